"""A whole pipeline for drawing."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from dojo.models import loaded
from dojo.models.sd15.config import Config


def load_pipeline(
    config: Config, dtype: torch.dtype, device: torch.device
) -> StableDiffusionPipeline:
    """The model as it was, every part in `dtype`, with its own scheduler and no safety checker."""
    pipeline = loaded.pipeline(
        config.folder,
        flag=config.flag,
        kind=StableDiffusionPipeline,
        dtype=dtype,
        variant=config.args.variant,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(device)


def around(unet: Any, vae: AutoencoderKL, config: Config) -> StableDiffusionPipeline:
    """A pipeline without text encoder and safety checker: it is given embeddings."""
    absent: Any = None
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=own_scheduler(config),
        vae=vae,
        text_encoder=absent,
        tokenizer=absent,
        safety_checker=absent,
        feature_extractor=absent,
        requires_safety_checker=False,
    )


def own_scheduler(config: Config) -> Any:
    """The model's own scheduler, with which its pipeline draws."""
    kind = getattr(diffusers, config.scheduler["_class_name"])
    return kind.from_config(config.scheduler)
