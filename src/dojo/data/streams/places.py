"""Where shards lie: what a location names, and how bytes are fetched from there.

A location is a folder of .tar files, a pattern such as `FOLDER/*.parquet` (also
`shard-{000..127}.tar`), or a URL of any file system that fsspec knows, with or without a pattern.
Paths of this machine are read in place; what has a `://` is fetched, `file://` too.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dojo.cli import UserError
from dojo.data.formats import picture_suffixes

SUFFIXES = (".parquet", ".tar")
MADE = "made.json"
"""The file by which a folder that `python -m dojo.data cache` wrote is known."""

PAUSES = (1.0, 5.0)
"""Seconds between readings of a remote file that fails; the run stops for it after the last."""

_TRIES = len(PAUSES) + 1
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# What tells a file from another version of it, in the words of s3fs, gcsfs, http, the hub, disks.
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime")
_ADVICE = {
    "s3": 'pip install -e ".[s3]" installs what it takes',
    "http": 'pip install -e ".[s3]" installs what it takes (aiohttp)',
    "https": 'pip install -e ".[s3]" installs what it takes (aiohttp)',
}
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One file of shards."""

    path: str
    """As it is opened: of this machine, or with its protocol."""
    name: str
    """Below the folder that all of them lie in; what messages call it."""
    size: int
    """In bytes."""
    version: str
    """Another one where the content is another, as far as the file system tells."""

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched before it is read."""
        return "://" in self.path


def is_streamed(location: str) -> bool:
    """Whether a location names shards, of which a few are on the disk at a time."""
    if "://" in location:
        return True
    folder = Path(location).expanduser()
    if not folder.exists():
        return bool(glob.escape(location) != location or _RANGE.search(location))
    return folder.is_dir() and ((folder / MADE).is_file() or _holds_tars(folder))


def _holds_tars(folder: Path) -> bool:
    """Whether there are tars and no pictures, which would be trained on as ever."""
    endings = {path.suffix.lower() for path in folder.iterdir() if path.is_file()}
    return ".tar" in endings and not endings & picture_suffixes()


def files_at(location: str, split: str = "train") -> list[Place]:
    """The shards that a location names, sorted by their names.

    Args:
        split: of the files below a folder, those are taken whose names hold this word, if any do.

    Raises:
        UserError: there are none, or the file system cannot be reached or read.
    """
    found = [place for one in _expanded(location) for place in _found(one)]
    if not found:
        raise UserError(f"{location}: no {' or '.join(SUFFIXES)} file is there")
    if _is_pattern(location) and split != "train":
        raise UserError(
            f"{location}: a pattern says by itself which files are taken, and --dataset_split "
            f"{split} does not go with it"
        )
    if not _is_pattern(location):
        found = _of_split(location, found, split)
    kinds = {Path(place.path).suffix for place in found}
    if len(kinds) > 1:
        raise UserError(
            f"{location}: there are {' and '.join(sorted(kinds))} files: name one kind, as in "
            f"{location.rstrip('/')}/*.parquet"
        )
    return sorted(_named(found), key=lambda place: place.name)


def exists(path: str) -> bool:
    """Whether there is such a file, here or there."""
    if "://" not in path:
        return Path(path).expanduser().is_file()
    return told(path.removesuffix(f"/{MADE}"), lambda: bool(_fs(path)[0].isfile(_fs(path)[1])))


def read_bytes(path: str) -> bytes:
    """The content of a small file, from here or there."""
    with opened(path) as file:
        return file.read()


def opened(path: str) -> BinaryIO:
    """A file for reading, from here or there; its parts are fetched as they are read.

    Raises:
        UserError: it cannot be reached.
    """
    if "://" not in path:
        return Path(path).expanduser().open("rb")
    fs, inner = _fs(path)
    return told(path, lambda: fs.open(inner, "rb", block_size=2**22))


def fetch(path: str, target: BinaryIO) -> None:
    """Copies a remote file, from the beginning again where the connection breaks.

    Raises:
        UserError: it cannot be read, three times over.
    """

    def copy() -> None:
        target.seek(0)
        with opened(path) as source:
            while part := source.read(2**22):
                target.write(part)

    told(path, copy)


def told(path: str, work: Callable[[], T]) -> T:
    """Does something with a remote file, several times if need be.

    Raises:
        UserError: it fails each time; in one sentence.
        OSError: the disk of this machine is full.
    """
    for attempt in range(_TRIES):
        try:
            return work()
        except UserError:
            raise
        except ImportError as error:
            protocol = path.partition("://")[0]
            advice = _ADVICE.get(protocol, "install that package")
            raise UserError(f"{path}: {error}: {advice}") from error
        except FileNotFoundError as error:
            raise UserError(f"{path}: there is no such file") from error
        except Exception as error:  # of any network library
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            if attempt == _TRIES - 1 or isinstance(error, ValueError | PermissionError):
                reason = str(error) or type(error).__name__
                raise UserError(f"{path}: cannot be read: {reason}") from error
            time.sleep(PAUSES[attempt])
    raise AssertionError("the last try returns or raises")


def _fs(path: str) -> tuple[Any, str]:
    """The file system of a URL, of this process alone, and the path in it."""
    from fsspec.core import url_to_fs

    return url_to_fs(path)


def _expanded(location: str) -> list[str]:
    """A location with its numbers in braces written out."""
    match = _RANGE.search(location)
    if match is None:
        return [location]
    first, last = match.groups()
    numbers = (str(k).zfill(len(first)) for k in range(int(first), int(last) + 1))
    ends = _expanded(location[match.end() :])
    return [f"{location[: match.start()]}{number}{end}" for number in numbers for end in ends]


def _is_pattern(location: str) -> bool:
    return any(letter in location for letter in "*?[{") or location.endswith(SUFFIXES)


def _found(location: str) -> Iterator[Place]:
    yield from _remote(location) if "://" in location else _local(location)


def _local(location: str) -> Iterator[Place]:
    path = Path(location).expanduser()
    if path.is_dir():
        names: Sequence[str] = [str(one) for one in path.rglob("*")]
    else:
        names = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
    for name in names:
        if name.endswith(SUFFIXES) and os.path.isfile(name):
            stat = os.stat(name)
            yield Place(os.path.abspath(name), name, stat.st_size, str(stat.st_mtime_ns))


def _remote(location: str) -> Iterator[Place]:
    found = told(location, lambda: _listed(location))
    fs = _fs(location)[0]
    for one in found:
        if one.get("type") == "file" and str(one["name"]).endswith(SUFFIXES):
            version = next((str(one[key]) for key in _VERSIONS if one.get(key)), "")
            path = str(fs.unstrip_protocol(one["name"]))
            yield Place(path, path, int(one.get("size") or 0), version)


def _listed(location: str) -> list[dict[str, Any]]:
    """What fsspec says of the files that a URL names."""
    fs, path = _fs(location)
    if any(letter in path for letter in "*?["):
        return list(fs.glob(path, detail=True).values())
    if path.endswith(SUFFIXES):
        return [fs.info(path)]
    return list(fs.find(path, detail=True).values())


def _of_split(location: str, found: list[Place], split: str) -> list[Place]:
    """Those below a folder that belong to a split, if the names tell.

    Raises:
        UserError: another split than train was asked for, and none of them is of it.
    """
    word = re.compile(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)")
    root = _root(location)
    some = [place for place in found if word.search(_bare(place.path).removeprefix(root))]
    if not some and split != "train":
        raise UserError(f"{location}: no file there belongs to --dataset_split {split}")
    return some or found


def _root(location: str) -> str:
    """A folder as the paths of files below it begin, without a protocol."""
    if "://" in location:
        return _bare(_fs(location)[1])
    return _bare(os.path.abspath(os.path.expanduser(location)))


def _bare(path: str) -> str:
    """A path without its protocol, and without the slashes that some file systems put before it."""
    return (path.partition("://")[2] or path).strip("/")


def _named(found: list[Place]) -> Iterator[Place]:
    """The same with names that begin below the folder of all of them."""
    folders = {os.path.dirname(place.path) for place in found}
    common = os.path.commonpath([one.replace("://", "/") for one in folders])
    for place in found:
        name = os.path.relpath(place.path.replace("://", "/"), common)
        yield Place(place.path, name, place.size, place.version)
