"""A result folder's frozen parts: copied from the base model so that plain diffusers loads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from dojo.models import folder as pipelines
from dojo.models.sd3.config import TEXT_ENCODERS, Config, ModelArgs
from dojo.models.sd3.models import load_part, load_text_pipeline
from dojo.models.sd3.single_file import load_encoder


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
    inside = [part for part in parts if config.checkpoint and part in config.checkpoint]
    pipelines.copy_parts(
        config.folder, folder, parts, args.variant, partial(_load, config, args), inside
    )


def _load(config: Config, args: ModelArgs, part: str) -> Any:
    """A model that is not stored as safetensors in the folder."""
    if config.checkpoint is not None and part in config.checkpoint:
        dtype = config.checkpoint.dtype(part)
        if part in TEXT_ENCODERS:
            # In half precision transformers keeps some of T5 in float32, which the file is not.
            return load_encoder(config.checkpoint, part, config.folder, dtype).to(dtype)
        return load_part(AutoencoderKL, part, config, args, dtype)
    if part == "vae":
        return load_part(AutoencoderKL, part, config, args, torch.float32)
    return getattr(load_text_pipeline(config, args, torch.float32), part)
