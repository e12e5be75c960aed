"""Captions to what the UNet reads: ChatGLM3's second-last states, and its last state's last token.

A caption is 256 tokens, padded on the left; `[gMASK]` and `sop` stand before it and are never cut.
`prompt_embeds` [T, D] are the states that go into the last layer; the UNet, which knows no mask,
attends to the padding's too, and these hang on the caption, since padding may look anywhere.
`pooled_prompt_embeds` [P] is what the last layer says of the last token, without the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dojo.lazy import torch
from dojo.models.folders import Embeds
from dojo.models.unet import text


class TextEncoders(text.TextEncoders):
    """ChatGLM, as `KolorsPipeline.encode_prompt` asks it. It is not trained."""

    asked = ("input_ids", "attention_mask", "position_ids")

    @staticmethod
    def trimmed(encoder: Any) -> Any:
        """Without what a chat would end with: a layer as large as the table of embeddings."""
        encoder.output_layer = torch.nn.Identity()
        return encoder

    @property
    def trainable(self) -> list[Any]:
        """None: no plain call of diffusers would load the adapters."""
        return []

    def say(self, place: int, captions: Sequence[str]) -> Embeds:
        """`prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P]."""
        wanted = {"output_hidden_states": True, "use_cache": False, "return_dict": True}
        states = self.ask(place, captions, **wanted).hidden_states
        return {  # ChatGLM's states are [T, B, D]
            "prompt_embeds": states[-2].transpose(0, 1).contiguous(),
            "pooled_prompt_embeds": states[-1][-1].clone(),
        }
