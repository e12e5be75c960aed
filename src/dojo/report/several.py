"""Several runs beside each other: what differs in their options, and how they ended, as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dojo.cli import UserError
from dojo.files.records import read_if_whole, read_rows
from dojo.report.html import number

# What a run is told by, the most telling first; the last value that was logged of each.
_METRICS = ("eval_reward", "reward", "eval_accuracy", "eval_loss", "clip_score", "loss")
_MOST = 4  # of them in a table
_WIDEST = 40  # letters of a cell


def compared(folders: Sequence[Path]) -> list[str]:
    """A table of runs in lines of equal columns: a row each, in the order that is given.

    Raises:
        UserError: a folder holds no run.
    """
    for folder in folders:
        if not (folder / "args.json").is_file():
            raise UserError(f"{folder} holds no run: there is no args.json")
    options = [dict(_options(folder)) for folder in folders]
    names = [folder.name for folder in folders]
    alike = len(set(names)) < len(names) or "" in names
    logged = [_last(folder) for folder in folders]
    differing = [name for name in _names(options) if len({_text(one, name) for one in options}) > 1]
    measured = [name for name in _METRICS if any(name in one for one in logged)][:_MOST]
    head = ["run", *differing, "step", "state", *measured]
    rows = [
        [
            str(folder) if alike else name,
            *(_text(said, name) for name in differing),
            str(last.get("step", 0)),
            "finished" if (folder / "finished.json").is_file() else "not finished",
            *(number(last[name]) if name in last else "" for name in measured),
        ]
        for folder, name, said, last in zip(folders, names, options, logged, strict=True)
    ]
    return list(aligned([head, *rows]))


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines whose cells stand below each other; a cell that is too long is cut."""
    most = max(_WIDEST, shutil.get_terminal_size().columns // max(len(rows[0]), 1))
    cut = [
        [cell if len(cell) <= most else f"{cell[: most - 3]}..." for cell in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    for row in cut:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _options(folder: Path) -> Iterator[tuple[str, Any]]:
    """The options of a run that may tell it from another."""
    record = read_if_whole(folder / "args.json")
    yield "script", record.get("script")
    groups = record.get("args")
    for values in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(values, Mapping):
            yield from ((str(k), v) for k, v in values.items() if k != "output_dir")
    if record.get("seed") is not None:  # also one that was drawn
        yield "seed", record["seed"]


def _names(options: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in options for name in one))


def _text(options: Mapping[str, Any], name: str) -> str:
    value = options.get(name)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _last(folder: Path) -> dict[str, float]:
    """The last number of each metric, which may be NaN, and the last step."""
    found: dict[str, float] = {}
    rows, _ = read_rows(folder / "metrics.jsonl")
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float):
                found[name] = value
    return found
