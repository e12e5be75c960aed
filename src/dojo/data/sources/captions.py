"""Which caption a picture is trained with: one of several, its tags shuffled, or none at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dojo import rng
from dojo.lazy import torch


@dataclass(frozen=True, kw_only=True)
class CaptionArgs:
    """What happens to a caption before a text encoder reads it."""

    caption_dropout: float = 0.0
    """share of the captions that are replaced by the empty one, for classifier-free guidance"""
    shuffle_caption: bool = False
    """shuffle the parts of a caption that commas separate (tags)"""
    keep_tokens: int = 0
    """with shuffle_caption: the first N tags stay in front, in their order"""
    caption_variants: int = 4
    """with shuffle_caption: shuffled orders of each caption, as many as the text cache holds"""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"--caption_dropout must lie between 0 and 1, got {self.caption_dropout}"
            )
        if self.keep_tokens < 0:
            raise ValueError(f"--keep_tokens must be 0 or more, got {self.keep_tokens}")
        if self.keep_tokens and not self.shuffle_caption:
            raise ValueError("--keep_tokens does something only with --shuffle_caption")
        if self.caption_variants < 1:
            raise ValueError(f"--caption_variants must be at least 1, got {self.caption_variants}")


def choose(alternatives: Sequence[str], args: CaptionArgs, seed: int, place: int) -> str:
    """The caption of one use of a sample, drawn from the run's seed and the place of the use.

    Args:
        alternatives: the captions of the sample, at least one.
    """

    def below(count: int, stream: str) -> int:
        if count <= 1:
            return 0
        # uniform() lies in (0, 1], so this lies in [0, count).
        return int((1 - rng.uniform([(seed, stream, place)]).item()) * count)

    dropout = args.caption_dropout
    if dropout and rng.uniform([(seed, "caption", place)]).item() <= dropout:
        return ""
    caption = alternatives[below(len(alternatives), "alternative")]
    if not args.shuffle_caption:
        return caption
    return shuffled(caption, below(args.caption_variants, "tags"), args.keep_tokens)


def every(alternatives: Sequence[str], args: CaptionArgs) -> list[str]:
    """All that `choose` may give for a sample, without repeats; the empty caption goes unsaid."""
    if not args.shuffle_caption:
        return list(dict.fromkeys(alternatives))
    orders = (
        shuffled(caption, variant, args.keep_tokens)
        for caption in alternatives
        for variant in range(args.caption_variants)
    )
    return list(dict.fromkeys(orders))


def shuffled(caption: str, variant: int, keep_tokens: int = 0) -> str:
    """A caption with its tags in another order, its first `keep_tokens` tags in place.

    The order hangs on the caption and the variant's number alone, not on a run's seed, so that all
    runs share what was encoded. A caption without two tags to exchange is left as it is.
    """
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    kept, rest = tags[:keep_tokens], tags[keep_tokens:]
    if len(rest) < 2:
        return caption
    order = torch.randperm(len(rest), generator=rng.generator("tags", caption, variant))
    return ", ".join([*kept, *(rest[i] for i in order.tolist())])
