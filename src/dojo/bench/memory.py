"""Compares the memory that a dry run computes, phase by phase, with the peaks on a GPU.

A script is started twice, as a user would start it: with `--dry_run`, and for a few steps with
empty caches and a validation picture. Both count tensors; what the allocator and CUDA itself take
comes on top of both. It fails when a phase is further off than `--tolerance`.

    python -m dojo.bench memory --model sd35-medium --method lora --batch_size 4
    python -m dojo.bench memory --model sdxl --method full --batch_size 1 -- --optimizer adafactor

What follows `--` goes to the script as it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dojo.bench import supervised
from dojo.bench.supervised import SupervisedArgs
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, UserError, ranges
from dojo.files.records import read_table
from dojo.lazy import torch

SLACK = 0.1  # GiB that no phase is blamed for: workspaces of kernels


@dataclass(frozen=True, kw_only=True)
class MemoryArgs(SupervisedArgs):
    """Which training is measured; the defaults are those of the script where it has the option."""

    tolerance: float = 0.1
    """largest share of the measured peak that a computed one may be off"""
    num_steps: int = 2
    """optimizer steps that are measured"""
    warmup_steps: int = 1
    """optimizer steps before them, which are measured too"""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check(self, "tolerance", above=0)
        if self.num_processes > 1:
            raise ValueError("--num_processes: memory is measured with one process")


@dataclass(frozen=True)
class Compared:
    """A phase of a run: GiB of tensors as computed and as measured."""

    phase: str
    computed: float
    measured: float

    @property
    def off(self) -> float:
        """How far the computed peak is from the measured one, as a share of it; with its sign."""
        return (self.computed - self.measured) / self.measured if self.measured else 0.0

    def fits(self, tolerance: float) -> bool:
        """Whether that is near enough; a tenth of a GiB always is."""
        return abs(self.computed - self.measured) <= max(SLACK, tolerance * self.measured)


def main(args: MemoryArgs, extra: Sequence[str] = ()) -> None:
    """Measures, prints.

    Raises:
        UserError: there is no GPU.
        TrainingStopped: a phase is further off than the tolerance, or the script failed.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "python -m dojo.bench memory needs a GPU: on a CPU a process's memory is that of its "
            "libraries for the most part, and nothing that is computed could be compared with it"
        )
    if args.output is not None:
        supervised.check_numbers(args)
    compared = compare(*measure(args, extra))
    print(markdown([row(one, args.tolerance) for one in compared]))
    if args.output is not None:
        found = [{**vars(one), "images_per_s": None} for one in compared]
        supervised.write_numbers(args, found)
    refuse(compared, args.tolerance)


def refuse(compared: Sequence[Compared], tolerance: float) -> None:
    """Fails where a phase is too far off.

    Raises:
        TrainingStopped: naming them all.
    """
    wrong = [
        f"{one.phase} {one.computed:.2f} computed, {one.measured:.2f} measured ({one.off:+.0%})"
        for one in compared
        if not one.fits(tolerance)
    ]
    if wrong:
        raise TrainingStopped(f"further off than {tolerance:.0%}: {'; '.join(wrong)}")


def compare(computed: Mapping[str, float], measured: Mapping[str, float]) -> list[Compared]:
    """The phases that both know, in the order of the computed ones.

    A phase that was computed and did not come, or came and was not computed, is compared with 0.

    Args:
        computed, measured: GiB by phase.
    """
    names = [*computed, *(name for name in measured if name not in computed)]
    return [Compared(name, computed.get(name, 0.0), measured.get(name, 0.0)) for name in names]


def row(one: Compared, tolerance: float) -> dict[str, str]:
    """A phase's row of the table."""
    return {
        "phase": one.phase,
        "computed, GiB": f"{one.computed:.2f}",
        "measured, GiB": f"{one.measured:.2f}",
        "off": f"{one.off:+.1%}",
        f"within {tolerance:.0%}": "yes" if one.fits(tolerance) else "no",
    }


def measure(
    args: SupervisedArgs, extra: Sequence[str] = ()
) -> tuple[dict[str, float], dict[str, float]]:
    """GiB by phase of a training, computed and measured."""
    model, work_dir = supervised.model_folder(args), args.work_dir.absolute()
    data = supervised.make_data(args, work_dir / "datas")
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="memory-", dir=work_dir) as name:
        folder = Path(name)
        own = ["--validation_prompt", "random colours 0", "--validation_inference_steps", "2"]
        own += ["--latent_cache_dir", str(folder / "cache"), *extra]
        run = folder / "runs" / "run"
        _, *words = supervised.command(args, model, data, run, own)
        begin = [sys.executable, "-m", "dojo.bench.watched"]
        computed = _computed([*begin, str(folder / "computed.json"), *words, "--dry_run"])
        peaks = folder / "peaks.json"
        goal = args.warmup_steps + args.num_steps
        supervised.follow([*begin, str(peaks), *words], run / "metrics.jsonl", goal, done=_steps)
        measured = {phase: size / 2**30 for phase, size in read_table(peaks).items()}
    measured.pop("loading", None)
    return computed, measured


def _steps(rows: supervised.Rows) -> int:
    """Optimizer steps that some rows hold; a validation's row is none."""
    return sum("images_per_s" in one for one in rows)


def _computed(words: Sequence[str]) -> dict[str, float]:
    """What a dry run computes.

    Raises:
        TrainingStopped: it failed.
    """
    result = subprocess.run(words, stdout=2, check=False, env=supervised.environment())
    file: Any = Path(words[3])
    if result.returncode or not file.is_file():
        raise TrainingStopped(f"the dry run failed with exit code {result.returncode}")
    return json.loads(file.read_text())
