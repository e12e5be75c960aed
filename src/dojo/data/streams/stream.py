"""Captioned pictures in shards: found, counted, and read row by row from the shards at hand."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dojo import files
from dojo.cli import UserError
from dojo.data.contents import write_json
from dojo.data.images import BadSample
from dojo.data.shards import digest
from dojo.data.sources.captioned import BadReport, Captioned, Recipe, listing
from dojo.data.sources.columns import shown
from dojo.data.streams import places
from dojo.data.streams.disk import Disk
from dojo.data.streams.packs import (
    BadShard,
    Columns,
    Pack,
    Table,
    parquet_columns,
    parquet_rows,
    tar_table,
    unpack,
)
from dojo.data.streams.places import Place
from dojo.data.streams.rows import Rows

INDEX = ".index.npy"
"""What a tar's index is called: the tar's name and this, beside it."""

_FORMAT = 1  # of what is remembered of shards; to be raised when it is found otherwise
_TRIES = 3  # to open a shard that another process's shards put out
_DIGITS = 20  # bytes of a number in a record, at most
_THREADS = 8  # shards that are looked at at a time


@dataclass
class Stream:
    """Captioned pictures in parquet files or tars; pickles small, holds no rows."""

    location: str
    shards: tuple[Place, ...]
    counts: tuple[int, ...]
    """Rows of each, at least 1."""
    columns: Columns
    prompt: str | None
    """One caption for all."""
    recipe: Recipe
    disk: Disk
    window: int
    left_out: list[BadReport] = field(default_factory=list[BadReport])
    """Shards that cannot be read."""
    limit: int | None = None
    """Rows that are used, from the first on; None is all."""
    _open: OrderedDict[int, Pack] = field(default_factory=OrderedDict[int, Pack], repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        total = sum(self.counts)
        return total if self.limit is None else min(total, self.limit)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of each shard's first row."""
        return tuple(accumulate(self.counts, initial=0))[:-1]

    @property
    def description(self) -> str:
        """Where the samples come from, for the screen."""
        kind = "tar" if self.shards[0].name.endswith(".tar") else "parquet"
        size = sum(place.size for place in self.shards) / 2**30
        caption = self.columns.caption
        taken = (
            f"one caption for all: {self.prompt!r} (--instance_prompt)"
            if self.prompt is not None
            else f"captions from {caption!r}"
            if caption
            else "captions from .txt or .json beside the pictures"
        )
        return (
            f"{self.location}: {len(self):,} rows in {len(self.shards):,} {kind} files "
            f"({size:.2f} GiB), {taken}"
        )

    @property
    def words(self) -> list[object]:
        """What tells these data and their order from others, wherever they lie."""
        return [*self.samples, self.window]

    @property
    def samples(self) -> list[object]:
        """What tells the rows from others, wherever they lie."""
        shards = [(place.name, place.size) for place in self.shards]
        columns = (self.columns.image, self.columns.caption)
        return [shards, self.counts, columns, self.prompt, len(self)]

    def rows(self) -> Rows:
        """All rows that are used, to be put in order."""
        left, counts = len(self), list[int]()
        for count in self.counts:
            counts.append(min(count, left))
            left -= counts[-1]
        used = [count for count in counts if count]
        return Rows(self.starts[: len(used)], tuple(used), self.window)

    def where(self, index: int) -> tuple[int, int]:
        """The shard and the row in it."""
        shard = bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def part(self, shard: int, rows: Sequence[int]) -> Captioned:
        """Some rows of a shard as samples, which is fetched if it is not at hand.

        Raises:
            UserError: it cannot be fetched.
        """
        pack = self.fetch(shard)
        name = self.shards[shard].name
        found = [pack.captions(row) for row in rows]
        if self.prompt is not None:
            found = [((self.prompt,), fault) for _, fault in found]
        return Captioned(
            description=name,
            names=[f"{name} row {row}" for row in rows],
            ids=[f"{name} row {row}|{self.shards[shard].size}" for row in rows],
            captions=[captions for captions, _ in found],
            problems=[fault for _, fault in found],
            rows=list(rows),
            store=pack.picture,
            recipes=(self.recipe,),
            recipe_of=[0] * len(found),
            has_masks=self.recipe.mask_from_alpha,
        )

    def cut(self, rows: int) -> Iterator[tuple[int, int, range]]:
        """The rows that are used, in order, so many at a time: shard, number of the first, rows."""
        left = len(self)
        for shard, (first, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            used = min(count, left)
            left -= used
            for start in range(0, used, rows):
                yield shard, first + start, range(start, min(start + rows, used))

    def fetch(self, shard: int) -> Pack:
        """A shard, open; brought to the disk if it is not there.

        Raises:
            UserError: it cannot be fetched, or is another than it was.
        """
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        place = self.shards[shard]
        self._close_gone()  # before there is another one on the disk
        pack = self._packed(place)
        if not pack.is_whole:  # damaged on our disk
            pack.close()
            self.disk.drop(self._key(place))
            pack = self._packed(place)
        if len(pack.table) != self.counts[shard] or not pack.is_whole:
            raise UserError(
                f"{place.name} has {len(pack.table)} rows, and had {self.counts[shard]} when the "
                "shards were counted: start again, its files have changed"
            )
        self._close_gone()
        self._open[shard] = pack
        while len(self._open) > 2 * self.window:
            self._open.popitem(last=False)[1].close()
        return pack

    def _close_gone(self) -> None:
        """Files without a name take room on the disk until they are closed."""
        for gone in [one for one, other in self._open.items() if other.is_gone]:
            self._open.pop(gone).close()

    def bring(self, shard: int) -> None:
        """Sees to it that a shard is on the disk."""
        packed(self.shards[shard], self.columns, self.disk)

    def _packed(self, place: Place) -> Pack:
        for _ in range(_TRIES):
            path, table = packed(place, self.columns, self.disk)
            with suppress(FileNotFoundError):  # gone again, where others fill the same folder
                return Pack(path, table, place.name, self.columns)
        raise UserError(
            f"{place.name} goes from {self.disk.folder} as soon as it is there: give a larger "
            "--data_cache_limit"
        )

    def _key(self, place: Place) -> str:
        return _key(place, self.columns)


# -- what is known of a shard -------------------------------------------------------------------


def packed(place: Place, columns: Columns, disk: Disk) -> tuple[Path, Table]:
    """A shard's file on the disk, and where its rows lie.

    Raises:
        BadShard: it cannot be read.
        UserError: it cannot be fetched, or the disk is full.
    """
    key = _key(place, columns)
    kept = disk.folder / f"{key}.npy"
    if place.name.endswith(".tar"):
        path = Path(place.path) if not place.is_remote else _fetched(place, disk)
        table = _loaded(kept)
        if table is None:
            table = tar_table(path, place.name, columns)
            with disk.room(table.nbytes):
                _keep(kept, table)
        return path, table
    if _loaded(kept) is None:
        disk.drop(key)
    path = disk.hold(key, place.size, partial(_unpacked, place, columns, disk, kept))
    table = _loaded(kept)
    if table is None:
        raise UserError(f"{kept}, an index of {place.name}, is damaged or gone: start again")
    return path, table


def _fetched(place: Place, disk: Disk) -> Path:
    """A remote file as it is."""
    key = f"{_stem(place)}-{_hash(place)}"
    return disk.hold(key, place.size, partial(places.fetch, place.path))


def _unpacked(place: Place, columns: Columns, disk: Disk, kept: Path, target: BinaryIO) -> None:
    with _at_hand(place, disk) as path:
        table = unpack(path, place.name, columns, target)
    _keep(kept, table)


@contextmanager
def _at_hand(place: Place, disk: Disk) -> Iterator[Path]:
    """A file on this machine; a remote one for as long as it is looked at."""
    if not place.is_remote:
        yield Path(place.path)
        return
    with disk.aside(f"{_stem(place)}-{_hash(place)}-fetched") as (path, file):
        places.fetch(place.path, file)
        file.flush()
        yield path


def _key(place: Place, columns: Columns) -> str:
    """The name of what is kept of a shard."""
    return f"{_stem(place)}-{_hash(place, columns.image or '', str(columns.caption))}"


def _hash(place: Place, *more: str) -> str:
    words = [place.path, str(place.size), place.version, str(_FORMAT), *more]
    return digest(words)[:16]


def _stem(place: Place) -> str:
    return "".join(c if c.isalnum() else "-" for c in Path(place.name).stem)[:80]


def _loaded(path: Path) -> Table | None:
    """A table as it was kept; None where there is none, or it is damaged."""
    with suppress(OSError):
        return _table(io.BytesIO(path.read_bytes()))
    return None


def _table(file: BinaryIO) -> Table | None:
    with suppress(OSError, ValueError, EOFError):
        table = np.load(file, allow_pickle=False)
        if table.ndim == 2 and table.shape[1] == 4 and table.dtype == np.int64:
            return table
    return None


def _keep(path: Path, table: Table) -> None:
    buffer = io.BytesIO()
    np.save(buffer, table)
    with files.whole(path) as file:
        file.write(buffer.getvalue())


# -- opening ------------------------------------------------------------------------------------


def open_stream(
    location: str,
    shards: Sequence[Place],
    wanted: Columns,
    disk: Disk,
    *,
    prompt: str | None,
    recipe: Recipe,
    window: int,
    skip: bool,
    limit: int | None,
) -> Stream:
    """Counts the rows of shards: by the footers of parquet, by the indices of tars.

    What was found is remembered beside the shards. A tar without an index is read once as a whole.

    Args:
        wanted: columns that the user named; a caption of "" is to be found.
        skip: leave out shards that cannot be read, in place of stopping.

    Raises:
        UserError: a shard cannot be read, or there is no row.
    """
    disk.open()
    tars = shards[0].name.endswith(".tar")
    seen = [(place.path, place.size, place.version) for place in shards]
    chosen = [str(wanted.image), str(wanted.caption)]
    known = disk.folder / f"shards-{digest([json.dumps(seen), *chosen, str(_FORMAT)])}.json"
    counts, columns = _known(known, shards)
    bad: list[BadReport] = []
    if not counts:
        if tars:
            columns, found = wanted, _each(partial(_tar_rows, columns=wanted, disk=disk), shards)
        else:
            found = _each(parquet_rows, shards)
            columns, found = _one_form(location, shards, found, wanted)
        bad = [one for one in found if isinstance(one, BadReport)]
        counts = [0 if isinstance(one, BadReport) else one[0] for one in found]
        if bad and not skip:
            raise BadSample(
                f"{len(bad)} of {len(shards)} shards cannot be read (--on_bad_sample skip leaves "
                f"them out):\n{listing(bad)}"
            )
        if not bad:
            with disk.room(len(counts) * _DIGITS):
                write_json(known, {"counts": counts, "columns": [columns.image, columns.caption]})
    used = [(place, count) for place, count in zip(shards, counts, strict=True) if count]
    if not used:
        raise UserError(f"{location}: no row in {len(shards)} files\n{listing(bad)}".rstrip())
    return Stream(
        location=location,
        shards=tuple(place for place, _ in used),
        counts=tuple(count for _, count in used),
        columns=columns,
        prompt=prompt,
        recipe=recipe,
        disk=disk,
        window=window,
        left_out=bad,
        limit=limit,
    )


_Found = tuple[int, list[str]] | BadReport
"""A shard's rows and columns, or why it cannot be read."""


def _one_form(
    location: str, shards: Sequence[Place], found: list[_Found], wanted: Columns
) -> tuple[Columns, list[_Found]]:
    """The columns that are taken, by the first parquet file with rows; those that lack one cannot
    be read.

    Raises:
        UserError: the first has none of that name.
    """
    names = next((one[1] for one in found if not isinstance(one, BadReport) and one[0]), None)
    if names is None:
        return wanted, found
    columns = parquet_columns(location, names, wanted)
    asked = {one for one in (columns.image, columns.caption) if one is not None}

    def judged(place: Place, one: _Found) -> _Found:
        if isinstance(one, BadReport) or not one[0] or asked.issubset(one[1]):
            return one
        lacking = sorted(asked.difference(one[1]))[0]
        return BadReport(place.name, f"there is no column {lacking!r}; it has {shown(one[1])}")

    return columns, [judged(*pair) for pair in zip(shards, found, strict=True)]


def _known(path: Path, shards: Sequence[Place]) -> tuple[list[int], Columns]:
    """What is remembered of shards; no counts where nothing is."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        kept = json.loads(path.read_text())
        counts = [int(count) for count in kept["counts"]]
        if len(counts) == len(shards):
            return counts, Columns(*kept["columns"])
    return [], Columns(None, None)


def _each(work: Callable[[Place], tuple[int, list[str]]], shards: Sequence[Place]) -> list[_Found]:
    """What is found of each shard, or why it cannot be read."""

    def done(place: Place) -> _Found:
        try:
            return work(place)
        except BadShard as error:
            return BadReport(place.name, str(error).removeprefix(f"{place.name}: "))

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(done, shards))


def _tar_rows(place: Place, columns: Columns, disk: Disk) -> tuple[int, list[str]]:
    """Rows of a tar: by the index beside it, or by looking through it."""
    kept = disk.folder / f"{_key(place, columns)}.npy"
    table = _loaded(kept)
    if table is None:
        table = _own_index(place, columns)
        if table is not None:
            with disk.room(table.nbytes):
                _keep(kept, table)
        else:
            table = packed(place, columns, disk)[1]
    return len(table), []


def _own_index(place: Place, columns: Columns) -> Table | None:
    """The index that `python -m dojo.data index` wrote beside a tar, if it is of this tar."""
    path = f"{place.path}{INDEX}"
    if columns.image or columns.caption or not places.exists(path):
        return None
    table = _table(io.BytesIO(places.read_bytes(path)))
    if table is None or not len(table) or table[0].tolist() != _mark(place):
        print(
            f"{place.name}{INDEX} is damaged or of another tar, and is not used: `python -m "
            "dojo.data index` writes it anew",
            flush=True,
        )
        return None
    return table[1:]


def _mark(place: Place) -> list[int]:
    """What tells a tar from another version of it: its size, and a sum over its end.

    A tar is filled up to a whole record, so one to which little was added has the size that it had.
    What was changed in its middle is noticed row by row: see `Pack`.
    """

    def end() -> bytes:
        with places.opened(place.path) as file:
            file.seek(max(0, place.size - tarfile.RECORDSIZE))
            return file.read()

    return [place.size, zlib.crc32(places.told(place.path, end)), 0, 0]


def write_index(place: Place, folder: Path) -> Path:
    """Writes the index of a local tar: what tells it from others, then where its rows lie.

    Raises:
        BadShard: it cannot be read.
    """
    table = tar_table(Path(place.path), place.name, Columns(None, ""))
    path = folder / f"{os.path.basename(place.path)}{INDEX}"
    _keep(path, np.concatenate([np.array([_mark(place)], np.int64), table]))
    return path
