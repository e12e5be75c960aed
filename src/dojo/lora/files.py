"""Adapters on disk: saved so that they say their alpha, loaded so that they are known to arrive."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dojo import outputs, tensors
from dojo.cli import UserError
from dojo.lora import formats
from dojo.lora.adapter import ADAPTER, LoraArgs, state
from dojo.lora.formats import METADATA, Format
from dojo.pipelines import UNET, part_of

WEIGHTS = "pytorch_lora_weights.safetensors"


def save(
    folder: Path,
    network: nn.Module,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> None:
    """Writes `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`.

    The adapters' configurations go into the file's header: without them diffusers would take
    alpha for the rank. Equal weights give equal bytes.
    """
    weights: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part, model in _models(network, text_encoder, text_encoder_2).items():
        weights |= {f"{part}.{name}": value for name, value in state(model).items()}
        for name, value in model.peft_config[ADAPTER].to_dict().items():  # pyright: ignore
            if name == "base_model_name_or_path":
                continue  # a path of this machine
            config[f"{part}.{name}"] = sorted(value) if isinstance(value, set) else value
    metadata = {METADATA: json.dumps(config, indent=2, sort_keys=True)}
    tensors.save(outputs.own(folder / WEIGHTS), weights, metadata)


def export(folder: Path, form: Format) -> Path:
    """Writes a saved adapter in another format beside diffusers' file and returns where.

    Raises:
        UserError: it has no form in that format (DoRA).
    """
    source = folder / WEIGHTS
    if form == "diffusers":
        return source
    target = source.with_name(f"{source.stem}_{form}.safetensors")
    formats.write(outputs.own(target), formats.read(source)[0], form)
    return target


def restore(
    folder: Path,
    network: nn.Module,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> None:
    """Puts a saved adapter's tensors back into models that have the same adapters.

    Raises:
        UserError: the file's tensors are not exactly those of the adapters.
    """
    models = _models(network, text_encoder, text_encoder_2)
    saved = load_file(folder / WEIGHTS)
    own = {
        f"{part}.{name}": value
        for part, model in models.items()
        for name, value in state(model).items()
    }
    wrong = sorted(
        name
        for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )
    if wrong:
        raise UserError(
            f"{folder / WEIGHTS} does not fit this adapter (other --rank, --lora_layers or "
            f"--train_text_encoder?): {', '.join(wrong[:4])}"
        )
    for part, model in models.items():
        mine = {n.removeprefix(f"{part}."): v for n, v in saved.items() if n.startswith(f"{part}.")}
        set_peft_model_state_dict(model, mine, adapter_name=ADAPTER)


def start_from(
    args: LoraArgs,
    network: nn.Module,
    text_encoder: nn.Module | None = None,
    text_encoder_2: nn.Module | None = None,
) -> None:
    """Makes fresh adapters compute what `--init_lora_weights_path` computes; unset does nothing.

    A file of smaller rank fills the first ranks; in the others B stays zero and A random, so
    that the update is the file's and every rank can learn. Layers that the file lacks stay fresh.
    Files for SD1 usually adapt convolutions and the text encoder too: these are left out, and it is
    said.

    Raises:
        UserError: the file has other layers than the adapters, or a larger rank.
    """
    if args.init_lora_weights_path is None:
        return
    flag = "--init_lora_weights_path"
    path = find(args.init_lora_weights_path, flag)
    models = _models(network, text_encoder, text_encoder_2)
    lora, unknown = formats.read(path)
    if UNET in models:
        lora = _of_unet(lora, unknown, models, f"{flag}: {path}")
    elif UNET in lora:
        raise UserError(f"{flag}: {path} is a LoRA for Stable Diffusion 1")
    elif unknown:
        raise UserError(f"{flag}: {path} has tensors that SD3 has no place for: {unknown[0]}")
    for part, layers in lora.items():
        if part not in models:
            raise UserError(
                f"{flag}: {path} adapts {part}, which is not trained here (--train_text_encoder)"
            )
        modules: dict[str, Any] = dict(models[part].named_modules())
        for name, factors in layers.items():
            module = modules.get(name)
            if not hasattr(module, "lora_A"):
                raise UserError(f"{flag}: {path} adapts {name}, which --lora_layers does not")
            _fill(module, factors, f"{path}: {name}")


def _models(
    network: nn.Module, text_encoder: nn.Module | None, text_encoder_2: nn.Module | None
) -> dict[str, nn.Module]:
    """The adapted models by their names in a pipeline and in a file."""
    models = {
        part_of(network): network,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    return {part: model for part, model in models.items() if model is not None}


def _of_unet(
    lora: formats.Lora, unknown: Sequence[str], models: Mapping[str, nn.Module], where: str
) -> formats.Lora:
    """The layers of a file that may be adapted in these models; says which others there are.

    Raises:
        UserError: none of them is in the UNet.
    """
    found: formats.Lora = {}
    left = list(unknown)
    for part, layers in lora.items():
        modules = dict(models[part].named_modules()) if part in models else {}
        for name, factors in layers.items():
            if name not in modules or isinstance(modules[name], nn.Conv2d):
                left.append(f"{part}.{name}")
            else:
                found.setdefault(part, {})[name] = factors
    if UNET not in found:
        raise UserError(f"{where} has no linear layer of this UNet")
    if left and os.environ.get("RANK", "0") == "0":
        print(f"{where}: {len(left)} layers are not trained here and left out, such as {left[0]}")
    return found


def _fill(module: Any, factors: formats.Factors, where: str) -> None:
    down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    if factors.rank > len(down):
        raise UserError(
            f"--rank {len(down)} is smaller than the rank {factors.rank} of "
            f"--init_lora_weights_path {where}"
        )
    if down.shape[1:] != factors.down.shape[1:] or len(up) != len(factors.up):
        raise UserError(f"--init_lora_weights_path: {where} has another size in this model")
    ratio = factors.scale / module.scaling[ADAPTER]
    with torch.no_grad():
        down[: factors.rank] = factors.down.to(down)
        up.zero_()
        up[:, : factors.rank] = factors.up.to(up) * ratio


def load(pipeline: Any, path: Path | str, name: str) -> int:
    """Loads a LoRA file, folder or hub id into a pipeline and returns how many tensors arrived.

    SD3 takes diffusers', kohya's and ComfyUI's format, other pipelines what diffusers knows. What
    found no place is said on the screen.

    Raises:
        UserError: the file is missing or unreadable, or not one of its tensors found a place:
            diffusers loads several public formats as a silent no-op.
    """
    flag = "--lora_weights_path"
    file = find(path, flag)
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            names = _names(file)
            start = min(names, default="")
            if isinstance(pipeline, StableDiffusion3Pipeline) and formats.detect(names) in (
                "kohya",
                "comfyui",
            ):
                adapters, lost = formats.read(file)
                file = Path(folder) / WEIGHTS
                formats.write(file, adapters, "diffusers")
                names = _names(file)
            level = diffusers_logging.get_verbosity()
            diffusers_logging.set_verbosity_error()  # it warns of each encoder without an adapter
            try:
                pipeline.load_lora_weights(str(file), adapter_name=name)
            finally:
                diffusers_logging.set_verbosity(level)
        except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{flag}: {path} could not be loaded ({str(error).splitlines()[0]})"
            ) from error
    arrived = 0
    there = set()
    for part, component in pipeline.components.items():
        if name in getattr(component, "peft_config", {}):
            for key, value in get_peft_model_state_dict(component, adapter_name=name).items():
                # Older files are renamed on the way; their up-projection is then not zero.
                moved = "lora_B" in key and bool(value.any())
                arrived += f"{part}.{key}" in names or moved
                there.add(f"{part}.{key}")
    if arrived == 0:
        raise UserError(
            f"{flag}: not one tensor of {path} fits this model (its names begin with {start!r})"
        )
    if there & names:
        lost += sorted(names - there)
    if lost:
        print(f"{path}: {len(lost)} tensors have no place in this model, such as {lost[0]}")
    return arrived


def _names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def find(path: Path | str, flag: str) -> Path:
    """The safetensors file that an option means."""
    location = Path(path)
    if location.is_dir():
        files = sorted(location.glob("*.safetensors"))
        if (location / WEIGHTS) in files or len(files) == 1:
            return location / WEIGHTS if (location / WEIGHTS) in files else files[0]
        raise UserError(f"{flag}: {path} has no {WEIGHTS}")
    if location.is_file():
        return location
    if location.suffix or str(path).count("/") != 1:
        raise UserError(f"{flag}: there is no file or folder {path}")
    try:
        return Path(hf_hub_download(str(path), WEIGHTS))
    except OSError as error:
        raise UserError(
            f"{flag}: {path} is neither a file, a folder nor a reachable hub "
            f"repository with {WEIGHTS}"
        ) from error
