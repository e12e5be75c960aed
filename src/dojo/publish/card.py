"""The model card `README.md`: what a result is, how it is loaded, what its base's licence is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dojo.cli.masking import hide
from dojo.files.records import read_pictures, read_table
from dojo.publish import markdown
from dojo.run.checkpoint import write_file

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name for a LoRA
DEFAULT_TEXT_TOKENS = 256  # what a StableDiffusion3Pipeline pads T5 to when it is not told

_STABILITY = {"license": "other", "license_name": "stabilityai-ai-community"}
# As the base models' own cards state them; of any other base nothing is claimed.
_LICENCES = {
    "stabilityai/stable-diffusion-3.5-medium": _STABILITY,
    "stabilityai/stable-diffusion-3.5-large": _STABILITY,
    "stabilityai/stable-diffusion-3.5-large-turbo": _STABILITY,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"license": "creativeml-openrail-m"},
}
_MIRRORS = ("AI-ModelScope", "runwayml")  # owners whose copies are those same models
_LOCAL_ROOTS = ("models", "datas", "outputs", ".", "..", "~", "")

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


def write_card(
    folder: Path,
    *,
    title: str,
    base_model: str,
    dataset: str,
    options: Mapping[str, Any],
    steps: int,
    tags: Sequence[str],
    weights: str = WEIGHTS,
    instance_prompt: str | None = None,
    repo_id: str | None = None,
) -> None:
    """Writes the model card `README.md` in the hubs' form, with the last validation pictures.

    Args:
        folder: where the result lies; its `scheduler/` and `validation/` are looked at.
        base_model: hub id or folder of the model that was trained; "" when it is not known.
        dataset: hub id or folder of the data; "" is left out.
        options: the script's options by group, as `run.folders.options` gives them.
        steps: optimizer steps; 0 when nothing is known of the training.
        weights: file of a LoRA, "" for a whole pipeline, "transformer" or "unet" for that part
            of one alone.
        instance_prompt: the words that call up the subject; unset: the option of that name.
        repo_id: the repository that the card is for; unset: the folder's name, to be replaced.
    """
    values = {
        name: hide(value) if isinstance(value, str) else value  # of an older run's record
        for group in options.values()
        if isinstance(group, dict)
        for name, value in group.items()
    }
    trigger = instance_prompt or values.get("instance_prompt") or ""
    prompts = [str(prompt) for prompt in values.get("validation_prompt") or ()]
    drawn = _drawn(folder)
    gallery = [
        (drawn.get(path.name) or _prompt_of(path, prompts), path.relative_to(folder).as_posix())
        for path in last_pictures(folder)
    ]
    base = _base(base_model)
    is_lora = weights.endswith(".safetensors")

    header: dict[str, Any] = {}
    if _is_hub_id(base):  # the hub's index accepts nothing else
        header |= {"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"}
    header |= {"library_name": "diffusers", **_licence(base), "pipeline_tag": "text-to-image"}
    if _is_hub_id(dataset):
        header["datasets"] = [dataset]
    header["tags"] = list(dict.fromkeys([*tags, "diffusers"]))
    if trigger:
        header["instance_prompt"] = trigger
    if gallery:
        header["widget"] = [
            {"text": prompt or trigger or " ", "output": {"url": url}} for prompt, url in gallery
        ]

    made_of = f" from {markdown.code(base)}" if base else ""
    data = dataset if _is_hub_id(dataset) else Path(dataset).name
    trained_on = f" on {markdown.code(data)}" if data else ""
    rows = [
        f"| `{name}` | {markdown.plain(json.dumps(values[name], ensure_ascii=False))} |"
        for name in _SHOWN
        if values.get(name) is not None
    ]
    body = [f"# {markdown.plain(title)}", ""]
    if steps:
        body += [f"Trained with SD Dojo for {steps} steps{made_of}{trained_on}.", ""]
    if gallery:
        body += [markdown.picture(prompt, url) for prompt, url in gallery] + [""]
    if trigger:
        body += ["## Trigger words", "", f"Use {markdown.code(trigger)} in the prompt.", ""]
    prompt = (prompts or [*drawn.values(), trigger or "a photo"])[0]
    body += ["## Use", "", _usage(folder, base, weights, prompt, values, repo_id), ""]
    if rows:
        body += ["## Training", "", "| option | value |", "| --- | --- |", *rows, ""]
        body += ["All options and versions are in `args.json`, the curves in `metrics.jsonl`.", ""]
    body += ["## Licence", "", _licence_text(base), ""]
    text = yaml.safe_dump(header, allow_unicode=True, sort_keys=False, width=1000)
    write_file(folder / "README.md", "\n".join(["---", text.rstrip(), "---", "", *body]))


def last_pictures(folder: Path) -> list[Path]:
    """The validation pictures of the last step that has any, in order."""
    steps = [path for path in folder.glob("validation/step-*") if path.name[5:].isdigit()]
    for path in sorted(steps, key=lambda path: int(path.name[5:]), reverse=True):
        if pictures := sorted(path.glob("[!.]*.png")):
            return pictures
    return []


def _drawn(folder: Path) -> dict[str, str]:
    """The prompt of each validation picture by its file name, as the run recorded them."""
    rows = read_pictures(folder / "validation")
    return {row["file"]: row["prompt"] for row in rows if isinstance(row.get("prompt"), str)}


def _prompt_of(picture: Path, prompts: Sequence[str]) -> str:
    """The prompt of `<index>-<words>-seed<n>.png`; the words when the index says nothing."""
    index, _, rest = picture.stem.partition("-")
    if index.isdigit() and int(index) < len(prompts):
        return prompts[int(index)]
    return re.sub(r"-seed\d+$", "", rest).replace("_", " ")


def _usage(
    folder: Path,
    base: str,
    weights: str,
    prompt: str,
    values: Mapping[str, Any],
    repo_id: str | None,
) -> str:
    """Python that loads the result in diffusers and draws a picture as in training."""
    scheduler = read_table(folder / "scheduler" / "scheduler_config.json")
    if weights == "":  # a pipeline brings its scheduler along
        scheduler_class = part_class = None
    else:
        scheduler_class = scheduler.get("_class_name")
        part_class = read_table(folder / weights / "config.json").get("_class_name")
    names = sorted(filter(None, ["DiffusionPipeline", scheduler_class, part_class]))
    place = repo_id or folder.resolve().name
    comment = "" if repo_id else "  # this folder, or its repository"
    lines = [
        "import torch",
        f"from diffusers import {', '.join(names)}",
        "",
        f"result = {_quoted(place)}{comment}",
    ]
    precise = "torch_dtype=torch.bfloat16"
    base_text = _quoted(base or "the base model")
    if weights == "":
        lines += [f"pipe = DiffusionPipeline.from_pretrained(result, {precise})"]
    elif weights.endswith(".safetensors"):
        lines += [
            f"pipe = DiffusionPipeline.from_pretrained({base_text}, {precise})",
            f"pipe.load_lora_weights(result, weight_name={_quoted(weights)})",
        ]
    else:
        lines += [
            f"{weights} = {part_class}.from_pretrained(",
            f"    result, subfolder={_quoted(weights)}, {precise}",
            ")",
            "pipe = DiffusionPipeline.from_pretrained(",
            f"    {base_text}, {weights}={weights}, {precise}",
            ")",
        ]
    if scheduler_class:
        if "shift" in scheduler:
            lines += [f"# It was trained with shift {scheduler['shift']:.4g}."]
        load = f'{scheduler_class}.from_pretrained(result, subfolder="scheduler")'
        lines += [f"pipe.scheduler = {load}"]
    arguments = [_quoted(prompt)]
    for argument, option, usual in (
        ("num_inference_steps", "validation_inference_steps", None),
        ("guidance_scale", "validation_guidance_scale", None),
        ("max_sequence_length", "max_sequence_length", DEFAULT_TEXT_TOKENS),
    ):
        if values.get(option) not in (None, usual):
            arguments.append(f"{argument}={values[option]}")
    call = [f"image = pipe({', '.join(arguments)}).images[0]"]
    if len(call[0]) > 88:
        call = ["image = pipe(", *[f"    {argument}," for argument in arguments], ").images[0]"]
    lines += ['pipe.to("cuda")', *call, 'image.save("image.png")']
    return markdown.block(lines, "python")


def _base(name: str) -> str:
    """The base model's name: a hub id where one is known, else a path's last part.

    A card names no private folders; a download of a known base counts as that base.
    """
    owner, _, last = name.rstrip("/").rpartition("/")
    if _is_hub_id(name) and owner not in _MIRRORS:
        return name
    known = {hub_id.split("/")[1]: hub_id for hub_id in _LICENCES}
    return known.get(last, name if _is_hub_id(name) else last)


def _is_hub_id(name: str) -> bool:
    """Whether a name is `owner/name` on a hub and not a path here."""
    if name.count("/") != 1 or name.split("/")[0] in _LOCAL_ROOTS or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _licence(base: str) -> dict[str, str]:
    found = dict(_LICENCES.get(base, {}))
    if "license_name" in found:
        found["license_link"] = f"https://huggingface.co/{base}/blob/main/LICENSE.md"
    return found


def _licence_text(base: str) -> str:
    found = _licence(base)
    if "license_link" in found:
        terms = f"the [Stability AI Community License]({found['license_link']})"
        return f"The base model, and with it this result, is under {terms}."
    if found:
        return "The base model, and with it this result, is under CreativeML Open RAIL-M."
    return "The licence follows from that of the base model."


def _quoted(text: str) -> str:
    """A Python string literal that keeps every script readable."""
    return json.dumps(text, ensure_ascii=False)
