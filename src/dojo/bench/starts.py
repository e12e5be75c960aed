"""Times what is waited for beside training, of two checkouts by turns: start, end, `--help`.

Each round starts the same small LoRA of the pocket SD3 in both checkouts, with empty caches and
with full ones, and asks both for their help. What is compared is the wall time from the start of
the process to its first step, and from its last step to its end; steps themselves are left out.

    git worktree add --detach /tmp/before v1.0
    python -m dojo.bench starts --before /tmp/before --after . --num_rounds 5
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dojo import files
from dojo.bench import processes, supervised
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, UserError, ranges
from dojo.files.records import read_rows

SCRIPT, MODEL, DATA = "train_lora_sd3.py", "models/pocket-sd3", "datas/pocket-hearts"
# What is timed, in words, and the largest share of the former time that is aimed at.
GOALS = {
    "warm": ("start to first step, caches full", 0.5),
    "cold": ("start to first step, caches empty", 0.6),
    "end": ("last step to end", 0.5),
    "help": ("--help", 0.2),
}
_SIDES = ("before", "after")
_POLL = 0.005  # seconds: far less than what is timed


@dataclass(frozen=True, kw_only=True)
class StartArgs:
    """What is compared."""

    before: Path
    """the checkout that the other one is compared with"""
    after: Path = Path()
    """the other checkout"""
    num_rounds: int = 5
    """times that each is started, by turns"""
    num_steps: int = 3
    """steps of a run, which are not timed"""
    work_dir: Path = Path("outputs/starts")
    """folder of caches and runs, made anew"""
    output: Path | None = None
    """also write every number to this JSON file"""

    def __post_init__(self) -> None:
        ranges.check(self, "num_rounds num_steps", least=1)


def main(args: StartArgs) -> None:
    """Starts both by turns, prints.

    Raises:
        UserError: a checkout lacks the script, the model or the pictures.
        TrainingStopped: a run failed.
    """
    sides = {name: getattr(args, name).absolute() for name in _SIDES}
    for name, folder in sides.items():
        for part in (SCRIPT, MODEL, DATA, "src/dojo"):
            if not (folder / part).exists():
                raise UserError(f"--{name}: {folder} has no {part}")
    if args.output is not None:
        files.check_output(args.output, "--output", is_ours=lambda text: '"rounds"' in text)
    place = args.work_dir.absolute()
    found: dict[str, dict[str, list[float]]] = {
        name: {what: [] for what in GOALS} for name in _SIDES
    }
    for name, folder in sides.items():  # compiled modules and full caches
        run(args, folder, place / name, "full", fresh=True)
    for number in range(args.num_rounds):
        print(f"round {number + 1} of {args.num_rounds}", file=sys.stderr)
        # Who comes second finds the other's libraries in memory, so that they change places.
        for name in _SIDES if number % 2 == 0 else reversed(_SIDES):
            folder = sides[name]
            found[name]["cold"].append(run(args, folder, place / name, "new", fresh=True)[0])
            first, end = run(args, folder, place / name, "full")
            found[name]["warm"].append(first)
            found[name]["end"].append(end)
            found[name]["help"].append(ask_help(folder))
    result = {
        "args": {name: str(value) for name, value in asdict(args).items()},
        "ratios": ratios(found),
        "rounds": found,
    }
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(found))


def run(
    args: StartArgs, folder: Path, place: Path, cache: str, *, fresh: bool = False
) -> tuple[float, float]:
    """Seconds to the end of the first step, and from the end of the last one to the process's.

    Args:
        folder: the checkout.
        cache: name of the folder of caches in `place`.
        fresh: it is emptied first.
    Raises:
        TrainingStopped: the run failed.
    """
    output = place / "run"
    shutil.rmtree(output, ignore_errors=True)
    if fresh:
        shutil.rmtree(place / cache, ignore_errors=True)
    values = {
        "pretrained_model_name_or_path": MODEL,
        "dataset_name": DATA,
        "resolution": 64,
        "max_sequence_length": 24,
        "train_batch_size": 4,
        "max_train_steps": args.num_steps,
        "logging_steps": 1,
        "seed": 0,
        "output_dir": output,
        "latent_cache_dir": place / cache,
    }
    words = [word for flag, value in values.items() for word in (f"--{flag}", str(value))]
    return follow(
        [sys.executable, SCRIPT, *words], folder, output / "metrics.jsonl", args.num_steps
    )


def follow(words: Sequence[str], folder: Path, metrics: Path, steps: int) -> tuple[float, float]:
    """Runs a command to its end; see `run`.

    Args:
        metrics: the rows that it writes, one for each step.
    Raises:
        TrainingStopped: it failed, or ended before its last step.
    """
    arrivals: dict[int, float] = {}
    size, began = 0, time.perf_counter()

    def look() -> None:
        nonlocal size
        now = metrics.stat().st_size if metrics.is_file() else 0
        if now != size:
            size, seen = now, time.perf_counter()
            for row in read_rows(metrics)[0]:
                if "loss" in row:
                    arrivals.setdefault(int(row["step"]), seen)

    with processes.started(words, env=environment(folder), cwd=folder, stdout=2) as process:
        while process.poll() is None:
            look()
            time.sleep(_POLL)
        size = -1
        look()  # rows that came between the last look and the end
        ended = time.perf_counter()
    if process.returncode or not {1, steps} <= set(arrivals):
        raise TrainingStopped(
            f"{folder}: the run ended with exit code {process.returncode} after {len(arrivals)} of "
            f"{steps} steps; its own message stands above"
        )
    return arrivals[1] - began, ended - arrivals[steps]


def ask_help(folder: Path) -> float:
    """Seconds that a checkout's script takes for its `--help`.

    Raises:
        TrainingStopped: it failed.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise TrainingStopped(f"{folder}: {SCRIPT} --help ended with exit code {done.returncode}")
    return time.perf_counter() - began


def environment(folder: Path) -> dict[str, str]:
    """The variables of a script of a checkout, which imports that checkout's package."""
    others = [path for path in [os.environ.get("PYTHONPATH")] if path]
    return processes.with_compiled_modules(
        {
            **supervised.environment(),
            "PYTHONPATH": os.pathsep.join([str(folder / "src"), *others]),
        }
    )


def ratios(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """The second checkout's time as a share of the first's: of the medians and of the minima."""
    before, after = (found[name] for name in _SIDES)
    return {
        what: {
            "median": median(after[what]) / median(before[what]),
            "minimum": min(after[what]) / min(before[what]),
        }
        for what in GOALS
    }


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A row for each of what is timed: seconds as median (minimum)."""
    shares = ratios(found)

    def row(what: str) -> dict[str, Any]:
        said, goal = GOALS[what]
        times = {
            f"{name}, s": f"{median(found[name][what]):.2f} ({min(found[name][what]):.2f})"
            for name in _SIDES
        }
        share = shares[what]
        return {
            "what": said,
            **times,
            "ratio": f"{share['median']:.2f} ({share['minimum']:.2f})",
            "goal": f"{goal:g}",
            "reached": "yes" if share["median"] <= goal else "no",
        }

    return markdown([row(what) for what in GOALS])
