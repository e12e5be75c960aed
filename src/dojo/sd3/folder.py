"""A result folder's frozen parts: copied from the base model so that plain diffusers loads them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from dojo.sd3.config import TEXT_ENCODERS, Config, ModelArgs
from dojo.sd3.models import load_part, load_text_pipeline
from dojo.sd3.single_file import load_encoder

_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_ANY_WEIGHTS = re.compile(r".*\.(safetensors|bin|msgpack|h5|onnx|pth|pt|index(\..+)?\.json)")


def copy_parts(config: Config, args: ModelArgs, folder: Path, parts: Sequence[str]) -> None:
    """Fills a result folder with frozen parts of the base model and with model_index.json.

    Afterwards `StableDiffusion3Pipeline.from_pretrained(folder)`, once the parts not named here
    (transformer, scheduler) are there, gives float32 models with the base's weights: files of a
    `--variant` lose its name, and text encoders say float32 in their configurations, where
    transformers would else take half precision from. A T5 that the base model does not have is
    null in model_index.json; diffusers then wants `text_encoder_3=None` in that call.

    Args:
        parts: sub-folders such as `vae`, `text_encoder` and `tokenizer`.
    """
    index = json.loads((config.folder / "model_index.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        source, target = config.folder / part, folder / part
        shutil.rmtree(target, ignore_errors=True)
        if config.checkpoint is not None and part in config.checkpoint:
            _load_from_file(config, args, part).save_pretrained(target)
        elif not part.startswith(("text_encoder", "vae")):
            if source.is_dir():
                shutil.copytree(source, target)
        elif index.get(part, [None])[0] is None:
            continue
        elif not _copy_weights(source, target, args.variant):
            loaded = _load_from_folder(config, args, part)
            if loaded is not None:
                loaded.save_pretrained(target)
        if part in TEXT_ENCODERS and target.is_dir():
            path = target / "config.json"
            settings = json.loads(path.read_text())
            settings.pop("torch_dtype", None)
            path.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")
        if not target.is_dir():
            index[part] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy_weights(source: Path, target: Path, variant: str | None) -> bool:
    """Copies a model's folder with one set of safetensors; False if it has none."""
    infix = f".{variant}" if variant else ""
    files = {path.name: path for path in source.glob("*") if path.is_file()}
    renamed = {name.replace(infix, ""): name for name in files if infix and infix in name}
    chosen = {name: old for name, old in renamed.items() if _WEIGHTS.fullmatch(name)}
    if not chosen:
        chosen = {name: name for name in files if _WEIGHTS.fullmatch(name)}
    if not any(name.endswith(".safetensors") for name in chosen):
        return False
    chosen |= {name: name for name in files if not _ANY_WEIGHTS.fullmatch(name)}
    target.mkdir(parents=True)
    for name, old in chosen.items():
        if name.endswith(".index.json"):
            listed = json.loads(files[old].read_text())
            listed["weight_map"] = {
                tensor: file.replace(infix, "") for tensor, file in listed["weight_map"].items()
            }
            (target / name).write_text(json.dumps(listed, indent=2) + "\n")
        else:
            shutil.copyfile(files[old], target / name)
    return True


def _load_from_file(config: Config, args: ModelArgs, part: str) -> Any:
    assert config.checkpoint is not None
    dtype = config.checkpoint.dtype(part)
    if part in TEXT_ENCODERS:
        # In half precision transformers keeps some of T5 in float32, which the file is not.
        return load_encoder(config.checkpoint, part, config.folder, dtype).to(dtype)
    return load_part(AutoencoderKL, part, config, args, dtype)


def _load_from_folder(config: Config, args: ModelArgs, part: str) -> Any:
    """A model that is not stored as safetensors."""
    if part == "vae":
        return load_part(AutoencoderKL, part, config, args, torch.float32)
    return getattr(load_text_pipeline(config, args, torch.float32), part)
