"""The model card `README.md`: what a result is, how it is loaded, what its base's licence is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dojo.cli.masking import hide
from dojo.files import tensors
from dojo.files.records import read_pictures, read_table
from dojo.publish import learned, markdown
from dojo.publish.learned import EMBEDDINGS
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

_METHODS = {"loha": "LoHa", "lokr": "LoKr"}  # LyCORIS' names in a file's header
_OF_LORA = ("rank", "lora_alpha", "lora_layers")  # a LoHa or LoKr stays as it was started from
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

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
    pipeline: str | None = None,
    opens: bool = True,
) -> None:
    """Writes the model card `README.md` in the hubs' form, with the last validation pictures.

    Args:
        folder: where the result lies; its `scheduler/` and `validation/` are looked at.
        base_model: hub id or folder of the model that was trained; "" when it is not known.
        dataset: hub id or folder of the data; "" is left out.
        options: the script's options by group, as `run.folders.options` gives them; `run_name` is
            the title instead.
        steps: optimizer steps; 0 when nothing is known of the training.
        weights: file of a LoRA, "" for a whole pipeline, "transformer" or "unet" for that part
            of one alone, "embeddings" for new words alone.
        instance_prompt: the words that call up the subject; unset: the option of that name.
        repo_id: the repository that the card is for; unset: the folder's name, to be replaced.
        pipeline: diffusers' class of the base model, which has to be named where it is one file.
        opens: whether diffusers opens the base as it is laid out.
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
    adapts = is_lora or weights == EMBEDDINGS
    method = _method(folder / weights) if is_lora else None
    if method:
        title = title.replace("LoRA", method)
        tags = [*tags, "lycoris", method.lower()]

    title = values.get("run_name") or title
    header: dict[str, Any] = {}
    if _is_hub_id(base):  # the hub's index accepts nothing else
        header |= {"base_model": base, "base_model_relation": "adapter" if adapts else "finetune"}
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
        if values.get(name) is not None and not (method and name in _OF_LORA)
    ]
    body = [f"# {markdown.plain(title)}", ""]
    if steps:
        body += [f"Trained with SD Dojo for {steps} steps{made_of}{trained_on}.", ""]
    if gallery:
        body += [markdown.picture(prompt, url) for prompt, url in gallery] + [""]
    if trigger:
        body += ["## Trigger words", "", f"Use {markdown.code(trigger)} in the prompt.", ""]
    prompt = (prompts or [*drawn.values(), trigger or "a photo"])[0]
    if opens:
        usage = _usage(folder, base, weights, prompt, values, repo_id, pipeline, method)
    else:
        place = repo_id or folder.resolve().name
        usage = _by_demo(place, base, prompt, values.get("tencent_weights"))
    body += ["## Use", "", usage, ""]
    if words := learned.told(folder, pipeline):
        body += [words, ""]
    if quantised := _quantised(values):
        body += [quantised, ""]
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


def _method(path: Path) -> str | None:
    """LoHa or LoKr, of a file that LyCORIS' readers alone take; None of a LoRA."""
    with suppress(OSError, ValueError):
        header = tensors.read_header(path)[1]
        algorithm = json.loads(header.get("ss_network_args", "{}")).get("algo")
        if header.get("ss_network_module", "").startswith("lycoris"):
            return _METHODS.get(algorithm)
    return None


def _usage(
    folder: Path,
    base: str,
    weights: str,
    prompt: str,
    values: Mapping[str, Any],
    repo_id: str | None,
    pipeline: str | None,
    method: str | None,
) -> str:
    """Python that loads the result in diffusers and draws a picture as in training.

    Args:
        pipeline: diffusers' class of the base, where it is known.
        method: LoHa or LoKr, which diffusers does not load.
    """
    scheduler = read_table(folder / "scheduler" / "scheduler_config.json")
    if weights == "":  # a pipeline brings its scheduler along
        scheduler_class = part_class = None
    else:
        scheduler_class = scheduler.get("_class_name")
        part_class = read_table(folder / weights / "config.json").get("_class_name")
    one_file = weights != "" and base.endswith(_SINGLE_FILES) and pipeline is not None
    kind = str(pipeline) if one_file else "DiffusionPipeline"
    names = sorted(filter(None, [kind, scheduler_class, part_class]))
    plain = not weights.endswith(".safetensors") or not _needs_help(folder / weights)
    if not plain:
        names = sorted([*names, "HunyuanDiT2DModel"])
    place = repo_id or folder.resolve().name
    comment = "" if repo_id else "  # this folder, or its repository"
    lines = [
        "import torch",
        f"from diffusers import {', '.join(names)}",
        *([] if plain else ["from diffusers.loaders import PeftAdapterMixin"]),
        "",
        *([] if method and not scheduler_class else [f"result = {_quoted(place)}{comment}"]),
    ]
    precise = "torch_dtype=torch.bfloat16"
    variant = values.get("variant")  # of the base's files, such as fp16
    of_base = precise + (f", variant={_quoted(str(variant))}" if variant else "")
    opening = "from_single_file" if one_file else "from_pretrained"
    merged = "merged.safetensors" if one_file else "merged"
    before = _merging(place, base, merged, method) if method else []
    base_text = _quoted(merged if method else base or "the base model")
    if weights == "":
        lines += [f"pipe = DiffusionPipeline.from_pretrained(result, {precise})"]
    elif weights.endswith(".safetensors") or weights == EMBEDDINGS:
        if plain:
            lines += [f"pipe = {kind}.{opening}({base_text}, {of_base})"]
        else:
            lines += _with_adapters(base_text, of_base, weights)
        if plain and not method and weights != EMBEDDINGS:
            lines += [f"pipe.load_lora_weights(result, weight_name={_quoted(weights)})"]
        lines += learned.loading(folder, pipeline)
    else:
        lines += [
            f"{weights} = {part_class}.from_pretrained(",
            f"    result, subfolder={_quoted(weights)}, {precise}",
            ")",
            f"pipe = {kind}.{opening}(",
            f"    {base_text}, {weights}={weights}, {of_base}",
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
    if not plain:
        arguments += _as_trained(values)
    call = [f"image = pipe({', '.join(arguments)}).images[0]"]
    if len(call[0]) > 88:
        call = ["image = pipe(", *[f"    {argument}," for argument in arguments], ").images[0]"]
    lines += ['pipe.to("cuda")', *call, 'image.save("image.png")']
    return "\n".join([*before, markdown.block(lines, "python")])


def _by_demo(place: str, base: str, prompt: str, network: str | None) -> str:
    """What draws with an adapter over a base in its authors' layout.

    Args:
        network: which of several networks of the base was trained on, where that was chosen.
    """
    words = ["python", "demo.py", "--pretrained_model_name_or_path", base]
    words += ["--tencent_weights", network] if network not in (None, "auto") else []
    words += ["--lora_weights_path", place, "--prompt", prompt]
    return (
        "It was trained on files in the layout of the model's authors, which diffusers does not "
        f"open. SD Dojo draws with both:\n\n{markdown.block([shlex.join(words)], 'bash')}"
    )


def _needs_help(path: Path) -> bool:
    """Whether a LoRA is for a HunyuanDiT, whose class in diffusers can have no adapters."""
    with suppress(OSError, ValueError):
        return any(name.startswith("transformer.blocks.") for name in tensors.read_header(path)[0])
    return False


def _with_adapters(base: str, of_base: str, weights: str) -> list[str]:
    """Python that loads a LoRA into a HunyuanDiT of diffusers."""
    return [
        "class WithAdapters(HunyuanDiT2DModel, PeftAdapterMixin):",
        '    """diffusers\' own class loads no LoRA."""',
        "",
        "",
        "transformer = WithAdapters.from_pretrained(",
        f'    {base}, subfolder="transformer", {of_base}',
        ")",
        f"transformer.load_lora_adapter(result, weight_name={_quoted(weights)})",
        f"pipe = DiffusionPipeline.from_pretrained({base}, transformer=transformer, {of_base})",
    ]


def _as_trained(values: Mapping[str, Any]) -> list[str]:
    """The size that was trained; the pipeline would draw the nearest of ten."""
    sizes = values.get("resolution") or ()
    names = ("height", "width")
    given = [values.get(name) or next(iter(sizes), None) for name in names]
    told = [f"{name}={size}" for name, size in zip(names, given, strict=True) if size]
    return [*told, "use_resolution_binning=False"]


def _merging(place: str, base: str, merged: str, method: str) -> list[str]:
    """What to do before diffusers can load a LoHa or LoKr."""
    words = ["python", "-m", "dojo.lora", "merge", "--input", place]
    words += ["--base", base or "BASE", "--output", merged]
    return [
        f"It is a {method} in LyCORIS' format: ComfyUI, kohya's scripts and SD Dojo's `demo.py` "
        "read it, diffusers alone does not. Merged into its base it is a model that diffusers "
        "loads:",
        "",
        markdown.block([shlex.join(words)], "bash"),
        "",
    ]


def _quantised(values: Mapping[str, Any]) -> str:
    """What base an adapter was trained on, where its weights were rounded."""
    precision = values.get("base_precision")
    if values.get("finetune") == "full" or precision in (None, "bf16"):
        return ""
    return (
        f"The adapter was trained on the base with the linear layers of its blocks quantised to "
        f"{precision}, which is also the model that validation pictures and any comparison with "
        "the model before training show. It loads on the base in any precision; on another one "
        "its pictures differ a little."
    )


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
