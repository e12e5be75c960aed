"""Files on the disk that can be had again: as many as a limit allows, the longest unused ones go.

Processes share the folder. A file appears under its name when it is whole; one process makes it
and the others wait; a kill leaves nothing that another would take for a file.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dojo import files
from dojo.cli import UserError

Write = Callable[[BinaryIO], None]

_SUFFIX = ".shard"


@dataclass(frozen=True)
class Disk:
    """A folder of a bounded size.

    A file that goes while somebody reads it takes room until it is closed: whoever opens another
    file closes those of his own that are gone.
    """

    folder: Path
    limit: int
    """In bytes, of the files that `hold` makes."""

    def open(self) -> None:
        """Makes the folder, and removes what kills have left in it."""
        files.cache_root(self.folder)

    def hold(self, name: str, size: int, write: Write) -> Path:
        """The path of a file; it is made if it is not there, and counts as used now.

        Args:
            size: of the file, in bytes, or a guess at it.
            write: writes its content.
        Raises:
            UserError: the disk is full.
        """
        path = self.folder / f"{name}{_SUFFIX}"
        if _touched(path):
            return path
        with self._turn(name):
            if not _touched(path):
                self._make(path, size, write)
        return path

    def drop(self, name: str) -> None:
        """Forgets a file that turned out to be damaged."""
        (self.folder / f"{name}{_SUFFIX}").unlink(missing_ok=True)

    @contextmanager
    def aside(self, name: str) -> Iterator[tuple[Path, BinaryIO]]:
        """A file to be written that is gone afterwards, or after a kill when a run begins."""
        path = self.folder / f".{name}{_SUFFIX}.{os.getpid()}"
        with os.fdopen(files.open_locked(path, wait=True), "r+b") as file:
            try:
                file.truncate(0)
                yield path, file
            finally:
                path.unlink(missing_ok=True)

    def _make(self, path: Path, size: int, write: Write) -> None:
        with self.room(size), files.whole(path) as file:
            with self._turn("room"):
                self._make_room(size)
                file.truncate(size)  # what others count from now on
            write(file)
            file.truncate(file.tell())

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Says so where the disk is full.

        Args:
            size: of what is written, in bytes.
        Raises:
            UserError: it is.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self.folder).free
            raise UserError(
                f"{self.folder}: there is no room for {size / 2**30:.2f} GiB more, "
                f"{free / 2**30:.2f} GiB are free: name another --data_cache_dir, or a smaller "
                "--data_cache_limit"
            ) from error

    def _make_room(self, size: int) -> None:
        """Removes files until `size` bytes more are within the limit, or none is left."""
        whole = [(path, _stat(path)) for path in self.folder.glob(f"*{_SUFFIX}")]
        partial = [_stat(path) for path in self.folder.glob(f".*{_SUFFIX}.*")]
        there = [(path, stat) for path, stat in whole if stat is not None]
        total = sum(stat.st_size for _, stat in there) + sum(one.st_size for one in partial if one)
        for path, stat in sorted(there, key=lambda pair: pair[1].st_mtime_ns):
            if total + size <= self.limit:
                return
            path.unlink(missing_ok=True)  # who reads it has it open
            total -= stat.st_size

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """One process at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.turn(self.folder / f".{name}.lock"):
            yield


def _touched(path: Path) -> bool:
    """Whether a file is there; if so it counts as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _stat(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat()
    return None
