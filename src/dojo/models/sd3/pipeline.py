"""A whole pipeline for drawing, put together from a folder, a hub id or a single file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dojo.lazy import diffusers
from dojo.models.sd3 import schedule
from dojo.models.sd3.config import Config
from dojo.models.sd3.models import load_text_pipeline, load_transformer, load_vae

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL


def load_pipeline(
    config: Config, dtype: torch.dtype, device: torch.device, *, texts: bool = True
) -> diffusers.StableDiffusion3Pipeline:
    """The model as trained, every part in `dtype`, with the scheduler's own shift.

    Args:
        texts: with text encoders and tokenizers.
    """
    parts: Any = dict.fromkeys(config.text_folders)
    if texts:
        parts = load_text_pipeline(config, dtype).components
    parts["transformer"] = load_transformer(config, dtype, device)
    vae: Any = load_vae(config, device)
    parts["vae"] = vae.to(dtype)
    parts["scheduler"] = config.with_shift(schedule.own_shift(config.scheduler))
    return diffusers.StableDiffusion3Pipeline(**parts).to(device)


def around(
    transformer: Any, vae: AutoencoderKL, config: Config, shift: float
) -> diffusers.StableDiffusion3Pipeline:
    """A pipeline without text encoders: it is given embeddings."""
    absent: Any = None
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=config.with_shift(shift),
        vae=vae,
        text_encoder=absent,
        tokenizer=absent,
        text_encoder_2=absent,
        tokenizer_2=absent,
        text_encoder_3=absent,
        tokenizer_3=absent,
    )
