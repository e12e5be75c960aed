"""A whole pipeline for drawing, put together from a folder, a hub id or a single file."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from dojo.models.sd3 import schedule
from dojo.models.sd3.config import Config, ModelArgs
from dojo.models.sd3.models import load_text_pipeline, load_transformer, load_vae


def load_pipeline(
    config: Config, args: ModelArgs, dtype: torch.dtype, device: torch.device
) -> StableDiffusion3Pipeline:
    """The model as trained, every part in `dtype`, with the scheduler's own shift."""
    parts: Any = load_text_pipeline(config, args, dtype).components
    parts["transformer"] = load_transformer(config, args, dtype, device)
    vae: Any = load_vae(config, args, device)
    parts["vae"] = vae.to(dtype)
    parts["scheduler"] = config.make_scheduler(schedule.own_shift(config.scheduler))
    return StableDiffusion3Pipeline(**parts).to(device)
