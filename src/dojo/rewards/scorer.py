"""What one scorer is, and where it works.

A scorer turns pictures and prompts into one number per picture. `dojo.rewards.reward` mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from dojo.cli import UserError
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Metadata = Sequence[Mapping[str, Any]]
SharedT = TypeVar("SharedT")


class RewardFailed(UserError):
    """A scorer that is not ours went wrong: its code is to be mended, not what was asked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardOutput:
    """The scores of B pictures, on the pictures' device."""

    scores: Tensor
    """float32 [B]: the weighted sum; 0 where it is not valid"""
    valid: Tensor
    """bool [B]: every component has a finite score"""
    components: dict[str, Tensor]
    """float32 [B] by name: each scorer's own numbers, unweighted; NaN where there is none"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a scorer's network lives, and what it shares with others."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = field(default_factory=lambda: torch.float32)
    """of a network's weights; similarities and heads are float32 in any case"""
    loaded: dict[Hashable, Any] = field(default_factory=dict)
    """networks that several scorers use, by what tells them apart"""

    def share(self, key: Hashable, load: Callable[[], SharedT]) -> SharedT:
        """What was loaded under `key`, loaded now if it is the first time."""
        place = (key, self.device, self.dtype)
        if place not in self.loaded:
            self.loaded[place] = load()
        return self.loaded[place]


class Scorer:
    """One component of a reward; higher is better.

    A subclass takes its options as keyword-only strings after `place`; they are what may stand in
    brackets in a reward's text.
    """

    differentiable: ClassVar[bool] = False
    """whether gradients reach the pixels"""
    range: ClassVar[str] = ""
    """the scores that are usual"""
    good_enough: ClassVar[float | None] = None
    """the score from which on a picture is left alone by training with the score's gradient, if
    the authors name one"""
    checkpoint: ClassVar[str] = "none"
    """what is loaded unless an option names something else"""
    size: ClassVar[str] = "-"
    """of the checkpoint"""
    licence: ClassVar[str] = "-"
    """of the weights"""
    places: ClassVar[tuple[str, ...]] = ()
    """the options that name weights or other files, by a path or an id of the hub; the first is
    `checkpoint` where it is unset"""

    def __init__(self, place: Place) -> None:
        self.place = place

    def cannot_score(self, prompt: str, row: Mapping[str, Any]) -> str:
        """Why a prompt can have no score, whatever the picture; "" where it may have one.

        Args:
            row: its metadata.
        """
        return ""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> Tensor | Sequence[float]:
        """Scores [B] in float32; NaN where there is none (an answer that cannot be read).

        Args:
            images: float32 [B, 3, H, W] in [0, 1], on the scorer's device. Gradients flow if the
                scorer is differentiable and gradients are on.
            metadata: one mapping per picture, from the prompts' file, or None.
        """
        raise NotImplementedError


def unread(read: Callable[[Mapping[str, Any]], object], row: Mapping[str, Any]) -> str:
    """What `read` finds wrong with a prompt's row (its ValueError); "" where nothing is."""
    try:
        read(row)
    except ValueError as error:
        return str(error)
    return ""
