"""Pieces of the page: numbers in words, tables, pictures in the page itself. All escape."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

MAX_WIDTH, MAX_HEIGHT = 1600, 16_000  # pixels of an embedded picture
MAX_BYTES = 1_100_000  # of an embedded picture, before base64
MAX_ROWS = 40  # of a table


def number(value: float) -> str:
    """A number as short as its size allows."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def file_size(count: float) -> str:
    """Bytes in the unit that suits them."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts and numbers, cut after MAX_ROWS; without rows, nothing."""
    if not rows:
        return ""
    lines = []
    if any(head):
        lines.append("".join(f"<th>{escape(name)}</th>" for name in head))
    lines += ["".join(_cell(value) for value in row) for row in rows[:MAX_ROWS]]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    left = len(rows) - MAX_ROWS
    more = f"<p>and {left} more</p>" if left > 0 else ""
    return f'<div class="scroll"><table>{body}</table></div>{more}'


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="number">{number(value)}</td>'
    return f"<td>{escape(str(value))}</td>"


def picture(title: str, image: Image.Image) -> str:
    """A picture in the page itself: PNG where that is small, else JPEG, scaled down to fit."""
    factor = min(MAX_WIDTH / image.width, MAX_HEIGHT / image.height)
    if factor < 1:
        image = _scaled(image, factor)
    kind, content = "png", _encoded(image, "PNG")
    while len(content) > MAX_BYTES:
        kind, content = "jpeg", _encoded(image, "JPEG", quality=85)
        if len(content) > MAX_BYTES:
            image = _scaled(image, 0.8)
    name = escape(title, quote=True)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    # On a narrow screen a sheet keeps half its width or more, and scrolls sideways.
    style = f"--width: {image.width}px"
    return (
        f"<figure><figcaption>{name}</figcaption>"
        f'<div class="scroll"><img style="{style}" src="{source}" alt="{name}"></div></figure>'
    )


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
