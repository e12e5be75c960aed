"""What leaves the house with a result: its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dojo.checkpoint import write_file

_SHOWN = (
    "rank",
    "lora_alpha",
    "lora_layers",
    "learning_rate",
    "train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler",
    "mixed_precision",
    "resolution",
    "max_sequence_length",
    "flow_shift",
    "weighting_scheme",
    "seed",
)

_USE = """```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{folder}")
image = pipe("{prompt}").images[0]
```"""


def write_card(
    folder: Path,
    *,
    title: str,
    base_model: str,
    dataset: str,
    options: Mapping[str, Any],
    steps: int,
    tags: Sequence[str],
) -> None:
    """Writes the model card `README.md` in the hub's form, with the last validation pictures.

    The licence is left to the person who publishes: it follows from the base model's.
    """
    values = {
        name: value
        for group in options.values()
        if isinstance(group, dict)
        for name, value in group.items()
    }
    pictures = sorted((folder / "validation").glob(f"step-{steps}/*.png"))
    prompts = values.get("validation_prompt") or ["a photo"]
    base = _hub_name(base_model)
    # The hub's index accepts repository names only; a local folder is named in the text.
    header = ["---", *([f"base_model: {base}"] if base == base_model else [])]
    header += ["library_name: diffusers", "tags:", *[f"- {tag}" for tag in tags], "---", ""]
    gallery = [f"![{path.stem}]({path.relative_to(folder).as_posix()})" for path in pictures]
    rows = [f"| `{name}` | {json.dumps(values[name])} |" for name in _SHOWN if name in values]
    body = [
        f"# {title}",
        "",
        f"Trained with SD Dojo for {steps} steps from `{base}` on `{Path(dataset).name}`.",
        "",
        *gallery,
        "",
        "## Use",
        "",
        _USE.format(base=base, folder=folder.name, prompt=json.dumps(prompts[0])[1:-1]),
        "",
        "## Training",
        "",
        "| option | value |",
        "| --- | --- |",
        *rows,
        "",
        "All options and versions are in `args.json`, the curves in `metrics.jsonl`. The licence "
        "follows from that of the base model.",
        "",
    ]
    write_file(folder / "README.md", "\n".join([*header, *body]))


def _hub_name(name: str) -> str:
    """A hub id as it is; of a local path the last part only, a card names no private folders."""
    is_hub_id = name.count("/") == 1 and not Path(name).exists()
    return name if is_hub_id else Path(name).name
