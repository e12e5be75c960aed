"""Weights averaged over the training: EMA, or what a schedule-free optimizer keeps by itself.

Validation and the result use the averaged weights; training goes on with its own, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError, option
from dojo.files import tensors
from dojo.lazy import diffusers, safetensors_torch, torch

if TYPE_CHECKING:
    from torch import nn

STATE = "ema.json"
FOLDER = "ema"
SHADOWS = "ema.safetensors"


@dataclass(frozen=True, kw_only=True)
class EmaArgs:
    """An exponential moving average of the trained weights."""

    use_ema: bool = option(False, common=True)
    """keep an average of the weights; validation and the result use it"""
    ema_decay: float = 0.9999
    """decay per update; early updates use (1 + n) / (10 + n) where that is smaller"""
    ema_update_every: int = 1
    """optimizer steps between two updates of the average"""
    offload_ema: bool = option(False, incidental=True)
    """keep the average in CPU memory between updates"""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError("--ema_decay must lie in [0, 1)")
        if self.ema_update_every < 1:
            raise ValueError("--ema_update_every must be at least 1")

    def check(self, optimizer: str, num_steps: int) -> None:
        """Refuses an average that would not be one.

        Raises:
            UserError: the optimizer averages already, or the run is over before the first update.
        """
        if self.use_ema and optimizer == "schedulefree":
            raise UserError("--use_ema: schedulefree averages its weights already")
        if self.use_ema and self.ema_update_every > num_steps:
            raise UserError(
                f"--ema_update_every {self.ema_update_every}: the run has {num_steps} steps only"
            )

    @property
    def bytes_per_weight(self) -> int:
        """On the device, for the estimate of memory."""
        return 4 if self.use_ema and not self.offload_ema else 0

    def step_bytes(self, params: Sequence[torch.Tensor]) -> int:
        """Bytes on the device that an update takes and gives back, when activations are gone.

        In float32, of the largest weight: the distance to it, that distance scaled, and with
        `--offload_ema` its average, which comes and goes.
        """
        numbers = 2 + self.offload_ema if self.use_ema else 0
        return 4 * numbers * max((param.numel() for param in params), default=0)


class Averaged:
    """The averaged weights of a training, if any are kept.

    Args:
        params: the trained weights.
        optimizer: asked for its own average when it is a schedule-free one.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], args: EmaArgs, optimizer: torch.optim.Optimizer
    ) -> None:
        self.params = list(params)
        self.args = args
        self.optimizer: Any = optimizer if hasattr(optimizer, "eval") else None
        self.ema: diffusers.EMAModel | None = None
        if args.use_ema:
            # Of no weights: of these it would make copies on their device.
            self.ema = diffusers.EMAModel([], decay=args.ema_decay)
            # In bfloat16 an update of one part in ten thousand would be rounded away.
            self.ema.shadow_params = [
                param.detach().to(self._home, torch.float32, copy=True) for param in self.params
            ]

    @property
    def _home(self) -> torch.device:
        return torch.device("cpu") if self.args.offload_ema else self.params[0].device

    def update(self, step: int) -> None:
        """After an optimizer step: moves the average when its turn has come."""
        if self.ema is None or step % self.args.ema_update_every:
            return
        if not self.args.offload_ema:
            self.ema.step(self.params)
            return
        # All at once they would take four bytes a weight, for which there may be no room: with
        # --fused_backward no gradient has left any.
        everyone, steps = self.ema.shadow_params, self.ema.optimization_step
        try:
            for shadow, param in zip(everyone, self.params, strict=True):
                self.ema.shadow_params = [shadow.to(param.device)]
                self.ema.optimization_step = steps  # which `step` counts
                self.ema.step([param])
                shadow.copy_(self.ema.shadow_params[0])
        finally:
            self.ema.shadow_params = everyone

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights in the model for a while."""
        if self.ema is None and self.optimizer is None:
            yield
            return
        kept = [param.detach().to("cpu", copy=True) for param in self.params]
        if self.ema is not None:
            self.ema.copy_to(self.params)
        else:
            self.optimizer.eval()
        try:
            yield
        finally:
            if self.optimizer is not None:
                self.optimizer.train()
            with torch.no_grad():  # the optimizer's way back is not exact to the bit
                for param, value in zip(self.params, kept, strict=True):
                    param.copy_(value)

    # -- checkpoints --------------------------------------------------------------------------

    def save(self, folder: Path, write: Callable[[], None]) -> None:
        """Lets `write` save the model while the moving average is in it, and how far it is."""
        if self.ema is None:
            return
        with self.applied():
            write()
        if self._rounded:
            shadows = {str(i): value for i, value in enumerate(self.ema.shadow_params)}
            tensors.save(folder / SHADOWS, shadows)
        self.save_progress(folder)

    def save_progress(self, folder: Path) -> None:
        """Writes how far the moving average is."""
        if self.ema is not None:
            state = {"optimization_step": self.ema.optimization_step}
            (folder / STATE).write_text(json.dumps(state))

    def restore(self, folder: Path, read: Callable[[], None]) -> None:
        """Lets `read` load the saved average into the model and takes it from there.

        The caller loads the training's own weights afterwards.

        Raises:
            UserError: the checkpoint was made without an average.
        """
        if self.ema is None:
            return
        self.restore_progress(folder)
        if self._rounded:
            saved = safetensors_torch.load_file(folder / SHADOWS)
            values = [saved[str(i)] for i in range(len(saved))]
        else:
            read()
            values = [param.detach() for param in self.params]
        for shadow, value in zip(self.ema.shadow_params, values, strict=True):
            shadow.copy_(value)

    def restore_progress(self, folder: Path) -> None:
        """Reads how far the moving average was.

        Raises:
            UserError: the checkpoint was made without an average.
        """
        if self.ema is None:
            return
        if not (folder / STATE).is_file():
            raise UserError(f"{folder} was made without --use_ema")
        self.ema.optimization_step = json.loads((folder / STATE).read_text())["optimization_step"]

    def shadows(self) -> Sequence[torch.Tensor]:
        """The average's tensors, wherever they are now; none where there is no moving average."""
        return self.ema.shadow_params if self.ema is not None else ()

    @property
    def _rounded(self) -> bool:
        """Whether the model, in bfloat16, cannot hold the float32 average exactly."""
        return any(param.dtype != torch.float32 for param in self.params)
