"""Tables for a person to read: with a rule on a terminal, plain columns elsewhere."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Collection, Sequence


def told(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table as standard output shows it best.

    Args:
        head: the names of the columns.
        rows: as many cells each.
        right: numbers of the columns that end at their right, as numbers do.
    """
    return framed(head, rows, right) if sys.stdout.isatty() else plain(head, rows, right)


def plain(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Aligned columns, two spaces apart; the arguments are those of `told`."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ways = [str.rjust if i in right else str.ljust for i in range(len(head))]
    return "\n".join(
        "  ".join(
            way(cell, width) for way, cell, width in zip(ways, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def framed(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    width: int | None = None,
) -> str:
    """The table with a rule below its head, and long cells broken into lines where it is narrow.

    Args:
        width: of the terminal in letters; unset is asked for. The rest is as for `told`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="right" if i in right else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # texts as they are: [name] is no markup
    columns = width or shutil.get_terminal_size().columns
    console = Console(file=io.StringIO(), force_terminal=True, width=columns)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())  # the frame has no sides
