"""Shards that any row can be read from: a file, and a table of where each row lies in it.

A tar is read as it is; where its rows lie is found once. Rows of parquet lie in compressed groups
of thousands, so a parquet file is unpacked: the contents of its pictures and captions, one after
the other. Either way a row is two reads at known places, and nothing else is held in memory.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dojo.cli import UserError
from dojo.data.formats import picture_suffixes
from dojo.data.sources.columns import caption_column, clean_captions, shown
from dojo.data.streams.places import Place, opened, told

Table = NDArray[np.int64]
"""[rows, 4]: where the picture begins and its size, the same of the caption; size -1: none."""

_FOOTER = 2**16  # bytes of a parquet file's end that are read at first
_BATCH = 64  # rows of parquet in memory at a time
_CAPTIONS = (".txt", ".caption", ".text")
_NONE, _DAMAGED, _NAMED = -1, -2, -3
_FAULTS = {
    _DAMAGED: "its part of the file is damaged",
    _NAMED: "it names a file where its content is expected: put the pictures into the table",
}


class BadShard(UserError):
    """A shard that cannot be read; the message is ``<file>: <reason>``."""


@dataclass(frozen=True)
class Columns:
    """Where in a shard pictures and captions stand."""

    image: str | None
    """The column of parquet; of a tar, the ending, None for any picture."""
    caption: str | None
    """The column; of a tar, an ending or a field of its .json. None: they are not read."""


# -- parquet ------------------------------------------------------------------------------------


def parquet_rows(place: Place) -> tuple[int, list[str]]:
    """Rows and columns of a parquet file, by its footer; the rest is not read.

    Raises:
        BadShard: there is none.
        UserError: the file cannot be reached.
    """
    from pyarrow import ArrowException, BufferReader, parquet

    tail = told(place.path, lambda: _tail(place))
    try:
        found = parquet.read_metadata(BufferReader(tail))
        return found.num_rows, [str(name) for name in found.schema.to_arrow_schema().names]
    except (ArrowException, OSError) as error:
        raise BadShard(f"{place.name}: cannot be read as parquet: {_first(error)}") from error


def _tail(place: Place) -> bytes:
    """The end of a parquet file with all of its footer."""
    with opened(place.path) as file:
        file.seek(max(0, place.size - _FOOTER))
        tail = file.read()
        need = 8 + int.from_bytes(tail[-8:-4], "little")
        if tail.endswith(b"PAR1") and len(tail) < need <= place.size:
            file.seek(place.size - need)
            tail = file.read()
        return tail


def parquet_columns(location: str, columns: Sequence[str], wanted: Columns) -> Columns:
    """The columns that are taken.

    Args:
        wanted: the user's choice; a caption of "" is the first of the usual names.

    Raises:
        UserError: there is no such column.
    """
    image = wanted.image or "image"
    if image not in columns:
        raise UserError(
            f"{location} has no column {image!r}; it has {shown(columns)} (--image_column)"
        )
    if wanted.caption is None:
        return Columns(image, None)
    return Columns(image, caption_column(location, columns, wanted.caption or None))


def unpack(path: Path, name: str, columns: Columns, target: BinaryIO) -> Table:
    """Writes the contents of a parquet file one after the other; where they lie comes back.

    Groups of rows that cannot be read are written as nothing: their rows will say so when they
    are asked for.

    Args:
        name: what a message calls the file.

    Raises:
        BadShard: it is no parquet file, or lacks a column.
    """
    from pyarrow import ArrowException, parquet

    names = [one for one in (columns.image, columns.caption) if one is not None]
    parts: list[Table] = []
    try:
        file = parquet.ParquetFile(path, memory_map=True)
        missing = [one for one in names if one not in file.schema_arrow.names]
    except (ArrowException, OSError) as error:
        raise BadShard(f"{name}: cannot be read as parquet: {_first(error)}") from error
    with file:
        if missing:
            raise BadShard(f"{name}: there is no column {missing[0]!r}")
        for group in range(file.num_row_groups):
            begun = target.tell()
            try:
                batches = file.iter_batches(_BATCH, row_groups=[group], columns=names)
                some = [row for batch in batches for row in _written(batch, columns, target)]
            except (ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno:  # the disk that is written on
                    raise
                target.seek(begun)
                count = file.metadata.row_group(group).num_rows
                some = [(0, _DAMAGED, 0, _NONE)] * count
            parts.append(np.array(some, dtype=np.int64).reshape(-1, 4))
    return np.concatenate([np.empty((0, 4), np.int64), *parts])


def _written(batch: Any, columns: Columns, target: BinaryIO) -> Iterator[tuple[int, int, int, int]]:
    captions = batch.column(columns.caption).to_pylist() if columns.caption else None
    for row, cell in enumerate(batch.column(columns.image)):
        value = cell.as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        start, size = target.tell(), _NONE
        if isinstance(content, bytes) and content:
            target.write(content)
            size = len(content)
        elif isinstance(content, str) or (isinstance(value, dict) and value.get("path")):
            size = _NAMED
        text = b"" if captions is None else json.dumps(captions[row], default=str).encode()
        yield start, size, target.tell(), len(text)
        target.write(text)


# -- tar ----------------------------------------------------------------------------------------


def tar_table(path: Path, name: str, columns: Columns) -> Table:
    """Where the samples of a webdataset lie in a tar: files that follow each other under one key.

    Args:
        name: what a message calls the tar.

    Raises:
        BadShard: it is no tar, or ends in the middle of a file.
    """
    rows: list[tuple[int, int, int, int]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for members in _samples(tar):
                picture = _picture(members, columns.image)
                caption = _caption(members, columns.caption)
                if picture is not None or caption is not None:
                    rows.append((*_span(picture), *_span(caption)))
            if os.path.getsize(path) < tar.offset:
                raise tarfile.ReadError("it ends in the middle of a file")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BadShard(f"{name}: cannot be read as tar: {_first(error)}") from error
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _samples(tar: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """The files of each sample, by their endings in lower case."""
    key, members = None, dict[str, tarfile.TarInfo]()
    while (member := tar.next()) is not None:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
        folder, _, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not member.isfile() or not stem or not dot:
            continue
        if (folder, stem) != key:
            if members:
                yield members
            key, members = (folder, stem), {}
        members.setdefault(f".{ending.lower()}", member)
    if members:
        yield members


def _picture(members: dict[str, tarfile.TarInfo], wanted: str | None) -> tarfile.TarInfo | None:
    if wanted:
        return members.get(f".{wanted.lower().lstrip('.')}")
    found = (one for ending, one in members.items() if _last(ending) in picture_suffixes())
    return next(found, None)


def _caption(members: dict[str, tarfile.TarInfo], wanted: str | None) -> tarfile.TarInfo | None:
    """The file that holds the caption; a .json where a field of it was asked for."""
    if wanted is None:
        return None
    if wanted:
        return members.get(f".{wanted.lower().lstrip('.')}") or members.get(".json")
    found = (members[ending] for ending in (*_CAPTIONS, ".json") if ending in members)
    return next(found, None)


def _span(member: tarfile.TarInfo | None) -> tuple[int, int]:
    return (0, _NONE) if member is None else (member.offset_data, member.size)


def _last(ending: str) -> str:
    return f".{ending.rpartition('.')[2]}"


# -- reading ------------------------------------------------------------------------------------


class Pack:
    """The rows of one shard that is on the disk."""

    def __init__(self, path: Path, table: Table, name: str, columns: Columns) -> None:
        self.table = table
        self.name = name
        self.columns = columns
        self._file = path.open("rb")  # readable even when its name is gone

    @property
    def is_whole(self) -> bool:
        """Whether the file is as long as the table says."""
        ends = (self.table[:, [0, 2]] + self.table[:, [1, 3]].clip(0)).max(initial=0)
        return os.fstat(self._file.fileno()).st_size >= int(ends)

    @property
    def is_gone(self) -> bool:
        """Whether the file has no name any more, and goes when it is closed."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def picture(self, row: int) -> bytes:
        """The content of a picture's file; empty where there is none.

        Raises:
            UserError: the table is of another tar.
        """
        self._check(row)
        return self._read(*self.table[row, :2].tolist())

    def captions(self, row: int) -> tuple[tuple[str, ...], str]:
        """A row's captions, each on one line, and what is wrong with the row.

        Raises:
            UserError: the table is of another tar.
        """
        size = int(self.table[row, 1])
        if size < 0:
            return (), _FAULTS.get(size, "there is no picture")
        if self.columns.caption is None:
            return (), ""
        start, size = self.table[row, 2:].tolist()
        if size < 0:
            return (), "the caption is missing"
        self._check(row)
        return self._cell(self._read(start, size))

    def _cell(self, content: bytes) -> tuple[tuple[str, ...], str]:
        """The captions in what stands in a shard for them."""
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return (), "the caption is no UTF-8"
        if not self.is_tar:
            return clean_captions(json.loads(text))
        try:
            fields = json.loads(text)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):  # one line is one caption, as in files of sidecars
            return clean_captions([line for line in text.splitlines() if line.strip()])
        try:
            field = caption_column(self.name, list(fields), self.columns.caption or None)
        except UserError as error:
            return (), str(error)
        return clean_captions(fields[field])

    @property
    def is_tar(self) -> bool:
        """Whether captions are files of their own."""
        return self.name.endswith(".tar")

    def _check(self, row: int) -> None:
        """Compares a row of a tar with the headers that stand before its files there."""
        if not self.is_tar:
            return
        keys: set[str] = set()
        for start, size in self.table[row].reshape(2, 2).tolist():
            if size < 0:
                continue
            try:
                header = self._read(start - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
            except (tarfile.TarError, OSError):
                member = tarfile.TarInfo()
            folder, _, base = member.name.rpartition("/")
            keys.add(f"{folder}/{base.partition('.')[0]}")
            if not member.isfile() or member.size != size or len(keys) > 1:
                raise UserError(
                    f"{self.name} row {row}: no sample begins where the index has it, which is of "
                    "another tar: `python -m dojo.data index` writes it anew (where there is none "
                    "beside the tar: remove --data_cache_dir)"
                )

    def _read(self, start: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, start) if size > 0 else b""

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def _first(error: Exception) -> str:
    """The first line of a message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
