"""The optimizer step in the backward pass: each weight moves as soon as its gradient is there.

A gradient lives from the node that computed it until the weight's own step, which follows at once:
of all gradients, one layer's are in memory at a time. What needs all of them together is not to be
had: the norm over all weights is known when the weights have moved already. So a gradient is scaled
down by its own weight's norm, and the norm over all of them is what is logged.

The weights are to the bit those of plain training where no gradient is scaled down: autograd
accumulates into a weight when nothing in the backward pass needs the weight any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dojo.cli import UserError
from dojo.run import split
from dojo.run.split import Group, MakeOptimizer

# Those that count the steps of all their weights together.
_TOGETHER = ("prodigy", "schedulefree")


class Run(Protocol):
    """What is asked of a run."""

    @property
    def accelerator(self) -> Any: ...
    @property
    def args(self) -> Any: ...


def check(optimizer: str, accumulation: int) -> None:
    """Refuses what a step within the backward pass cannot be.

    Args:
        optimizer: its name.
        accumulation: micro-batches, or backward passes, of a step.
    Raises:
        ValueError: naming the flag.
    """
    if optimizer in _TOGETHER:
        raise ValueError(
            f"--fused_backward: {optimizer} looks at all weights together; take adamw, adafactor, "
            "lion, stableadamw or one with 8-bit states"
        )
    if accumulation > 1:
        raise ValueError(
            f"--fused_backward: every backward pass is a step, and here {accumulation} make one; "
            "with --gradient_accumulation_steps 1 and a larger --train_batch_size it can be used"
        )


def check_run(run: Run, passes: int = 1) -> None:
    """Refuses a run whose gradients are needed after the backward pass.

    Args:
        passes: backward passes of a step.
    Raises:
        UserError: naming what it cannot go with.
    """
    if run.accelerator.num_processes > 1 or getattr(run.args, "shard", False):
        raise UserError(
            "--fused_backward is for one process: several would have to average every gradient "
            "before its weight's step; start one, or leave it out"
        )
    if run.accelerator.mixed_precision == "fp16":
        raise UserError(
            "--fused_backward: the gradient scaler of --mixed_precision fp16 takes back a step "
            "after it has seen all gradients; take bf16"
        )
    if passes > 1:
        raise UserError(
            f"--fused_backward: every backward pass is a step, and this method has {passes} in one"
        )


class FusedOptimizer(torch.optim.Optimizer):
    """An optimizer whose steps are taken in the backward pass, weight by weight.

    Its `step` has nothing left to do. The inner optimizer has a group for each weight, so that one
    which counts the steps of a group counts right.

    Args:
        groups: of weights, with their learning rates `lr`.
        make: makes the inner optimizer of such groups.
        max_grad_norm: the norm that a weight's gradient is scaled down to.
    """

    def __init__(self, groups: Sequence[Group], make: MakeOptimizer, max_grad_norm: float) -> None:
        super().__init__([{**group} for group in groups], {})
        self.max_grad_norm = max_grad_norm
        single: list[Group] = []
        self._outer: list[Group] = []  # the group of each weight
        for group in self.param_groups:
            for weight in group["params"]:
                single.append({"params": [weight], "lr": group["lr"]})
                self._outer.append(group)
        self.inner = make(single)
        self._norms: dict[int, Tensor] = {}  # of the gradients of this step, by place
        for place, group in enumerate(single):
            # To the optimizer's own weights and not to a copy of its list: they are the same.
            group["params"][0].register_post_accumulate_grad_hook(partial(self._take, place))

    @torch.no_grad()
    def _take(self, place: int, weight: nn.Parameter) -> None:
        """A weight's gradient is whole: its step, and the end of the gradient."""
        self._norms[place] = nn.utils.clip_grad_norm_(weight, self.max_grad_norm)
        self.inner.param_groups[place]["lr"] = self._outer[place]["lr"]  # the schedule's
        step_one(self.inner, place)
        weight.grad = None

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing: the backward pass has done it."""

    def norm(self) -> Tensor:
        """The norm over all gradients since the last call, each as it was before it was scaled.

        As torch computes it of all gradients at once.
        """
        norms = [self._norms[place] for place in sorted(self._norms)]
        self._norms.clear()
        return torch.linalg.vector_norm(torch.stack(norms))

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The groups, and the inner optimizer's state."""
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Goes on from a `state_dict`.

        Raises:
            UserError: it is that of a run without --fused_backward.
        """
        if "inner" not in state_dict:
            raise UserError("the optimizer's state is that of a run without --fused_backward")
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for place, group in enumerate(self._groups_of_weights()):
            self._outer[place] = group
        self.inner.load_state_dict(state_dict["inner"])

    def _groups_of_weights(self) -> list[Group]:
        return [group for group in self.param_groups for _ in group["params"]]


def step_one(optimizer: torch.optim.Optimizer, place: int) -> None:
    """A step of one of the groups of an optimizer, which holds one weight.

    Those that go through all their weights would look at a thousand for each of a thousand.
    """
    if isinstance(optimizer, split.SplitOptimizer):
        optimizer.step_one(place, step_one)
        return
    groups = optimizer.param_groups
    optimizer.param_groups = [groups[place]]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def step_bytes(params: Sequence[Tensor]) -> int:
    """Bytes that the step of the largest weight takes beside weights, gradients and states.

    At most four float32 numbers for each of its own: those of Lion for bfloat16 weights (the weight
    and its gradient in float32, the update, another in the making) and of StableAdamW.
    """
    return 16 * max((param.numel() for param in params), default=0)
