"""Captions to what the network reads: a bilingual CLIP's BERT, and mT5, each with its mask.

A caption is 77 tokens of the BERT and 256 of mT5, cut before their end token. What the masks leave
out is replaced by rows that the network has learned. But what it is told of the whole text begins
as the mean of all of mT5's rows, padding included: padding has to be what it always was, token 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dojo.models import int8
from dojo.models.hunyuandit.config import EMBEDS, TEXT_ENCODERS, TOKENIZERS, TOKENS
from dojo.models.truncation import Reader
from dojo.models.unet import text

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from dojo.models.folders import Embeds

_NAMES = ("BERT", "mT5")


def readers(tokenizers: Sequence[Any]) -> list[Reader]:
    """What the encoders read, by their tokenizers."""
    return [
        Reader(name, tokenizer, TOKENS[part])
        for name, tokenizer, part in zip(_NAMES, tokenizers, TEXT_ENCODERS, strict=True)
    ]


class TextEncoders(text.TextEncoders):
    """Both encoders, as `HunyuanDiTPipeline.encode_prompt` asks them. They are not trained."""

    @classmethod
    def load(
        cls, config: Any, dtype: torch.dtype, device: torch.device, only: str | None = None
    ) -> TextEncoders:
        """The frozen encoders of a model, or one of them."""
        tokenizers, encoders = [], []
        for part, words in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
            encoder = tokenizer = None
            if only in (None, part):
                encoder = config.load_encoder(part, dtype)
                tokenizer = config.load_tokenizer(words, encoder)
                encoder = int8.as_asked(encoder, config.args.text_encoder_precision)
                encoder.requires_grad_(False).eval().to(device)
            tokenizers.append(tokenizer)
            encoders.append(encoder)
        return cls(tokenizers, encoders, 0, device)

    @property
    def trainable(self) -> list[Any]:
        """None: no other program would load the adapters."""
        return []

    def say(self, place: int, captions: Sequence[str]) -> Embeds:
        """Rows [B, T, D] and their mask [B, T] of one of the encoders."""
        tokens = self.tokenizers[place](
            list(captions),
            padding="max_length",
            max_length=TOKENS[TEXT_ENCODERS[place]],
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self.device)
        rows = self.encoders[place](tokens.input_ids.to(self.device), attention_mask=mask)[0]
        name, of_mask = EMBEDS[2 * place : 2 * place + 2]
        return {name: rows, of_mask: mask}

    def joined(self, said: Mapping[str, Tensor]) -> Embeds:
        """The same, in the pipeline's order."""
        return {name: said[name] for name in EMBEDS}
