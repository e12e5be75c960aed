"""Captions to what the UNet reads: CLIP's last hidden states after its final norm, [B, T, D].

With `--clip_skip` the last hidden states are those of a layer before the last one, after the same
norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dojo.models.folders import Embeds
from dojo.models.sd15.config import Config
from dojo.models.unet import text

if TYPE_CHECKING:
    import torch


class TextEncoders(text.TextEncoders):
    """CLIP, as `StableDiffusionPipeline.encode_prompt` asks it."""

    def say(self, place: int, captions: Sequence[str]) -> Embeds:
        """`prompt_embeds` [B, T, D]."""
        return {"prompt_embeds": self.ask(place, captions)[0]}


def load_text(config: Config, dtype: torch.dtype, device: torch.device) -> TextEncoders:
    """The frozen encoder of a model, without the layers that are skipped."""
    made = TextEncoders.load(config, dtype, device)
    text.cut(made.encoders[0], config.text.clip_skip)
    return made
