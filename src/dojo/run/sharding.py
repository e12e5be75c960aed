"""Weights, gradients and optimizer states in parts, one for each process: `--shard`.

torch's `fully_shard` gathers the weights of a block when its turn comes, in the precision of the
run, and hands each process its part of the gradients, summed in float32. Everything else here sees
plain tensors: the optimizer, the average and the checks work on this process's parts, which are
views of what `fully_shard` holds. Checkpoints are written by all processes at once
(`torch.distributed.checkpoint`), and may be read by another number of them.

Over several machines each has a whole set of the parts, and gradients are averaged between them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dojo.cli import UserError
from dojo.run import checkpoint, exchange
from dojo.run.replicas import SHARDS, Learned, Replicas
from dojo.run.shardable import FEW


@dataclass(frozen=True)
class Part:
    """A trained weight, and what this process has of it."""

    name: str
    whole: DTensor
    mine: nn.Parameter
    """on the same memory"""
    summing: nn.Parameter | None = None
    """on the same memory too: all parts in a row, for an optimizer that adds up over all of them"""

    def around(self, local: Tensor) -> DTensor:
        """A tensor of this process as its part of one that is shared out like the weight."""
        return DTensor.from_local(
            local,
            self.whole.device_mesh,
            self.whole.placements,
            run_check=False,
            shape=self.whole.shape,
            stride=self.whole.stride(),
        )

    def in_a_row(self, local: Tensor) -> DTensor:
        """The same in one dimension, the processes' parts one after the other."""
        return DTensor.from_local(
            local.flatten(),
            self.whole.device_mesh,
            self.whole.placements,
            run_check=False,
            shape=torch.Size([self.whole.numel()]),
            stride=(1,),
        )

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Room for such a tensor of this process."""
        return torch.empty_like(self.mine, dtype=dtype, requires_grad=False)


class Shards(Replicas):
    """Every process has a part of each weight.

    Args:
        dtype: that networks compute in.
        summing: the optimizer adds up over all weights, not only over this process's parts.
    """

    sharded = True
    owns_storage = True  # of gathered weights

    def __init__(
        self, accelerator: accelerate.Accelerator, dtype: torch.dtype, *, summing: bool
    ) -> None:
        super().__init__(accelerator)
        self._summing = summing
        self._alone = False
        self.on_machine = _on_machine(accelerator.num_processes)
        self.policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self._roots: list[nn.Module] = []
        self._units: list[tuple[FSDPModule, bool]] = []  # and whether they let go after a forward
        self._parts: list[Part] = []
        self._late = False  # gradients are shared out when all micro-batches are through

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The processes, replicas over machines by parts within one, or parts alone; asked for
        when there are weights, so that a dry run joins nobody."""
        device, processes = self.accelerator.device.type, self.accelerator.num_processes
        self._alone = not dist.is_initialized()
        if self._alone:
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        machines = processes // self.on_machine
        if machines == 1:
            return init_device_mesh(device, (processes,), mesh_dim_names=("parts",))
        return init_device_mesh(
            device, (machines, self.on_machine), mesh_dim_names=("machines", "parts")
        )

    # -- the weights --------------------------------------------------------------------------

    @property
    def home(self) -> torch.device:
        """The CPU: a block at a time goes to the device, and its part stays there."""
        return torch.device("cpu")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One process of a machine after the other: there is one whole network in its memory."""
        before = self.accelerator.local_process_index
        for _ in range(before):
            self.accelerator.wait_for_everyone()
        try:
            yield
        finally:
            for _ in range(self.on_machine - before):
                self.accelerator.wait_for_everyone()

    def spread(
        self, modules: Sequence[nn.Module], groups: list[dict[str, Any]]
    ) -> list[nn.Parameter]:
        """See `Replicas`."""
        names = {
            id(param): (number, name)
            for number, module in enumerate(modules)
            for name, param in module.named_parameters()
        }
        named = [[names[id(param)] for param in group["params"]] for group in groups]
        trained = sum(param.numel() for group in groups for param in group["params"])
        everything = sum(param.numel() for module in modules for param in module.parameters())
        for group in groups:
            group["params"] = []  # nothing but the modules may hold the whole weights
        for module in modules:
            self._shard(module)
        for group, own in zip(groups, named, strict=True):
            parts = [_part(modules[n], n, name, summing=self._summing) for n, name in own]
            self._parts += parts
            group["params"] = [p.mine if p.summing is None else p.summing for p in parts]
        if groups:  # a whole gradient of adapters is small; of all weights it must not be held
            self._late = trained < FEW * everything
        return [part.mine for part in self._parts]

    def _shard(self, module: nn.Module) -> None:
        wanted = set(getattr(module, "_no_split_modules", None) or ())
        inside = [one for one in module.modules() if type(one).__name__ in wanted]
        kept = [module, *inside[-1:]]  # whose backward pass comes at once
        by_gloo = self.accelerator.device.type == "cpu" and self.parts > 1
        for one in [*reversed(inside), module]:  # blocks within blocks come first
            fully_shard(
                one, mesh=self.mesh, mp_policy=self.policy, reshard_after_forward=one not in kept
            )
            assert isinstance(one, FSDPModule)
            if by_gloo:
                exchange.over_gloo(one)
            self._units.append((one, one not in kept))
        self._roots.append(module)

    @torch.no_grad()
    def whole(self, network: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
        """See `Replicas`; on the CPU, and one weight at a time on the device."""
        found: dict[str, Tensor] = {}
        own = {name for name, _ in network.named_parameters()}
        for name, value in network.state_dict().items():
            trained = name in own and network.get_parameter(name).requires_grad
            if not (trained or frozen):
                continue
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self.accelerator.is_main_process:
                found[name] = value.to("cpu", copy=True)
        return found

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights on every process, in the precision that networks compute in."""
        for unit, _ in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit, at_once in self._units:
                unit.set_reshard_after_forward(at_once, recurse=False)
                unit.reshard()

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: the weights are gathered in the precision of the run."""
        return nullcontext()

    # -- a step -------------------------------------------------------------------------------

    def prepare(
        self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, passes: int = 1
    ) -> tuple[list[nn.Module], Any]:
        """accelerate gets the optimizer alone: it would put DDP round the modules."""
        return list(modules), self.accelerator.prepare(optimizer)

    @contextmanager
    def accumulate(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """See `Replicas`."""
        with self.accelerator.accumulate(*modules):
            if self._late:
                for module in self._roots:
                    assert isinstance(module, FSDPModule)
                    module.set_requires_gradient_sync(self.accelerator.sync_gradients)
            yield

    def clip(self, params: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Of the parts of all processes together."""
        for part in self._parts:
            gradient: Any = part.whole.grad
            part.mine.grad = None if gradient is None else gradient.to_local()
        there = [param.grad for param in params if param.grad is not None]
        total = get_total_norm(there).float().square()
        dist.all_reduce(total)  # every machine has all parts
        norm = (total / (self.accelerator.num_processes // self.parts)).sqrt()
        clip_grads_with_norm_(params, max_norm, norm)
        for part in self._parts:
            if part.summing is not None and part.mine.grad is not None:
                part.summing.grad = part.in_a_row(part.mine.grad)
        return norm

    @property
    def parts(self) -> int:
        """How many parts a weight is in."""
        return self.mesh.size(-1)

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Forgets the gradients, those that `fully_shard` holds too."""
        for part in self._parts:
            part.whole.grad = part.mine.grad = None
            if part.summing is not None:
                part.summing.grad = None
        for unit, at_once in self._units:
            if not at_once:
                unit.reshard()  # after a forward pass without a backward one it is as it was then

    def anywhere(self, names: list[str]) -> list[str]:
        """See `Replicas`."""
        return sorted(set(gather_object(names))) if self.accelerator.num_processes > 1 else names

    # -- checkpoints --------------------------------------------------------------------------

    def check_resume(self, folder: Path) -> None:
        """See `Replicas`.

        Raises:
            UserError: the checkpoint was made without `--shard`.
        """
        if not (folder / SHARDS).is_dir():
            raise UserError(f"{folder} was made without --shard: it goes on without")

    def write(self, folder: Path, learned: Learned, rest: Callable[[Path], None]) -> None:
        """Every process writes its parts; the first one writes the rest and gives the name."""
        places: dict[str, DTensor] = {}
        optimizer = self._taken_out(learned.optimizer.state_dict(), places)
        for part, shadow in self._with_average(learned):
            places[f"weights/{part.name}"] = part.around(part.mine.detach())
            if shadow is not None:
                places[f"average/{part.name}"] = part.around(shadow)

        def own(inside: Path) -> list[Path]:
            writer = dcp.FileSystemWriter(inside / SHARDS, sync_files=False)
            dcp.save(places, storage_writer=writer)
            return sorted((inside / SHARDS).glob(f"__{dist.get_rank()}_*"))

        def others(inside: Path) -> None:
            checkpoint.save_optimizer(inside, optimizer)
            learned.averaged.save_progress(inside)
            rest(inside)

        self.write_together(folder, own, others)

    def _with_average(self, learned: Learned) -> Iterator[tuple[Part, Tensor | None]]:
        shadows: Sequence[Tensor | None] = learned.averaged.shadows() or [None] * len(self._parts)
        return zip(self._parts, shadows, strict=True)

    def _taken_out(self, tree: Any, places: dict[str, DTensor], path: str = "") -> Any:
        """An optimizer's state with a note in place of every tensor that follows a weight's parts;
        these are put among `places`."""
        if isinstance(tree, Mapping):
            return {k: self._taken_out(v, places, f"{path}/{k}") for k, v in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._taken_out(v, places, f"{path}/{i}") for i, v in enumerate(tree))
        if not isinstance(tree, Tensor) or tree.dim() == 0:
            return tree
        local = tree.to_local() if isinstance(tree, DTensor) else tree
        part = self._part_at(path)
        assert local.numel() == part.mine.numel(), f"{path} is no tensor of a weight's parts"
        name = f"optimizer{path}"
        places[name] = part.around(local.view_as(part.mine))
        return {_NOTE: name, "dtype": str(local.dtype)}

    def _part_at(self, path: str) -> Part:
        """The weight that the last number on a path through an optimizer's state means."""
        return self._parts[int(next(w for w in reversed(path.split("/")) if w.isdigit()))]

    def read(self, folder: Path, learned: Learned) -> None:
        """See `Replicas`."""
        learned.averaged.restore_progress(folder)
        saved = checkpoint.load_optimizer(folder)
        rooms: dict[str, Tensor] = {}
        self._make_room(saved, rooms)
        targets: list[tuple[Tensor, Tensor]] = []
        places: dict[str, DTensor] = {}
        for part, shadow in self._with_average(learned):
            for kind, target in (("weights", part.mine), ("average", shadow)):
                if target is not None:
                    room = part.empty(target.dtype)
                    places[f"{kind}/{part.name}"] = part.around(room)
                    targets.append((target, room))
        for name, room in rooms.items():
            places[name] = self._part_at(name).around(room)
        dcp.load(places, storage_reader=dcp.FileSystemReader(folder / SHARDS))
        with torch.no_grad():
            for target, room in targets:
                target.copy_(room)
        learned.optimizer.load_state_dict(self._put_back(saved, rooms))

    def _make_room(self, tree: Any, rooms: dict[str, Tensor]) -> None:
        """Finds the notes of `_taken_out`, and makes a tensor for each."""
        if isinstance(tree, Mapping) and _NOTE in tree:
            dtype = getattr(torch, tree["dtype"].removeprefix("torch."))
            rooms[tree[_NOTE]] = self._part_at(tree[_NOTE]).empty(dtype)
        elif isinstance(tree, Mapping | list):
            for value in tree.values() if isinstance(tree, Mapping) else tree:
                self._make_room(value, rooms)

    def _put_back(self, tree: Any, rooms: Mapping[str, Tensor]) -> Any:
        if isinstance(tree, list):
            return [self._put_back(value, rooms) for value in tree]
        if not isinstance(tree, Mapping):
            return tree
        if _NOTE not in tree:
            return {key: self._put_back(value, rooms) for key, value in tree.items()}
        local = rooms[tree[_NOTE]]
        return self._part_at(tree[_NOTE]).in_a_row(local) if self._summing else local

    def close(self) -> None:
        """Ends the process group that a single process has made for itself."""
        if self._alone and dist.is_initialized():
            dist.destroy_process_group()


_NOTE = "part"


def _on_machine(processes: int) -> int:
    """How many of the processes are on this machine.

    Raises:
        UserError: the machines have different numbers of them.
    """
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
    if processes % on_machine:
        raise UserError(
            f"--shard: {processes} processes are not the same number on every machine "
            f"({on_machine} on this one)"
        )
    return on_machine


def _part(module: nn.Module, number: int, name: str, *, summing: bool) -> Part:
    whole: Any = module.get_parameter(name)
    mine = nn.Parameter(whole.to_local().detach())
    part = Part(f"{number}.{name}", whole, mine)
    if not summing:
        return part
    return replace(part, summing=nn.Parameter(part.in_a_row(mine.detach())))
