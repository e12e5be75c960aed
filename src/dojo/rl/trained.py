"""The policy's weights: adapters on a frozen model, or all of it; and the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dojo import averaging, full, lora, optim, rng, rollout, sd3
from dojo.gaussian import Gaussian
from dojo.rl.args import FinetuneArgs
from dojo.rl.episodes import Steering
from dojo.training import Run


class Options(Protocol):
    """The groups of a script's options that say what is trained."""

    @property
    def model(self) -> sd3.ModelArgs: ...
    @property
    def finetune(self) -> FinetuneArgs: ...
    @property
    def lora(self) -> lora.LoraArgs: ...
    @property
    def full(self) -> full.FullArgs: ...
    @property
    def optim(self) -> optim.OptimArgs: ...
    @property
    def ema(self) -> averaging.EmaArgs: ...


class Trained:
    """A transformer of which some is trained.

    Args:
        with_reference: whether the model as it was will be asked for; full training keeps a frozen
            copy for that, adapters are switched off.
    """

    def __init__(
        self, run: Run, config: sd3.Config, args: Options, shift: float, *, with_reference: bool
    ) -> None:
        self.run, self.config, self.args, self.shift = run, config, args, shift
        self.is_lora = args.finetune.finetune == "lora"
        dtype = run.dtype if self.is_lora else args.full.dtype
        self.transformer: Any = sd3.load_transformer(config, args.model, dtype, run.device)
        self._copy: nn.Module | None = None
        if self.is_lora:
            rng.seed_global(run.seed, "adapter")
            self.params = lora.add(self.transformer, args.lora)
            lora.start_from(args.lora, self.transformer)
        else:
            self.params = full.thaw(self.transformer, args.full)
            if with_reference:
                self._copy = sd3.load_transformer(config, args.model, dtype, run.device).eval()
        # No dropout on either side, or sampling and training were two policies.
        self.transformer.eval()
        self.has_reference = self.is_lora or with_reference
        self.card_weights = lora.WEIGHTS if self.is_lora else ""  # as the model card calls it

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model as it was before training, in the policy's own precision."""
        if self._copy is not None:
            # accelerate has wrapped the policy's forward pass only.
            with self.run.accelerator.autocast():
                yield self._copy
            return
        with lora.disabled(self.transformer):
            yield self.transformer

    @torch.no_grad()
    def before(
        self,
        steering: Steering,
        embeds: sd3.Embeds,
        step: rollout.Step,
        number: int,
        plan: rollout.Plan,
    ) -> tuple[Gaussian, Tensor]:
        """What the reference would do in a step: `rollout.predict` of the model as it was."""
        with self.run.phase("reference", wait=True), self.reference() as network:
            velocity = steering.velocity(network, embeds)
            return rollout.predict(velocity, step.latents, number, plan, step.copies)

    def save(self, folder: Path, averaged: averaging.Averaged) -> None:
        """Weights, their average and the scheduler, for a checkpoint."""
        if self.is_lora:
            average = folder / averaging.FOLDER
            lora.save(folder, self.transformer)
            averaged.save(folder, lambda: lora.save(average, self.transformer))
        else:
            full.save(folder / full.TRANSFORMER, self.transformer)
            averaged.save(folder, lambda: full.save(folder / full.AVERAGE, self.transformer))
        self.config.make_scheduler(self.shift).save_pretrained(folder / "scheduler")

    def restore(self, folder: Path, averaged: averaging.Averaged) -> None:
        """Reads a checkpoint back, to the bit."""
        if self.is_lora:
            average = folder / averaging.FOLDER
            averaged.restore(folder, lambda: lora.restore(average, self.transformer))
            lora.restore(folder, self.transformer)
        else:
            averaged.restore(folder, lambda: full.restore(folder / full.AVERAGE, self.transformer))
            full.restore(folder / full.TRANSFORMER, self.transformer)

    def save_result(self, folder: Path) -> Path:
        """Writes what the training was for, and returns the file or folder that holds it."""
        if not self.is_lora:
            full.save_result(
                *(folder, self.transformer, self.config),
                *(self.args.model, self.args.full, self.shift),
            )
            return folder
        lora.save(folder, self.transformer)
        self.config.make_scheduler(self.shift).save_pretrained(folder / "scheduler")
        lora.export(folder, self.args.lora.lora_format)
        return folder / lora.WEIGHTS


def check(run: Run, args: Options) -> None:
    """Refuses before anything is loaded what could not be trained.

    Raises:
        UserError: the weights' precision does not fit the run's or the optimizer's.
    """
    if args.finetune.finetune == "full":
        args.full.check(run.dtype)
    optim.check(args.optim, trained_dtype(args))


def trained_dtype(args: Options) -> torch.dtype:
    """Of the weights that are trained."""
    return torch.float32 if args.finetune.finetune == "lora" else args.full.dtype


def bytes_per_weight(run: Run, args: Options, *, with_reference: bool) -> int:
    """What training one weight takes: itself, gradient, optimizer, average, autocast's copy, and
    the reference's."""
    dtype = trained_dtype(args)
    own = args.optim.state_bytes(dtype) + args.ema.bytes_per_weight
    if args.finetune.finetune == "lora":
        return own
    autocast = run.dtype.itemsize if run.dtype != dtype else 0
    return own + autocast + (dtype.itemsize if with_reference else 0)


def result_name(args: Options) -> str:
    """The file by which a finished run is known."""
    return lora.WEIGHTS if args.finetune.finetune == "lora" else full.RESULT
