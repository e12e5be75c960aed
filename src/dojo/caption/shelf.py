"""Where captions stand: a .txt beside each picture, or rows of metadata.jsonl, as training reads
them.

What is written of metadata.jsonl goes into a hidden file first, a line for each caption, and from
there into the table when the command ends, or when it is started again after a kill: the table is
whole at every moment.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from dojo import data, files
from dojo.cli import UserError
from dojo.data.sources.columns import CAPTION_COLUMNS
from dojo.data.sources.metadata import file_path, read_metadata

JOURNAL = ".captions.jsonl"
TABLE = "metadata.jsonl"
Target = Literal["txt", "metadata"]


class Shelf(Protocol):
    """A place for captions."""

    def has(self, picture: str) -> bool:
        """Whether a picture has a caption."""
        ...

    def put(self, picture: str, caption: str) -> None:
        """Writes the caption of a picture."""
        ...

    def close(self) -> None:
        """Sees to it that training finds what was written."""
        ...


def open_shelf(folder: data.Folder, target: Target) -> Shelf:
    """The place that is asked for, where training would read it.

    Raises:
        UserError: training would read captions from elsewhere.
    """
    root = folder.root
    others = [name for name in folder.metadata_files if posixpath.basename(name) != TABLE]
    if folder.metadata is None and folder.metadata_files:
        others = list(folder.metadata_files)
    if target == "metadata":
        if others:
            raise UserError(
                f"{root}: captions are read from {', '.join(others)} there, and --to metadata "
                f"writes one {TABLE} for all: rewrite it as {TABLE}"
            )
        if folder.sidecars and not folder.metadata:
            raise UserError(
                f"{root}: captions lie in files beside the pictures; --to txt adds to them"
            )
        return _Table(root, folder.metadata or f"{folder.prefix}{TABLE}")
    for name in folder.metadata_files:
        columns = {column for record in read_metadata(root / name) for column in record.fields}
        if columns.intersection(CAPTION_COLUMNS):
            raise UserError(
                f"{root}: training reads the captions in {name}, and none in files beside the "
                f"pictures: give --to metadata, or move {name} away"
            )
    return _Beside(root, folder.sidecars)


def refuse_shared(pictures: Sequence[str], root: Path) -> None:
    """Refuses pictures whose captions would go into one file, of which the last would be left.

    Raises:
        UserError: naming two of them.
    """
    by_stem: dict[str, str] = {}
    for one in pictures:
        stem = posixpath.splitext(one)[0]
        if (other := by_stem.setdefault(stem, one)) != one:
            raise UserError(
                f"{root}: the captions of {other} and {one} would go into one file, {stem}.txt: "
                "rename one of them, or give --to metadata"
            )


class _Beside:
    """Files beside the pictures."""

    def __init__(self, root: Path, sidecars: set[str]) -> None:
        self.root = root
        self.sidecars = sidecars

    def _path(self, picture: str) -> Path:
        stem = posixpath.splitext(picture)[0]
        other = f"{stem}.caption"
        return self.root / (other if other in self.sidecars else f"{stem}.txt")

    def has(self, picture: str) -> bool:
        # What is not UTF-8 is somebody's caption, too.
        with suppress(FileNotFoundError):
            return bool(self._path(picture).read_bytes().strip())
        return False

    def put(self, picture: str, caption: str) -> None:
        with files.whole(self._path(picture)) as file:
            file.write(f"{caption}\n".encode())

    def close(self) -> None:
        """Every file is whole already."""


class _Table:
    """Rows of metadata.jsonl."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self.within = posixpath.dirname(name)
        self.root = root
        self.journal = root / JOURNAL
        self.file: TextIO | None = None
        self._take_in()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [dict(record.fields) for record in read_metadata(self.path)]

    def _picture(self, row: Mapping[str, Any]) -> str:
        return file_path(self.within, row.get("file_name"), self.root)[0]

    def _take_in(self) -> None:
        """Puts what the hidden file holds into the table, and opens both anew."""
        rows, new = self._read(), _journal(self.journal)
        if rows and all("file_name" not in row for row in rows):
            raise UserError(f"{self.path} has no column file_name, by which rows are found")
        columns = dict.fromkeys(name for row in rows for name in row)
        self.column = next((name for name in CAPTION_COLUMNS if name in columns), "text")
        if new:
            kept = [row for row in rows if self._picture(row) not in new]
            before = {self._picture(row): row for row in reversed(rows)}
            start = f"{self.within}/" if self.within else ""
            added = [
                {
                    **before.get(picture, {"file_name": picture.removeprefix(start)}),
                    self.column: caption,
                }
                for picture, caption in new.items()
            ]
            rows = kept + added
            with files.whole(self.path) as file:
                for row in rows:
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        # Also where it held nothing but half a line, which the next one would go on with.
        self.journal.unlink(missing_ok=True)
        self.captioned = {
            self._picture(row)
            for row in rows
            if is_caption(row.get(self.column)) and self._picture(row)
        }

    def has(self, picture: str) -> bool:
        return picture in self.captioned

    def put(self, picture: str, caption: str) -> None:
        if self.file is None:
            self.file = self.journal.open("a", encoding="utf-8")
        row = {"picture": picture, "caption": caption}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        self._take_in()


def is_caption(cell: Any) -> bool:
    """Whether a cell holds a caption."""
    some = cell if isinstance(cell, list) else [cell]
    return any(isinstance(one, str) and one.strip() for one in some)


def _journal(path: Path) -> dict[str, str]:
    """Captions by their pictures; a line that a kill left half written counts as none."""
    found: dict[str, str] = {}
    with suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                found[row["picture"]] = row["caption"]
    return found
