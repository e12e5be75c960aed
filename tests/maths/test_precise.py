"""What a device without float64 computes: no such number is made on it, and the results agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dojo.maths import forward, precise
from dojo.maths.objective import Flow

A, B, OLD = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.3, 0.8])
TIMESTEP = torch.tensor([300.5, 999.0])


class NoDoubles(TorchFunctionMode):
    """This device is Apple's: it refuses float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


@pytest.mark.parametrize(
    "compute",
    [
        lambda: Flow().of_timestep(TIMESTEP),
        lambda: forward._clean_error(A, B, SIGMA, True),
        lambda: forward._matched(A, B, SIGMA, 0.25),
    ],
)
def test_nothing_asks_a_device_for_float64_that_has_none(
    monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Tensor]
) -> None:
    usual = compute()
    with pytest.raises(TypeError), NoDoubles():
        compute()
    monkeypatch.setattr(precise, "NARROW", frozenset({"cpu"}))
    with NoDoubles():
        found = compute()
    torch.testing.assert_close(found.double(), usual.double(), rtol=1e-5, atol=1e-6)


def test_apples_devices_are_known() -> None:
    assert "mps" in precise.NARROW
    assert precise.wide(SIGMA).dtype == torch.float64
