"""The text that names a reward: components, their options and weights.

    aesthetic=0.5,pickscore=1            two scorers, weighed
    clip[model=models/pocket-clip]       options in brackets; the weight is 1 where none stands
    pickscore[scale=1/26,dtype=bf16]     numbers may be fractions
    my_package.rewards:redness=2         a function `fn(images, prompts, metadata)`
    rewards/mine.py:redness              the same, from a file
    http://localhost:8000#pickscore=1    one that `python -m dojo.rewards serve` serves
    aesthetic,clip=0                     a weight of 0 scores and records, no more; not all are 0

Four options go with every scorer: `name` (of the component, to tell two of a kind apart), `scale`
(a second factor beside the weight), `device` and `dtype` (fp32, fp16, bf16).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction

from dojo.cli.masking import hide

# An address may have a query, with its own "=" in it; a weight after one needs a "#".
_TERM = re.compile(
    r"""(?P<source>https?://[^\[\]=?\#]+(\?[^\[\]\#]*)?(\#[^\[\]=]*)?|[^\[\]=]+)
        (\[(?P<options>[^\[\]]*)\])?
        (=(?P<weight>[^\[\]=]+))?""",
    re.VERBOSE,
)
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\]]*\])")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One component of a reward, as it is written."""

    source: str
    """a scorer's name, `module:function`, `file.py:function`, or an address"""
    name: str
    """what its scores are called"""
    weight: float = 1.0
    """weight times scale"""
    options: dict[str, str] = field(default_factory=dict)
    """those of the scorer, and `device` and `dtype`"""


def parse(text: str) -> tuple[Term, ...]:
    """Reads a reward's text.

    Raises:
        ValueError: it is not of the form above, two components have the same name, or all weights
            are 0.
    """
    terms = tuple(_term(part.strip()) for part in _COMMA_OUTSIDE_BRACKETS.split(text))
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"--reward has two components named {name}: tell them apart, as {name}[name=other]"
            )
    if not any(term.weight for term in terms):
        raise ValueError(
            f"--reward {hide(text)}: every weight is 0, so every score would be; give one of them "
            "another weight"
        )
    return terms


def _term(text: str) -> Term:
    match = _TERM.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--reward: {hide(text)!r} is not of the form name[option=value,...]=weight"
        )
    options: dict[str, str] = {}
    for pair in filter(None, (match["options"] or "").split(",")):
        key, equals, value = (word.strip() for word in pair.partition("="))
        if not (key and equals and value):
            words = f"{hide(pair)!r} in {hide(text)!r}"
            raise ValueError(f"--reward: {words} is not of the form option=value")
        options[key] = value
    source = match["source"].strip()
    weight = number(match["weight"] or "1", text) * number(options.pop("scale", "1"), text)
    if not math.isfinite(weight):
        raise ValueError(f"--reward: weight times scale in {hide(text)!r} is no number")
    name = options.pop("name", _name(source))
    return Term(source=source, name=name, weight=weight, options=options)


def _name(source: str) -> str:
    """`pickscore` for `http://localhost:8000#pickscore`, `redness` for `mine.py:redness`."""
    if is_address(source):
        return source.partition("#")[2] or "remote"
    return source.rpartition(":")[2]


def is_address(source: str) -> bool:
    """Whether a component is scored by a server."""
    return source.startswith(("http://", "https://"))


def number(text: str, where: str) -> float:
    """A number or a fraction; `where` is for the error."""
    try:
        value = float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"--reward: {hide(text)!r} in {hide(where)!r} is no number")
    return value
