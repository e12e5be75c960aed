"""Runs the training scripts on two commits with the same commands, and compares the results.

Every commit's tree is unpacked, and runs its own code in folders of its own, from the same
untrained pocket models and pictures, on a CPU with one thread. Then a third run, by the second
commit, goes on from the first checkpoint of the first commit's run. Compared are all files of a
run's folder but those that carry times (README.md, report.html) and checksums: files of tensors
byte for byte, files of torch and JSON by their values, rows of metrics.jsonl but for times,
pictures and other files byte for byte. Other options in args.json are told, and are no difference;
nor is it one when the second commit refuses to go on, as it does where options have other names.

    bash scripts/compare_commits.sh HEAD~1 HEAD
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from dojo import cli
from tests.conftest import ROOT
from tests.scripts.runs import SCRIPTS, make_inputs

Verdict = Literal["equal", "differs", "refused", "fails"]  # refused: to go on, which is allowed
Kind = Literal["lora", "full", ""]

# What is no result: it carries times, or follows from the other files.
APART = ("README.md", "report.html", "checksums.json", "args.json")
TIMES = ("images_per_s", "seconds_", "eta_s", "memory_gib", "mfu", "made")
SHOWN = 4  # files of a run that differ and are named in the table
PATIENCE = 300.0  # seconds after which a run hangs


@dataclass(frozen=True, kw_only=True)
class Args:
    """The comparison."""

    before: str
    """the one commit"""
    after: str
    """the other commit"""
    scripts: tuple[str, ...] = ()
    """only these (full_sd3 lora_sd3 dreambooth_lora_sd3 ddpo_sd3 grpo_sd3 dpo_sd15 refl_sd15)"""
    no_resume: bool = False
    """only whole runs"""
    jobs: int = 2
    """runs at a time"""
    output_dir: Path = ROOT / "outputs" / "compare"
    """folder that is made anew; the commits' trees, the runs and their logs stay there"""

    def __post_init__(self) -> None:
        if unknown := set(self.scripts) - set(SCRIPTS):
            raise ValueError(
                f"--scripts: {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}"
            )
        if self.jobs < 1:
            raise ValueError("--jobs must be at least 1")


@dataclass(frozen=True)
class Case:
    """A command that both commits run."""

    name: str
    script: str
    kind: Kind
    """what is trained, where the script leaves a choice"""
    flags: tuple[str, ...]


def _cases() -> tuple[Case, ...]:
    clip = f"clip[model={ROOT / 'models' / 'pocket-clip'}]"
    average = ("--use_ema", "--ema_decay", "0.5")
    learned = ("--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2")
    halves = ("--gradient_accumulation_steps", "2")
    uncached = ("--no_cache_latents", "--no_cache_text_embeddings")
    pretraining = ("--pretrain_data_dir", "inputs/scenes", "--pretrain_weight", "2")
    return (
        Case("full_sd3", "full_sd3", "", (*average, *learned, "--single_file")),
        Case("full_sd3, folder", "full_sd3", "", (*halves, "--weighting_scheme", "cosmap")),
        Case(
            *("lora_sd3", "lora_sd3", ""),
            (*average, *learned, *halves, "--caption_dropout", "0.3", "--lora_format", "kohya"),
        ),
        Case("lora_sd3, uncached", "lora_sd3", "", (*uncached, "--random_crop", "--random_flip")),
        Case(
            *("dreambooth_lora_sd3", "dreambooth_lora_sd3", ""),
            ("--train_text_encoder", "--eval_fraction", "0.25", *average, *learned),
        ),
        Case("ddpo_sd3", "ddpo_sd3", "lora", (*average, "--guidance_scale", "2")),
        Case("ddpo_sd3, full", "ddpo_sd3", "full", ("--learning_rate", "1e-4")),
        Case("grpo_sd3", "grpo_sd3", "lora", (*average, "--beta", "0.1", "--sampler", "cps")),
        Case("grpo_sd3, full", "grpo_sd3", "full", ("--beta", "0.1", "--learning_rate", "1e-4")),
        Case("nft_sd3", "nft_sd3", "lora", (*average, "--old_decay_ramp", "0.2")),
        Case("nft_sd3, full", "nft_sd3", "full", ("--objective", "ram", "--learning_rate", "1e-4")),
        Case("refl_sd3", "refl_sd3", "lora", (*average, *learned, "--grad_steps", "2")),
        Case("refl_sd3, full", "refl_sd3", "full", ("--reward", clip, "--learning_rate", "1e-4")),
        Case("dpo_sd3", "dpo_sd3", "lora", (*average, *learned)),
        Case("dpo_sd3, full", "dpo_sd3", "full", (*halves, "--weighting_scheme", "cosmap")),
        Case("dpo_sd15", "dpo_sd15", "lora", (*average, *learned, *halves)),
        Case("dpo_sd15, full", "dpo_sd15", "full", (*average, *uncached)),
        Case("refl_sd15", "refl_sd15", "lora", (*average, *learned, *pretraining)),
        Case("refl_sd15, full", "refl_sd15", "full", ("--reward", clip, *halves)),
        Case("dpo_sdxl", "dpo_sdxl", "lora", (*average, *learned)),
        Case("dpo_sdxl, full", "dpo_sdxl", "full", uncached),
        Case("refl_sdxl", "refl_sdxl", "lora", (*average, *learned)),
        Case("refl_sdxl, full", "refl_sdxl", "full", halves),
        Case("ddpo_sd15", "ddpo_sd15", "lora", average),
        Case("ddpo_sd15, full", "ddpo_sd15", "full", ("--learning_rate", "1e-4")),
        Case("ddpo_sdxl", "ddpo_sdxl", "lora", average),
        Case("ddpo_sdxl, full", "ddpo_sdxl", "full", ("--learning_rate", "1e-4")),
    )


CASES = _cases()
CASES += tuple(
    Case(name, name, "", ()) for name in SCRIPTS if name not in {c.script for c in CASES}
)
LENGTH = ("--max_train_steps", "6", "--checkpoints_total_limit", "9")  # all are compared


def flags_of(case: Case, options: Sequence[str]) -> list[str]:
    """The command line of a run, from its work folder, for a script that has these options."""
    flags = SCRIPTS[case.script].flags(Path("inputs"), folder_of(case, Path()))
    return [*flags, *LENGTH, *choice(case.kind, options), *case.flags]


def choice(kind: Kind, options: Sequence[str]) -> list[str]:
    """How a script is told what to train; the spelling is another one in older commits."""
    if not kind:
        return []
    rank = ["--rank", "2"] if kind == "lora" else []
    if "finetune" in options:
        return ["--finetune", kind, *rank]
    return ["--use_lora", *rank] if kind == "lora" else []


# ---- Runs ----


def option_names(group: type) -> list[str]:
    """The names of a script's options, in whatever group they stand."""
    found: list[str] = []
    for name, hint in typing.get_type_hints(group).items():
        inner = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        found += option_names(typing.cast(type, inner[0])) if inner else [name]
    return found


# What a commit's own interpreter is asked: those names by script, and where its library lies.
_ASK = f"""
import dataclasses, importlib, json, sys, typing
import dojo
{inspect.getsource(option_names)}
found = {{name: option_names(importlib.import_module(name).Args) for name in sys.argv[1:]}}
print(json.dumps({{"place": dojo.__file__, "options": found}}))
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    said: str
    """the last line"""


@dataclass(frozen=True)
class Side:
    """A commit: its tree, and the folder where its runs are."""

    commit: str
    tree: Path
    work: Path
    options: Mapping[str, Sequence[str]]
    """names by script"""

    def run(self, case: Case) -> Ended:
        """Runs a script to its end."""
        folder = folder_of(case, self.work)
        folder.mkdir(parents=True, exist_ok=True)
        words = [f"{self.tree}/train_{case.script}.py"]
        words += flags_of(case, self.options[f"train_{case.script}"])
        with (folder / "log").open("a") as log:
            print("$", *words, file=log, flush=True)
            try:
                code = _python(self.tree, words, self.work, log.fileno())
            except subprocess.TimeoutExpired:
                return Ended(-1, f"on {self.commit}: hangs")
        said = (folder / "log").read_text(errors="replace").strip().splitlines()
        return Ended(code, f"on {self.commit}: {said[-1]}")


def folder_of(case: Case, work: Path) -> Path:
    """Where a case's run, cache and log lie."""
    return work / case.name.replace(", ", "-")


def _python(tree: Path, words: Sequence[str], folder: Path, out: int) -> int:
    own = {"PYTHONPATH": f"{tree / 'src'}:{tree}", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    calm = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **own, **calm},
        stdout=out,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
    ).returncode


def _has(commit: str, file: str) -> bool:
    """Whether a commit has a file; scripts that one has not are not compared."""
    words = ["git", "cat-file", "-e", f"{commit}:{file}"]
    return subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0


def unpack(commit: str, folder: Path, inputs: Path, scripts: Sequence[str]) -> Side:
    """Writes a commit's tree below a folder, and asks its scripts for their options.

    Raises:
        UserError: there is no such commit, or it cannot be asked.
    """
    tree, work = folder / "tree", folder / "runs"
    for path in (tree, work, folder / "resumed"):
        path.mkdir(parents=True)
    for path in (work, folder / "resumed"):
        (path / "inputs").symlink_to(inputs)
    words = ["git", "archive", "--format", "tar", commit]
    packed = subprocess.run(words, cwd=ROOT, capture_output=True)
    if packed.returncode:
        raise cli.UserError(f"{commit}: {packed.stderr.decode().strip()}")
    subprocess.run(["tar", "-x"], cwd=tree, input=packed.stdout, check=True)
    answer = folder / "options.json"
    with answer.open("w") as file:
        code = _python(
            tree, ["-c", _ASK, *(f"train_{name}" for name in scripts)], work, file.fileno()
        )
    said = answer.read_text().strip().splitlines() or [""]
    if code:
        raise cli.UserError(f"{commit}: its scripts cannot be loaded: {said[-1]}")
    found = json.loads(said[-1])
    if not Path(found["place"]).is_relative_to(tree):
        raise cli.UserError(f"{commit}: its scripts load {found['place']}")
    return Side(commit, tree, work, found["options"])


# ---- Comparing ----


@dataclass(frozen=True)
class Compared:
    """What became of a case on both commits."""

    name: str
    verdict: Verdict
    files: int = 0
    """how many were compared"""
    differences: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def compare(name: str, one: Path, other: Path) -> Compared:
    """Compares two runs by the files below their folders, class pictures included."""
    metrics = "run/metrics.jsonl"  # tell most: they come first
    names = sorted({*_files(one), *_files(other)}, key=lambda name: (name != metrics, name))
    found = [words for name in names if (words := _compare_files(one, other, name))]
    records = (one / "run" / "args.json", other / "run" / "args.json")
    remarks = [*_remarks(*records)] if all(map(Path.exists, records)) else []
    verdict = "differs" if found else "equal"
    return Compared(name, verdict, len(names), tuple(found), tuple(remarks))


def _files(folder: Path) -> list[str]:
    paths = [*(folder / "run").rglob("*"), *(folder / "class").rglob("*")]
    return [
        path.relative_to(folder).as_posix()
        for path in paths
        if path.is_file() and path.name not in APART and not path.name.startswith(".")
    ]


def _compare_files(one: Path, other: Path, name: str) -> str:
    """What differs first between two files, and how much else does; nothing where all is equal."""
    paths = (one / name, other / name)
    if not all(map(Path.exists, paths)):
        return f"{name} is missing {'after' if paths[0].exists() else 'before'}"
    if paths[0].read_bytes() == paths[1].read_bytes():
        return ""
    read = {".safetensors": _tensors, ".pt": _pickled, ".json": _json, ".jsonl": _rows}
    if paths[0].suffix not in read:
        return f"{name}: other bytes"
    values = [*_values(name, *map(read[paths[0].suffix], paths))]
    if not values and paths[0].suffix == ".safetensors":
        return f"{name}: equal tensors and metadata in other bytes"
    return " and ".join([*values[:1], *([f"{len(values) - 1} more in it"] if values[1:] else [])])


def _tensors(path: Path) -> object:
    with safe_open(path, "pt") as file:
        found: dict[str, object] = {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }
        return {**found, "(metadata)": file.metadata()}


def _pickled(path: Path) -> object:
    return torch.load(path, weights_only=True)


def _json(path: Path) -> object:
    return json.loads(path.read_text())


def _rows(path: Path) -> object:
    rows = map(json.loads, path.read_text().splitlines())
    return {f"row {i}": _timeless(row) for i, row in enumerate(rows)}


def _timeless(row: object) -> object:
    if not isinstance(row, Mapping):
        return row
    return {name: value for name, value in row.items() if not str(name).startswith(TIMES)}


def _values(name: str, one: object, other: object) -> Iterator[str]:
    """What differs between two values, by the place in them."""
    if type(one) is not type(other):
        yield f"{name}: {_short(one)} became {_short(other)}"
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                yield f"{name}/{key} is missing {'after' if key in one else 'before'}"
            else:
                yield from _values(f"{name}/{key}", one[key], other[key])
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        yield from _values(name, dict(enumerate(one)), dict(enumerate(other)))
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        yield from _tensor(name, one, other)
    elif one != other and not _both_nan(one, other):
        yield f"{name}: {_short(one)} became {_short(other)}"


def _tensor(name: str, one: Tensor, other: Tensor) -> Iterator[str]:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        yield f"{name}: {_short(one)} became {_short(other)}"
    elif not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))):
        yield f"{name} by up to {(one.double() - other.double()).abs().max().item():.1e}"


def _both_nan(one: object, other: object) -> bool:
    floats = [value for value in (one, other) if isinstance(value, float)]
    return len(floats) == 2 and all(map(math.isnan, floats))


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def _remarks(one: Path, other: Path) -> Iterator[str]:
    """What became of the options in args.json."""
    before, after = (
        dict(options_of(json.loads(path.read_text())["args"])) for path in (one, other)
    )
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            yield f"args.json: {name} is gone"
        elif name not in before:
            yield f"args.json: {name} is new"
        else:
            yield from _values(f"args.json: {name}", before[name][1], after[name][1])
            if before[name][0] != after[name][0]:
                yield f"args.json: {name} went from {before[name][0]} to {after[name][0]}"


def options_of(
    group: Mapping[str, object], place: str = "args"
) -> Iterator[tuple[str, tuple[str, object]]]:
    """Options by name with the group that they stand in."""
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from options_of(value, name)
        else:
            yield name, (place, value)


# ---- Cases ----


def examine(before: Side, after: Side, resume: bool, case: Case) -> list[Compared]:
    """Runs a case on both commits, and goes on by the second from the first one's checkpoint."""
    for side in (before, after):
        if (ended := side.run(case)).code:
            return [Compared(case.name, "fails", 0, (ended.said,))]
    expected = folder_of(case, before.work)
    found = [compare(case.name, expected, folder_of(case, after.work))]
    if resume:
        found.append(go_on(case, expected, after))
    return found


def go_on(case: Case, expected: Path, after: Side) -> Compared:
    """Gives the second commit what the first one's run had when its first checkpoint was made."""
    name = f"{case.name}, resumed"
    again = dataclasses.replace(after, work=after.work.with_name("resumed"))
    folder = folder_of(case, again.work)
    first, *later = sorted(path.name for path in (expected / "run").glob("checkpoint-*"))
    shutil.copytree(expected, folder, ignore=shutil.ignore_patterns("finished.json", "log", *later))
    begun = (folder / "run" / first).stat().st_ino
    if (ended := again.run(case)).code:
        return Compared(name, "refused" if ended.code == 2 else "fails", 0, (ended.said,))
    if (folder / "run" / first).stat().st_ino != begun:
        return Compared(name, "fails", 0, ("began anew instead of going on",))
    return compare(name, expected, folder)


def table(found: Sequence[Compared]) -> str:
    """Markdown: verdicts, and the first differences."""
    lines = ["| run | verdict | files compared | what differs |", "| --- | --- | --- | --- |"]
    for one in found:
        shown = list(one.differences[:SHOWN])
        more = len(one.differences) - len(shown)
        words = "; ".join([*shown, *([f"{more} more files"] if more else [])])
        lines.append(f"| {one.name} | {one.verdict} | {one.files} | {words} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Compares two commits; prints the table.

    Raises:
        UserError: there is no such commit.
        TrainingStopped: they differ.
    """
    began = time.monotonic()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    work = args.output_dir.absolute()
    scripts = [
        name
        for name in args.scripts or SCRIPTS
        if _has(args.before, f"train_{name}.py") and _has(args.after, f"train_{name}.py")
    ]
    make_inputs(work / "inputs")
    resume = not args.no_resume
    with ThreadPoolExecutor(args.jobs) as pool:
        names = (("before", args.before), ("after", args.after))
        started = [
            pool.submit(unpack, commit, work / name, work / "inputs", scripts)
            for name, commit in names
        ]
        before, after = (future.result() for future in started)
        cases = [case for case in CASES if case.script in scripts]
        found: list[Compared] = []
        for results in pool.map(partial(examine, before, after, resume), cases):
            found += results
            print(*(f"{one.name}: {one.verdict}" for one in results), sep="\n", flush=True)
    print(table(found))
    for remark in dict.fromkeys(
        f"{one.name.split(',')[0]}: {r}" for one in found for r in one.remarks
    ):
        print(remark)
    print(f"{args.before} and {args.after}: {time.monotonic() - began:.0f} s, {args.output_dir}")
    if any(one.verdict in ("differs", "fails") for one in found):
        raise cli.TrainingStopped(f"{args.before} and {args.after} differ; see above")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
