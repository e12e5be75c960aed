"""Claims about tables: every cell is there, in columns, on a terminal and elsewhere."""

import io
import re
import sys

import pytest

from dojo import tables
from tests.test_bars import Terminal

HEAD = ("name", "GiB", "")
ROWS = [("training", "10.25", "weights [nf4]"), ("validation", "3.50", "")]


def bare(said: str) -> list[str]:
    """Its lines without bold letters."""
    return re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines()


def test_plain_columns_stand_below_each_other() -> None:
    assert tables.plain(HEAD, ROWS, right=[1]).splitlines() == [
        "name          GiB",
        "training    10.25  weights [nf4]",
        "validation   3.50",
    ]


def test_a_framed_table_holds_the_same_cells_and_takes_no_markup() -> None:
    head, rule, *rows = bare(tables.framed(HEAD, ROWS, right=[1], width=60))
    assert set(rule.strip()) == {"─"}
    assert head.split() == ["name", "GiB"]
    assert "weights [nf4]" in rows[0]
    assert rows[0].index("10.25") + 1 == rows[1].index("3.50"), "numbers end at their right"


def test_a_narrow_terminal_breaks_cells_and_loses_none() -> None:
    words = [f"word{i}" for i in range(12)]
    lines = bare(tables.framed(("name", "about"), [("it", " ".join(words))], width=30))
    assert max(map(len, lines)) <= 30
    assert " ".join(lines).split()[-12:] == words


@pytest.mark.parametrize(("stream", "framed"), [(Terminal(), True), (io.StringIO(), False)])
def test_lines_are_drawn_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, framed: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    assert ("─" in tables.told(HEAD, ROWS)) == framed
    assert (tables.told(HEAD, ROWS) == tables.plain(HEAD, ROWS)) != framed
