"""Pictures in a folder, each with its prompt and what else is known of it, to be scored.

read_rows(Path("outputs/demo"))                      prompts.json, as demo.py writes it
read_rows(Path("outputs/versus"))                    versus.csv: both sides of each pair
read_rows(Path("outputs/run/validation/step-100"))   prompts.json in the folder above
read_rows(Path("datas/dog"))                         metadata.jsonl, metadata.csv
read_rows(folder, Path("prompts.txt"))               a line per picture, by the names' order
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dojo.cli import UserError
from dojo.data.formats import picture_suffixes
from dojo.data.images import BadSample, read_image
from dojo.data.lines import split_lines, split_options
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

RECORDS = ("prompts.json", "versus.csv", "metadata.jsonl", "metadata.csv")
"""What a folder may say of its pictures, the first one preferred."""
_FILE = ("file_name", "file")
_TEXT = ("text", "prompt", "caption")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A picture to score."""

    path: Path
    name: str
    """of its file, below the folder"""
    text: str
    """its prompt"""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """the rest of its row"""


def read_rows(folder: Path, prompts: Path | None = None) -> list[Row]:
    """The pictures of a folder with their prompts and metadata.

    Args:
        prompts: text with a line per picture, or .jsonl, .json or .csv with columns file_name (or
            file) and text (or prompt, caption); unset: what the folder says itself.

    Raises:
        UserError: something is missing, or the numbers differ.
    """
    if not folder.is_dir():
        raise UserError(f"--images: there is no folder {folder}")
    if prompts is None:
        prompts = _record(folder)
    if not prompts.is_file():
        raise UserError(f"--prompts: there is no file {prompts}")
    try:
        if prompts.suffix not in (".json", ".jsonl", ".csv"):
            return _by_order(folder, prompts)
        entries = list(_entries(prompts))
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--prompts: {prompts} cannot be read ({error})") from None
    rows = [_row(folder, prompts, number, entry) for number, entry in enumerate(entries, 1)]
    if prompts.name == "versus.csv":
        sides = (("base", "tuned") if (folder / "base").is_dir() else ("",)) if rows else ()
        rows = [_on(folder, side, row) for side in sides for row in rows]
    if not rows:
        raise UserError(f"{prompts} is empty")
    for row in rows:
        if not row.path.is_file():
            raise UserError(f"{prompts}: {row.name} is not there ({row.path})")
    return rows


def read_picture(path: Path) -> Tensor:
    """float32 [1, 3, H, W] in [0, 1]."""
    try:
        pixels = np.array(read_image(path, str(path)))
    except BadSample as error:
        raise UserError(f"--images: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def _record(folder: Path) -> Path:
    """The file that tells the prompts of a folder."""
    places = [folder / name for name in RECORDS]
    if folder.name.startswith("step-"):  # validation/step-N of a run
        places.append(folder.parent / RECORDS[0])
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f"--images {folder} has none of {', '.join(RECORDS)}: say with --prompts which file "
            "holds the prompts"
        )
    return found


def _by_order(folder: Path, prompts: Path) -> list[Row]:
    """A line per picture."""
    pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in picture_suffixes())
    lines = split_lines(prompts.read_text(encoding="utf-8-sig"))
    if len(lines) != len(pictures) or not lines:
        raise UserError(f"{prompts} has {len(lines)} prompts, {folder} {len(pictures)} pictures")
    return [
        Row(path=path, name=path.name, text=_prompt(prompts, line))
        for path, line in zip(pictures, lines, strict=True)
    ]


def _prompt(file: Path, line: str) -> str:
    """The prompt of a line, without the options that a picture was drawn with."""
    try:
        return split_options(line)[0]
    except ValueError as error:
        raise UserError(f"{file}: {line!r}: {error}") from None


def _entries(path: Path) -> Iterator[Any]:
    """The rows of a table, whatever they hold.

    Raises:
        ValueError: it is no such table.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        yield from csv.DictReader(text.splitlines(keepends=True))
        return
    if path.suffix == ".json":
        content = json.loads(text)
        # demo.py and validation write their options beside the list.
        rows = content.get("pictures") if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise ValueError("it holds no list of pictures")
        yield from rows
        return
    for line in text.split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                yield None


def _row(folder: Path, prompts: Path, number: int, entry: Any) -> Row:
    """A picture by its entry.

    Raises:
        UserError: it names none, one outside of the folder, or no prompt.
    """
    fields = dict(entry) if isinstance(entry, dict) else {}
    name = next((fields[key] for key in _FILE if isinstance(fields.get(key), str)), None)
    if not name:
        raise UserError(f"{prompts}: entry {number} has no file_name")
    place = Path(name.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts:
        raise UserError(f"{prompts}: entry {number} leads out of the folder: {name}")
    text = next((fields[key] for key in _TEXT if isinstance(fields.get(key), str)), None)
    if text is None:
        raise UserError(f"{prompts}: entry {number} has no text")
    return Row(path=folder / place, name=place.as_posix(), text=text, metadata=fields)


def _on(folder: Path, side: str, row: Row) -> Row:
    """A pair's picture of one side."""
    name = f"{side}/{row.name}" if side else row.name
    return Row(path=folder / name, name=name, text=row.text, metadata=row.metadata)
