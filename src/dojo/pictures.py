"""Tensors to picture files, safe names for them, and labelled grids."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 6  # pixels between the cells of a grid
_LABEL_WIDTH = 150  # pixels of the column with the rows' labels


def to_pil(images: Tensor) -> list[Image.Image]:
    """Float [B, 3, H, W] in [0, 1] to 8-bit pictures."""
    rows = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(row) for row in rows.permute(0, 2, 3, 1).cpu().numpy()]


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, at most 60 characters."""
    words = re.sub(r"\W+", "_", prompt).strip("_")
    return words[:60] or "empty"


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell: int = 192,
) -> Image.Image:
    """A table of pictures with a label before each row and above each column.

    Args:
        rows: the pictures, all rows of one length; each is scaled to `cell` pixels in height,
            small ones without smoothing.
    """
    width = max(max(1, round(cell * p.width / p.height)) for row in rows for p in row)
    font = ImageFont.load_default(13)
    header = 26
    step_x, step_y = width + _MARGIN, cell + _MARGIN
    size = (_LABEL_WIDTH + step_x * len(rows[0]), header + step_y * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for x, label in enumerate(column_labels):
        center = _LABEL_WIDTH + x * step_x + width // 2
        pen.text((center, header // 2), label, fill="black", font=font, anchor="mm")
    for y, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = header + y * step_y
        words = "\n".join(textwrap.wrap(label, 20)[: cell // 16])
        pen.multiline_text((_MARGIN, top + _MARGIN), words, fill="black", font=font)
        for x, picture in enumerate(row):
            small = picture.height < cell
            resample = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            scaled = picture.resize((round(cell * picture.width / picture.height), cell), resample)
            sheet.paste(scaled, (_LABEL_WIDTH + x * step_x, top))
    return sheet
