"""Captions to what the UNet reads: the second-last states of CLIP-L and CLIP-G, side by side.

One caption is `prompt_embeds` [T, D], without a final norm, CLIP-L's numbers first, and
`pooled_prompt_embeds` [P], CLIP-G's projection of its last state at the end token. CLIP-L's last
layer is never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dojo.models.folders import Embeds
from dojo.models.sdxl.config import Config
from dojo.models.unet import text


class TextEncoders(text.TextEncoders):
    """Both CLIPs, as `StableDiffusionXLPipeline.encode_prompt` asks them."""

    def encode(self, captions: Sequence[str]) -> Embeds:
        """`prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P]."""
        first = self.ask(0, captions, output_hidden_states=True)
        second = self.ask(1, captions, output_hidden_states=True)
        rows = torch.cat([first.hidden_states[-1], second.hidden_states[-2]], dim=-1)
        return {"prompt_embeds": rows, "pooled_prompt_embeds": second[0]}


def load_text(config: Config, dtype: torch.dtype, device: torch.device) -> TextEncoders:
    """The frozen encoders of a model, CLIP-L without its last layer."""
    made = TextEncoders.load(config, dtype, device)
    text.cut(made.encoders[0], 1)
    return made
