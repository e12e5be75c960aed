"""A whole pipeline for drawing."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from dojo.sd15.config import Config, ModelArgs


def load_pipeline(
    config: Config, args: ModelArgs, dtype: torch.dtype, device: torch.device
) -> StableDiffusionPipeline:
    """The model as it was, every part in `dtype`, with its own scheduler and no safety checker."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        *(config.folder,),
        dtype=dtype,
        variant=args.variant,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(device)
