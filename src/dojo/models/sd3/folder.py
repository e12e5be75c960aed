"""A result folder's frozen parts: copied from the base model so that plain diffusers loads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dojo.files import outputs
from dojo.lazy import diffusers, torch
from dojo.models import folders
from dojo.models.family import Saving
from dojo.models.sd3.config import TEXT_ENCODERS, TEXT_FOLDERS, Config
from dojo.models.sd3.models import load_part, load_text_pipeline, load_vae
from dojo.models.sd3.single_file import load_encoder, save_single_file

SINGLE_FILE = "model.safetensors"


def copy_parts(config: Config, folder: Path, parts: Sequence[str]) -> None:
    """Fills a result folder with frozen parts of the base model and with model_index.json.

    Afterwards `StableDiffusion3Pipeline.from_pretrained(folder)`, once the parts not named here
    (transformer, scheduler) are there, gives float32 models with the base's weights: files of a
    `--variant` lose its name, and text encoders say float32 in their configurations, where
    transformers would else take half precision from. A T5 that the base model does not have is
    null in model_index.json; diffusers then wants `text_encoder_3=None` in that call.

    Args:
        parts: sub-folders such as `vae`, `text_encoder` and `tokenizer`.
    """
    inside = [part for part in parts if config.checkpoint and part in config.checkpoint]
    folders.copy_parts(
        config.folder, folder, parts, config.args.variant, partial(_load, config), inside
    )


def _load(config: Config, part: str) -> Any:
    """A model that is not stored as safetensors in the folder."""
    if config.checkpoint is not None and part in config.checkpoint:
        dtype = config.checkpoint.dtype(part)
        if part in TEXT_ENCODERS:
            # In half precision transformers keeps some of T5 in float32, which the file is not.
            return load_encoder(config.checkpoint, part, config.folder, dtype).to(dtype)
        return load_part(diffusers.AutoencoderKL, part, config, dtype)
    if part == "vae":
        return load_part(diffusers.AutoencoderKL, part, config, torch.float32)
    return getattr(load_text_pipeline(config, torch.float32), part)


def save_whole(
    folder: Path, transformer: Any, config: Config, saving: Saving, shift: float
) -> None:
    """Writes the whole pipeline, every component, so that one plain call loads the folder."""
    outputs.discard(folder / SINGLE_FILE)  # of a longer run's shorter past
    cast = folders.save_network(
        folder, transformer, config.part, saving.dtype, saving.max_shard_size
    )
    save_scheduler(folder, config, shift)
    copy_parts(config, folder, ("vae", *TEXT_FOLDERS))
    if not saving.single_file:
        return
    modules: dict[str, Any] = load_text_pipeline(config, saving.dtype).components
    # Whatever it was encoded with.
    exact = replace(config, args=replace(config.args, vae_dtype="no"))
    modules["vae"] = load_vae(exact, torch.device("cpu"))
    stored = ("vae", *TEXT_ENCODERS)
    parts = {name: modules[name].state_dict() for name in stored if modules[name] is not None}
    save_single_file(
        outputs.own(folder / SINGLE_FILE),
        {**parts, config.part: cast},
        saving.dtype,
        with_t5=saving.largest_encoder,
        title=folder.resolve().name,
    )


def save_scheduler(folder: Path, config: Config, shift: float) -> None:
    """Writes `scheduler/` into a folder, as diffusers reads it."""
    outputs.fill(folder / "scheduler", config.with_shift(shift).save_pretrained)
