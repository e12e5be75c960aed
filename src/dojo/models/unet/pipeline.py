"""A whole pipeline for drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dojo.models import folders, loaded
from dojo.models.unet.config import Config

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL


def load_pipeline(
    config: Config, dtype: torch.dtype, device: torch.device, *, texts: bool = True
) -> Any:
    """The model as it was, every part in `dtype`, with its own scheduler, no safety checker.

    Args:
        texts: with text encoders and tokenizers.
    """
    left_out = () if texts else config.text_folders
    parts = {
        part: config.load_part(kind, part, dtype)
        for part, kind in config.networks.items()
        if part not in left_out
    }
    folders.frugal(parts["vae"], config.args)
    pipeline = loaded.pipeline(
        config.folder,
        flag=config.flag,
        kind=config.pipeline_class,
        dtype=dtype,
        variant=config.args.variant,
        **parts,
        **dict.fromkeys((*config.optional_parts, *left_out)),
        **config.pipeline_options,
    )
    return pipeline.to(device)


def around(unet: Any, vae: AutoencoderKL, scheduler: Any, config: Config) -> Any:
    """A pipeline without text encoders: it is given embeddings."""
    absent = dict.fromkeys((*config.text_folders, *config.optional_parts))
    kind: Any = config.pipeline_class
    return kind(unet=unet, scheduler=scheduler, vae=vae, **absent, **config.pipeline_options)
