"""Frozen weights of blocks, and activations, in CPU memory while they are not needed.

A weight comes to the device for one product in the forward pass and for one in the backward pass,
through `quantised.FrozenLinear`: no graph keeps it, and adapters stay on the device. Which weight
comes next is learned from what came next the last time, since a pass through a network is like the
one before; as many layers as a block has are copied ahead on a stream of their own. A wrong guess
costs a copy and no correctness.

On the CPU the same code plays both devices, and a copy is a copy in the same memory: that is how
the tests hold it. Streams and pinned memory exist on CUDA alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from dojo.cli import UserError
from dojo.lazy import late, torch
from dojo.models.opening import facts_of
from dojo.models.precisions import Precision

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dojo.models import quantised
    from dojo.models.quantised import FrozenLinear, Packed
else:
    quantised = late("dojo.models.quantised")

# ---- weights ----

Turn: TypeAlias = "tuple[FrozenLinear, str]"
"""A layer's product in a forward pass, in one that recomputes, or in a backward pass."""


@dataclass(eq=False)
class _Copy:
    """A weight on its way to the device, or there."""

    packed: Packed
    arrived: Any
    """an event of CUDA, or None"""


class Belt:
    """Brings weights from CPU memory to a device, the next ones beforehand.

    Copies are made in the memory of the stream that brings them. It is given back once that stream
    waits for what has been computed with them, so that a later copy cannot overwrite a weight that
    is still read, however far the CPU is ahead of the device.

    Args:
        ahead: layers that are brought beforehand.
    Attributes:
        count: copies that were made.
    """

    def __init__(self, device: torch.device, ahead: int) -> None:
        self.device, self.ahead, self.count = device, ahead, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stored: dict[FrozenLinear, Packed] = {}
        self._coming: dict[FrozenLinear, _Copy] = {}
        self._used: list[_Copy] = []
        self._followed: dict[Turn, Turn] = {}
        self._last: Turn | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in CPU memory."""
        return sum(tensor.nbytes for packed in self._stored.values() for tensor in packed)

    def put(self, layer: FrozenLinear, packed: Packed) -> None:
        """See `quantised.Elsewhere`."""
        self._stored[layer] = tuple(self._kept(tensor) for tensor in packed)

    def fetch(self, layer: FrozenLinear, *, backward: bool) -> Packed:
        """See `quantised.Elsewhere`."""
        turn = (layer, "backward" if backward else _pass())
        if self._last is not None:
            self._followed[self._last] = turn
        self._last = turn
        self._give_back()
        copy = self._coming.get(layer) or self._bring(layer)
        there = {**self._coming, layer: copy}
        expected = self._expected(turn)
        self._coming = {one: there.get(one) or self._bring(one) for one in expected}
        self._used = [one for name, one in there.items() if name not in self._coming]
        if copy.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(copy.arrived)
        return copy.packed

    def look(self, layer: FrozenLinear) -> Packed:
        """See `quantised.Elsewhere`."""
        return tuple(_copied(tensor, self.device) for tensor in self._stored[layer])

    def _expected(self, turn: Turn) -> list[FrozenLinear]:
        """The layers that are asked for next, by what came after this turn the last time."""
        found: list[FrozenLinear] = []
        while len(found) < self.ahead and (following := self._followed.get(turn)) is not None:
            turn = following
            found.append(turn[0])
        return found

    def _kept(self, tensor: Tensor) -> Tensor:
        pinned = self._stream is not None
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        return kept.copy_(tensor)

    def _bring(self, layer: FrozenLinear) -> _Copy:
        self.count += 1
        packed = self._stored[layer]
        if self._stream is None:
            return _Copy(tuple(_copied(tensor, self.device) for tensor in packed), None)
        with torch.cuda.stream(self._stream):
            there = tuple(tensor.to(self.device, non_blocking=True) for tensor in packed)
            return _Copy(there, self._stream.record_event())

    def _give_back(self) -> None:
        """Lets go of what was computed with; its memory is used again when that is over."""
        if self._used and self._stream is not None:
            done = torch.cuda.current_stream(self.device).record_event()
            self._stream.wait_event(done)
        self._used.clear()


def _pass() -> str:
    """Which pass computes forward now: the backward pass does so where activations are recomputed.

    They follow one another in another order then.
    """
    return "forward" if torch._C._current_graph_task_id() == -1 else "again"


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, also where it is there already."""
    return tensor.clone() if tensor.device == device else tensor.to(device)


# ---- which weights ----


def blocks_of(network: nn.Module) -> list[str]:
    """The full names of a network's transformer blocks."""
    block = re.compile(facts_of(network).block)
    return [name for name, _ in network.named_modules() if block.fullmatch(name)]


def in_blocks(network: nn.Module) -> Callable[[str], bool]:
    """Whether a layer of a network, by its full name, lies in a transformer block.

    What lies before and behind the blocks (the embeddings of time and text, the first and last
    projection) is a hundredth of the weights, and rounding it to 4 bits changes a prediction more
    than rounding all the blocks does.
    """
    inside = re.compile(rf"{facts_of(network).block}\..+")
    return lambda name: inside.fullmatch(name) is not None


def spread(blocks: list[str], count: int) -> list[str]:
    """So many of some blocks, evenly spread: the others' time hides their copies.

    Raises:
        UserError: there are fewer.
    """
    total = len(blocks)
    if count > total:
        raise UserError(f"--blocks_on_cpu {count}: this network has {total} blocks")
    return [blocks[i] for i in range(total) if (i + 1) * count // total > i * count // total]


@dataclass(frozen=True)
class Storage:
    """How the frozen layers of a network's blocks are stored."""

    precision: Precision = "bf16"
    blocks_on_cpu: int = 0

    def __bool__(self) -> bool:
        return self.precision != "bf16" or self.blocks_on_cpu > 0

    def prepare(self, network: nn.Module, device: torch.device) -> None:
        """Puts layers that store their weights so into a frozen network.

        Args:
            network: on the meta device they wait for their weights; on the CPU they take them.
            device: of the run.
        Raises:
            UserError: it has fewer blocks.
        """
        blocks = self._layers(network)
        away = set(spread(list(blocks), self.blocks_on_cpu))
        most = max((len(layers) for layers in blocks.values()), default=0)
        belt = Belt(device, most) if away else None
        for block, layers in blocks.items():
            if self.precision != "bf16" or block in away:
                for name in layers:
                    place = belt if block in away else None
                    quantised.replace(network, name, self.precision, device, place)

    def bytes_of(self, network: nn.Module) -> tuple[int, int]:
        """Bytes of a network's frozen weights on the device; and of these those of weights that
        come from CPU memory, and are no parameters: while one block computes, the next one comes.

        Args:
            network: as for `quantised.bytes_of`.
        Raises:
            UserError: it has fewer blocks.
        """
        total = quantised.bytes_of(network, self.precision, in_blocks(network))
        if not self.blocks_on_cpu:
            return total, 0
        layers = self._layers(network)
        away = sorted(
            self._bytes(layers[block]) for block in spread(list(layers), self.blocks_on_cpu)
        )
        coming = sum(away[-2:])
        return total - sum(away) + coming, coming

    def _layers(self, network: nn.Module) -> dict[str, dict[str, nn.Linear]]:
        """The linear layers of each block by their full names."""
        made: dict[str, dict[str, nn.Linear]] = {block: {} for block in blocks_of(network)}
        inside = re.compile(rf"({facts_of(network).block})\..+")
        for name, linear in quantised.linears(network, in_blocks(network)):
            found = inside.fullmatch(name)
            assert found is not None, "it lies in a block"
            made[found[1]][name] = linear
        return made

    def _bytes(self, layers: Mapping[str, nn.Linear]) -> int:
        weights = [linear.weight for linear in layers.values() if not linear.weight.requires_grad]
        return sum(
            quantised.packed_bytes(weight.shape, self.precision, weight.dtype) for weight in weights
        )


# ---- activations ----


def keep_activations_on_cpu(network: nn.Module) -> None:
    """What a forward pass of the network keeps for its backward pass lies in CPU memory meanwhile.

    With gradient checkpointing those are the inputs of the blocks. As
    `torch.autograd.graph.save_on_cpu`, but for the weights, which stay where they are: that one
    copies the frozen ones too, at every layer. The bfloat16 copies that autocast makes of float32
    weights are tensors of their own and do go: slower, and the same numbers.

    Args:
        network: on the meta device, where costs are counted, nothing is kept of them but shapes.
    """
    opened: list[Any] = []

    def enter(*_: Any) -> None:
        weights = {param.untyped_storage()._cdata for param in network.parameters()}

        def pack(tensor: Tensor) -> Tensor | _Kept:
            known = tensor.untyped_storage()._cdata in weights
            return tensor if known or not tensor.numel() else _Kept.of(tensor)

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, _unpack)
        hooks.__enter__()
        opened.append(hooks)

    def leave(*_: Any) -> None:
        opened.pop().__exit__()

    network.register_forward_pre_hook(enter)
    network.register_forward_hook(leave, always_call=True)


@dataclass(frozen=True)
class _Kept:
    """A tensor of the device in CPU memory."""

    device: torch.device
    numbers: Tensor | None
    """none on the meta device"""
    once: torch.Size
    """without repetitions"""
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> _Kept:
        """A copy; what is only repeated is copied once."""
        once = tensor
        for axis, step in enumerate(tensor.stride()):
            once = once.narrow(axis, 0, 1) if step == 0 else once
        pinned = tensor.device.type == "cuda"
        numbers = None
        if not tensor.is_meta:
            numbers = torch.empty_like(once, device="cpu", pin_memory=pinned)
            # In the order of the device's stream, as is the way back: nothing waits for it here.
            numbers.copy_(once, non_blocking=pinned)
        form = (once.shape, tensor.dtype, tensor.shape, once.stride())
        return _Kept(tensor.device, numbers, *form)

    def back(self) -> Tensor:
        """The tensor, as far apart in memory as it was: kernels round by that."""
        there = torch.empty_strided(self.once, self.stride, dtype=self.dtype, device=self.device)
        if self.numbers is not None:
            there.copy_(self.numbers, non_blocking=self.numbers.is_pinned())
        return there.expand(self.size)


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.back() if isinstance(kept, _Kept) else kept


def belts(network: nn.Module) -> Iterator[Belt]:
    """The belts that bring a network's weights; one, or none."""
    found = (getattr(module, "elsewhere", None) for module in network.modules())
    yield from {belt: None for belt in found if isinstance(belt, Belt)}
