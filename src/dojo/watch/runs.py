"""The runs below a folder, and what their files say. Nothing outside of the folder is read."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

import psutil

from dojo.cli.masking import hide, is_secret
from dojo.files.outputs import LOCK
from dojo.files.records import parse_row, read_if_whole, read_pictures
from dojo.report.page import facts, shown
from dojo.watch.metrics import seconds_left

MAX_RUNS = 500
MAX_DEPTH = 4  # folders below the one that is watched
MAX_PICTURES = 60  # of a step
TAIL = 2**16  # bytes at a file's end that are looked at
LINES = 80  # of a log
ABROAD = 600.0  # seconds without a row after which a run of another machine is taken for ended
MARKS = ("args.json", "metrics.jsonl")
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
_SETS = re.compile(r"(validation|previews?)\b.*")
_LOGS = (".log", ".out")
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # and other orders to a terminal

State = Literal["running", "finished", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in the list."""

    name: str
    script: str
    state: State
    step: float
    num_steps: int | None
    loss: float | None
    seconds_left: float | None
    changed: float
    """when its last row was written, in seconds since 1970"""


class Root:
    """The folder that is watched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def runs(self) -> dict[str, Run]:
        """The runs by name, the newest first; a run's name is its path below the folder."""
        found = {}
        for folder in self._walk(self.folder, 0):
            name = folder.relative_to(self.folder).as_posix()
            name = _readable(name)
            found["." if name == "" else name] = Run(self, folder)
            if len(found) == MAX_RUNS:
                break
        return dict(sorted(found.items(), key=lambda item: (-item[1].changed, item[0])))

    def _walk(self, folder: Path, depth: int) -> Iterator[Path]:
        if any((folder / name).is_file() for name in MARKS):
            yield folder
            return
        if depth == MAX_DEPTH:
            return
        with suppress(OSError), os.scandir(folder) as entries:
            # Links would lead out, or in a circle.
            below = [one.name for one in entries if one.is_dir(follow_symlinks=False)]
            for name in sorted(below):
                if not name.startswith("."):
                    yield from self._walk(folder / name, depth + 1)

    def holds(self, path: Path) -> bool:
        """Whether a path is a plain file that lies below the folder, wherever links lead."""
        try:
            real = path.resolve(strict=True)
            return real.is_relative_to(self.folder) and S_ISREG(real.stat().st_mode)
        except (OSError, RuntimeError):
            return False


class Run:
    """One run's folder."""

    def __init__(self, root: Root, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.metrics = folder / "metrics.jsonl"

    @cached_property
    def changed(self) -> float:
        """When its last row, or its record, was written."""
        for name in reversed(MARKS):
            with suppress(OSError):
                return (self.folder / name).stat().st_mtime
        return 0.0

    @cached_property
    def record(self) -> dict[str, Any]:
        """Its args.json, with tables where tables are read."""
        found = self._table("args.json")
        tables = {name: found.get(name) for name in ("args", "versions")}
        return found | {k: v if isinstance(v, dict) else {} for k, v in tables.items()}

    def _table(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_if_whole(path) if self.root.holds(path) else {}

    @cached_property
    def options(self) -> dict[str, str]:
        """Its options as texts, by group and name."""
        return {
            f"{group}.{name}": _readable(shown(value))
            for group, values in self.record["args"].items()
            if isinstance(values, dict)
            for name, value in values.items()
            if not is_secret(name)
        }

    @property
    def num_steps(self) -> int | None:
        """Its length, where that is known."""
        told = self.record.get("num_steps")
        if type(told) is not int:
            told = self.options.get("optim.max_train_steps", "")
            return int(told) if told.isdecimal() else None
        return told

    @cached_property
    def last_rows(self) -> list[dict[str, Any]]:
        """The rows at the end of its metrics."""
        if not self.root.holds(self.metrics):
            return []
        rows = (parse_row(line) for line in _tail(self.metrics).split(b"\n"))
        return [row for row in rows if row is not None]

    @property
    def step(self) -> float:
        """The last that was logged."""
        return self.last_rows[-1]["step"] if self.last_rows else 0

    @property
    def seconds_left(self) -> float | None:
        """Until it is finished; None where it is not at work, or nothing can be said."""
        if self.state != "running":
            return None
        return seconds_left(self.last_rows, self.num_steps)

    @cached_property
    def state(self) -> State:
        """Whether it is at work, over, or was broken off."""
        if self._at_work():
            return "running"
        return "finished" if (self.folder / "finished.json").is_file() else "stopped"

    def _at_work(self) -> bool:
        path = self.folder / LOCK
        holder = self._table(LOCK)
        if not holder:
            return False
        if holder.get("host") != socket.gethostname():
            return time.time() - max(self.changed, _time(path)) < ABROAD
        try:
            # A process that began later has the number of one that was killed.
            return psutil.Process(int(holder["pid"])).create_time() <= _time(path) + 1
        except psutil.AccessDenied:
            return True
        except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
            return False

    def summary(self, name: str) -> dict[str, Any]:
        """What the list says of it."""
        losses = [row["loss"] for row in self.last_rows if type(row.get("loss")) is float]
        return asdict(
            Summary(
                name=name,
                script=str(self.record.get("script", "")),
                state=self.state,
                step=self.step,
                num_steps=self.num_steps,
                loss=losses[-1] if losses and abs(losses[-1]) < 1e300 else None,
                seconds_left=self.seconds_left,
                changed=self.changed,
            )
        )

    @property
    def facts(self) -> dict[str, str]:
        """What was run, in plain words."""
        found = facts(self.folder, self.record, self.step)
        return {name: _readable(hide(str(value))) for name, value in found.items()}

    # -- pictures -----------------------------------------------------------------------------

    def picture_sets(self) -> dict[str, list[int]]:
        """The folders that pictures come into, with their steps; [-1] where there are none."""
        found = {}
        with suppress(OSError), os.scandir(self.folder) as entries:
            names = [one.name for one in entries if one.is_dir(follow_symlinks=False)]
            for name in sorted(filter(_SETS.fullmatch, names)):
                steps = sorted(self._steps(self.folder / name))
                if not steps and self._files(self.folder / name):
                    steps = [-1]
                if steps:
                    found[name] = steps
        if self._files(self.folder):
            found["result"] = [-1]
        return found

    def _steps(self, folder: Path) -> Iterator[int]:
        for path in folder.glob("step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal() and len(number) < 12 and self._files(path):
                yield int(number)

    def pictures(self, name: str, step: int) -> list[dict[str, str]]:
        """The pictures of a step: their files, and the prompts that they show."""
        if name not in self.picture_sets():
            return []
        place = self.folder if name == "result" else self.folder / name
        folder = place / f"step-{step}" if step >= 0 else place
        known = self.root.holds(place / "prompts.json") and read_pictures(place)
        labels = {row["file"]: row["label"] for row in known or ()}
        order = {file: i for i, file in enumerate(labels)}
        files = sorted(self._files(folder), key=lambda file: (order.get(file, len(order)), file))
        return [
            {"file": (folder / file).relative_to(self.folder).as_posix(), "label": label}
            for file in files[:MAX_PICTURES]
            for label in [labels.get(file, Path(file).stem)]
        ]

    def _files(self, folder: Path) -> list[str]:
        """Pictures in a folder, links left out."""
        with suppress(OSError), os.scandir(folder) as entries:
            return [
                one.name
                for one in entries
                if Path(one.name).suffix in KINDS and one.is_file(follow_symlinks=False)
            ]
        return []

    def picture(self, file: str) -> Path | None:
        """The path of a picture of this run; None where there is none under that name."""
        path = self.folder / file
        fits = path.suffix in KINDS and ".." not in Path(file).parts and "\0" not in file
        inside = fits and path.resolve().is_relative_to(self.folder)
        return path if inside and self.root.holds(path) else None

    # -- logs and control ---------------------------------------------------------------------

    def log(self) -> dict[str, Any]:
        """The last lines of the newest log in the folder, in its `logs`, or beside it."""
        beside = [self.folder.with_name(self.folder.name + suffix) for suffix in _LOGS]
        places = (self.folder, self.folder / "logs")
        found = [path for place in places for suffix in _LOGS for path in place.glob(f"*{suffix}")]
        found = [path for path in (*found, *beside) if self.root.holds(path)]
        if not found:
            return {"file": "", "lines": []}
        newest = max(found, key=_time)
        return {"file": newest.name, "lines": plain_lines(_tail(newest))}

    def ask(self, what: str) -> None:
        """Leaves a control file, as `touch` would.

        Raises:
            OSError: it cannot be written, or something else has the name.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self.folder / what, flags, 0o666)
        try:
            if not S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EEXIST, "is no plain file")
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def _readable(text: str) -> str:
    """A text for a page, which takes no bytes of a file's name that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def plain_lines(data: bytes) -> list[str]:
    """The last lines of a log as a terminal would show them, without secrets.

    Of what a progress bar wrote over itself the last state is left.
    """
    text = _COLOURS.sub("", data.decode("utf-8", "replace"))
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [hide(line) for line in lines if line][-LINES:]


def _tail(path: Path) -> bytes:
    """A file's last bytes, from the beginning of a line on."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            data = file.read(TAIL)
    except OSError:
        return b""
    return data if size <= TAIL else data.partition(b"\n")[2]


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
