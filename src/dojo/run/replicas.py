"""How the processes of a run share the work on the weights: by default, every one has them all.

`sharding.Shards` and `deepspeed.Zero` are the other ways, and `run.start` chooses. A `Learner` and
what is trained ask these methods, and need not know which of them a run has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dojo import files
from dojo.cli import UserError
from dojo.files.records import read_table
from dojo.lazy import accelerate, late, nn
from dojo.run import checkpoint, finite
from dojo.run.averaging import Averaged

if TYPE_CHECKING:
    import accelerate
    import torch
    from torch import Tensor

    from dojo.run import fused
else:
    fused = late("dojo.run.fused")

SHARDS = "shards"  # the folder of a checkpoint that holds the processes' parts
ZERO = "deepspeed"  # that holds what DeepSpeed wrote
MADE_BY = "made_by.json"  # in it: by which stage, on how many processes


class Written(Protocol):
    """What is trained, as far as checkpoints write it."""

    def save(self, folder: Path) -> None:
        """Writes the weights, and what belongs beside them, into a checkpoint."""
        ...

    def restore(self, folder: Path) -> None:
        """Reads them back, to the bit."""
        ...

    def save_average(self, folder: Path) -> None:
        """Writes the weights to where a checkpoint has their average, which is in the model."""
        ...

    def restore_average(self, folder: Path) -> None:
        """Reads a checkpoint's average into the model."""
        ...


@dataclass(frozen=True)
class Learned:
    """What of a training is as large as the weights."""

    trained: Written
    averaged: Averaged
    optimizer: torch.optim.Optimizer


class Replicas:
    """Every process has all weights, and accelerate (DDP) averages their gradients.

    Attributes:
        sharded: this process has a part of each weight only.
        owns_storage: the weights lie in memory that something else counts on, so that they cannot
            be moved for a while.
    """

    sharded = False
    owns_storage = False

    def __init__(self, accelerator: accelerate.Accelerator) -> None:
        self.accelerator = accelerator

    # -- the weights --------------------------------------------------------------------------

    @property
    def home(self) -> torch.device:
        """Where networks are read to."""
        return self.accelerator.device

    def turn(self) -> AbstractContextManager[None]:
        """While networks are read: how many processes of a machine may do so at once."""
        return nullcontext()

    def spread(
        self, modules: Sequence[nn.Module], groups: list[dict[str, Any]]
    ) -> list[nn.Parameter]:
        """Leaves this process its part of networks that have just been read.

        Args:
            groups: of trained weights; their `params` become what the optimizer works on.
        Returns:
            The trained weights of all groups, as far as this process has them.
        """
        return [param for group in groups for param in group["params"]]

    def whole(self, network: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
        """The weights by their names, on the process that writes: a collective.

        Args:
            frozen: with those that are not trained.
        """
        raise NotImplementedError("every process has them")

    def gathered(self) -> AbstractContextManager[None]:
        """For a while the processes may ask the networks as often as they like, each for itself:
        a collective at its beginning."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """What a pass needs that does not go through the network as it was prepared."""
        return self.accelerator.autocast()

    # -- a step -------------------------------------------------------------------------------

    def prepare(
        self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, passes: int = 1
    ) -> tuple[list[nn.Module], Any]:
        """Modules and optimizer as the loop uses them.

        Args:
            passes: backward passes of a micro-batch.
        """
        network, *others = modules
        # accelerate would move the whole state of one to the device that steps as it goes.
        in_backward = isinstance(optimizer, fused.FusedOptimizer)
        placed = [None, False, *[None] * len(others)] if in_backward else None
        with warnings.catch_warnings():
            # torch 2.14 has a new name for an option that accelerate gives under its old one.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            prepared: Any = self.accelerator.prepare(
                network, optimizer, *others, device_placement=placed
            )
        return [prepared[0], *prepared[2:]], prepared[1]

    def accumulate(self, modules: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        """A micro-batch, from its forward to its backward pass."""
        return self.accelerator.accumulate(*modules)

    def clip(self, params: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Scales the gradients down to a norm, and returns what it was: equal everywhere."""
        self.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([one.grad for one in params if one.grad is not None])
        # To multiply by 1 changes nothing and goes through all gradients, which takes a CPU a tenth
        # of the optimizer's step; a GPU would have to be waited for to learn the factor.
        if norm.device.type != "cpu" or not max_norm / (norm + 1e-6) >= 1:
            nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Forgets the gradients."""
        optimizer.zero_grad(set_to_none=True)

    def state(self, optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
        """The tensors that an optimizer keeps on this process."""
        return finite.tensors_in(optimizer.state_dict())

    def anywhere(self, names: list[str]) -> list[str]:
        """Names that any process has found: a collective."""
        return names

    # -- checkpoints --------------------------------------------------------------------------

    def check_resume(self, folder: Path) -> None:
        """Refuses a checkpoint of processes that shared the work in another way.

        Raises:
            UserError: saying how it was made.
        """
        if (folder / SHARDS).is_dir():
            raise UserError(f"{folder} was made with --shard: give it to go on from it")
        if made := made_by(folder):
            raise UserError(
                f"{folder} was made {by_zero(made)}, and this run is without it: {AS_IT_WAS}"
            )

    def write(self, folder: Path, learned: Learned, rest: Callable[[Path], None]) -> None:
        """Writes a checkpoint, whole or not at all: all processes call it.

        Args:
            rest: writes what is small, on one process.
        Raises:
            TrainingStopped: the disk is full.
        """

        def fill(inside: Path) -> None:
            self.write_weights(inside, learned)
            checkpoint.save_optimizer(inside, learned.optimizer.state_dict())
            rest(inside)
            checkpoint.add_checksums(inside)

        if self.accelerator.is_main_process:
            checkpoint.write_whole(folder, fill)

    def read(self, folder: Path, learned: Learned) -> None:
        """Puts back what `write` wrote of weights, average and optimizer."""
        self.read_weights(folder, learned)
        learned.optimizer.load_state_dict(checkpoint.load_optimizer(folder))

    def write_together(
        self, folder: Path, part: Callable[[Path], Iterable[Path]], rest: Callable[[Path], None]
    ) -> None:
        """The same where every process has something to write.

        Args:
            part: writes this process's files, and returns which they are: a collective.
            rest: writes all else, on one process.
        Raises:
            TrainingStopped: the disk is full.
        """
        wait, main = self.accelerator.wait_for_everyone, self.accelerator.is_main_process
        inside = checkpoint.begin(folder) if main else checkpoint.partial_name(folder)
        wait()
        with files.room_in(folder.parent):
            own = part(inside)
            sums = {str(path.relative_to(inside)): checkpoint.settled(path) for path in own}
            several = self.accelerator.num_processes > 1
            everyones = dict(accelerate.utils.gather_object([*sums.items()]) if several else sums)
            if main:
                rest(inside)
                checkpoint.add_checksums(inside, everyones)
        if main:
            checkpoint.seal(inside, folder)

    def write_weights(self, folder: Path, learned: Learned) -> None:
        """Writes the weights and their average."""
        trained = learned.trained
        trained.save(folder)
        learned.averaged.save(folder, lambda: trained.save_average(folder))

    def read_weights(self, folder: Path, learned: Learned) -> None:
        """Puts them back."""
        trained = learned.trained
        learned.averaged.restore(folder, lambda: trained.restore_average(folder))
        trained.restore(folder)

    def close(self) -> None:
        """Ends what this has begun."""


AS_IT_WAS = (
    "what DeepSpeed's processes keep of the optimizer cannot be dealt anew; go on as it was made"
)


def made_by(folder: Path) -> dict[str, int] | None:
    """By which stage of DeepSpeed's, and on how many processes, a checkpoint was made; None where
    it was made without DeepSpeed."""
    path = folder / ZERO / MADE_BY
    return read_table(path) if path.is_file() else None


def by_zero(made: Mapping[str, int]) -> str:
    """The same in words."""
    return f"by DeepSpeed ZeRO-{made['stage']} on {made['processes']} processes"


def check_options(args: Any, untried: Mapping[str, object], other: str) -> None:
    """Refuses options that nobody has tried together with a way to share the work.

    Args:
        args: the script's options.
        untried: by name, the value at which they change nothing.
        other: that way, in the words of the message.
    Raises:
        UserError: naming the option.
    """
    groups = {name: group for group in vars(args).values() for name in vars(group)}
    for name, harmless in untried.items():
        if name in groups and getattr(groups[name], name) != harmless:
            left_out = other if _is_required(groups[name], name, harmless) else "one of them"
            raise UserError(f"--{name} does not work with {other}: leave {left_out} out")


def _is_required(group: Any, name: str, harmless: object) -> bool:
    """Whether a group of options refuses to be made without one of them."""
    try:
        type(group)(**{name: harmless})
    except ValueError:
        return True
    except TypeError:  # others have no default
        return False
    return False
