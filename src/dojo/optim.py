"""Length of a training, its optimizer and the schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from diffusers.optimization import get_scheduler
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimArgs:
    """Length of the training, batch, AdamW and its schedule."""

    train_batch_size: int = 4
    """samples per process and micro-step"""
    gradient_accumulation_steps: int = 1
    """micro-steps per optimizer step"""
    max_train_steps: int | None = None
    """optimizer steps; wins over num_train_epochs; both unset is 1000 steps"""
    num_train_epochs: int | None = None
    """passes over the data"""
    steps_per_epoch: int | None = None
    """optimizer steps that count as one epoch; unset is what the data set takes"""
    learning_rate: float = 1e-4
    """learning rate after warm-up"""
    scale_lr: bool = False
    """multiply the learning rate by batch size, accumulation steps and processes"""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """shape of the learning rate over the steps"""
    lr_warmup_steps: int = 0
    """optimizer steps of linear warm-up (every shape but constant)"""
    lr_num_cycles: int = 1
    """hard restarts of cosine_with_restarts"""
    lr_power: float = 1.0
    """power of polynomial"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.999
    """decay of the second moment"""
    adam_weight_decay: float = 1e-4
    """decoupled weight decay"""
    adam_epsilon: float = 1e-8
    """added to the root of the second moment"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""

    def __post_init__(self) -> None:
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "num_train_epochs",
            "steps_per_epoch",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("--learning_rate and --max_grad_norm must be positive")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError("--lr_warmup_steps needs --lr_scheduler constant_with_warmup")

    def samples_per_step(self, num_processes: int) -> int:
        """The effective batch size."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes

    def epoch_length(self, num_samples: int, num_processes: int) -> float:
        """Optimizer steps per epoch; the stream of samples knows no last, short batch."""
        return self.steps_per_epoch or num_samples / self.samples_per_step(num_processes)

    def num_steps(self, num_samples: int, num_processes: int) -> int:
        """Optimizer steps of the whole run."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is None:
            return 1000
        if self.steps_per_epoch is not None:
            return self.num_train_epochs * self.steps_per_epoch
        samples = self.num_train_epochs * num_samples
        return -(-samples // self.samples_per_step(num_processes))  # rounded up, in integers


class Length(Protocol):
    """What a schedule has to know of a run."""

    num_steps: int
    samples_per_step: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...


def make(
    params: Sequence[nn.Parameter], args: OptimArgs, run: Length
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Fused AdamW and its schedule over the optimizer steps of the run.

    The schedule is stepped once per optimizer step on every process, whatever their number; it
    must not be handed to accelerate, which would step it once per process.
    """
    lr = args.learning_rate * (run.samples_per_step if args.scale_lr else 1)
    optimizer = torch.optim.AdamW(
        params,
        lr=lr,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=run.device.type in ("cuda", "cpu"),
    )
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=run.num_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    return optimizer, schedule
