"""bfloat16 weights that go float32's way: the other half of each number is kept beside it.

A float32 number is 32 bits, and the upper 16 of them are a bfloat16 number. The network holds
those; the optimizer keeps the lower 16, puts the two together for a step, and takes them apart
again. So no step is lost, however small, weight decay works, the moments are float32, and the
weights are to the bit what float32 weights would be under the same gradients. What is saved is the
memory of a float32 gradient and of autocast's copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dojo.cli import UserError

PORTION = 2**26  # numbers that are float32 at a time, with their gradients: half a GiB
_HALF = 0x8000  # half of bfloat16's last place, in float32's bits
_KEY = "lower_halves"

Group = dict[str, Any]
MakeOptimizer = Callable[[list[Group]], torch.optim.Optimizer]


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """A bfloat16 tensor and its lower half, int16 of the same shape, as float32."""
    whole = torch.empty(upper.shape, dtype=torch.float32, device=upper.device)
    halves = _halves(whole)
    halves[..., 0] = lower
    halves[..., 1] = upper.view(torch.int16)
    whole.view(torch.int32).sub_(_HALF)
    return whole


def split_into(upper: Tensor, lower: Tensor, whole: Tensor) -> None:
    """Takes a float32 tensor apart; `join` gives it back to the bit. `whole` is used up.

    The upper half is rounded to the nearest and not cut off, so that the network computes with the
    best bfloat16 weights there are: half a place is added here and taken off again in `join`.
    """
    whole.view(torch.int32).add_(_HALF)
    halves = _halves(whole)
    lower.copy_(halves[..., 0])
    upper.view(torch.int16).copy_(halves[..., 1])


def _halves(whole: Tensor) -> Tensor:
    """The two 16-bit halves of float32 numbers: int16 [..., 2], the lower one first (every machine
    that torch computes on is little-endian)."""
    return whole.view(torch.int32).unsqueeze(-1).view(torch.int16)


def no_lower_half(weight: Tensor, *, offload: bool = False) -> Tensor:
    """What stands for lower bits of zero: int16 of the weight's shape.

    Args:
        offload: in CPU memory, where the weight's device can fetch it without a copy.
    """
    if not offload:
        return torch.full_like(
            weight, -_HALF, dtype=torch.int16, memory_format=torch.contiguous_format
        )
    pinned = weight.device.type == "cuda"
    return torch.full(weight.shape, -_HALF, dtype=torch.int16, pin_memory=pinned)


class SplitOptimizer(torch.optim.Optimizer):
    """An optimizer of float32 weights at work on bfloat16 ones.

    The inner optimizer knows float32 stand-ins, which have numbers only during a step, a portion of
    the weights at a time. It has to treat weights one by one (prodigy and schedulefree count the
    steps of a group, so a step in portions would be several).

    Args:
        groups: of bfloat16 weights, with their learning rates `lr`.
        make: makes the inner optimizer from the same groups of stand-ins.
        offload: keep the lower halves in CPU memory; the numbers are the same.
    """

    def __init__(
        self, groups: Sequence[Group], make: MakeOptimizer, *, offload: bool = False
    ) -> None:
        super().__init__([{**group} for group in groups], {})
        self.weights: list[Tensor] = []
        self.stand_ins: list[nn.Parameter] = []
        inner_groups: list[Group] = []
        for group in self.param_groups:
            stand_ins = [nn.Parameter(_nothing(weight)) for weight in group["params"]]
            self.weights += group["params"]
            self.stand_ins += stand_ins
            inner_groups.append({"params": stand_ins, "lr": group["lr"]})
        self.inner = make(inner_groups)
        self.lower = [no_lower_half(weight, offload=offload) for weight in self.weights]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every weight that has a gradient."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"] = group["lr"]  # the schedule's
        for some in self._portions():
            with self._whole(some):
                self.inner.step()

    def step_one(self, place: int, step: Callable[[torch.optim.Optimizer, int], None]) -> None:
        """A step of one weight, where each has a group of its own.

        Args:
            step: takes a step of one group of the inner optimizer.
        """
        self.inner.param_groups[place]["lr"] = self.param_groups[place]["lr"]
        with torch.no_grad(), self._whole([place]):
            step(self.inner, place)

    @contextmanager
    def _whole(self, some: Sequence[int]) -> Iterator[None]:
        """Some stand-ins in float32 with their gradients, and back into halves."""
        for i in some:
            weight, stand_in = self.weights[i], self.stand_ins[i]
            assert weight.grad is not None
            stand_in.data = join(weight, self.lower[i])
            stand_in.grad = weight.grad.float()
        yield
        for i in some:
            weight, stand_in = self.weights[i], self.stand_ins[i]
            split_into(weight.data, self.lower[i], stand_in.data)
            stand_in.data, stand_in.grad = _nothing(weight), None

    def _portions(self) -> list[list[int]]:
        """The places of the weights that have gradients, some at a time."""
        portions: list[list[int]] = []
        room = 0
        for i, weight in enumerate(self.weights):
            if weight.grad is None:
                continue
            if not portions or weight.numel() > room:
                portions.append([])
                room = PORTION
            portions[-1].append(i)
            room -= weight.numel()
        return portions

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The groups, the lower halves, and the inner optimizer's state."""
        return {**super().state_dict(), "inner": self.inner.state_dict(), _KEY: [*self.lower]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Goes on from a `state_dict`; the weights are the caller's to put back.

        Raises:
            UserError: it is that of another optimizer.
        """
        if len(state_dict.get(_KEY, ())) != len(self.lower):
            raise UserError(
                "the optimizer's state is not that of these bfloat16 weights; until 2026-11-28 "
                "--train_dtype bf16 kept less of them: such a run cannot go on"
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.inner.load_state_dict(state_dict["inner"])
        for mine, saved in zip(self.lower, state_dict[_KEY], strict=True):
            mine.copy_(saved)


def _nothing(weight: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=weight.device)
