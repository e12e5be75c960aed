"""Tensors of many samples on disk, in files that are whole or absent.

A cache is a folder named by a fingerprint of everything its numbers depend on; a shard is a
safetensors file named by the samples in it. A shard appears under its name only when it is whole,
so a process that is killed loses at most the shard in its hands, and a sample that changed has
another id and thereby another shard. What stays the same is shared by later runs. A shard that is
damaged is made again: at the start one that is not whole, and after it was read one whose numbers
are not those that were written, which a checksum of every view in its header tells.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dojo import files
from dojo.bars import Bar
from dojo.cli import UserError
from dojo.files import tensors
from dojo.lazy import safetensors_torch, torch

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2  # to be raised when the same settings would give other numbers
SHARD_SIZE = 32  # samples at most; the most work that a kill can lose

_CHECKSUMS = "crc32"  # in a header; shards from before there were any are read without


class Shards:
    """The shards of one list of samples in one cache folder.

    A shard's name is a hash of its samples' ids, and where it ends the id of its last sample says:
    so a sample that is added or left out changes the shard around it, not all that follow. Small
    to pickle; holds no tensors.
    """

    def __init__(self, folder: Path, ids: Sequence[str], *, views: Sequence[int] = ()) -> None:
        """
        Args:
            views: lengths of the axes after the sample's along which it is encoded several times;
                the more views, the fewer samples in a shard.
        """
        self.folder = folder
        self.views = tuple(views)
        self.starts = _starts(ids, max(1, SHARD_SIZE // math.prod(views)))
        self.members = [range(*pair) for pair in itertools.pairwise([*self.starts, len(ids)])]
        self.names = [digest([ids[i] for i in members]) for members in self.members]
        self._whole: set[int] = set()  # shards that were looked at and are

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{self.names[shard]}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not on disk yet, or damaged there."""
        found = [k for k in range(len(self.names)) if k not in self._whole and not self._check(k)]
        self._whole.update(set(range(len(self.names))) - set(found))
        return found

    def _check(self, shard: int) -> bool:
        """Whether the file of a shard is there, all its bytes, with a row for every sample.

        Its header is read and not its numbers: a cache may be larger than the memory.
        """
        try:
            with safe_open(self.path(shard), framework="pt") as file:
                rows = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, IndexError):
            return False
        return rows == {len(self.members[shard])}

    def num_missing(self) -> int:
        """Samples in the missing shards."""
        return sum(len(self.members[k]) for k in self.missing())

    def share(self, process: int = 0, num_processes: int = 1, first: int = 0) -> list[int]:
        """Numbers of the missing shards that `fill` lets this process make."""
        return [k for k in self.missing() if (first + k) % num_processes == process]

    def fill(
        self,
        make: Callable[[Sequence[int]], Mapping[str, Tensor]],
        *,
        title: str,
        process: int = 0,
        num_processes: int = 1,
        first: int = 0,
    ) -> None:
        """Makes this process's share of the missing shards, one after another.

        Args:
            make: takes sample indices, returns tensors whose first axis is the sample.
            title, process, num_processes, first: as for `stream`.
        """
        self.stream(
            partial(map, make),
            title=title,
            process=process,
            num_processes=num_processes,
            first=first,
        )

    def stream(
        self,
        make_all: Callable[[Sequence[Sequence[int]]], Iterable[Mapping[str, Tensor]]],
        *,
        title: str,
        process: int = 0,
        num_processes: int = 1,
        first: int = 0,
    ) -> None:
        """Makes this process's share of the missing shards; one is written while the next is made.

        Args:
            make_all: takes lists of sample indices, returns for each list tensors whose first axis
                is the sample; it may read ahead.
            first: shards of lists that were dealt to the processes before this one, so that many
                short lists do not all begin with process 0.
        """
        if process == 0:
            files.sweep(self.folder.parent.glob("*/.*"))  # of kills, in other caches too
        mine = self.share(process, num_processes, first)
        damaged = [self.path(k) for k in mine if self.path(k).exists()]
        if damaged:
            names = ", ".join(path.name for path in damaged[:3])
            print(
                f"{self.folder}: {len(damaged)} damaged files are made again ({names})", flush=True
            )
        total = sum(len(self.members[k]) for k in mine)
        bar = Bar(total=total, desc=title, disable=process != 0 or not mine, unit="sample")
        with ThreadPoolExecutor(1) as writer:  # the disk is waited for while the next is made
            written: Future[None] | None = None
            for k, made in zip(mine, make_all([self.members[k] for k in mine]), strict=True):
                if written is not None:
                    written.result()
                written = writer.submit(self._save, k, made)
                bar.update(len(self.members[k]))
            if written is not None:
                written.result()
        bar.close()

    def read(self, index: int, *view: int) -> dict[str, Tensor]:
        """One sample's tensors, or what lies at `view` of them; nothing else is read.

        Raises:
            UserError: the shard was removed or damaged since the run began.
        """
        shard = bisect_right(self.starts, index) - 1
        view, rest = view[: len(self.views)], view[len(self.views) :]
        place = (index - self.starts[shard], *view)
        path = self.path(shard)
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                entries, told = _header(path, (about.st_ino, about.st_size, about.st_mtime_ns))
                read = {name: tensors.read_part(file, entries[name], place) for name in entries}
            if told is not None:
                self._compare(read.values(), told, place)
            found = {
                name: tensors.from_part(part, entries[name], place) for name, part in read.items()
            }
            return {name: one[rest] for name, one in found.items()} if rest else found
        except (OSError, IndexError, ValueError) as error:
            # Where its header looks whole, nobody would make it again.
            if not isinstance(error, OSError) and self._check(shard):
                with suppress(OSError):
                    path.unlink()
            raise UserError(
                f"{path}, a file of the cache, cannot be read any more ({error}): "
                "the same command with --resume_from_checkpoint latest makes it again"
            ) from error

    def _save(self, shard: int, made: Mapping[str, Tensor]) -> None:
        shape = (len(self.members[shard]), *self.views)
        parts = [
            one.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            for _, one in sorted(made.items())
        ]
        told = json.dumps(torch.tensor(checksums(parts, math.prod(shape))).view(shape).tolist())
        tensors.save(self.path(shard), made, {_CHECKSUMS: told})

    def _compare(
        self, found: Iterable[bytearray], told: Sequence[int], place: Sequence[int]
    ) -> None:
        """
        Args:
            found: what lies at a place, of the sample and of some of its views.
            told: checksums of all views of all samples, in their order.
        Raises:
            ValueError: they are others.
        """
        count = math.prod(self.views[len(place) - 1 :])  # views that lie there
        number = 0
        for index, length in zip(place, (0, *self.views), strict=False):
            number = number * length + index
        if checksums(found, count) != told[number * count : (number + 1) * count]:
            raise ValueError("its numbers are not those that were written")


@lru_cache(maxsize=1024)
def _header(
    path: Path, about: tuple[int, ...]
) -> tuple[dict[str, dict[str, Any]], list[int] | None]:
    """Where the tensors of a shard lie, by name, and the checksums of all views, if it has some.

    Read once for many samples: opening a file by the library takes as long as a sample's numbers.

    Args:
        about: what changes when the file does.
    Raises:
        ValueError: it is damaged.
    """
    entries, metadata = tensors.read_header(path)
    entries, told = dict(sorted(entries.items())), metadata.get(_CHECKSUMS)
    return entries, None if told is None else torch.tensor(json.loads(told)).flatten().tolist()


def checksums(parts: Iterable[bytearray | memoryview], count: int) -> list[int]:
    """The crc32 of each of `count` equal pieces of some tensors, over all of these.

    Args:
        parts: the bytes of each tensor, by the order of their names.
    """
    sums = [0] * count
    for part in parts:
        view = memoryview(part)
        size = len(view) // count
        sums = [zlib.crc32(view[i * size : (i + 1) * size], one) for i, one in enumerate(sums)]
    return sums


class Aside:
    """Tensors laid aside in one file without a name, which ends with its process, however it ends.

    Args:
        folder: on the disk that has the room.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[object, tuple[int, int]] = {}

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Lays tensors aside under a key."""
        content = safetensors_torch.save({name: one.contiguous() for name, one in tensors.items()})
        self._places[key] = (self._file.seek(0, os.SEEK_END), len(content))
        self._file.write(content)

    def get(self, key: Hashable) -> dict[str, Tensor]:
        """What lies under a key."""
        start, length = self._places[key]
        self._file.seek(start)
        return safetensors_torch.load(self._file.read(length))


def _starts(ids: Sequence[str], size: int) -> list[int]:
    """Where shards begin: about `size / 2` apart, and never more than `size`."""
    starts: list[int] = []
    ended = True
    for i, sample_id in enumerate(ids):
        if ended or i - starts[-1] == size:
            starts.append(i)
        ended = zlib.crc32(sample_id.encode("utf-8", "surrogatepass")) % max(1, size // 2) == 0
    return starts


def digest(words: Sequence[str]) -> str:
    """A hash of words, which cannot run into each other: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()


def cache_folder(root: Path, kind: str, settings: Mapping[str, object]) -> Path:
    """The folder of the cache that was made with exactly these settings."""
    text = json.dumps({**settings, "format": FORMAT}, sort_keys=True, default=str)
    return root / f"{kind}-{digest([text])}"


def describe(folder: Path, settings: Mapping[str, object]) -> None:
    """Writes beside the shards what they were made with, for a person who looks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(
        json.dumps(settings, indent=1, sort_keys=True, default=str)
    )


def announce(what: str, root: Path, num_bytes: int) -> None:
    """Says how much a cache is about to take, and refuses what the disk cannot hold.

    Raises:
        UserError: less is free than `num_bytes` and a margin of 5 %.
    """
    files.cache_root(root)
    free = shutil.disk_usage(root).free
    room = f"{num_bytes / 2**30:.2f} GiB in {root}, where {free / 2**30:.2f} GiB are free"
    if num_bytes * 1.05 > free:
        raise UserError(
            f"caching {what} needs {room}: choose another --latent_cache_dir, or "
            "--no_cache_latents and --no_cache_text_embeddings"
        )
    print(f"caching {what}: {room}", flush=True)
