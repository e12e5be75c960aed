"""Stable Diffusion XL behind the contract of `dojo.models.family`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dojo.models import folders
from dojo.models.folders import Embeds
from dojo.models.sdxl import text
from dojo.models.sdxl.config import Config, ModelArgs, TextArgs
from dojo.models.unet import config, sized
from dojo.models.unet.text import cut

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Model(Config, sized.Model):
    """One opened Stable Diffusion XL."""

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

    def meta_encoder(self, part: str) -> nn.Module:
        """See `family.Model`; CLIP-L without its last layer."""
        encoder = super().meta_encoder(part)
        return cut(encoder, 1) if part == self.text_encoders[0] else encoder

    def no_caption(self, embeds: Embeds, captions: Sequence[str]) -> Embeds:
        """As `--uncond` or the folder says: zeros, pooled included, or the embeddings of ""."""
        return folders.zeros_for_empty(embeds, captions) if self.zeros else embeds


def open_model(args: ModelArgs, text: TextArgs | None = None) -> Model:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no SDXL.
    """
    return config.read(Model, args, text or TextArgs())
