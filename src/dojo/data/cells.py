"""What a cell of a table says: yes or no, or a number; read here for every table.

A value arrives as JSON or parquet have it, or as the text that csv makes of it, and pandas writes
what is missing as NaN. All spellings of one value are that value, and what is none of them is
refused: a label that is guessed wrong is trained on the wrong way round.
"""

from __future__ import annotations

import math
import re

_EMPTY = ("", "nan", "none", "null", "na", "n/a", "<na>", "nat")
_YES = ("true", "t", "yes", "y", "on", "1", "1.0")
_NO = ("false", "f", "no", "n", "off", "0", "0.0")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def is_empty(cell: object) -> bool:
    """Whether a cell says nothing: None, NaN, blank, or the text for one of them."""
    if isinstance(cell, str):
        return cell.strip().lower() in _EMPTY
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def truth(cell: object) -> bool | None:
    """Yes or no; None where the cell is empty.

    Raises:
        ValueError: it is neither.
    """
    if is_empty(cell):
        return None
    word = str(cell).strip().lower()
    if not isinstance(cell, bool | int | float | str) or word not in (*_YES, *_NO):
        raise ValueError(f"{cell!r} is neither true nor false")
    return word in _YES


def number(cell: object) -> float | None:
    """A finite number; None where the cell is empty.

    Commas are refused: 1,000 is a thousand to some and one to others.

    Raises:
        ValueError: it is none.
    """
    if is_empty(cell):
        return None
    if isinstance(cell, str):
        plain = _NUMBER.fullmatch(cell.strip())
        value = float(plain[0]) if plain else math.nan
    else:
        try:
            value = float(cell) if isinstance(cell, int | float) else math.nan
        except OverflowError:
            value = math.inf
    if not math.isfinite(value):
        hint = ", written without commas" if isinstance(cell, str) and "," in cell else ""
        raise ValueError(f"{cell!r} is no finite number{hint}")
    return value
