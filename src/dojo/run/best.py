"""The best weights of a run by a number of its evaluations, and the end of one that learns no more.

Nothing is kept for it but what is in metrics.jsonl: which evaluation was the best, and how many
came after it, is read from the rows up to the run's step, so that a run that goes on decides as one
that never stopped. With every new best there is a checkpoint first: a run never goes on from before
the evaluation whose weights lie in `best/`, unless an older checkpoint is named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dojo.cli import UserError
from dojo.files import records

FOLDER = "best"
RECORD = "best.json"

_LESS = ("loss", "gap", "kl", "drift", "invalid_share")
_MORE = ("reward", "accuracy", "clip_score", "diversity")


@dataclass(frozen=True)
class Wish:
    """What `--keep_best` asks for."""

    metric: str
    """as metrics.jsonl calls it"""
    larger: bool
    """whether larger numbers are better"""


def read_wish(text: str) -> Wish:
    """A metric's name, with `:max` or `:min` behind it where the name does not tell.

    Raises:
        ValueError: it does not tell.
    """
    name, _, way = text.rpartition(":")
    if name and way in ("max", "min"):
        return Wish(name, way == "max")
    known = text.split("/")[0]
    for larger, words in ((False, _LESS), (True, _MORE)):
        if any(word in known for word in words):
            return Wish(text, larger)
    raise ValueError(f"--keep_best {text}: write {text}:max or {text}:min, which of them is better")


@dataclass(frozen=True)
class Standing:
    """Where a run stands by its evaluations."""

    step: int
    """of the best one"""
    value: float
    looks: int
    """evaluations since then"""
    kept: int | None
    """the step whose weights lie in `best/`; None where there are none"""


def standing(
    rows: Iterable[Mapping[str, Any]], wish: Wish, kept: int | None, step: int
) -> Standing | None:
    """The best of the evaluations up to a step, the first of equal ones; None where none says it.

    Args:
        rows: of metrics.jsonl, in order; of two at one step the later one counts.
        kept: the step whose weights are kept.
    """
    found: dict[int, float] = {}
    for row in rows:
        value = row.get(wish.metric)
        if isinstance(value, int | float) and math.isfinite(value) and row["step"] <= step:
            found[row["step"]] = float(value)
    if not found:
        return None
    sign = 1 if wish.larger else -1
    best = max(found, key=lambda at: (sign * found[at], -at))
    return Standing(best, found[best], sum(at > best for at in found), kept)


def read(folder: Path, wish: Wish, step: int) -> Standing | None:
    """Where the run in a folder stands."""
    rows, _ = records.read_rows(folder / "metrics.jsonl")
    record = records.read_if_whole(folder / FOLDER / RECORD)
    kept = record.get("step") if record.get("metric") == wish.metric else None
    found = standing(rows, wish, kept if isinstance(kept, int) else None, step)
    if found and found.kept == found.step and record.get("value") != found.value:
        return replace(found, kept=None)  # of a branch that was left, whose best was at this step
    return found


def write_record(folder: Path, wish: Wish, now: Standing) -> None:
    """Says beside the weights what they are the best by."""
    record = {**asdict(wish), "step": now.step, "value": now.value}
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def refuse_unknown(wish: Wish, known: Sequence[str]) -> None:
    """Refuses a metric that no evaluation of the run writes.

    Raises:
        UserError: naming those that there are.
    """
    if wish.metric not in known:
        there = ", ".join(sorted(known)) or "none: nothing is held out, and nothing is scored"
        raise UserError(
            f"--keep_best {wish.metric}: no evaluation of this run says that; there is {there}"
        )
