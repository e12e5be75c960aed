"""Training every weight of a network: which ones, checkpoints, and the pipeline that results.

A checkpoint holds `transformer/` (and `transformer_ema/`), for a UNet `unet/` (and `unet_ema/`), as
diffusers reads them; the result is a whole pipeline folder, and of SD3 on request one file with the
original names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dojo.cli import UserError, option
from dojo.finetune.contract import Trained
from dojo.finetune.offload import keep_activations_on_cpu
from dojo.lazy import torch
from dojo.maths.objective import Objective
from dojo.models import attention, loaded
from dojo.models.family import Model, ModelArgs, Saving
from dojo.models.opening import facts_of
from dojo.models.precisions import dtype_of
from dojo.run.averaging import EmaArgs
from dojo.run.optim import OptimArgs
from dojo.run.run import Run

if TYPE_CHECKING:
    from torch import nn

_EMA = "_ema"
RESULT = "model_index.json"
PRESETS = {"adaln": r"(.*\.)?(norm1|norm1_context|norm_out)\.linear\..*"}


@dataclass(frozen=True, kw_only=True)
class WholeArgs:
    """What is trained, and in which form the result is saved."""

    train_dtype: Literal["fp32", "bf16"] = "fp32"
    """the trained weights: fp32 masters (with autocast by --mixed_precision), or bf16 whose lower
    16 bits the optimizer keeps (adamw, lion, adafactor and those with 8-bit states): float32's
    steps, a fifth less memory"""
    freeze: tuple[str, ...] = ()
    """weights that stay as they are: adaln (SD3's modulation layers, a third of SD3.5-Medium's
    weights), parts of names (pos_embed, context_embedder, transformer_blocks.0, conv_in), or re:
    and a regular expression over full names"""
    save_dtype: Literal["fp32", "fp16", "bf16"] = option("fp32", incidental=True)
    """precision of the result's network (and single file); checkpoints keep the training's own"""
    max_shard_size: str = option("5GB", incidental=True)
    """largest file of the result's network"""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(GB|MB|KB)", self.max_shard_size):
            raise ValueError("--max_shard_size is a number with GB, MB or KB, such as 5GB")

    def check(self, dtype: torch.dtype) -> None:
        """Refuses bfloat16 weights in a run that computes in another precision.

        Raises:
            UserError: naming the flag that is missing.
        """
        if self.train_dtype == "bf16" and dtype != torch.bfloat16:
            raise UserError("--train_dtype bf16 needs --mixed_precision bf16")

    @property
    def dtype(self) -> torch.dtype:
        """Of the trained weights."""
        return dtype_of(self.train_dtype)

    @property
    def saving(self) -> Saving:
        """The form of the result."""
        return Saving(dtype=dtype_of(self.save_dtype), max_shard_size=self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class FileArgs(WholeArgs):
    """The same for a family that other programs know as one file too."""

    single_file: bool = option(False, incidental=True)
    """also write model.safetensors: all of it with the original names, for other programs"""

    @property
    def saving(self) -> Saving:
        """The form of the result."""
        return replace(super().saving, single_file=self.single_file)


@dataclass(frozen=True, kw_only=True)
class FullArgs(FileArgs):
    """The same for SD3, whose file may go without T5."""

    single_file_without_t5: bool = option(False, incidental=True)
    """leave T5 out of that file"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.single_file_without_t5 and not self.single_file:
            raise ValueError("--single_file_without_t5 needs --single_file")

    @property
    def saving(self) -> Saving:
        """The form of the result."""
        return replace(super().saving, largest_encoder=not self.single_file_without_t5)


def average(part: str) -> str:
    """The folder of a checkpoint that holds the averaged weights of a part."""
    return part + _EMA


def thaw(network: nn.Module, args: WholeArgs) -> list[nn.Parameter]:
    """Makes the weights trainable but for the frozen ones, and returns those that train.

    What nothing reads is left alone: its gradient is zero, and weight decay would eat it.

    Raises:
        UserError: a pattern of `--freeze` matches nothing, or everything is frozen.
    """
    names = [name for name, _ in network.named_parameters()]
    still = facts_of(network).unread(names)
    for word in args.freeze:
        pattern = PRESETS.get(word.lower(), rf"(.*\.)?{re.escape(word)}(\..*)?")
        if word.startswith("re:"):
            pattern = word.removeprefix("re:")
        try:
            found = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"--freeze: {word!r} is no regular expression ({error})") from error
        if not found:
            raise UserError(
                f"--freeze: {word!r} matches no weight; there are, for example, "
                f"{', '.join(names[:4])}"
            )
        still |= found
    for name, param in network.named_parameters():
        param.requires_grad_(name not in still)
    params = [param for param in network.parameters() if param.requires_grad]
    if not params:
        raise UserError(f"--freeze {' '.join(args.freeze)} leaves nothing to train")
    return params


def save(folder: Path, network: Any) -> None:
    """Writes the network in its own precision, for a checkpoint."""
    network.save_pretrained(folder)


def restore(folder: Path, network: Any) -> None:
    """Reads a checkpoint's network back, to the bit.

    Raises:
        UserError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder.parent} is no checkpoint of full fine-tuning: no {folder.name}")
    flag = "--resume_from_checkpoint"
    saved = loaded.network(type(network), folder, flag=flag, dtype=network.dtype)
    network.load_state_dict(saved.state_dict())


class AllWeights(Trained):
    """Every weight that `--freeze` leaves, in the precision of `--train_dtype`.

    A checkpoint holds the network as diffusers reads it, and a second one for the average. The
    reference is a frozen copy, if one was asked for.
    """

    result_name = RESULT
    card_weights = ""
    reference_is_free = False
    result_has_frozen = True

    def __init__(self, run: Run, args: WholeArgs) -> None:
        super().__init__(run)
        self.args = args
        self.has_reference = False
        self._copy: nn.Module | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of `--train_dtype`."""
        return self.args.dtype

    def check(self, args: OptimArgs) -> None:
        """See `Trained`."""
        self.args.check(self.run.dtype)
        super().check(args)

    def check_model(self, args: ModelArgs) -> None:
        """See `Trained`; every option goes."""

    def adapt(self, network: nn.Module) -> list[nn.Parameter]:
        """Makes the weights trainable."""
        return thaw(network, self.args)

    def stored(self, network: nn.Module) -> nn.Module:
        """In `--train_dtype`, the frozen weights too."""
        return network.to(self.dtype)

    def bytes_per_weight(self, optim: OptimArgs, ema: EmaArgs) -> int:
        """See `Trained`."""
        autocast = self.run.dtype.itemsize if self.run.dtype != self.dtype else 0
        return optim.state_bytes(self.dtype) + ema.bytes_per_weight + autocast

    def reference_bytes(self, network: nn.Module) -> int:
        """A copy, of the weights that `--freeze` leaves as they are too."""
        weights = sum(param.numel() for param in network.parameters())
        return self.dtype.itemsize * weights + sum(one.nbytes for one in network.buffers())

    def load(
        self,
        model: Model,
        objective: Objective,
        *,
        with_reference: bool = False,
        text_encoders: Sequence[nn.Module] = (),
        text_rates: Sequence[float] = (),
    ) -> None:
        """Reads the network, and a second time for the reference; see `Trained`."""
        assert not text_encoders, "text encoders are trained by adapters only"
        self.model, self.objective = model, objective
        replicas = self.run.replicas
        with replicas.turn():
            self.network = model.load_network(self.dtype, replicas.home)
            attention.install(self.network, model.args.attention_backend)
            if model.args.activations_on_cpu:
                keep_activations_on_cpu(self.network)
            self.modules = [self.network]
            self.groups = [{"params": self.adapt(self.network)}]
            self.spread()
            self.has_reference = with_reference
            if with_reference:
                self._copy = copy = model.load_network(self.dtype, replicas.home).eval()
                attention.install(copy, model.args.attention_backend)
                replicas.spread([copy], [])
        self.network.eval()

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The copy."""
        assert self._copy is not None, "load with_reference"
        # accelerate has wrapped the trained network's forward pass only.
        with self.run.replicas.autocast():
            yield self._copy

    def save(self, folder: Path) -> None:
        """See `Trained`."""
        save(folder / self.model.part, self.network)
        self.model.finish(folder, self.objective)

    def restore(self, folder: Path) -> None:
        """See `Trained`."""
        restore(folder / self.model.part, self.network)

    def save_average(self, folder: Path) -> None:
        """See `Trained`."""
        save(folder / average(self.model.part), self.network)

    def restore_average(self, folder: Path) -> None:
        """See `Trained`."""
        restore(folder / average(self.model.part), self.network)

    def save_result(self, folder: Path) -> Path:
        """Writes the whole pipeline."""
        self.model.save_whole(folder, self.network, self.args.saving, self.objective)
        return folder
