"""Columns of preference pairs: which ones are taken, and how a row of them scores its pictures."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dojo.cli import UserError
from dojo.data.columns import caption_column, clean_captions, shown, spare_columns
from dojo.data.pair_options import PairArgs

HAS_LABEL = "has_label"
"""Pick-a-Pic's; where it is false, the label says nothing."""

_CAPTION_COLUMNS = ("caption", "prompt", "text")
_TWO = (("image_0", "image_1"), ("jpg_0", "jpg_1"))
_LIST, _SCORES, _LABEL = "images", "scores", "label_0"


@dataclass(frozen=True)
class Columns:
    """The columns that a row of preferences is read from."""

    pictures: tuple[str, ...]
    """Two, or one of lists."""
    scores: str | None
    """The label of the first picture, or a list; None where the order says all, or a model will."""
    caption: str
    unused: list[str]
    """What looks like captions and is not taken."""

    @classmethod
    def of(cls, place: str, columns: Sequence[str], args: PairArgs) -> Columns:
        """
        Raises:
            UserError: a column is missing.
        """
        two = next((pair for pair in _TWO if set(pair) <= set(columns)), None)
        if two is None and _LIST not in columns:
            raise UserError(
                f"{place} has neither the columns {' or '.join(map(' and '.join, _TWO))} nor "
                f"{_LIST}; it has {shown(columns)}"
            )
        if two is None:
            scores = _SCORES if _SCORES in columns else None
        elif args.choice_model is not None:
            scores = None
        elif _LABEL in columns:
            scores = _LABEL
        else:
            raise UserError(
                f"{place} has no column {_LABEL!r}; it has {shown(columns)}. Without labels give "
                "a --choice_model"
            )
        present = (column for column in _CAPTION_COLUMNS if column in columns)
        wanted = args.caption_column or next(present, None)
        caption = caption_column(place, columns, wanted)
        return cls(two or (_LIST,), scores, caption, spare_columns(columns, caption))

    @property
    def of_lists(self) -> bool:
        """Whether a cell holds several pictures."""
        return len(self.pictures) == 1

    @property
    def others(self) -> list[str]:
        """All but the pictures."""
        return [self.caption, *([self.scores] if self.scores else [])]

    @property
    def taken(self) -> list[str]:
        """What to say of them."""
        told = [f"pictures from {' and '.join(map(repr, self.pictures))}"]
        told += [f"preferred by {self.scores!r}"] if self.scores else []
        told += [f"captions from column {self.caption!r}"]
        return told + ([f"not used: {', '.join(self.unused)}"] if self.unused else [])

    def caption_of(self, fields: Mapping[str, object]) -> str:
        """
        Raises:
            ValueError: there is none, or there are several.
        """
        captions, problem = clean_captions(fields.get(self.caption))
        if problem:
            raise ValueError(problem)
        if len(captions) != 1:
            raise ValueError(f"{len(captions)} captions where one is expected")
        return captions[0]

    def scores_of(self, fields: Mapping[str, object], count: int) -> list[float]:
        """The scores of a row of so many pictures.

        Raises:
            ValueError: they are not what they should be.
        """
        if count < 2:
            raise ValueError(f"{self.pictures[0]} holds {count} pictures; a pair needs 2")
        if self.of_lists:
            if self.scores is None:
                return [float(-place) for place in range(count)]
            cells = listed(fields.get(self.scores), self.scores)
            scores = [_number(cell) for cell in cells]
            if not all(map(math.isfinite, scores)):
                raise ValueError(f"{self.scores} {cells!r} are not all numbers")
            if len(scores) != count:
                raise ValueError(f"{len(scores)} {self.scores} for {count} pictures")
            return scores
        if self.scores is None or fields.get(HAS_LABEL) is False:
            return [0.5, 0.5]
        label = _number(fields.get(self.scores))
        if label not in (0.0, 0.5, 1.0):
            raise ValueError(
                f"{self.scores} is {fields.get(self.scores)!r}, not 1 ({self.pictures[0]} is "
                f"preferred), 0 ({self.pictures[1]} is) or 0.5 (a tie)"
            )
        return [label, 1.0 - label]


def _number(cell: object) -> float:
    """A cell as a number; NaN for what is none."""
    try:
        return float(cell) if isinstance(cell, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def listed(cell: object, column: str) -> list[object]:
    """A list, which csv files hold as JSON.

    Raises:
        ValueError: it is none.
    """
    if isinstance(cell, str):
        with contextlib.suppress(json.JSONDecodeError):  # told below
            cell = json.loads(cell)
    if not isinstance(cell, list):
        raise ValueError(f"{column} is {cell!r}, not a list")
    return cell
