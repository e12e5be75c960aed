"""JSON that a run left on the disk, read by programs that must survive what happened to it.

A kill can cut a line off, and a full or failing disk can do worse; what is whole is read, and the
rest is counted or named.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dojo.cli import UserError


class DamagedFile(UserError):
    """A file that was whole once."""


def read_table(path: Path, instead: str = "") -> dict[str, Any]:
    """The table that a JSON file holds; an empty one where there is no such file.

    Args:
        instead: what to do about a file that is damaged, as the end of a sentence.
    Raises:
        DamagedFile: the file cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged ({error}){instead}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} is damaged (no table of names and values){instead}")
    return content


def read_if_whole(path: Path) -> dict[str, Any]:
    """The same for what can be done without: an empty table where the file is damaged too."""
    try:
        return read_table(path)
    except DamagedFile:
        return {}


def read_pictures(folder: Path) -> list[dict[str, Any]]:
    """What prompts.json says of the pictures of a validation folder; nothing where it is damaged.

    Each row has texts `file` and `label`, and what else is known of the picture.
    """
    rows = read_if_whole(folder / "prompts.json").get("pictures")
    return [
        row
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("file", "label"))
    ]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a metrics.jsonl in their order, and how many of its lines are none.

    A row is a table with a finite number `step`; the last line is none where a kill has cut it off,
    or another process is writing it.
    """
    if not path.is_file():
        return [], 0
    rows: list[dict[str, Any]] = []
    bad = 0
    for line in path.read_bytes().split(b"\n"):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            bad += 1
    return rows, bad


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One line of a metrics.jsonl; None where it is no row (see `read_rows`)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) not in (int, float):
        return None
    return row if abs(row["step"]) < math.inf else None
