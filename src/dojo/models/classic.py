"""CLIP's tensors under the names that every reader knows.

Since transformers 5.6, `CLIPTextModel` is written without the `text_model.` that its names began
with for years, and so are the networks in which a CLIP is a part. Later versions read both
spellings; earlier ones, ComfyUI and kohya's scripts know the old one only, and transformers before
5.6 goes on with noise in its place. So the old one is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dojo.files import tensors
from dojo.lazy import safetensors_torch

ValueT = TypeVar("ValueT")

# Class of a config.json: what names begin with that lack something, and what they should.
_TEXT = (re.compile(r"^(?=(embeddings|encoder|final_layer_norm)\.)"), "text_model.")
_PREFIXES = {
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": _TEXT,
    "StableDiffusionSafetyChecker": (
        re.compile(r"^vision_model\.(?!vision_model\.)"),
        "vision_model.vision_model.",
    ),
}


def rename(state: Mapping[str, ValueT], kind: str = "CLIPTextModel") -> dict[str, ValueT]:
    """A network's tensors, or whatever stands under their names, with the old names.

    Args:
        kind: the network's class; one in which no name has changed comes back as it is.
    """
    pattern, prefix = _PREFIXES.get(kind, (re.compile(r"(?!)"), ""))
    return {pattern.sub(prefix, name): value for name, value in state.items()}


def rewrite(folder: Path) -> None:
    """Gives the tensors of a model's folder their old names; the rest of it stays as it is."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = (config.get("architectures") or [""])[0]
    for path in sorted(folder.glob("*.safetensors")):
        header, metadata = tensors.read_header(path)
        if rename(header, kind).keys() != header.keys():
            tensors.save(path, rename(safetensors_torch.load_file(path), kind), metadata)
    for path in sorted(folder.glob("*.index*.json")):
        listed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        renamed = rename(listed["weight_map"], kind)
        if renamed.keys() != listed["weight_map"].keys():
            path.write_text(json.dumps({**listed, "weight_map": renamed}, indent=2) + "\n")
