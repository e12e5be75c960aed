"""Checks on a GPU what tests can only claim on a CPU, in at most nine minutes.

Precision, determinism, the ratio before the first update, attention, quantised weights, weights in
CPU memory, predicted against measured memory, speed with random weights of the published sizes.
Every step works in a process of its own with a time limit, prints what it found, and is followed by
the next one whatever became of it. OUTPUT_DIR gets `check.json`, `rows.md` (for docs/benchmarks.md)
and a log of every step. The exit status is 1 if a claim did not hold, a step failed or the time did
not reach it, and 2 if nothing could be checked, for want of a GPU.

    python -m dojo.bench check
    python -m dojo.bench check --steps precision attention
    python -m dojo.bench check --pocket        # the same steps on the pocket models, on any machine
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dojo import doctor, files
from dojo.bench import processes, report
from dojo.bench.report import Place, Report
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, UserError, ranges

LEAST = 10.0  # seconds that are worth beginning a step for
NOT_BEGUN = "not begun"  # the state of a step that the time did not reach
POCKET_PATIENCE = 4  # a CPU gets so many times the time


@dataclass(frozen=True)
class Step:
    """A part of the check."""

    name: str
    about: str
    """what is checked, in a few words"""
    act: str
    """its function, as module:name; it takes a `Report` and a `Place`"""
    limit: int
    """seconds that it may take on a GPU"""
    anywhere: bool = False
    """it has something to say without a GPU too"""


_PARTS, _SCRIPTS = "dojo.bench.parts", "dojo.bench.scripted"
STEPS = (
    Step("environment", "what is installed (dojo.doctor)", f"{_PARTS}:environment", 40, True),
    Step("precision", "products and networks in bf16, fp16, tf32", f"{_PARTS}:precision", 60),
    Step("attention", "attention's backends", f"{_PARTS}:attention", 45),
    Step("determinism", "equal bytes of equal runs", f"{_SCRIPTS}:determinism", 90),
    Step("ratio", "the ratio before the first update", f"{_SCRIPTS}:ratio", 45),
    Step("quantised", "int8 and nf4 against the CPU's numbers", f"{_PARTS}:quantised", 45),
    Step("offload", "blocks in CPU memory, equal bits", f"{_PARTS}:offload", 45),
    Step("lora-sd35-medium", "speed and memory of a LoRA", f"{_SCRIPTS}:lora_medium", 90),
    Step("lora-sdxl", "speed and memory of a LoRA", f"{_SCRIPTS}:lora_sdxl", 90),
    Step("grpo-sd35-medium", "speed of Flow-GRPO", f"{_SCRIPTS}:grpo_medium", 100),
    Step("memory", "predicted against measured memory", f"{_SCRIPTS}:memory", 80),
    Step("ratio-compiled", "the ratio with --torch_compile", f"{_SCRIPTS}:ratio_compiled", 90),
    Step("full-sd35-medium", "speed and memory of full", f"{_SCRIPTS}:full_medium", 90),
    Step("memory-grpo", "the same of Flow-GRPO", f"{_SCRIPTS}:memory_grpo", 80),
    Step("deepspeed", "ZeRO-1, 2, 3 by accelerate launch", f"{_SCRIPTS}:deepspeed", 150),
)


@dataclass(frozen=True, kw_only=True)
class CheckArgs:
    """What is checked, and for how long."""

    steps: tuple[str, ...] = ()
    """only these steps, by name, in this order; unset is all of them"""
    pocket: bool = False
    """work on the pocket models, with or without a GPU, instead of models of the published sizes"""
    minutes: float = 9.0
    """time for everything; a step that would begin later is not begun"""
    output_dir: Path = Path("outputs/check_gpu")
    """folder of check.json, rows.md and the steps' logs; an earlier check there is replaced"""
    work_dir: Path = Path("outputs/bench")
    """folder of the models made here (5 GB each), pictures, caches, runs"""

    def __post_init__(self) -> None:
        ranges.check(self, "minutes", above=0)
        known = {step.name for step in STEPS}
        if unknown := [name for name in self.steps if name not in known]:
            raise ValueError(f"--steps {unknown[0]}: there are {', '.join(sorted(known))}")

    @property
    def chosen(self) -> list[Step]:
        """The steps in their order."""
        by_name = {step.name: step for step in STEPS}
        return [by_name[name] for name in self.steps] if self.steps else list(STEPS)


@dataclass
class Result:
    """What became of a step."""

    name: str
    state: str
    """passed, failed, skipped, timed out, not begun"""
    seconds: float = 0.0
    trouble: str = ""
    """the last line of what went wrong"""
    found: Report = field(default_factory=Report)


def main(args: CheckArgs) -> None:
    """Runs the steps, prints and writes what they found.

    Raises:
        UserError: nothing could be checked, for want of a GPU.
        TrainingStopped: a claim did not hold, a step failed, or the time did not reach it.
    """
    folder = args.output_dir.absolute()
    take(folder)
    place = Place(args.work_dir.absolute(), args.pocket)
    results: list[Result] = []
    try:
        for result in run_steps(args.chosen, place, folder, args.minutes * 60):
            results.append(result)
    finally:  # also when it is interrupted: what has been found is kept
        write(folder, results)
        print(f"\n{summary(results)}\n\n{folder}/check.json has every number")
    conclude(results, place)


def take(folder: Path) -> None:
    """Makes the folder, or takes that of an earlier check.

    Raises:
        UserError: it holds something else.
    """
    marker = folder / "check.json"
    files.check_output(marker, "--output_dir", is_ours=lambda text: '"when"' in text)
    if folder.is_dir() and any(folder.iterdir()) and not marker.is_file():
        raise UserError(f"--output_dir {folder} holds something else: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text('{"when": "has just begun"}\n', encoding="utf-8")


def conclude(results: Sequence[Result], place: Place) -> None:
    """Ends the process with what the check comes to.

    Raises:
        UserError: nothing was checked.
        TrainingStopped: something is not as it should be, or was not begun.
    """
    right = ("passed", "skipped", NOT_BEGUN)
    wrong = [result.name for result in results if result.state not in right]
    late = [result.name for result in results if result.state == NOT_BEGUN]
    said = [f"not as it should be: {', '.join(wrong)}"] if wrong else []
    said += [f"not begun, for want of time (--minutes): {', '.join(late)}"] if late else []
    if said:
        raise TrainingStopped("; ".join(said))
    if not place.on_gpu and not place.pocket:
        raise UserError(
            "torch sees no GPU, so nothing was checked (why: python -m dojo.doctor); --pocket runs "
            "the same steps on the pocket models"
        )


# -- running ----------------------------------------------------------------------------------


def run_steps(steps: Sequence[Step], place: Place, folder: Path, limit: float) -> Iterator[Result]:
    """Every step after the other, whatever became of the one before; prints what they find.

    Args:
        folder: of the steps' logs.
        limit: seconds for all of them.
    """
    started = time.monotonic()
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.name}: {step.about}", flush=True)
        left = limit - (time.monotonic() - started)
        result = run_step(step, place, folder, left)
        for line in told(result):
            print(f"    {line}", flush=True)
        yield result


def run_step(step: Step, place: Place, folder: Path, left: float) -> Result:
    """One step in a process of its own.

    Args:
        left: seconds until no step may run any more.
    """
    if not (place.on_gpu or place.pocket or step.anywhere):
        return Result(step.name, "skipped", found=Report(skipped=[f"no GPU: {step.about}"]))
    if left < LEAST:
        return Result(step.name, NOT_BEGUN)
    patience = step.limit if place.on_gpu else POCKET_PATIENCE * step.limit
    file, log = (folder / f"{step.name}.{kind}" for kind in ("json", "log"))
    file.unlink(missing_ok=True)
    words = [sys.executable, "-m", "dojo.bench.worker", step.act, str(file), str(place.folder)]
    words += ["--pocket"] if place.pocket else []
    started = time.monotonic()
    with log.open("wb") as output:
        code = follow(words, output, min(patience, left))
    found = report.read(file)
    result = Result(step.name, "passed", time.monotonic() - started, found=found)
    if code is None:
        result.state, result.trouble = "timed out", f"ended after {min(patience, left):.0f} s"
    elif code:
        result.state, result.trouble = "failed", last_line(log) or f"exit status {code}"
    elif not all(claim.holds for claim in found.claims):
        result.state = "failed"
    elif found.skipped and not (found.claims or found.rows or found.numbers):
        result.state = "skipped"
    return result


def follow(words: Sequence[str], output: Any, limit: float) -> int | None:
    """Runs a program with all below it, and ends them at the limit.

    Returns:
        Its exit status, or None where it was ended.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(doctor.ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    options = {"cwd": doctor.ROOT, "env": environment, "stdout": output}
    with processes.started(words, stderr=subprocess.STDOUT, **options) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None


def last_line(log: Path) -> str:
    """What a program said last, or the last thing that it called an error."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").split("\n")]
    said = [line for line in lines if line.startswith(("error:", "stopped:"))]
    return next(reversed(said or [line for line in lines if line]), "")


# -- telling ----------------------------------------------------------------------------------


def told(result: Result) -> list[str]:
    """What the screen says of a step."""
    found = result.found
    lines = [
        f"{'ok  ' if claim.holds else 'NOT '} {claim.text}: {claim.value}" for claim in found.claims
    ]
    lines += [f"skipped: {why}" for why in found.skipped]
    lines += [f"remark: {remark}" for remark in found.remarks]
    for rows in found.rows.values():
        lines += [", ".join(f"{k} {v}" for k, v in row.items() if k != "command") for row in rows]
    if result.trouble:
        lines.append(result.trouble)
    if result.state == "skipped" and not result.seconds:
        return lines
    return [*lines, f"{result.state} ({result.seconds:.0f} s)"]


def summary(results: Sequence[Result]) -> str:
    """The table at the end."""
    rows = [
        {
            "step": result.name,
            "result": result.state,
            "claims": f"{sum(c.holds for c in result.found.claims)} of {len(result.found.claims)}",
            "s": f"{result.seconds:.0f}",
            "not as it should be": "; ".join(
                [c.text for c in result.found.claims if not c.holds]
                + ([result.trouble] if result.trouble else [])
            ),
        }
        for result in results
    ]
    return markdown(rows)


def write(folder: Path, results: Sequence[Result]) -> None:
    """check.json with everything, rows.md with what docs/benchmarks.md has tables for."""
    record = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "environment": doctor.examine(),
        "steps": [{**asdict(result), "found": asdict(result.found)} for result in results],
    }
    text = json.dumps(record, indent=1, default=str)
    (folder / "check.json").write_text(text + "\n", encoding="utf-8")
    tables: dict[str, list[dict[str, str]]] = {}
    for result in results:
        for name, rows in result.found.rows.items():
            tables.setdefault(name, []).extend(rows)
    parts = [f"## {name}\n\n{markdown(rows)}\n" for name, rows in tables.items()]
    (folder / "rows.md").write_text("\n".join(parts), encoding="utf-8")
