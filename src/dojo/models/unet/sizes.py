"""What the UNet is told of a picture's size, crop and target (arXiv:2307.01952, Section 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dojo.data.geometry import Geometry
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MicroConditioning = Literal["file", "resized", "constant"]
COUNT = 6  # numbers that are told of a picture


def time_ids(geometry: Geometry, kind: MicroConditioning) -> Tensor:
    """Original height and width, top and left of the crop, target height and width.

    In pixels, fractions included: float32 [B, 6].
    """
    target = geometry.target
    if kind == "constant":
        return torch.cat([target, torch.zeros_like(target), target], dim=1)
    original = resized(geometry) if kind == "resized" else geometry.original
    return torch.cat([original, geometry.crop, target], dim=1)


def resized(geometry: Geometry) -> Tensor:
    """Height and width of whole pictures, resized so that they just cover the target: [B, 2]."""
    scale = geometry.target / geometry.original  # [B, 2]
    larger = scale.amax(1, keepdim=True)
    # The side that is cut to nothing has the target's length to the bit.
    return torch.where(scale == larger, geometry.target, geometry.original * larger)
