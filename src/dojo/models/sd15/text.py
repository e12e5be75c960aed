"""Captions to what the UNet reads: CLIP's last hidden states after its final norm, [B, T, D].

There is no mask, so padding is attended to; a caption longer than T tokens is cut before its end
token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dojo.models import loaded
from dojo.models.folders import Embeds
from dojo.models.sd15.config import Config
from dojo.models.truncation import Reader


def readers(config: Config) -> list[Reader]:
    """The tokenizer of a model and how much its encoder reads, without the encoder."""
    tokenizer = loaded.tokenizer(CLIPTokenizer, config.folder, "tokenizer", flag=config.flag)
    return [Reader("CLIP", tokenizer, tokenizer.model_max_length)]


class TextEncoder:
    """Captions to embeddings, as `StableDiffusionPipeline.encode_prompt` makes them."""

    def __init__(self, tokenizer: Any, encoder: Any, device: torch.device) -> None:
        """Takes a tokenizer and the CLIP that computes on `device`."""
        self.tokenizer, self.device = tokenizer, device
        self.encoder: Any = encoder

    @property
    def trainable(self) -> list[Any]:
        """None of them is trained yet."""
        return []

    def refresh(self, cached: Mapping[str, Tensor], captions: Sequence[str]) -> Embeds:
        """Cached embeddings as they are."""
        return dict(cached)

    def free_others(self) -> None:
        """Lets go of CLIP."""
        self.encoder = None

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Embeds:
        """`prompt_embeds` [B, T, D], on the CPU."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"prompt_embeds": self.encoder(tokens.input_ids.to(self.device))[0].cpu()}


def load_text_encoder(config: Config, dtype: torch.dtype, device: torch.device) -> TextEncoder:
    """The frozen encoder of a model."""
    encoder = loaded.network(
        CLIPTextModel,
        *(config.folder, "text_encoder"),
        flag=config.flag,
        dtype=dtype,
        variant=config.args.variant,
    )
    tokenizer = loaded.tokenizer(
        CLIPTokenizer, config.folder, "tokenizer", flag=config.flag, encoder=encoder
    )
    return TextEncoder(tokenizer, encoder.requires_grad_(False).eval().to(device), device)
