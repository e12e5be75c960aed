"""What a training step costs, counted on the meta device without memory or weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What one forward and backward pass costs."""

    flops: int
    """floating-point operations of the products, recomputation included"""
    saved_bytes: int
    """activations kept for the backward pass"""


def count_cost(loss: Callable[[], Tensor]) -> Cost:
    """Runs a loss and its backward pass, on the meta device usually, and counts."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # A tensor that several nodes keep is stored once.
        seen[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []  # keeps the ids above from being given away again
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
    return Cost(counter.get_total_flops(), sum(seen.values()))
