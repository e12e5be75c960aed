"""Columns of preference pairs: which ones are taken, and how a row of them scores its pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dojo.cli import UserError
from dojo.data.cells import number, truth
from dojo.data.pairs.options import PairArgs
from dojo.data.sources.columns import caption_column, clean_captions, shown, spare_columns

HAS_LABEL = "has_label"
"""Pick-a-Pic's; where it is false or empty, the label says nothing."""

_CAPTION_COLUMNS = ("caption", "prompt", "text")
_TWO = (("image_0", "image_1"), ("jpg_0", "jpg_1"))
_LIST, _SCORES, _LABEL, _RANK = "images", "scores", "label_0", "rank"


@dataclass(frozen=True)
class Columns:
    """The columns that a row of preferences is read from."""

    pictures: tuple[str, ...]
    """Two, or one of lists."""
    scores: str | None
    """The label of the first picture, or a list; None where the order says all, or a model will."""
    has_label: bool
    """Whether a column says of each row that its label counts."""
    caption: str
    unused: list[str]
    """What looks like captions or preferences and is not taken."""

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
        ways = (_SCORES, _RANK) if two is None else (_LABEL, _RANK)
        present = [column for column in ways if column in columns]
        if two is not None and args.choice_model is None and not present:
            raise UserError(
                f"{place} has no column {_LABEL!r}; it has {shown(columns)}. Without labels give "
                "a --choice_model"
            )
        taken = present[:1] if two is None or args.choice_model is None else []
        scores = taken[0] if taken else None
        unused = [f"column {column!r}" for column in present if column not in taken]
        expected = (column for column in _CAPTION_COLUMNS if column in columns)
        wanted = args.caption_column or next(expected, None)
        caption = caption_column(place, columns, wanted)
        return cls(
            pictures=two or (_LIST,),
            scores=scores,
            has_label=scores == _LABEL and HAS_LABEL in columns,
            caption=caption,
            unused=[*spare_columns(columns, caption), *unused],
        )

    @property
    def of_lists(self) -> bool:
        """Whether a cell holds several pictures."""
        return len(self.pictures) == 1

    @property
    def others(self) -> list[str]:
        """All but the pictures."""
        labelled = [HAS_LABEL] if self.has_label else []
        return [self.caption, *([self.scores] if self.scores else []), *labelled]

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
        if self.scores is None:
            return [float(-place) for place in range(count)] if self.of_lists else [0.5, 0.5]
        if self.scores == _LABEL:
            return self._labelled(fields)
        cells = listed(fields.get(self.scores), self.scores)
        try:
            numbers = [number(cell) for cell in cells]
        except ValueError as error:
            raise ValueError(f"{self.scores} {cells!r} are not all numbers: {error}") from error
        scores = [one for one in numbers if one is not None]
        if len(scores) < len(cells):
            raise ValueError(f"{self.scores} {cells!r} are not all numbers")
        if len(scores) != count:
            raise ValueError(f"{len(scores)} {self.scores} for {count} pictures")
        return [-one for one in scores] if self.scores == _RANK else scores  # rank 1 is the best

    def _labelled(self, fields: Mapping[str, object]) -> list[float]:
        """The scores of a row of two by its label; a row without one is a tie."""
        try:
            if self.has_label and not truth(fields.get(HAS_LABEL)):
                return [0.5, 0.5]
        except ValueError as error:
            raise ValueError(f"{HAS_LABEL}: {error}") from error
        cell = fields.get(_LABEL)
        for read in (number, truth):
            with contextlib.suppress(ValueError):
                label = read(cell)
                if label in (0.0, 0.5, 1.0):
                    return [float(label), 1.0 - label]
        raise ValueError(
            f"{_LABEL} is {cell!r}, not 1 ({self.pictures[0]} is preferred), 0 "
            f"({self.pictures[1]} is) or 0.5 (a tie)"
        )


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
