"""Texts of others in Markdown: they show as they are and make no markup (GitHub's Markdown)."""

from __future__ import annotations

import re
from urllib.parse import quote

# Before any of these a backslash stands for the character itself; < and & would begin HTML.
_MARKS = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>$@:])")


def plain(text: str) -> str:
    """A text on one line, between the words of a paragraph, in a heading or as a picture's name."""
    line = _one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKS.sub(r"\\\1", line)


def code(text: str, *, in_table: bool = False) -> str:
    """A text on one line as code.

    Args:
        in_table: a table's cells end at every bar, in code too.
    """
    line = _one_line(text)
    if in_table:
        line = line.replace("|", "\\|")
    fence = "`" * (_longest(line) + 1)
    edge = " " if line[:1] in ("`", " ", "") or line[-1:] in ("`", " ") else ""
    return f"{fence}{edge}{line}{edge}{fence}"


def block(lines: list[str], language: str) -> str:
    """Lines of code."""
    text = "\n".join(lines)
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def picture(name: str, path: str) -> str:
    """A picture with its name; `path` is relative."""
    place = re.sub(r"[^\w/.~-]", lambda match: quote(match[0]), path)  # letters of any script stay
    return f"![{plain(name)}]({place})"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _longest(text: str) -> int:
    """The longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
