"""Hashes of what files and rows contain: read once, and remembered while nothing has changed.

A copy of a file has another path, inode and time but the same content, and a hash that hangs on
content alone. To read everything again at every start would take as long as a pass of training, so
a hash is kept with what the file system says of its file: size, times of change and inode. The
inode's own time of change (ctime) is set by every write and by no program, so a file that was
changed and got its old size and time back is read again. A file that was changed in the last
moments could change once more within one tick of the file system's clock: it is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dojo import files
from dojo.bars import Bar

MISSING = "missing"
"""Stands for the hash of what cannot be read."""

_TICK = 2.0  # seconds: the coarsest clock of a file system in use (FAT)
_CHUNK = 2**20  # bytes


@dataclass(frozen=True)
class Origin:
    """Where a content comes from, and what would tell that it has changed."""

    home: str
    """Of the record that remembers it: a folder, or a table."""
    key: str
    """Its name there."""
    state: tuple[int | str, ...]
    """Another one wherever the content may be another."""
    changed: float
    """When it was last changed, in seconds since the epoch."""


@runtime_checkable
class Remembered(Protocol):
    """A store of pictures whose contents can be remembered."""

    def origin(self, row: int) -> Origin | None:
        """Where the picture of a row comes from; None where nothing would tell a change."""
        ...


@dataclass(frozen=True)
class Content:
    """Something to be hashed."""

    origin: Origin | None
    read: Callable[[], Path | bytes]
    """Its bytes, or the file that they stand in."""


def file_origin(home: str, key: str) -> Origin | None:
    """The origin of the file `key` of a folder; None where there is no such file."""
    try:
        stat = os.stat(os.path.join(home, key))
    except (OSError, ValueError):  # ValueError: a path with a null character
        return None
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return Origin(os.path.abspath(home), key, state, max(stat.st_mtime, stat.st_ctime))


def hashes(
    contents: Sequence[Content],
    root: Path | None,
    *,
    num_threads: int = 2,
    progress: bool = False,
) -> list[str]:
    """The hash of each content, 32 hexadecimal digits; `MISSING` of what cannot be read.

    Args:
        root: folder of the records, in which new hashes are remembered; None remembers nothing.
        num_threads: that read at a time.
        progress: show a bar while contents are read.
    """
    homes = {one.origin.home for one in contents if one.origin}
    known = {home: _recorded(root, home) for home in homes}
    found = [_known(one.origin, known) for one in contents]
    unknown = [place for place, value in enumerate(found) if value is None]
    changed: set[str] = set()
    with ThreadPoolExecutor(num_threads) as pool:
        made = pool.map(_hashed, (contents[place] for place in unknown))
        bar = Bar(made, "Reading pictures", len(unknown), disable=not (progress and unknown))
        for place, (value, begun) in zip(unknown, bar, strict=True):
            found[place] = value
            origin = contents[place].origin
            if origin and value != MISSING and begun - origin.changed >= _TICK:
                known[origin.home][origin.key] = [*origin.state, value]
                changed.add(origin.home)
    for home in changed if root else ():
        write_json(_record(Path(root or ""), home), known[home])
    return [value or MISSING for value in found]


def file_hashes(paths: Sequence[Path], root: Path | None) -> list[str]:
    """The hash of each file; see `hashes`."""
    contents = [
        Content(file_origin(str(path.parent), path.name), partial(Path, path)) for path in paths
    ]
    return hashes(contents, root)


def write_json(path: Path, content: object) -> None:
    """Writes a file that is whole or absent, also beside others who write it."""
    with files.whole(path) as file:
        file.write(json.dumps(content).encode())


def _known(origin: Origin | None, known: dict[str, dict[str, list[Any]]]) -> str | None:
    kept = known[origin.home].get(origin.key) if origin else None
    return kept[-1] if origin and kept and kept[:-1] == list(origin.state) else None


def _record(root: Path, home: str) -> Path:
    name = hashlib.blake2b(os.fsencode(home), digest_size=16).hexdigest()
    return root / f"contents-{name}.json"


def _recorded(root: Path | None, home: str) -> dict[str, list[Any]]:
    """What is remembered of a home; nothing where the record is damaged."""
    if root is not None:
        with suppress(OSError, ValueError):
            record = json.loads(_record(root, home).read_text())
            if isinstance(record, dict) and all(
                isinstance(kept, list) and kept and isinstance(kept[-1], str)
                for kept in record.values()
            ):
                return record
    return {}


def _hashed(content: Content) -> tuple[str, float]:
    """The hash of a content, and when its reading began."""
    begun = time.time()
    digest = hashlib.blake2b(digest_size=16)
    try:
        source = content.read()
        for part in _parts(source) if isinstance(source, Path) else [source]:
            digest.update(part)
    except (OSError, ValueError):
        return MISSING, begun
    return digest.hexdigest(), begun


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            yield part
