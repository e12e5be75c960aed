"""Kills small trainings of all scripts at random moments, and compares what they end with.

Every script runs once undisturbed, with one and with two processes. Then it is started, killed by
SIGKILL, SIGINT or SIGTERM at a moment drawn from the seed, and started again, several times, until
it is let to its end: weights, rows of metrics.jsonl and validation pictures must be equal to the
bit. Nothing is shared between two such runs: latents, texts and DreamBooth's class pictures are
made anew, and killed in the making.

    bash scripts/prove_kills.sh 200
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from dojo import cli
from tests.conftest import ROOT
from tests.scripts.runs import SCRIPTS, ended_with, make_inputs, pairs, rewards

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
IN_A_ROW = 4  # kills of one run before it is let to its end
PATIENCE = 120.0  # seconds after which a run hangs
# -15: before the script's first line.
CODES = {signal.SIGKILL: {-9}, signal.SIGINT: {130}, signal.SIGTERM: {143, -15}}


@dataclass(frozen=True, kw_only=True)
class Args:
    """The proof."""

    kills: int = 200
    """how many runs are killed"""
    seed: int = 0
    """of the moments and signals"""
    jobs: int = 2
    """runs at a time"""
    scripts: tuple[str, ...] = ()
    """only these (full_sd3 lora_sd3 dreambooth_lora_sd3 ddpo_sd3 grpo_sd3 dpo_sd15 refl_sd15)"""
    processes: tuple[Literal[1, 2], ...] = (1, 2)
    """of a run"""
    output_dir: Path = ROOT / "outputs" / "kills"
    """folder that is made anew; logs of runs that were lost stay there"""

    def __post_init__(self) -> None:
        if self.kills < 1 or self.jobs < 1:
            raise ValueError("--kills and --jobs must be at least 1")


@dataclass(frozen=True)
class Case:
    """A script and how many processes run it."""

    script: str
    processes: int


@dataclass
class Outcome:
    """What became of the kills of a case."""

    case: Case
    kills: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    kept: int = 0  # of those by SIGINT and SIGTERM: the run stopped itself and kept its step
    late: int = 0  # the run was faster
    words: list[str] = field(default_factory=list)


def flags_of(case: Case, inputs: Path, folder: Path) -> list[str]:
    """The command line of a run that writes everything below `folder`."""
    script = SCRIPTS[case.script]
    adapters = ["--finetune", "lora", "--rank", "2"] if script.kind in (pairs, rewards) else []
    return [*script.flags(inputs, folder), *adapters]


# ---- Processes ----


class Started:
    """A run in processes that were forked from this one, which has loaded the libraries."""

    def __init__(self, case: Case, flags: Sequence[str], log: Path) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.began = time.monotonic()
        self.alive: dict[int, int] = {}  # process id: rank
        self.codes: dict[int, int] = {}
        for rank in range(case.processes):
            pid = os.fork()
            if not pid:
                self._become(case, flags, rank, port)
            self.alive[pid] = rank

    def _become(self, case: Case, flags: Sequence[str], rank: int, port: int) -> None:
        os.setsid()
        where = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(where, 1)
        os.dup2(where, 2)
        if case.processes > 1:  # what torchrun says
            os.environ |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **{name: str(case.processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
                **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            }
        script = str(ROOT / f"train_{case.script}.py")
        sys.argv = [script, *flags]
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        except KeyboardInterrupt:  # before the script's first line
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 70
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def look(self) -> bool:
        """Notices who has ended; whether anybody lives."""
        for pid in [*self.alive]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[self.alive.pop(pid)] = os.waitstatus_to_exitcode(status)
        return bool(self.alive)

    def wait(self, seconds: float) -> bool:
        """Waits until all have ended; whether they have."""
        until = time.monotonic() + seconds
        while self.look():
            if any(self.codes.values()):  # one has failed: as torchrun does
                self.send(signal.SIGTERM, [*self.alive])
                for _ in range(600):
                    if not self.look():
                        return True
                    time.sleep(0.05)
                return False
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def send(self, number: int, to: Sequence[int]) -> None:
        """Sends a signal to processes, with their helpers as torchrun does."""
        for pid in to:
            try:
                os.killpg(pid, number)
            except ProcessLookupError:  # it has not yet made a group of its own
                os.kill(pid, number)

    def end(self) -> None:
        """Leaves nothing behind."""
        self.send(signal.SIGKILL, [*self.alive])
        while self.look():
            time.sleep(0.02)


# ---- Runs ----


def whole(case: Case, inputs: Path, folder: Path) -> tuple[dict[str, object], float]:
    """A run that nobody disturbs, and the seconds it takes.

    Raises:
        RuntimeError: it fails.
    """
    folder.mkdir(parents=True)
    run = Started(case, flags_of(case, inputs, folder), folder / "log")
    ended = run.wait(PATIENCE)
    spent = time.monotonic() - run.began
    run.end()
    if not ended or any(run.codes.values()):
        raise RuntimeError(f"{case} fails undisturbed: {folder / 'log'}")
    return ended_with(folder), spent


def disturb(case: Case, inputs: Path, work: Path, kills: int, seed: int) -> Outcome:
    """Kills runs of a case so many times."""
    outcome, draw = Outcome(case), random.Random(f"{seed} {case}")
    name = f"{case.script}-{case.processes}"
    expected, seconds = whole(case, inputs, work / f"{name}-whole")
    number = 0
    while outcome.kills.total() < kills:
        folder = work / f"{name}-{number}"
        folder.mkdir()
        number += 1
        left = min(IN_A_ROW, kills - outcome.kills.total())
        tried = [_killed(case, inputs, folder, draw, seconds, outcome) for _ in range(left)]
        used = [name for name in tried if name]
        wrong = _ended(case, inputs, folder, expected)
        outcome.lost.update(used if wrong else [])
        outcome.words += [f"{folder}: {wrong}"] if wrong else []
        if not wrong:
            shutil.rmtree(folder)
    shutil.rmtree(work / f"{name}-whole")
    return outcome


def _killed(
    case: Case, inputs: Path, folder: Path, draw: random.Random, seconds: float, outcome: Outcome
) -> str:
    """Starts a run and kills it; the signal's name, or nothing where it was done before."""
    number, moment = draw.choice(SIGNALS), draw.uniform(0, 1.1 * seconds)
    everybody, twice = draw.random() < 0.7, draw.random() < 0.3
    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    run = Started(case, flags_of(case, inputs, folder), log)
    while run.look() and time.monotonic() - run.began < moment:
        time.sleep(0.005)
    if not run.alive:
        outcome.late += 1
        return ""
    to = [*run.alive] if everybody else [draw.choice([*run.alive])]
    run.send(number, to)
    if twice and number != signal.SIGKILL:  # the group's, and the launcher's
        time.sleep(0.05)
        run.look()
        run.send(signal.SIGTERM, [*run.alive])
    outcome.kills[number.name] += 1
    hangs = not run.wait(PATIENCE)
    run.end()
    said = log.read_text(errors="replace") if log.exists() else ""
    outcome.kept += "is kept" in said
    # 0: in its last moment; 143, -15: the other process; 70: that one, missing the killed one.
    alone = number == signal.SIGKILL or not everybody
    allowed = CODES[number] | {0, 143, -15} | ({70} if alone else set())
    unusual = [code for code in run.codes.values() if code not in allowed]
    for trouble in (hangs and "hangs", unusual and f"ends with {unusual}"):
        if trouble:
            outcome.words.append(f"{log}: {trouble} after {number.name} at {moment:.2f} s")
    if not alone and "Traceback" in said:
        outcome.words.append(f"{log}: a traceback after {number.name} at {moment:.2f} s")
        shutil.copy(log, folder.parent / f"{folder.name}-{log.name}")
    return number.name


def _ended(case: Case, inputs: Path, folder: Path, expected: dict[str, object]) -> str:
    """Lets a run go to its end; what is wrong with it."""
    run = Started(case, flags_of(case, inputs, folder), folder / "log-last")
    ended = run.wait(PATIENCE)
    run.end()
    if not ended or any(run.codes.values()):
        return f"ends with {run.codes}" if ended else "hangs"
    found = ended_with(folder)
    return ", ".join(f"other {name}" for name in expected if found[name] != expected[name])


# ---- The table ----


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: kills by signal, and what was lost."""
    lines = [
        "| script | processes | SIGKILL | SIGINT | SIGTERM | stopped itself, step kept | lost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in outcomes:
        counts = " | ".join(str(one.kills[number.name]) for number in SIGNALS)
        kept, lost = one.kept, sum(one.lost.values())
        lines.append(
            f"| train_{one.case.script}.py | {one.case.processes} | {counts} | {kept} | {lost} |"
        )
    totals = [sum(one.kills[number.name] for one in outcomes) for number in SIGNALS]
    totals += [sum(one.kept for one in outcomes), sum(one.lost.total() for one in outcomes)]
    lines.append(f"| all {sum(totals[:3])} | | {' | '.join(map(str, totals))} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Runs the proof; prints its table.

    Raises:
        TrainingStopped: something was lost.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    began = time.monotonic()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    make_inputs(args.output_dir / "inputs")
    for script in SCRIPTS:  # loads the libraries, once for all runs
        importlib.import_module(f"train_{script}")
    cases = [Case(s, n) for s in args.scripts or SCRIPTS for n in args.processes]
    until = [args.kills * i // len(cases) for i in range(len(cases) + 1)]
    shares = [high - low for low, high in pairwise(until)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        work = args.output_dir
        futures = [
            pool.submit(disturb, case, work / "inputs", work, kills, args.seed)
            for case, kills in zip(cases, shares, strict=True)
            if kills
        ]
        outcomes = []
        for future in futures:
            outcomes.append(future.result())
            one = outcomes[-1]
            print(f"{one.case}: {one.kills.total()} kills, {one.lost.total()} lost", flush=True)
    print(table(outcomes))
    for words in (words for one in outcomes for words in one.words):
        print(words)
    print(f"seed {args.seed}, {time.monotonic() - began:.0f} s")
    if any(one.lost or one.words for one in outcomes):
        raise cli.TrainingStopped("not every kill was survived as it should be; see above")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
