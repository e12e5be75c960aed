"""Captions to what the UNet reads: the second-last states of CLIP-L and CLIP-G, side by side.

One caption is `prompt_embeds` [T, D], without a final norm, CLIP-L's numbers first, and
`pooled_prompt_embeds` [P], CLIP-G's projection of its last state at the end token. CLIP-L's last
layer is never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dojo.lazy import torch
from dojo.models.folders import Embeds
from dojo.models.sdxl.config import Config
from dojo.models.unet import text

if TYPE_CHECKING:
    from torch import Tensor


class TextEncoders(text.TextEncoders):
    """Both CLIPs, as `StableDiffusionXLPipeline.encode_prompt` asks them."""

    def say(self, place: int, captions: Sequence[str]) -> Embeds:
        """The rows of one CLIP; of CLIP-G the pooled vectors too."""
        found = self.ask(place, captions, output_hidden_states=True)
        if place == 0:
            return {"clip_l": found.hidden_states[-1]}
        return {"clip_g": found.hidden_states[-2], "pooled_prompt_embeds": found[0]}

    def joined(self, said: Mapping[str, Tensor]) -> Embeds:
        """`prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P]."""
        rows = torch.cat([said["clip_l"], said["clip_g"]], dim=-1)
        return {"prompt_embeds": rows, "pooled_prompt_embeds": said["pooled_prompt_embeds"]}


def load_text(
    config: Config, dtype: torch.dtype, device: torch.device, only: str | None = None
) -> TextEncoders:
    """The frozen encoders of a model or one of them, CLIP-L without its last layer."""
    made = TextEncoders.load(config, dtype, device, only)
    if made.encoders[0] is not None:
        text.cut(made.encoders[0], 1)
    return made
