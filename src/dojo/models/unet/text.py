"""Captions to what a UNet reads, by one CLIP or two.

There is no mask, so padding is attended to; a caption longer than T tokens is cut before its end
token. Layers whose result nothing reads are taken out of an encoder: they would cost time, and
adapters on them would never learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dojo.lazy import no_grad, torch
from dojo.models import int8
from dojo.models.folders import Embeds
from dojo.models.truncation import Reader
from dojo.models.unet.config import Config

if TYPE_CHECKING:
    from torch import Tensor


def readers(config: Config) -> list[Reader]:
    """The tokenizers of a model and how much its encoders read, without the encoders."""
    made = [config.load_tokenizer(part) for part in config.text_encoders]
    if config.words:
        made = [config.words.reader(one) for one in made]
    return [Reader("CLIP", one, config.text_tokens) for one in made]


def cut(encoder: Any, layers: int) -> Any:
    """Takes the last layers out of a CLIP."""
    stack = getattr(encoder, "text_model", encoder).encoder
    if layers:
        stack.layers = stack.layers[:-layers]
    return encoder


class TextEncoders:
    """The CLIPs of a model, all of which may be in training."""

    asked: ClassVar[Sequence[str]] = ("input_ids",)
    """what of the tokenizer's answer the encoders are given"""

    def __init__(
        self, tokenizers: Sequence[Any], encoders: Sequence[Any], tokens: int, device: torch.device
    ) -> None:
        """Takes tokenizers and the CLIPs that compute on `device`.

        Args:
            encoders: None where one was not loaded.
            tokens: T, that every caption is padded to.
        """
        self.tokenizers, self.encoders = list(tokenizers), list(encoders)
        self.tokens, self.device = tokens, device

    @classmethod
    def load(
        cls, config: Config, dtype: torch.dtype, device: torch.device, only: str | None = None
    ) -> Any:
        """The frozen encoders of a model, or one of them."""
        tokenizers, encoders = [], []
        for part, kind in config.text_classes.items():
            if only not in (None, part):
                tokenizers.append(None)
                encoders.append(None)
                continue
            encoder = cls.trimmed(config.load_part(kind, part, dtype))
            encoder = int8.as_asked(encoder, config.args.text_encoder_precision)
            tokenizer = config.load_tokenizer(part, encoder)
            encoder = encoder.requires_grad_(False).eval()
            if config.words:
                tokenizer = config.words.teach(part, tokenizer, encoder)
            tokenizers.append(tokenizer)
            encoders.append(encoder.to(device))
        return cls(tokenizers, encoders, config.text_tokens, device)

    @staticmethod
    def trimmed(encoder: Any) -> Any:
        """An encoder as it was loaded, without what nothing reads of it."""
        return encoder

    @property
    def trainable(self) -> list[Any]:
        """All of them."""
        return self.encoders

    def refresh(self, cached: Mapping[str, Tensor], captions: Sequence[str]) -> Embeds:
        """What the encoders say now (they are in training), with gradients."""
        return self.encode(captions)

    def free_others(self) -> None:
        """There are no others."""

    @no_grad
    def __call__(self, captions: Sequence[str]) -> Embeds:
        """The embeddings, on the CPU."""
        return {name: value.cpu() for name, value in self.encode(captions).items()}

    def encode(self, captions: Sequence[str]) -> Embeds:
        """The embeddings, on the device."""
        return self.joined(self.said(captions))

    def said(self, captions: Sequence[str]) -> Embeds:
        """What each loaded CLIP says, on the device."""
        found: Embeds = {}
        for place, encoder in enumerate(self.encoders):
            if encoder is not None:
                found |= self.say(place, captions)
        return found

    def say(self, place: int, captions: Sequence[str]) -> Embeds:
        """What a family reads of one of its CLIPs."""
        raise NotImplementedError

    def joined(self, said: Mapping[str, Tensor]) -> Embeds:
        """What the CLIPs said as the UNet reads it."""
        return dict(said)

    def ask(self, place: int, captions: Sequence[str], **options: Any) -> Any:
        """What one of the encoders says of captions."""
        tokens = self.tokenizers[place](
            list(captions),
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )
        encoder = self.encoders[place]
        encoder.train(torch.is_grad_enabled())  # dropout of adapters in training only
        asked = {name: tokens[name].to(self.device) for name in self.asked}
        return encoder(**asked, **options)
