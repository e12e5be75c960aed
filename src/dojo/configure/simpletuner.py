"""SimpleTuner's config.json and multidatabackend.json as options of ours.

What has no counterpart is named, one line each, and so is what means something else here: nothing
is dropped in silence. The names are those of its documentation (documentation/OPTIONS.md and
DATALOADER.md at bc8e6ab, 2026), with or without dashes in front.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dojo import cli
from dojo.cli import UserError, foreign, scripts
from dojo.configure.recipe import Options, to_words

Table = Mapping[str, Any]

# Its families, as our scripts end.
_ENDINGS = {"sd1x": "sd15", "sdxl": "sdxl", "sd3": "sd3", "kolors": "kolors"}
# What says nothing about the training, or what is so here in any case.
_SILENT = {
    *("model_family", "model_type", "data_backend_config", "lora_type", "user_prompt_library"),
    *("resolution_type", "aspect_bucket_rounding", "aspect_bucket_alignment"),
}
_NEEDLESS = {
    "disable_benchmark": "the base is drawn before the first step in any case",
    "validation_seed_source": "seeds are the same wherever they are drawn",
    "quantize_via": "weights are quantised as they are loaded",
    "vae_batch_size": "pictures of a kind are encoded together",
    "metadata_update_interval": "pictures are read once, before the first step",
    "minimum_image_size": "max_upscale leaves out what would be enlarged",
    "disable_bucket_pruning": "no sample is dropped",
    "ignore_final_epochs": "a run ends at its last step",
    "write_batch_size": "caches are written as they are made",
}
_OPTIMIZERS = {
    "adamw_bf16": ("adamw", "bfloat16 weights there; here they are float32, and adapters always"),
    "adamw_schedulefree": ("schedulefree", ""),
    "optimi-adamw": ("adamw", "Kahan summation there; here the weights are float32"),
    "optimi-lion": ("lion", ""),
    "optimi-stableadamw": ("stableadamw", ""),
    "optimi-stableadam": ("stableadamw", ""),
    "bnb-adamw": ("adamw", ""),
    "bnb-adamw8bit": ("adamw8bit", ""),
    "bnb-adamw8bit-paged": ("paged_adamw8bit", ""),
    "bnb-lion8bit": ("lion8bit", ""),
    "bnb-lion8bit-paged": ("paged_lion8bit", ""),
    "bnb-lion": ("lion", ""),
    "ao-adamw8bit": ("adamw8bit", "of another library"),
    "prodigy": ("prodigy", ""),
}
_PRECISIONS = {
    "no_change": "bf16",
    "int8-quanto": "int8",
    "int8-torchao": "int8",
    "fp8-quanto": "fp8",
    "fp8uz-quanto": "fp8",
    "fp8-torchao": "fp8",
    "nf4-bnb": "nf4",
}


@dataclass
class Translation:
    """What was translated, and what there is to say about it."""

    options: Options = field(default_factory=Options)
    left: list[str] = field(default_factory=list[str])
    """keys without a counterpart, with what is known about them"""
    otherwise: list[str] = field(default_factory=list[str])
    """keys whose counterpart is not the same thing"""
    off: list[str] = field(default_factory=list[str])
    """keys without a counterpart that switch something off"""

    def told(self) -> list[str]:
        """All of it for the screen."""
        lines: list[str] = []
        for title, found in (
            ("no counterpart, left out:", self.left),
            ("not quite the same:", self.otherwise),
            ("no counterpart, and off there:", [", ".join(self.off)] if self.off else []),
        ):
            lines += [title, *(f"  {one}" for one in found)] if found else []
        return lines or ["every key has a counterpart"]


def translate(path: Path, data_config: Path) -> tuple[str, Options, list[dict[str, Any]]]:
    """The script, its options and the entries of its data of a config.json; the rest is printed.

    Args:
        data_config: where the entries would be written, where there are several.
    Raises:
        UserError: a file cannot be read, or nothing here trains what it trains.
    """
    read = {name.removeprefix("--").replace("-", "_"): value for name, value in _read(path).items()}
    name = _script(path, read)
    module = scripts.load(scripts.ROOT / name)
    known = dict(cli.options(module.Args))
    made = Translation()
    _main(read, known, made)
    entries = _data(path, read, made)
    if len(entries) == 1 and not entries[0].keys() - _AS_FLAGS.keys():
        made.options |= {_AS_FLAGS[key]: value for key, value in entries[0].items()}
        entries = []
    elif entries:
        made.options["data_config"] = str(data_config)
    _settle(made, known)
    print("\n".join(made.told()))
    return name, made.options, entries


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _script(path: Path, read: Table) -> str:
    own, kind = str(read.get("model_family")), str(read.get("model_type", "lora"))
    ending = _ENDINGS.get(own)
    names = {"lora": "lora", "full": "full"}
    if ending is None or kind not in names:
        raise UserError(
            f"{path}: model_family {own}, model_type {kind}: there are {', '.join(_ENDINGS)}, lora "
            "or full"
        )
    if str(read.get("lora_type", "standard")) != "standard" and kind == "lora":
        raise UserError(f"{path}: lora_type {read['lora_type']}: adapters here are LoRA and DoRA")
    name = f"train_{names[kind]}_{ending}.py"
    if scripts.find(name) is None:
        raise UserError(f"{path}: there is no {name}")
    return name


# -- config.json ----------------------------------------------------------------------------------


def _main(read: Table, known: Table, made: Translation) -> None:
    for key, value in read.items():
        if key in _SILENT or key.startswith("flow_schedule") or value in ("", None):
            continue
        if key in _NEEDLESS:
            made.left.append(f"{key}: not needed, {_NEEDLESS[key]}")
        elif key in _SPECIAL:
            _SPECIAL[key](key, value, made)
        else:
            _plain(key, value, known, made)
    _shift(read, made)
    if isinstance(read.get("user_prompt_library"), str):
        made.options["validation_prompts_file"] = read["user_prompt_library"]


def _plain(key: str, value: Any, known: Table, made: Translation) -> None:
    """A key that has our name, or a table's."""
    ours = foreign.RENAMED.get(key, key)
    if ours in known:
        made.options[ours] = _value(value, known[ours])
    elif _off(value):
        made.off.append(key)
    else:
        answer = foreign.answer(key, known)
        made.left.append(f"{key} = {json.dumps(value)}" + (f": {answer}" if answer else ""))


def _value(value: Any, hint: Any) -> Any:
    if hint is bool:
        return str(value).lower() == "true"
    return [str(one) for one in value] if isinstance(value, list) else str(value)


def _off(value: Any) -> bool:
    return str(value).lower() in ("false", "0", "0.0", "none", "[]")


def _optimizer(key: str, value: Any, made: Translation) -> None:
    ours, remark = _OPTIMIZERS.get(str(value), ("", ""))
    if not ours:
        made.left.append(f"{key} = {value}: there is no such optimizer; adamw is taken")
        return
    made.options["optimizer"] = ours
    if remark:
        made.otherwise.append(f"{key} {value}: {remark}")


def _precision(key: str, value: Any, made: Translation) -> None:
    ours = _PRECISIONS.get(str(value))
    if ours is None:
        made.left.append(f"{key} = {value}: --base_precision int8 and nf4 come nearest")
    elif ours != "bf16":
        made.options["base_precision"] = ours
        made.otherwise.append(f"{key} {value}: --base_precision {ours}, by another library")


def _scheduler(key: str, value: Any, made: Translation) -> None:
    made.options["lr_scheduler"] = str(value)
    if value == "sine":
        del made.options["lr_scheduler"]
        made.left.append(f"{key} = sine: there is no such schedule")


def _size(key: str, value: Any, made: Translation) -> None:
    made.options["resolution"] = str(_pixels(float(value)))


def _pixels(value: float) -> int:
    """A side in pixels; a number below 16 is megapixels."""
    return int(value) if value >= 16 else round((value * 1e6) ** 0.5 / 64) * 64


def _validation_size(key: str, value: Any, made: Translation) -> None:
    sizes = [one.strip() for one in str(value).split(",")]
    # Width first there, and a number alone is a square.
    made.options["validation_resolution"] = [
        one if "x" in one else f"{int(float(one))}x{int(float(one))}" for one in sizes
    ]


def _epochs(key: str, value: Any, made: Translation) -> None:
    if int(value):
        made.options[key] = str(value)


def _uncond(key: str, value: Any, made: Translation) -> None:
    ours = {"zero": "zeros"}.get(str(value), str(value))
    if made.options.setdefault("uncond", ours) != ours:
        made.otherwise.append(
            f"{key} {value}: --uncond {made.options['uncond']} is for all encoders"
        )


def _skip_layers(key: str, value: Any, made: Translation) -> None:
    made.options["validation_skip_guidance_layers"] = [str(one) for one in value]


def _renamed(ours: str, remark: str = "") -> Callable[[str, Any, Translation], None]:
    def take(key: str, value: Any, made: Translation) -> None:
        made.options[ours] = str(value)
        if remark:
            made.otherwise.append(f"{key} {value}: {remark}")

    return take


def _library(key: str, value: Any, made: Translation) -> None:
    if isinstance(value, str) and value.endswith(".json"):
        made.options["validation_prompts_file"] = value
    elif not _off(value):
        made.left.append(f"{key} = {value}: its own list; --validation_prompts_file takes yours")


def _negative(key: str, value: Any, made: Translation) -> None:
    made.options["validation_negative_prompt"] = str(value)


_SPECIAL: Mapping[str, Callable[[str, Any, Translation], None]] = {
    "optimizer": _optimizer,
    "base_model_precision": _precision,
    "lr_scheduler": _scheduler,
    "resolution": _size,
    "validation_resolution": _validation_size,
    "num_train_epochs": _epochs,
    "max_train_steps": _epochs,
    "sd3_clip_uncond_behaviour": _uncond,
    "sd3_t5_uncond_behaviour": _uncond,
    "validation_guidance_skip_layers": _skip_layers,
    "validation_guidance_skip_layers_start": _renamed("validation_skip_layer_guidance_start"),
    "validation_guidance_skip_layers_stop": _renamed("validation_skip_layer_guidance_stop"),
    "validation_guidance_skip_scale": _renamed("validation_skip_layer_guidance_scale"),
    "validation_prompt_library": _library,
    "validation_negative_prompt": _negative,
    "grad_clip_method": lambda key, value, made: (
        None
        if value == "norm"
        else made.left.append(f"{key} = {value}: gradients are clipped by their norm")
    ),
}


def _shift(read: Table, made: Translation) -> None:
    """Automatic shift wins over a number; 0 is none."""
    if str(read.get("flow_schedule_auto_shift", "")).lower() == "true":
        made.options["flow_shift"] = "auto"
    elif read.get("flow_schedule_shift") not in (None, ""):
        shift = float(read["flow_schedule_shift"])
        made.options["flow_shift"] = str(shift or 1.0)


# -- multidatabackend.json ------------------------------------------------------------------------

_AS_FLAGS = {
    "path": "train_data_dir",
    "resolution": "resolution",
    "repeats": "repeats",
    "caption_strategy": "caption_strategy",
    "instance_prompt": "instance_prompt",
    "aspect_buckets": "aspect_buckets",
    "random_crop": "random_crop",
    "mask_dir": "mask_dir",
}
_STRATEGIES = {"textfile": "sidecar", "filename": "filename", "instanceprompt": "instance"}
# Where a backend's caches lie, and what it is called: here they have one place.
_CACHES = {
    *(
        "id",
        "type",
        "dataset_type",
        "dataset_name",
        "cache_dir_vae",
        "cache_dir",
        "text_embeds",
        "image_embeds",
    ),
    *("vae_cache_clear_each_epoch", "preserve_data_backend_cache", "skip_file_discovery"),
    *("metadata_backend", "disabled", "disable", "default", "write_batch_size", "probability"),
    *("resolution_type", "conditioning_data", "source_dataset_id", "only_instance_prompt"),
    *("crop", "crop_style", "crop_aspect", "instance_data_dir", "caption_strategy", "resolution"),
    *(
        "repeats",
        "instance_prompt",
        "is_regularisation_data",
        "is_regularization_data",
        "ignore_epochs",
    ),
}


def _data(path: Path, read: Table, made: Translation) -> list[dict[str, Any]]:
    if not read.get("data_backend_config"):
        raise UserError(f"{path}: there is no data_backend_config, which names the data")
    place = _found(path, str(read["data_backend_config"]))
    backends = _read(place)
    if not isinstance(backends, list):
        raise UserError(f"{place}: a list of data backends is expected")
    masks = {
        one.get("source_dataset_id"): one.get("instance_data_dir")
        for one in backends
        if one.get("conditioning_type") == "mask"
    }
    masks |= {
        one.get("id"): one.get("instance_data_dir")
        for one in backends
        if one.get("conditioning_type") == "mask"
    }
    entries: list[dict[str, Any]] = []
    for one in backends:
        entries += _backend(one, read, masks, made)
    if not entries:
        raise UserError(f"{place}: no backend holds pictures in a folder or on the hub")
    return entries


def _found(path: Path, name: str) -> Path:
    """A file that is named from its working folder, or from beside the configuration."""
    tried = [Path(name), path.parent / name, path.parent / Path(name).name]
    for one in [*tried, *(parent / name for parent in path.resolve().parents)]:
        if one.is_file():
            return one
    raise UserError(f"{path}: data_backend_config {name} is not there")


def _backend(one: Table, read: Table, masks: Table, made: Translation) -> list[dict[str, Any]]:
    """The entry of a backend; none where it holds no pictures."""
    called = f"data backend {one.get('id', '?')}"
    kind = one.get("dataset_type", "image")
    if kind in ("text_embeds", "image_embeds") or one.get("conditioning_type") == "mask":
        return []
    if str(one.get("disabled", one.get("disable", False))).lower() == "true":
        made.left.append(f"{called}: disabled there")
        return []
    if kind != "image" or one.get("type", "local") not in ("local", "huggingface"):
        made.left.append(
            f"{called}: {kind} of type {one.get('type')}: not read; for buckets and "
            "shards see docs/data.md"
        )
        return []
    local = one.get("instance_data_dir")
    # A file beside another folder would look from there.
    path = str(Path(str(local)).absolute()) if local else one.get("dataset_name")
    entry: dict[str, Any] = {"path": path}
    if not entry["path"]:
        made.left.append(f"{called}: it names no folder")
        return []
    entry |= _use(one, read, called, made)
    mask = masks.get(str(one.get("id"))) or masks.get(str(one.get("conditioning_data")))
    if mask:
        entry["mask_dir"] = str(Path(str(mask)).absolute())
    for key, value in one.items():
        if key not in _CACHES and not _off(value):
            made.left.append(f"{called}: {key} = {json.dumps(value)}")
    return [entry]


def _use(one: Table, read: Table, called: str, made: Translation) -> dict[str, Any]:
    """How the pictures of a backend are used."""
    entry: dict[str, Any] = {}
    strategy = str(one.get("caption_strategy", read.get("caption_strategy", "filename")))
    prompt = one.get("instance_prompt")
    if str(one.get("only_instance_prompt", "")).lower() == "true":
        strategy = "instanceprompt"
    if strategy == "instanceprompt" and prompt:
        entry["instance_prompt"] = str(prompt)
    elif strategy in _STRATEGIES:
        entry["caption_strategy"] = _STRATEGIES[strategy]
    elif strategy != "huggingface":
        made.left.append(
            f"{called}: caption_strategy = {strategy}: a column is found by its name "
            "(caption_column)"
        )
    # One more there than it says: 0 means each picture once.
    entry["repeats"] = int(one.get("repeats", 0)) + 1
    if (size := one.get("resolution", read.get("resolution"))) is not None:
        entry["resolution"] = _pixels(float(size))
    cropped = str(one.get("crop", True)).lower() != "false"
    square = cropped and one.get("crop_aspect", "square") == "square"
    if not square:
        entry["aspect_buckets"] = True
    if cropped and one.get("crop_style") == "random":
        entry["random_crop"] = True
    elif cropped and one.get("crop_style") not in (None, "center", "centre"):
        made.left.append(f"{called}: crop_style = {one['crop_style']}: the centre is taken")
    if one.get("is_regularisation_data") or one.get("is_regularization_data"):
        entry["is_regularisation"] = True
        made.otherwise.append(
            f"{called}: is_regularisation_data: the pictures are learned from "
            "beside the others; there the base model's answer is"
        )
    if float(one.get("probability", 1)) != 1:
        made.left.append(
            f"{called}: probability = {one['probability']}: repeats and weight say how "
            "often and how much"
        )
    return entry


def _settle(made: Translation, known: Table) -> None:
    """Names what the script does not take, of all that was made."""
    for name in [one for one in made.options if one not in known]:
        made.left.append(f"{name} = {made.options.pop(name)}: this script has no such option")
    if made.options.get("lr_scheduler") == "constant" and int(
        made.options.get("lr_warmup_steps", 0)
    ):
        made.options["lr_scheduler"] = "constant_with_warmup"
    if not re.search("resume", " ".join(to_words(made.options))):
        made.otherwise.append("a run there goes on by itself: add --resume_from_checkpoint latest")
