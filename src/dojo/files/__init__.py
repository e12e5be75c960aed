"""Files that are whole or absent, and the operating system's locks, which end with their process.

Locks are `flock`'s, advisory and tied to an open file: however a process ends, its locks end with
it. Linux passes them on to an NFS server, where they hold between machines; on a file system that
knows none (some FUSE and cluster file systems) nothing is locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dojo.cli import TrainingStopped, UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_OLD = 24 * 3600  # seconds: nobody writes one file for so long
_FULL = 16 << 20  # bytes: with less than this free, a writer that failed met the disk's end
_LEFTOVER = re.compile(r"\.(.+)\.\d+")
_TAG = (  # the sign by which tar, restic, borg and others leave caches out: bford.info/cachedir
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Latents, embeddings and checks that SD Dojo makes again when they are missing.\n"
)


def open_locked(path: Path, *, wait: bool = False, create: bool = True) -> int:
    """Opens a file for reading and writing, locked for this process alone.

    Returns:
        The descriptor; closing it ends the lock.
    Raises:
        BlockingIOError: another process has it, and `wait` is False.
        FileNotFoundError: it is not there and is not to be made.
    """
    flags = os.O_RDWR | (os.O_CREAT if create else 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            _flock(descriptor, wait=wait)
            if is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had it took its name away meanwhile


def _flock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def turn(path: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time, by the lock of a file that is gone afterwards.

    Raises:
        BlockingIOError: another process has its turn, and `wait` is False.
    """
    descriptor = open_locked(path, wait=wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def is_locked(descriptor: int) -> bool:
    """Whether what `open_locked` returned is locked: some file systems know no locks."""
    return _flock(descriptor, wait=True)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still names the file that a descriptor is open on."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to be written that gets its name only when every byte is on the disk.

    Until then it is `.NAME.PID`, locked, so that `sweep` tells what a kill left from what another
    process is writing. Processes may share the folder, and write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(open_locked(temporary, wait=True), "wb") as file:
        try:
            file.truncate()
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(found: Iterable[Path]) -> None:
    """Removes those of these paths that a killed process left of `whole`, and nothing else.

    Where nothing can be locked, age alone tells them from what another process is writing.
    """
    for path in found:
        if not _LEFTOVER.fullmatch(path.name):
            continue
        try:
            descriptor = open_locked(path, create=False)
        except OSError:  # being written, gone by now, or a folder
            continue
        if is_locked(descriptor) or time.time() - os.fstat(descriptor).st_mtime > _OLD:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def cache_root(root: Path) -> None:
    """Makes a folder of caches, marked as such for backups and for whoever looks for files."""
    root.mkdir(parents=True, exist_ok=True)
    tag = root / "CACHEDIR.TAG"
    if not tag.exists():
        tag.write_text(_TAG)
    sweep(root.glob(".*"))
    sweep(root.glob("*/.*"))


def check_output(
    path: Path, flag: str, *, is_ours: Callable[[str], bool], overwrite: bool = False
) -> None:
    """Refuses a file to be written whose name is taken by something else.

    Args:
        is_ours: whether the beginning of a text is that of such a file: those are replaced.
        overwrite: replace any file.
    Raises:
        UserError: naming the flag.
    """
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder; name a file in it")
    if not path.exists() or overwrite:
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        if not is_ours(file.read(4096)):
            raise UserError(
                f"{flag}: {path} is there already and was not written by this command: name "
                "another file, or remove it"
            )


def user_caches() -> Path:
    """The user's folder of what is made again when it is missing, in XDG_CACHE_HOME or ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path("~/.cache").expanduser()) / "sd-dojo"


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Says so when a writer inside fails, in whichever library's words, because the disk is full.

    Raises:
        TrainingStopped: that is so.
    """
    try:
        yield
    except Exception as error:
        no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not no_room and shutil.disk_usage(folder).free >= _FULL:
            raise
        raise TrainingStopped(
            f"{folder}: there is no room left on the disk; what was whole before is whole: make "
            "room, or keep fewer checkpoints (--checkpoints_total_limit), and go on with "
            "--resume_from_checkpoint latest"
        ) from error
