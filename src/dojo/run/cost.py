"""What a training step costs, counted on the meta device without memory or weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """What one forward and backward pass costs."""

    flops: int
    """floating-point operations of the products, recomputation by checkpointing included"""
    saved_bytes: int
    """activations kept for the backward pass"""
    forward_flops: int = 0
    """those of the forward pass alone"""


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps its inputs and output only, as fused kernels do.

    The meta device would take the plain form, which keeps the matrix of weights: 72 GiB for one
    picture of 1024 px in SD3.5-Medium. Values do not exist here, only shapes and products.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore
        output = query @ key.transpose(-1, -2) @ value
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        query, key, value, _ = ctx.saved_tensors
        weights = grad.new_empty(*query.shape[:-1], key.shape[-2])
        by_weights = grad @ value.transpose(-1, -2)
        return (
            by_weights @ key,
            by_weights.transpose(-1, -2) @ query,
            weights.transpose(-1, -2) @ grad,
        )


@contextmanager
def _fused_attention() -> Iterator[None]:
    original = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return _FusedAttention.apply(query, key, value)  # pyright: ignore

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at a time, made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return made

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._part, key)

    def _part(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


class _Operations(TorchDispatchMode):
    """Counts the operations of all products by torch's own formulas.

    As torch's FlopCounterMode does, which also tells them apart by module and takes twice the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=made)
        return made


@torch.no_grad()
def live_bytes(act: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at a time while `act` computes on the meta device.

    Without gradients, weights that were there before not among them. What kernels take for
    themselves is not counted.
    """
    with _fused_attention(), _Live() as live:
        act()
    return live.peak


def count_cost(loss: Callable[[], Tensor], model: torch.nn.Module) -> Cost:
    """Runs a loss of a model on the meta device and its backward pass, and counts."""
    weights = {param.untyped_storage()._cdata for param in model.parameters()}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # keeps the ids below from being given away again

    def keep(tensor: Tensor) -> Tensor:
        # A tensor that several nodes keep is stored once; weights are there anyway.
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with _fused_attention(), _Operations() as counted:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        forward = counted.total
        value.backward()
    return Cost(counted.total, sum(seen.values()), forward)


def training_cost(
    model: Any,
    add_adapter: Callable[[torch.nn.Module], object],
    loss: Callable[[], Tensor],
    dtype: torch.dtype,
    *,
    checkpointing: bool,
) -> Cost:
    """Readies one of diffusers' models, on the meta device, for training, and counts a loss.

    Args:
        add_adapter: makes something in the frozen model trainable.
        loss: of one micro-batch, in `dtype`.
    """
    model.to(dtype).requires_grad_(False)
    add_adapter(model)
    for param in model.parameters():
        param.data = param.data.to(dtype)  # there is no autocast on the meta device
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    return count_cost(loss, model)
