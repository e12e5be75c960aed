"""What of a model is trained: adapters on frozen weights, or all of it; and the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dojo import rng
from dojo.cli import UserError
from dojo.finetune import lora
from dojo.finetune import whole as full
from dojo.models import sd3, sd15
from dojo.models.folder import TRANSFORMER, UNET
from dojo.run import averaging, optim
from dojo.run.run import Run


class Options(Protocol):
    """The groups of a script's options that say what is trained."""

    @property
    def lora(self) -> lora.LoraArgs: ...
    @property
    def full(self) -> full.WholeArgs: ...
    @property
    def optim(self) -> optim.OptimArgs: ...
    @property
    def ema(self) -> averaging.EmaArgs: ...


class Family(Protocol):
    """What differs between the families of models."""

    @property
    def part(self) -> str:
        """The network's name in the pipeline."""
        ...

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The frozen network."""
        ...

    def finish(self, folder: Path) -> None:
        """Writes what belongs beside weights of a training: in a checkpoint, or with a LoRA."""
        ...

    def save_whole(self, folder: Path, network: nn.Module, args: Any) -> None:
        """Writes the whole pipeline; `args` is the script's group `full`."""
        ...


@dataclass(frozen=True)
class Sd3Family:
    """Stable Diffusion 3: the shift goes with the weights."""

    config: sd3.Config
    model: sd3.ModelArgs
    shift: float
    part: str = TRANSFORMER

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The frozen MMDiT."""
        return sd3.load_transformer(self.config, self.model, dtype, device)

    def finish(self, folder: Path) -> None:
        """Writes the scheduler with the training's shift."""
        self.config.save_scheduler(folder, self.shift)

    def save_whole(self, folder: Path, network: nn.Module, args: full.FullArgs) -> None:
        """Writes the whole pipeline."""
        full.save_result(folder, network, self.config, self.model, args, self.shift)


@dataclass(frozen=True)
class Sd15Family:
    """Stable Diffusion 1: its schedule stays as it is."""

    config: sd15.Config
    model: sd15.ModelArgs
    part: str = UNET

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The frozen UNet."""
        return sd15.load_unet(self.config, self.model, dtype, device)

    def finish(self, folder: Path) -> None:
        """Nothing: the base model's scheduler is right."""

    def save_whole(self, folder: Path, network: nn.Module, args: full.WholeArgs) -> None:
        """Writes the whole pipeline."""
        full.save_result_sd15(folder, network, self.config, self.model, args)


class Trained:
    """A network of which some is trained.

    It is in eval mode: without dropout, so that two passes over one input agree.

    Args:
        is_lora: adapters are trained; else every weight that is not frozen by an option.
        with_reference: whether the model as it was will be asked for; full training keeps a frozen
            copy for that, adapters are switched off.
    """

    def __init__(
        self, run: Run, family: Family, args: Options, *, is_lora: bool, with_reference: bool
    ) -> None:
        self.run, self.family, self.args, self.is_lora = run, family, args, is_lora
        dtype = run.dtype if is_lora else args.full.dtype
        self.network: Any = family.load(dtype, run.device)
        self._copy: nn.Module | None = None
        if is_lora:
            rng.seed_global(run.seed, "adapter")
            self.params = lora.add(self.network, args.lora)
            lora.start_from(args.lora, self.network)
        else:
            self.params = full.thaw(self.network, args.full)
            if with_reference:
                self._copy = family.load(dtype, run.device).eval()
        self.network.eval()
        self.has_reference = is_lora or with_reference
        self.card_weights = lora.WEIGHTS if is_lora else ""  # as the model card calls it

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model as it was before training, in the trained network's own precision."""
        if self._copy is not None:
            # accelerate has wrapped the trained network's forward pass only.
            with self.run.accelerator.autocast():
                yield self._copy
            return
        with lora.disabled(self.network):
            yield self.network

    def save(self, folder: Path, averaged: averaging.Averaged) -> None:
        """Weights, their average and what belongs beside them, for a checkpoint."""
        if self.is_lora:
            average = folder / averaging.FOLDER
            lora.save(folder, self.network)
            averaged.save(folder, lambda: lora.save(average, self.network))
        else:
            own, average = self._places(folder)
            full.save(own, self.network)
            averaged.save(folder, lambda: full.save(average, self.network))
        self.family.finish(folder)

    def restore(self, folder: Path, averaged: averaging.Averaged) -> None:
        """Reads a checkpoint back, to the bit."""
        if self.is_lora:
            average = folder / averaging.FOLDER
            averaged.restore(folder, lambda: lora.restore(average, self.network))
            lora.restore(folder, self.network)
        else:
            own, average = self._places(folder)
            averaged.restore(folder, lambda: full.restore(average, self.network))
            full.restore(own, self.network)

    def save_result(self, folder: Path) -> Path:
        """Writes what the training was for, and returns the file or folder that holds it."""
        if not self.is_lora:
            self.family.save_whole(folder, self.network, self.args.full)
            return folder
        lora.save(folder, self.network)
        self.family.finish(folder)
        lora.export(folder, self.args.lora.lora_format)
        return folder / lora.WEIGHTS

    def _places(self, folder: Path) -> tuple[Path, Path]:
        """Where a checkpoint has the weights, and where their average."""
        return folder / self.family.part, folder / full.average(self.family.part)


def check(run: Run, args: Options, *, is_lora: bool) -> None:
    """Refuses before anything is loaded what could not be trained.

    Raises:
        UserError: the weights' precision does not fit the run's or the optimizer's.
    """
    if not is_lora:
        args.full.check(run.dtype)
    elif args.lora.lora_dropout:
        raise UserError("--lora_dropout: the network and its reference would not be comparable")
    optim.check(args.optim, trained_dtype(args, is_lora=is_lora))


def trained_dtype(args: Options, *, is_lora: bool) -> torch.dtype:
    """Of the weights that are trained."""
    return torch.float32 if is_lora else args.full.dtype


def bytes_per_weight(run: Run, args: Options, *, is_lora: bool, with_reference: bool) -> int:
    """What training one weight takes: itself, gradient, optimizer, average, autocast's copy, and
    the reference's."""
    dtype = trained_dtype(args, is_lora=is_lora)
    own = args.optim.state_bytes(dtype) + args.ema.bytes_per_weight
    if is_lora:
        return own
    autocast = run.dtype.itemsize if run.dtype != dtype else 0
    return own + autocast + (dtype.itemsize if with_reference else 0)


def result_name(*, is_lora: bool) -> str:
    """The file by which a finished run is known."""
    return lora.WEIGHTS if is_lora else full.RESULT
