"""A whole pipeline for drawing."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from dojo.models import loaded
from dojo.models.sd15.config import Config, ModelArgs


def load_pipeline(
    config: Config, args: ModelArgs, dtype: torch.dtype, device: torch.device
) -> StableDiffusionPipeline:
    """The model as it was, every part in `dtype`, with its own scheduler and no safety checker."""
    pipeline = loaded.pipeline(
        config.folder,
        flag=config.flag,
        kind=StableDiffusionPipeline,
        dtype=dtype,
        variant=args.variant,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(device)
