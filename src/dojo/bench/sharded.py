"""Times steps of a model whose weights are in parts beside steps of one that every process has.

Two processes hold both, on a pocket model, and take steps of one and of the other by turns, so that
whatever else the machine does falls on both. The first processes of all start the others.

    python -m dojo.bench sharded
    python -m dojo.bench sharded --model pocket-sd15 --method lora --num_processes 4
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from dojo import files
from dojo.bench import models
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, ranges
from dojo.finetune import lora, whole
from dojo.lazy import accelerate, torch
from dojo.models.family import ModelArgs
from dojo.models.opening import open_model
from dojo.run import optim
from dojo.run.optim import OptimArgs
from dojo.run.replicas import Replicas
from dojo.run.sharding import Shards

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.models.family import Model

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class ShardArgs:
    """What is compared."""

    model: Literal["pocket", "pocket-sd15", "pocket-sdxl"] = "pocket"
    """which pocket model"""
    method: Literal["full", "lora"] = "full"
    """what of it is trained"""
    batch_size: int = 16
    """pictures per process and step"""
    rank: int = 16
    """rank of the LoRA"""
    num_processes: int = 2
    """processes (GPUs) on this machine"""
    num_rounds: int = 5
    """turns of each; the fastest one counts"""
    num_steps: int = 5
    """steps of a turn"""
    mixed_precision: Literal["no", "bf16"] = "no"
    """precision of the frozen parts and the arithmetic"""
    output: Path | None = None
    """also write every number to this JSON file"""

    def __post_init__(self) -> None:
        names = "batch_size rank num_processes num_rounds num_steps"
        ranges.check(self, names, least=1)


def main(args: ShardArgs) -> None:
    """Starts the processes, or is one of them, of which the first prints a table.

    Raises:
        UserError: the model is missing.
        TrainingStopped: a process failed; its own message stands above.
    """
    folder = models.pocket(args.model)
    if args.output is not None:
        files.check_output(args.output, "--output", is_ours=lambda text: '"ratio"' in text)
    if "WORLD_SIZE" not in os.environ:
        _start(args.num_processes)
        return
    options = accelerate.DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True
    )
    accelerator = accelerate.Accelerator(
        mixed_precision=args.mixed_precision, kwargs_handlers=[options]
    )
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    model = open_model(ModelArgs(pretrained_model_name_or_path=str(folder)))
    sides: dict[str, Replicas] = {
        "whole": Replicas(accelerator),
        "sharded": Shards(accelerator, dtype, summing=False),
    }
    steps = {name: make_step(args, model, side, dtype) for name, side in sides.items()}
    result = alternate(steps, args, accelerator.wait_for_everyone)
    if accelerator.is_main_process:
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(table(result))
    accelerator.end_training()


def _start(num_processes: int) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc_per_node", str(num_processes), "-m", "dojo.bench", "sharded", *sys.argv[1:]]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    if subprocess.run(words, env=environment, check=False).returncode:
        raise TrainingStopped("a process failed; what it said stands above")


class _Length:
    num_steps, samples_per_step = 1, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device


def make_step(args: ShardArgs, model: Model, side: Replicas, dtype: torch.dtype) -> Step:
    """One optimizer step on inputs that stay the same."""
    device = side.accelerator.device
    torch.manual_seed(0)
    with side.turn():
        full = args.method == "full"
        network = model.load_network(torch.float32 if full else dtype, side.home)
        if full:
            params = whole.thaw(network, whole.WholeArgs())
        else:
            params = lora.add(network, lora.LoraArgs(rank=args.rank))
        groups: list[dict[str, Any]] = [{"params": params}]
        del params
        own = side.spread([network], groups)
    optimizer, _ = optim.make(groups, OptimArgs(), _Length(device))
    modules, prepared = side.prepare([network], optimizer)
    size = models.native_size(args.model)
    shape = model.latent_shape(size, size)
    noisy, level, conditions = model.meta_inputs(args.batch_size, shape, dtype)

    def real(empty: Tensor) -> Tensor:
        if empty.is_floating_point():
            return torch.rand(empty.shape, device=device).to(empty.dtype)
        return torch.randint(1000, empty.shape, device=device)

    inputs = real(noisy), real(level), {name: real(value) for name, value in conditions.items()}

    def step() -> None:
        with side.accumulate(modules):
            loss = model.predict(modules[0], *inputs, dtype).square().mean()
            side.accelerator.backward(loss)
        side.clip(own, 1.0)
        prepared.step()
        side.zero_grad(prepared)

    return step


def alternate(steps: dict[str, Step], args: ShardArgs, wait: Callable[[], None]) -> dict[str, Any]:
    """Seconds of a step in every round, by side, and the ratio of the fastest."""
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.num_rounds):
        for name, step in steps.items():
            wait()
            began = time.perf_counter()
            for _ in range(args.num_steps):
                step()
            wait()
            found[name].append((time.perf_counter() - began) / args.num_steps)
    return {
        **{f"{name}_seconds": seconds for name, seconds in found.items()},
        "ratio": min(found["sharded"]) / min(found["whole"]),
        "ratio_by_round": [a / b for a, b in zip(found["sharded"], found["whole"], strict=True)],
        "args": {key: str(value) for key, value in asdict(args).items()},
    }


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    whole_, sharded = result["whole_seconds"], result["sharded_seconds"]
    row = {
        "model": result["args"]["model"],
        "method": result["args"]["method"],
        "whole, s a step (fastest, median)": f"{min(whole_):.3f}, {median(whole_):.3f}",
        "sharded, s a step (fastest, median)": f"{min(sharded):.3f}, {median(sharded):.3f}",
        "ratio of the fastest": f"{result['ratio']:.2f}",
        "median ratio of rounds": f"{median(result['ratio_by_round']):.2f}",
    }
    return markdown([row])
