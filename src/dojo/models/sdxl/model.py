"""Stable Diffusion XL behind the contract of `dojo.models.family`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dojo.data.geometry import Geometry
from dojo.models import folders
from dojo.models.folders import Embeds
from dojo.models.sdxl import sizes, text
from dojo.models.sdxl.config import TIME_IDS, Config, ModelArgs, TextArgs
from dojo.models.unet import config
from dojo.models.unet.model import Model as UNetModel


@dataclass(frozen=True, kw_only=True)
class Model(Config, UNetModel):
    """One opened Stable Diffusion XL, whose network is told sizes and crops."""

    def load_text(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole: bool = True,
        only: str | None = None,
    ) -> text.TextEncoders:
        """The two frozen CLIPs, or one of them."""
        return text.load_text(self, dtype, device, only)

    def no_caption(self, embeds: Embeds, captions: Sequence[str]) -> Embeds:
        """As `--uncond` or the folder says: zeros, pooled included, or the embeddings of ""."""
        return folders.zeros_for_empty(embeds, captions) if self.zeros else embeds

    def conditions(self, embeds: Embeds, geometry: Geometry | None) -> dict[str, Tensor]:
        """The embeddings, and `time_ids` float32 [B, 6]."""
        assert geometry is not None, "the rows of a model that is told sizes have a geometry"
        told = sizes.time_ids(geometry, self.args.micro_conditioning)
        return {**embeds, "time_ids": told.to(embeds["prompt_embeds"].device)}

    def meta_inputs(
        self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, timestep, embeddings and sizes."""
        noisy, timestep, conditions = super().meta_inputs(rows, shape, dtype)
        pooled = torch.empty(rows, self.pooled_width, dtype=dtype, device="meta")
        told = torch.empty(rows, TIME_IDS, device="meta")
        return noisy, timestep, {**conditions, "pooled_prompt_embeds": pooled, "time_ids": told}


def open_model(args: ModelArgs, text: TextArgs | None = None) -> Model:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no SDXL.
    """
    return config.read(Model, args, text or TextArgs())
