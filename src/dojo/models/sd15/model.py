"""Stable Diffusion 1 and 2 behind the contract of `dojo.models.family`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dojo.models.sd15 import text
from dojo.models.sd15.config import Config, ModelArgs, TextArgs
from dojo.models.unet import config
from dojo.models.unet.model import Model as UNetModel
from dojo.models.unet.text import cut

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Model(Config, UNetModel):
    """One opened Stable Diffusion 1 or 2."""

    @property
    def text_settings(self) -> dict[str, object]:
        """Which layers are left out, if any."""
        skipped = self.text.clip_skip
        return {**super().text_settings, **({"clip_skip": skipped} if skipped else {})}

    def load_text(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole: bool = True,
        only: str | None = None,
    ) -> text.TextEncoders:
        """The frozen CLIP."""
        return text.load_text(self, dtype, device)

    def meta_encoder(self, part: str) -> nn.Module:
        """See `family.Model`; without the layers that are skipped."""
        return cut(super().meta_encoder(part), self.text.clip_skip)

    def load_pipeline(self, dtype: torch.dtype, device: torch.device, *, texts: bool = True) -> Any:
        """The whole pipeline, without safety checker; prompts go through the layers of training.

        The pipeline's own `clip_skip` fails with transformers 5.6 and later.
        """
        pipeline = super().load_pipeline(dtype, device, texts=texts)
        if texts:
            cut(pipeline.text_encoder, self.text.clip_skip)
        return pipeline


def open_model(args: ModelArgs, text: TextArgs | None = None) -> Model:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no SD1 or SD2.
    """
    return config.read(Model, args, text or TextArgs())
