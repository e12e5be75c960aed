"""Makes a run of every combination of options in a grid, one after the other.

    python -m dojo.sweep run.yaml             run.yaml holds options as for --config, and a grid
    python -m dojo.sweep run.yaml --dry_run   prints the commands

    script: train_NAME.py
    output_dir: outputs/rates
    ...
    grid:
      learning_rate: [1e-4, 3e-4]
      rank: [4, 16]

Each run lies in a folder of output_dir, named after its combination, with its options beside it as
a .yaml. The same command again goes on: what is finished is left alone, what was interrupted is
resumed by its script. Without a seed in the file all runs have seed 0. More: docs/config.md.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from dojo import cli, files
from dojo.cli import UserError, config, scripts
from dojo.cli.masking import hide, is_secret
from dojo.report.several import compared

_HEAD = "# Written by python -m dojo.sweep from"
_OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
_LONGEST, _MOST_BYTES = 100, 200  # letters of a folder's name, and its bytes (file systems: 255)


@dataclass(frozen=True, kw_only=True)
class SweepArgs:
    """The sweep."""

    file: tyro.conf.Positional[Path]
    """a file of options with a grid (YAML, JSON or TOML)"""
    dry_run: bool = False
    """print the commands of what is left to do, and end"""
    launcher: str = ""
    """what starts a script, such as "accelerate launch --multi_gpu"; unset: this Python"""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    folder: Path
    text: str
    """its own file of options"""

    @property
    def file(self) -> Path:
        return self.folder.with_name(f"{self.name}.yaml")

    @property
    def is_finished(self) -> bool:
        """Its script has ended with these options."""
        same = self.file.is_file() and self.file.read_text(encoding="utf-8") == self.text
        # What ended before the options were written ended with others.
        return same and _written(self.folder / "finished.json") >= _written(self.file)

    def settle(self) -> None:
        """Its script takes these options for those that the run has ended with."""
        ended, given = (_written(path) for path in (self.folder / "finished.json", self.file))
        if 0 <= ended < given:
            os.utime(self.file, ns=(ended, ended))


def _written(path: Path) -> int:
    """When a file was written, in ns; -1 where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else -1


def main(args: SweepArgs) -> None:
    """Starts what is left to do, and prints the table of all runs.

    Raises:
        UserError: the file or a combination in it cannot be taken.
        TrainingStopped: a run failed; the others were made.
    """
    script, members = plan(args.file)
    left = [one for one in members if not one.is_finished]
    print(f"{len(members)} runs, {len(members) - len(left)} of them finished already", flush=True)
    start = shlex.split(args.launcher) or [sys.executable]
    failed: list[str] = []
    for number, one in enumerate(left, start=1):
        words = [*start, str(script), *(config.FLAG, str(one.file))]
        words += ["--resume_from_checkpoint", "latest"]
        print(f"[{number}/{len(left)}] {one.name}\n  {shlex.join(words)}", flush=True)
        if args.dry_run:
            continue
        write(one)
        if code := run(words):
            if code >= 128 or code < 0:
                raise cli.TrainingStopped(f"{one.name} was interrupted: the same command goes on")
            failed.append(one.name)
        else:
            one.settle()
    if not args.dry_run:
        told = [one.folder for one in members if (one.folder / "args.json").is_file()]
        print("\n".join(["", *(compared(told) if told else ())]))
    if failed:
        raise cli.TrainingStopped(f"{len(failed)} of {len(members)} failed: {', '.join(failed)}")


def run(words: Sequence[str]) -> int:
    """The exit code of a command; an interrupt reaches both, and the command ends first.

    Of one that was interrupted it tells so, whatever its launcher makes of that: torchrun ends
    with 1.
    """
    process = subprocess.Popen(words)
    caught: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        caught.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                caught.append(signal.SIGINT)
            else:
                return 128 + caught[0] if caught else code
    finally:
        signal.signal(signal.SIGTERM, before)


def write(one: Member) -> None:
    """Writes a run's file of options.

    Raises:
        UserError: another file lies in its place.
    """
    there = one.file.read_text(encoding="utf-8") if one.file.is_file() else None
    if there == one.text:
        return
    if there is not None and not there.startswith(_HEAD):
        raise UserError(f"{one.file} was not written by a sweep: choose another output_dir")
    one.file.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(one.file) as file:
        file.write(one.text.encode())


# -- the plan -------------------------------------------------------------------------------------


def plan(path: Path) -> tuple[Path, list[Member]]:
    """The script and the runs of a sweep; every combination has been parsed as the script would.

    Raises:
        UserError: the file, its grid or a combination cannot be taken.
    """
    try:
        read = config.read(path)
        if read.grid is None:
            raise config.ConfigError(
                f"{path}: there is no {config.GRID}: a list of values by option"
            )
        script = _script(read)
        module = scripts.load(script)
        combinations = list(_combinations(path, read.grid))
        base = {one.name: one.value for one in replace(read, grid=None).given(module.Args)}
        _refuse_secrets(path, [base, *combinations])
        folder = _folder(path, base)
        members = [_member(path, read, folder, base, one) for one in combinations]
        _refuse_alike(path, members)
        for one in combinations:
            _check(replace(read, grid=None, content={**base, **one}), module)
    except config.ConfigError as error:
        raise UserError(str(error)) from error
    return script, members


def _refuse_secrets(path: Path, tables: Sequence[Mapping[str, Any]]) -> None:
    """A run's own file is written from the sweep's, and would hold what is written nowhere."""
    for name in (name for table in tables for name in table if is_secret(name)):
        variable = {"hub_token": "HF_TOKEN", "webhook": "DOJO_WEBHOOK"}.get(name, name.upper())
        raise config.ConfigError(
            f"{path}: {name} is a secret, and every run's file would hold it: set {variable} in "
            "the environment"
        )


def _script(read: config.Config) -> Path:
    if not read.script:
        raise config.ConfigError(f"{read.path}: {config.SCRIPT}: NAME.py says what is to be run")
    found = scripts.find(read.script)
    if found is None:
        known = ", ".join(one.name for one in scripts.every())
        raise config.ConfigError(
            f"{read.path}: {config.SCRIPT}: {read.script} is not there ({known})"
        )
    return found


def _combinations(path: Path, grid: Any) -> Iterator[dict[str, Any]]:
    """The combinations of one table of lists, or of several tables one after the other."""
    for table in grid if isinstance(grid, list) else [grid]:
        if not isinstance(table, dict) or not table:
            raise config.ConfigError(f"{path}: {config.GRID} needs options with lists of values")
        for name, values in table.items():
            if not isinstance(values, list) or not values:
                raise config.ConfigError(f"{path}: {config.GRID}.{name} needs a list of values")
            if _flat(name) in _OWN:
                raise config.ConfigError(f"{path}: {config.GRID}.{name}: a sweep sets it itself")
        for values in itertools.product(*table.values()):
            yield dict(zip((_flat(name) for name in table), values, strict=True))


def _flat(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _folder(path: Path, base: Mapping[str, Any]) -> Path:
    for name in _OWN[1:]:
        if name in base:
            raise config.ConfigError(
                f"{path}: {name}: a sweep goes on with what is there; leave it out"
            )
    if not base.get(_OWN[0]):
        raise config.ConfigError(f"{path}: output_dir says where the runs' folders go")
    return Path(str(base[_OWN[0]]))


def _member(
    path: Path, read: config.Config, folder: Path, base: Mapping[str, Any], one: Mapping[str, Any]
) -> Member:
    name = _name(one)
    options = {"seed": 0, **base, **one, "output_dir": str(folder / name)}
    text = f"{_HEAD} {path}\n{config.written(str(read.script), options)}"
    return Member(name, folder / name, text)


def _name(one: Mapping[str, Any]) -> str:
    """A folder's name that tells a combination from the others."""
    parts = (f"{name}={_value(value)}" for name, value in one.items())
    name = re.sub(r"[^\w.=,+-]", "_", ",".join(parts))[:_LONGEST]
    return name.encode()[:_MOST_BYTES].decode(errors="ignore")


def _value(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _refuse_alike(path: Path, members: Sequence[Member]) -> None:
    names = [one.name for one in members]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise config.ConfigError(f"{path}: {config.GRID}: two combinations are called {twice}")


def _check(read: config.Config, module: Any) -> None:
    """Ends the process as the script would, if it would refuse a combination's options."""
    words = config.words_of(list(read.given(module.Args)), module.Args)
    try:
        cli.parse(module.Args, None, words)
    except SystemExit:
        told = hide(json.dumps(read.content, default=str))
        print(f"(in {read.path}: {told})", file=sys.stderr)
        raise


if __name__ == "__main__":
    cli.run(main, SweepArgs, __doc__)
