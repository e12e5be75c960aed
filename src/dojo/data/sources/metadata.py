"""Metadata files of picture folders: csv, jsonl and parquet become records, with their places."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from dojo.cli import UserError
from dojo.data.sources.columns import shown

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
METADATA_JSON = "metadata.json"
"""Taken too if its rows name pictures; it is a usual name for other things."""


@dataclass(frozen=True)
class Record:
    """One row of a metadata file."""

    place: str
    """Where it stands in the file: ``line 3``."""
    fields: Mapping[str, object]
    """Its cells by column."""
    problem: str = ""
    """What is wrong with the row as a whole; empty where nothing is."""


def read_metadata(path: Path) -> list[Record]:
    """The rows of a metadata file.

    Raises:
        UserError: the file is broken, not UTF-8, or has no rows.
    """
    if path.suffix == ".parquet":
        records = list(_read_parquet(path))
    elif path.suffix == ".json":
        records = read_json(path, "file_name", of_names="text")
    else:
        text = _read_text(path)
        records = list((_read_csv if path.suffix == ".csv" else _read_jsonl)(path, text))
    if not records:
        raise UserError(f"{path} has no rows")
    return records


def names_pictures(path: Path, folder: str, pictures: Set[str]) -> bool:
    """Whether a .json file has rows that name pictures.

    Args:
        folder: of the file, relative to the root.
        pictures: paths relative to the root.
    """
    try:
        records = read_metadata(path)
    except (UserError, OSError):
        return False
    names = (file_path(folder, record.fields.get("file_name"))[0] for record in records)
    return any(name in pictures for name in names)


def read_json(path: Path, column: str, *, of_names: str | None = None) -> list[Record]:
    """The rows of a .json file: a list of objects, or of texts.

    Args:
        column: that a text is taken for.
        of_names: an object from names to objects, or to texts, is such a list too; this is the
            column that its texts are taken for, and its names come into `column`.

    Raises:
        UserError: it is no such list, or is empty.
    """
    try:
        rows = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not JSON ({error.msg})") from error
    if isinstance(rows, dict) and of_names is not None:
        rows = [
            {column: name, **(row if isinstance(row, dict) else {of_names: row})}
            for name, row in rows.items()
        ]
    if not isinstance(rows, list):
        raise UserError(f"{path} is no list of {column}s or of objects")
    if not rows:
        raise UserError(f"{path} has no rows")
    records: list[Record] = []
    for number, row in enumerate(rows, start=1):
        fields = {column: row} if isinstance(row, str) else row
        if not isinstance(fields, dict):
            raise UserError(f"{path} row {number}: neither a {column} nor a JSON object")
        records.append(Record(f"row {number}", fields))
    return records


def file_column(metadata: Path | str, columns: Sequence[str], wanted: str | None) -> str:
    """The column that names the pictures' files.

    Raises:
        UserError: there is no such column.
    """
    # datasets shows the files of an imagefolder as a column "image", so that name is taken too.
    as_datasets_shows_it = wanted == "image" and wanted not in columns
    column = "file_name" if wanted is None or as_datasets_shows_it else wanted
    if column not in columns:
        raise UserError(
            f"{metadata} has no column {column!r}; it has {shown(columns)} (--image_column)"
        )
    return column


def file_path(folder: str, file_name: object, root: Path | None = None) -> tuple[str, str]:
    """The path of a file_name relative to the root, and what is wrong with it.

    Judged by the text alone: hub snapshots are symbolic links that lead outside by design. Only
    backslashes are looked at on the disk: they part folders, as Windows has it, unless a file of
    that very name is there.

    Args:
        folder: of the metadata file, relative to the root.
        file_name: the cell.
        root: of the data set, where backslashes may stand for slashes.
    """
    if not isinstance(file_name, str) or not file_name.strip():
        return "", "the file name is missing"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", file_name):
        return "", f"{file_name!r} is an address; the pictures must be files in the folder"
    if PureWindowsPath(file_name).anchor:  # of a drive, a server or the root, as Linux has it too
        return "", f"{file_name!r} is an absolute path; paths must lie inside the folder"
    if ".." in PureWindowsPath(posixpath.normpath(file_name)).parts:
        return "", f"{file_name!r} climbs out of the folder"
    path = posixpath.join(folder, posixpath.normpath(file_name))
    if root is not None and "\\" in path and not os.path.lexists(root / path):
        path = posixpath.normpath(path.replace("\\", "/"))
    return path, ""


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object, unlike raw, lacks the byte order mark that error.start does not count.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: line {line}, byte {len(raw) - len(error.object) + error.start}"
        ) from error


def _read_csv(path: Path, text: str) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for fields in reader:
            surplus: object = fields.pop(None, None)
            problem = "more fields than the header; quote captions with commas" if surplus else ""
            yield Record(f"line {reader.line_num}", fields, problem)
    except csv.Error as error:
        # line_num is the end of the row before; a quote left open runs on to the end of the file.
        raise UserError(f"{path} line {reader.line_num + 1}: {error}") from error


def _read_jsonl(path: Path, text: str) -> Iterator[Record]:
    # Not splitlines: JSON strings may hold U+2028, which is a line break to it.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            fields = json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {line}: not JSON ({error.msg})") from error
        if not isinstance(fields, dict):
            raise UserError(f"{path} line {line}: not a JSON object")
        yield Record(f"line {line}", fields)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet  # folders with other metadata do without

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for row, fields in enumerate(table.to_pylist(), start=1):
        yield Record(f"row {row}", fields)
