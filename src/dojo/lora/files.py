"""Adapters on disk: saved so that they say their alpha, loaded so that they are known to arrive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from dojo.cli import UserError
from dojo.lora.adapter import ADAPTER, state

WEIGHTS = "pytorch_lora_weights.safetensors"


def save(
    folder: Path,
    transformer: nn.Module,
    pipeline: type[DiffusionPipeline] = StableDiffusion3Pipeline,
) -> None:
    """Writes `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`.

    The adapter's configuration goes into the file's header: without it diffusers would take alpha
    for the rank. Equal weights give equal bytes.
    """
    config = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in transformer.peft_config[ADAPTER].to_dict().items()  # pyright: ignore
    }
    pipeline.save_lora_weights(  # pyright: ignore
        folder,
        transformer_lora_layers=state(transformer),
        transformer_lora_adapter_metadata=config,
    )
    _sort_header(folder / WEIGHTS)


def _sort_header(path: Path) -> None:
    """Puts the header's free text in alphabetical order; safetensors writes it in a random one.

    The format is 8 bytes of header length, a JSON header padded with spaces, the tensors.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-len(text) % 8)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + length :])


def restore(folder: Path, transformer: nn.Module) -> None:
    """Puts a saved adapter's tensors back into a model that has the same adapter.

    Raises:
        UserError: the file's tensors are not exactly those of the adapter.
    """
    saved = load_file(folder / WEIGHTS)
    tensors = {name.removeprefix("transformer."): value for name, value in saved.items()}
    own = state(transformer)
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise UserError(
            f"{folder / WEIGHTS} does not fit this adapter (other --rank or --lora_layers?): "
            f"{', '.join(wrong[:4])}"
        )
    set_peft_model_state_dict(transformer, tensors, adapter_name=ADAPTER)


def load(pipeline: Any, path: Path | str, name: str) -> int:
    """Loads a LoRA file, folder or hub id into a pipeline and returns how many tensors arrived.

    Raises:
        UserError: the file is missing or unreadable, or not one of its tensors found a place:
            diffusers loads several public formats as a silent no-op.
    """
    file = _find(path)
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
        level = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()  # it warns of each encoder that has no adapter
        try:
            pipeline.load_lora_weights(str(file), adapter_name=name)
        finally:
            diffusers_logging.set_verbosity(level)
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"--lora_weights_path: {path} could not be loaded ({str(error).splitlines()[0]})"
        ) from error
    arrived = 0
    for part, component in pipeline.components.items():
        if name in getattr(component, "peft_config", {}):
            for key, value in get_peft_model_state_dict(component, adapter_name=name).items():
                # Older files are renamed on the way; their up-projection is then not zero.
                moved = "lora_B" in key and bool(value.any())
                arrived += f"{part}.{key}" in names or moved
    if arrived == 0:
        raise UserError(
            f"--lora_weights_path: not one tensor of {path} fits this model (its names begin with "
            f"{min(names, default='')!r})"
        )
    return arrived


def _find(path: Path | str) -> Path:
    """The safetensors file that a `--lora_weights_path` means."""
    location = Path(path)
    if location.is_dir():
        files = sorted(location.glob("*.safetensors"))
        if (location / WEIGHTS) in files or len(files) == 1:
            return location / WEIGHTS if (location / WEIGHTS) in files else files[0]
        raise UserError(f"--lora_weights_path: {path} has no {WEIGHTS}")
    if location.is_file():
        return location
    if location.suffix or str(path).count("/") != 1:
        raise UserError(f"--lora_weights_path: there is no file or folder {path}")
    try:
        return Path(hf_hub_download(str(path), WEIGHTS))
    except OSError as error:
        raise UserError(
            f"--lora_weights_path: {path} is neither a file, a folder nor a reachable hub "
            f"repository with {WEIGHTS}"
        ) from error
