"""Numbers as wide as their device has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NARROW = frozenset({"mps"})  # kinds of devices without float64: to ask one for it is an error


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in float32 on a device that has none (Apple's)."""
    return tensor.float() if tensor.device.type in NARROW else tensor.double()
