"""The three text encoders, as the pipeline uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dojo.sd3.config import Config, ModelArgs


class TextEncoders:
    """The three frozen text encoders, as `StableDiffusion3Pipeline.encode_prompt` uses them."""

    def __init__(
        self, config: Config, args: ModelArgs, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.max_sequence_length = args.max_sequence_length
        self.device = device
        self.pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
            config.folder, transformer=None, vae=None, dtype=dtype, variant=args.variant
        ).to(device)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P] on the CPU."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt_embeds": embeds.cpu(), "pooled_prompt_embeds": pooled.cpu()}
