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
from torch.utils.flop_counter import flop_registry

from dojo.run.autocast import Autocast


@dataclass(frozen=True)
class Cost:
    """What one forward and backward pass costs."""

    flops: int
    """floating-point operations of the products, recomputation by checkpointing included"""
    saved_bytes: int
    """activations kept for the backward pass"""
    forward_flops: int = 0
    """those of the forward pass alone"""
    peak_bytes: int = 0
    """the most that both passes hold at a time beside weights and their gradients, the gradient of
    one weight among them; what kernels take for themselves is not counted"""

    @property
    def held_bytes(self) -> int:
        """What has to be there beside weights, gradients and the optimizer's state."""
        return max(self.saved_bytes, self.peak_bytes)


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps its inputs and output only, as fused kernels do.

    The meta device would take the plain form, which makes the matrix of weights: 72 GiB for one
    picture of 1024 px in SD3.5-Medium. Values do not exist here, only shapes and products; those
    that no fused kernel stores are made unseen.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore
        with _unseen():
            product = query @ key.transpose(-1, -2) @ value
        output = torch.empty_like(product)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        query, key, value, _ = ctx.saved_tensors
        with _unseen():
            weights = grad.new_empty(*query.shape[:-1], key.shape[-2])
            by_weights = grad @ value.transpose(-1, -2)
            products = (
                by_weights @ key,
                by_weights.transpose(-1, -2) @ query,
                weights.transpose(-1, -2) @ grad,
            )
        return tuple(torch.empty_like(product) for product in products)


@contextmanager
def _fused_attention(autocast: Autocast | None = None) -> Iterator[None]:
    original = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        if autocast is not None:
            query, key, value = (autocast.cast(one, autocast.dtype) for one in (query, key, value))
        return _FusedAttention.apply(query, key, value)  # pyright: ignore

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Done:
    """What an operation made of nothing but shapes, and the operations of its product.

    Args:
        made: one new tensor, or a list or tuple of some.
    """

    def __init__(self, made: Any, flops: int) -> None:
        alone = isinstance(made, Tensor)
        self.flops = flops
        self._kind = None if alone else type(made)
        self._forms = [
            (tensor.shape, tensor.stride(), tensor.dtype) for tensor in ([made] if alone else made)
        ]

    def again(self) -> Any:
        """New tensors of the same shapes, strides and precisions."""
        made = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in self._forms
        ]
        return made[0] if self._kind is None else self._kind(made)


def _described(value: Any) -> Any:
    """What an operation's result on the meta device hangs on, as a key."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.shape, value.stride()
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in value.items())
    return type(value), value  # 1 and 1.0 promote an integer to two precisions


def _is_new(made: Any, given: list[Tensor]) -> bool:
    """Whether an operation made tensors without values that share nothing with its inputs."""
    tensors = [made] if isinstance(made, Tensor) else made
    if not isinstance(tensors, tuple | list) or not all(isinstance(t, Tensor) for t in tensors):
        return False
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    shared = {tensor.untyped_storage()._cdata for tensor in given}
    whole = all(
        tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes() for tensor in tensors
    )
    return (
        whole
        and all(tensor.is_meta for tensor in tensors)
        and len({*storages}) == len(storages)
        and not shared & {*storages}
    )


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at a time, made inside, and operations.

    The operations of all products, by torch's own formulas, as its FlopCounterMode counts them,
    which also tells them apart by module and takes twice the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.blind = False
        self._known: dict[int, int] = {}
        self._done: dict[Any, _Done | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors(args, kwargs))
        for tensor in given:  # those that were there before, such as weights
            self._meet(tensor, counts=False)
        made, flops = self._compute(func, given, args, kwargs)
        for tensor in _tensors(made):
            self._meet(tensor, counts=not self.blind)
        self.flops += flops
        return made

    def _compute(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> tuple[Any, int]:
        """What an operation makes, and the operations of its product.

        A network repeats its blocks, and the meta device finds out shapes in Python: where an
        operation has made new tensors of such inputs before, the same ones are made at once.
        """
        key = (func, _described(args), _described(kwargs))
        done = self._done.get(key)
        if done is not None:
            return done.again(), done.flops
        made = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=made)
        if key not in self._done:
            self._done[key] = _Done(made, flops) if _is_new(made, given) else None
        return made, flops

    def _meet(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes() if counts else 0
            self.now += self._known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._part, key)

    def forget(self, tensor: Tensor) -> None:
        """Counts a tensor no longer, while it goes on living."""
        self._meet(tensor, counts=False)
        key = tensor.untyped_storage()._cdata
        self.now -= self._known[key]
        self._known[key] = 0

    def _part(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _tensors(*values: object) -> Iterator[Tensor]:
    """The tensors among values, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(*value)  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, dict):
            yield from _tensors(*value.values())  # pyright: ignore[reportUnknownArgumentType]


_watching: list[_Live] = []


@contextmanager
def _watched() -> Iterator[_Live]:
    """Counts what lives inside, but for what is `_unseen`."""
    live = _Live()
    _watching.append(live)
    try:
        with live:
            yield live
    finally:
        _watching.remove(live)


@contextmanager
def _unseen() -> Iterator[None]:
    """Tensors made inside are not counted as alive, their products are."""
    before = [live.blind for live in _watching]
    for live in _watching:
        live.blind = True
    try:
        yield
    finally:
        for live, blind in zip(_watching, before, strict=True):
            live.blind = blind


@torch.no_grad()
def live_bytes(act: Callable[[], object], autocast: torch.dtype | None = None) -> int:
    """The most bytes of tensors that are alive at a time while `act` computes on the meta device.

    Without gradients, weights that were there before not among them. What kernels take for
    themselves is not counted.

    Args:
        autocast: precision that a GPU's autocast would compute in; None is none.
    """
    with _watched() as live, _autocast(autocast, live, set()) as casting, _fused_attention(casting):
        act()
    return live.peak


@contextmanager
def _autocast(
    dtype: torch.dtype | None, live: _Live, weights: set[int]
) -> Iterator[Autocast | None]:
    """Autocast to a precision below float32; its copies of weights are counted nowhere.

    Args:
        weights: learns of these copies.
    """
    if dtype is None or dtype == torch.float32:
        yield None
        return

    def cast_weight(made: Tensor) -> None:
        live.forget(made)
        weights.add(made.untyped_storage()._cdata)
        weakref.finalize(made.untyped_storage(), weights.discard, made.untyped_storage()._cdata)

    with Autocast(dtype, cast_weight) as casting:
        yield casting


def count_cost(
    loss: Callable[[], Tensor], model: torch.nn.Module, autocast: torch.dtype | None = None
) -> Cost:
    """Runs a loss of a model on the meta device and its backward pass, and counts.

    Args:
        autocast: as for `live_bytes`; copies of weights are not among the activations.
    """
    weights = {param.untyped_storage()._cdata for param in model.parameters()}
    seen: set[int] = set()
    saved = 0

    def keep(tensor: Tensor) -> Tensor:
        # A tensor that several nodes keep is stored once; weights are there anyway.
        nonlocal saved
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in weights and key not in seen:
            seen.add(key)
            saved += storage.nbytes()
            weakref.finalize(storage, seen.discard, key)  # the number may be given away again
        return tensor

    with (
        _without_gradients(model),
        _watched() as live,
        _autocast(autocast, live, weights) as casting,
        _fused_attention(casting),
    ):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        forward = live.flops
        _go_back(value)
    return Cost(live.flops, saved, forward, live.peak)


def _go_back(value: Tensor) -> None:
    """`value.backward()`, within which torch would not look through an `Autocast`.

    Functions that modes of torch see are called without these modes, and so would be what
    checkpointing computes again.
    """
    graph: Any = torch.autograd.graph
    graph._engine_run_backward(
        (value,), (torch.ones_like(value),), False, False, (), True, accumulate_grad=True
    )


@contextmanager
def _without_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Lets each gradient of a weight go as soon as it is there."""

    def let_go(param: Tensor) -> None:
        param.grad = None

    trained = [param for param in model.parameters() if param.requires_grad]
    handles = [param.register_post_accumulate_grad_hook(let_go) for param in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        add_adapter: makes something in the frozen model trainable, and puts its weights into the
            precisions that they are stored in.
        loss: of one micro-batch, in `dtype`.
    """
    model.to(dtype).requires_grad_(False)
    add_adapter(model)
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    return count_cost(loss, model, dtype)
