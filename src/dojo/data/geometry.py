"""Where a training picture comes from: what SDXL and its kin are told beside the caption.

It follows from the size of the file's picture, the size that is trained and the draw of the crop,
so it costs no reading, and caches of latents hold for models that ask for it and for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dojo.data.images import Size, cover_box
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """The size conditions of a batch (Podell et al. 2023, arXiv:2307.01952, Section 2.2)."""

    original: Tensor
    """height and width of the pictures in their files, upright: float32 [B, 2]"""
    crop: Tensor
    """top and left of the crops in the resized pictures, in their pixels, fractions included; in
    the mirrored picture where it is mirrored: float32 [B, 2]"""
    target: Tensor
    """height and width that are trained: float32 [B, 2]"""

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Geometry:
        """That of collated rows; of pairs, [2B, 2], the winners before the losers.

        Raises:
            ValueError: the rows do not say it, because the source was not `checked`.
        """
        if "original" not in batch:
            raise ValueError("the pictures' sizes are known of a source that was verified only")
        original, crop = (_flat(batch[name]) for name in ("original", "crop"))
        target = torch.tensor(batch["size"], dtype=torch.float32)  # [B, 2]
        return cls(
            original=original, crop=crop, target=target.repeat(len(original) // len(target), 1)
        )

    def __getitem__(self, rows: slice) -> Geometry:
        """That of some of the pictures."""
        return Geometry(
            original=self.original[rows], crop=self.crop[rows], target=self.target[rows]
        )

    @classmethod
    def whole(cls, size: Size, count: int) -> Geometry:
        """That of pictures which are drawn: nothing was resized or cut off."""
        sizes = torch.tensor([size] * count, dtype=torch.float32)
        return cls(original=sizes, crop=torch.zeros_like(sizes), target=sizes)


def _flat(column: Tensor) -> Tensor:
    """[B, 2] as it is; that of pairs [B, side, 2] -> [2B, 2], the winners first."""
    return column if column.dim() == 2 else column.transpose(0, 1).flatten(0, 1)


def framed(
    original: Size, size: Size, anchor: tuple[float, float], flip: bool
) -> dict[str, Tensor]:
    """What a row says of a picture that `fit` has cut: `original` and `crop`, float32 [2].

    Args:
        original: (height, width) of the picture.
        size: (height, width) of the result.
        anchor, flip: of the crop, as `fit` takes them.
    """
    height, width = size
    left, top, right, bottom = cover_box((original[1], original[0]), height, width, anchor)
    cut = original[1] - right if flip else left  # what is missing on the left of the result
    crop = (top * height / (bottom - top), cut * width / (right - left))
    return {
        "original": torch.tensor(original, dtype=torch.float32),
        "crop": torch.tensor(crop, dtype=torch.float32),
    }
