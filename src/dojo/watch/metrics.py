"""A metrics.jsonl that grows, read piece by piece: its curves stay in memory, its rows do not."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dojo.files.records import parse_row
from dojo.watch.thinned import Thinned

PIECE = 2**19  # bytes that are read at a time
MAX_KEYS = 200  # curves of a run; further keys are left out
MOST = 1e300  # of a number: sums of such are finite
MARK = 256  # bytes before the place, by which a file is known again

_numbers = itertools.count()


class MetricsFile:
    """The curves of one run's rows, as far as they have been read.

    A file that was written anew (a run that went on drops the rows of steps that are done again) is
    read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = next(_numbers)  # tells it from all others
        self.version = 0  # changes with what has been read
        self._begin()

    def _begin(self) -> None:
        self.curves: dict[str, Thinned] = {}
        self.place = self.size = 0
        self._file = 0  # inode
        self._mark = b""  # what stands before the place
        self._rest = b""  # a line whose end is not there yet

    @property
    def whole(self) -> bool:
        """Whether all that was there has been read."""
        return self.place >= self.size

    @property
    def share(self) -> float:
        """The share of the file that has been read."""
        return self.place / self.size if self.size else 1.0

    def read(self, until: float) -> None:
        """Reads on, at least a piece, until the file's end or the time (`time.monotonic`)."""
        try:
            with self.path.open("rb") as file:
                self._look(file)
                while not self.whole:
                    self._take(file)
                    if time.monotonic() >= until:
                        return
        except OSError:
            pass  # not there, or not any more: what is known stays

    def _look(self, file: BinaryIO) -> None:
        """Begins anew in another file than last time."""
        found = os.fstat(file.fileno())
        same = found.st_ino == self._file and found.st_size >= self.place
        if same and self._mark:
            file.seek(self.place - len(self._mark))
            same = file.read(len(self._mark)) == self._mark
        if not same:
            self._begin()
            self._file = found.st_ino
            self.version += 1
        self.size = found.st_size
        file.seek(self.place)

    def _take(self, file: BinaryIO) -> None:
        data = file.read(min(PIECE, self.size - self.place))
        if not data:
            self.size = self.place
            return
        self.place += len(data)
        self._mark = (self._mark + data)[-MARK:]
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest if len(rest) <= PIECE else b""  # no row is that long
        columns: dict[str, tuple[list[float], list[float]]] = {}
        for line in lines:
            row = parse_row(line)
            if row is not None:
                self._sort_in(row, columns)
        for key, (steps, values) in columns.items():
            self.curves.setdefault(key, Thinned()).add(steps, values)
        self.version += 1

    def _sort_in(
        self, row: Mapping[str, Any], columns: dict[str, tuple[list[float], list[float]]]
    ) -> None:
        step = row["step"]
        if not abs(step) <= MOST:
            return
        for key, value in row.items():
            if type(value) not in (float, int) or not abs(value) <= MOST:
                continue  # NaN and infinity have no place on an axis
            if key not in columns:
                known = key in self.curves or len(self.curves | columns) < MAX_KEYS
                if key == "step" or not known:
                    continue
                columns[key] = ([], [])
            steps, values = columns[key]
            steps.append(step)
            values.append(value)


def seconds_left(rows: list[dict[str, Any]], num_steps: int | None) -> float | None:
    """Seconds until a run is finished: what it says itself in its last row.

    Of older runs, which say nothing, at the pace of the last rows: what validations and checkpoints
    among them took counts in; filling caches happens once.

    Args:
        rows: the last of a run, in their order.
    Returns:
        None where nothing can be said.
    """
    timed = [row for row in rows if "seconds_train" in row]
    told = timed[-1].get("eta_s") if timed else None
    if isinstance(told, int | float) and not isinstance(told, bool) and 0 <= told < math.inf:
        return told
    if num_steps is None or len(timed) < 2:
        return None
    spent = sum(
        value
        for row in timed[1:]
        for key, value in row.items()
        if key.startswith("seconds_") and key != "seconds_cache" and type(value) in (int, float)
    )
    steps = timed[-1]["step"] - timed[0]["step"]
    left = num_steps - timed[-1]["step"]
    if steps <= 0 or left < 0 or not math.isfinite(spent):
        return None
    return left * spent / steps
