"""Which networks are on the device: those that compute now.

On a CPU nothing moves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor, nn

_CPU = torch.device("cpu")


@contextmanager
def at_work(network: nn.Module, device: torch.device) -> Iterator[None]:
    """A frozen network is on the device for a while, and then where it was."""
    before = next(network.parameters()).device
    network.to(device)
    try:
        yield
    finally:
        network.to(before)


@contextmanager
def away(network: nn.Module, device: torch.device, shelter: torch.device = _CPU) -> Iterator[None]:
    """A network that nobody asks leaves the device for a while; an optimizer keeps its parameters.

    Only plain tensors leave, the codes and scales of packed weights among them. Shards stay: they
    have another owner.

    Args:
        device: that it is to leave.
        shelter: where it stays meanwhile.
    """
    moved: list[Tensor] = []
    if device != shelter:
        every = itertools.chain(network.parameters(), network.buffers())
        moved = [one for one in every if _is_plain(one) and one.device.type == device.type]
    for one in moved:
        one.data = one.data.to(shelter)
    _give_back(device)
    try:
        yield
    finally:
        for one in moved:
            one.data = one.data.to(device)


class Turns(ModelHook):
    """Of some networks that nobody trains, the one that computes is on the device, and no other.

    diffusers' `enable_model_cpu_offload` leaves the last text encoder there while the first is
    asked once more, for the negative prompt. Its pipelines read `execution_device` of a hook like
    this one.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        self.execution_device = device
        self.there: nn.Module | None = None
        for network in networks:
            add_hook_to_module(network.to(_CPU), self)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by accelerate before the network computes."""
        if self.there is not module:
            if self.there is not None:
                self.there.to(_CPU)
                _give_back(self.execution_device)
            self.there = module.to(self.execution_device)
        return send_to_device((args, kwargs), self.execution_device)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor) and type(tensor.data) is Tensor


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
