"""bitsandbytes' optimizers of 8-bit states, and what becomes of them on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes  # pyright: ignore[reportMissingImports]
import torch

_KINDS: Mapping[str, Any] = {
    "adamw8bit": bitsandbytes.optim.AdamW8bit,
    "lion8bit": bitsandbytes.optim.Lion8bit,
    "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit,
    "paged_lion8bit": bitsandbytes.optim.PagedLion8bit,
}


def make(
    kind: str, groups: list[dict[str, Any]], options: Mapping[str, Any], device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer with 8-bit states; weights of fewer than 4,096 numbers have float32 ones.

    Args:
        kind: its name among the choices of --optimizer.
        options: `lr`, `betas`, `weight_decay`, `eps`.
        device: of the weights; on a CPU nothing is paged.
    """
    common = dict(options)
    if "lion" in kind:
        common.pop("eps")
    if device.type == "cpu":  # where bitsandbytes warns and does the same
        return _KINDS[kind.removeprefix("paged_")](groups, **common)
    made = _KINDS[kind]
    return (_paged_again(made) if kind.startswith("paged") else made)(groups, **common)


def _paged_again(kind: Any) -> Any:
    """A paged optimizer whose state is paged after a resume too.

    bitsandbytes 0.50 puts what it reads back onto the device as it does any tensor, where it stays.
    """

    class Paged(kind):
        read = False

        def load_state_dict(self, state_dict: Any, move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device)
            self.read = True

        def step(self, closure: Any = None) -> Any:
            # Not when it is read: accelerate reads it a second time, and pages are never freed.
            if self.read:
                page(self)
                self.read = False
            return super().step(closure)

    return Paged


def page(optimizer: Any) -> None:
    """Moves the states of an optimizer into pages that may leave the device."""
    for weight, state in optimizer.state.items():
        for name in ("state1", "state2"):
            held = state.get(name)
            if held is not None and not getattr(held, "is_paged", False):
                state[name] = optimizer.get_state_buffer(weight, dtype=held.dtype)
                state[name].copy_(held)
