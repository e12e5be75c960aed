"""A result folder's frozen parts: copied from the base model so that plain diffusers loads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from dojo.models import folders, loaded
from dojo.models.family import Saving
from dojo.models.sd15.config import TEXT_FOLDERS, Config

_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


def copy_parts(config: Config, folder: Path, parts: Sequence[str]) -> None:
    """Fills a result folder with frozen parts of the base model and with model_index.json.

    Afterwards `StableDiffusionPipeline.from_pretrained(folder)`, once the parts not named here
    (unet) are there, gives float32 models with the base's weights. Safety checker, feature
    extractor and image encoder come along where the base has them.

    Args:
        parts: sub-folders such as `vae`, `scheduler`, `text_encoder` and `tokenizer`.
    """

    def load(part: str) -> Any:
        if not (config.folder / part).is_dir():
            return None  # listed, but never downloaded
        pipeline = loaded.pipeline(
            config.folder,
            flag=config.flag,
            kind=StableDiffusionPipeline,
            dtype=torch.float32,
            variant=config.args.variant,
            unet=None,
        )
        return getattr(pipeline, part)

    wanted = list(dict.fromkeys([*parts, *_OPTIONAL]))
    index = folders.copy_parts(config.folder, folder, wanted, config.args.variant, load)
    if index.get("safety_checker", [None])[0] is None:
        # Or diffusers would warn of a checker that was taken away.
        folders.write_index(folder, {**index, "requires_safety_checker": False})


def save_whole(folder: Path, unet: Any, config: Config, saving: Saving) -> None:
    """Writes the whole pipeline, every component, so that one plain call loads the folder."""
    folders.save_network(folder, unet, config.part, saving.dtype, saving.max_shard_size)
    copy_parts(config, folder, ("vae", "scheduler", *TEXT_FOLDERS))
