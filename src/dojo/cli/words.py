"""Command lines whose first word goes without a flag."""

from __future__ import annotations

from collections.abc import Sequence


def first_word_as(flag: str, words: Sequence[str]) -> list[str]:
    """A command line with a flag before its first word, if that is none itself."""
    first = next(iter(words), "-")
    return list(words) if first.startswith("-") else [flag, *words]
