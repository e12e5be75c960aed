"""Columns of metadata files and tables: which one is taken, and what a cell of it says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dojo.cli import UserError

CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Names that a column of captions is expected under, the first one preferred."""


def caption_column(place: str, columns: Sequence[str], wanted: str | None) -> str:
    """The column that captions are taken from.

    Args:
        place: what an error message calls the table.
        columns: that there are.
        wanted: the user's choice; None takes the first of ``CAPTION_COLUMNS``.

    Raises:
        UserError: there is no such column.
    """
    candidates = (wanted,) if wanted else CAPTION_COLUMNS
    found = next((column for column in candidates if column in columns), None)
    if found is None:
        looked_for = " or ".join(map(repr, candidates))
        raise UserError(
            f"{place} has no column {looked_for}; it has {shown(columns)} (--caption_column)"
        )
    return found


def spare_columns(columns: Sequence[str], taken: str | None) -> list[str]:
    """What to say of the columns that look like captions and are not taken."""
    return [f"column {name!r}" for name in CAPTION_COLUMNS if name in columns and name != taken]


def clean_captions(cell: object) -> tuple[tuple[str, ...], str]:
    """The captions of one cell, each on one line, and what is wrong with it.

    A list holds alternatives; those that are blank are passed over as long as one is not.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):  # pandas' word for None
        return (), "the caption is missing"
    captions: list[str] = []
    for one in cell if isinstance(cell, list) else [cell]:
        if isinstance(one, str):
            captions.append(one_line(one))
        elif one is not None:
            return (), f"the caption is of type {type(one).__name__}, not text"
    kept = tuple(filter(None, captions))
    return kept, "" if kept else "the caption is empty"


def one_line(text: str) -> str:
    """A text without line breaks and without blanks around them."""
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def shown(columns: Iterable[str]) -> str:
    """Names for an error message."""
    return ", ".join(map(repr, columns)) or "none"
