"""Tensors to picture files, safe names for them, labelled grids and the contact sheet of a run."""

from __future__ import annotations

import csv
import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from dojo.files.records import read_pictures
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_MARGIN = 6  # pixels between the cells of a grid
_LABEL_WIDTH = 170  # pixels of the column with the rows' labels
_FONT_SIZE = 13
_LINE = 17  # pixels from one line of a label to the next
_WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")


def to_pil(images: Tensor) -> list[Image.Image]:
    """Float [B, 3, H, W] in [0, 1] to 8-bit pictures."""
    rows = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(row) for row in rows.permute(0, 2, 3, 1).cpu().numpy()]


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, at most 60 characters.

    In UTF-8 it takes at most 180 bytes, so that with number, size and seed it stays below the 255
    that file systems allow.
    """
    words = re.sub(r"\W+", "_", unicodedata.normalize("NFC", prompt)).strip("_")[:60]
    return words.encode()[:180].decode(errors="ignore") or "empty"


# -- grids ------------------------------------------------------------------------------------


def labelled_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    notes: Sequence[Sequence[str]] | None = None,
    cell: int = 192,
) -> Image.Image:
    """A table of pictures with a label before each row and above each column.

    Args:
        rows: the pictures, all rows of one length; each is scaled to `cell` pixels in height,
            small ones without smoothing; None leaves the cell empty.
        notes: a word below each picture, such as its score.
    """
    width = max(max(1, round(cell * p.width / p.height)) for row in rows for p in row if p)
    heads = [_wrapped(label, width) for label in column_labels]
    header = 9 + _LINE * max(1, *(len(lines) for lines in heads))
    step_x, step_y = width + _MARGIN, cell + _MARGIN + (_LINE if notes else 0)
    size = (_LABEL_WIDTH + step_x * len(rows[0]), header + step_y * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for x, lines in enumerate(heads):
        center = _LABEL_WIDTH + x * step_x + width // 2
        for i, line in enumerate(lines):
            write(pen, (center, header - (len(lines) - i) * _LINE + 4), line, centred=True)
    for y, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = header + y * step_y
        lines = _wrapped(label, _LABEL_WIDTH - 2 * _MARGIN)
        for i, line in enumerate(lines[: cell // _LINE]):
            write(pen, (_MARGIN, top + _MARGIN + i * _LINE), line)
        for x, picture in enumerate(row):
            if picture is None:
                continue
            small = picture.height < cell
            resample = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            scaled_width = max(1, round(cell * picture.width / picture.height))
            scaled = picture.convert("RGB").resize((scaled_width, cell), resample)
            left = _LABEL_WIDTH + x * step_x
            sheet.paste(scaled, (left, top))
            if notes:
                place = (left + width // 2, top + cell + _LINE // 2)
                write(pen, place, drawable(notes[y][x]), centred=True)
    return sheet


def contact_sheet(
    folder: Path, *, last_step: int | None = None, max_columns: int = 8, max_rows: int = 60
) -> Image.Image | None:
    """What became of each validation picture: a row per picture, a column per step.

    Args:
        folder: holds `step-N/*.png`, and perhaps `prompts.json` with the pictures' labels and
            `step-N/scores.csv` with their rewards.
        last_step: later steps are left out (they belong to a run that was given up).
        max_columns: more steps are thinned out evenly; the first and the last stay.
        max_rows: of more pictures the first are shown.
    Returns:
        None when there are no pictures that can be read.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and (last_step is None or int(number) <= last_step):
            found[int(number)] = path
    files = {step: {p.name for p in path.glob("*.png")} for step, path in sorted(found.items())}
    steps = thin_out([step for step, names in files.items() if names], max_columns)
    if not steps:
        return None
    there = {name for step in steps for name in files[step]}
    known = {row["file"]: row["label"] for row in read_pictures(folder)}
    names = ([name for name in known if name in there] or sorted(there))[:max_rows]
    scores = {step: _scores(found[step] / "scores.csv") for step in steps}
    pictures = [[read(found[step] / name) for step in steps] for name in names]
    if not any(map(any, pictures)):
        return None
    return labelled_grid(
        pictures,
        row_labels=[known.get(name, name.removesuffix(".png")) for name in names],
        column_labels=[f"step {step}" for step in steps],
        notes=[[scores[step].get(name, "") for step in steps] for name in names]
        if any(scores.values())
        else None,
    )


def thin_out(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread over the list, with its first and last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _scores(path: Path) -> dict[str, str]:
    """The reward of each picture file, with three digits, where there is one."""
    if not path.is_file():
        return {}
    found = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
        for row in csv.DictReader(file):
            with suppress(KeyError, TypeError, ValueError):  # a line that is damaged
                found[row["file"]] = f"{float(row['reward']):.3g}"
    return found


def read(path: Path) -> Image.Image | None:
    """A picture; None where there is none, or its file is damaged."""
    with suppress(OSError, SyntaxError, ValueError), Image.open(path) as picture:
        return picture.convert("RGB")
    return None


# -- letters ----------------------------------------------------------------------------------


def drawable(text: str) -> str:
    """A text in one line, with what no font has spelled out: U+13000 for an Egyptian hieroglyph.

    matplotlib's DejaVu Sans has the European scripts, Arabic and Hebrew; a font in this package has
    the Chinese characters of GB 2312, its punctuation and Japan's syllabaries; for others the
    machine's fonts are searched.
    """
    text = " ".join(text.split())
    fonts = _fonts_of("".join(sorted(set(text))))
    return "".join(char if char in fonts else f"U+{ord(char):04X}" for char in text)


def write(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, centred: bool = False
) -> None:
    """Writes a line in black, each character in the first font that has it.

    Args:
        place: in pixels, of the line's left upper corner, or of its middle where it is `centred`.
        text: without characters that no font has (`drawable`).
    """
    runs = _runs(text)
    if len(runs) == 1:
        anchor = "mm" if centred else "la"
        pen.text(place, runs[0][1], fill="black", font=runs[0][0], anchor=anchor)
        return
    above, below = _font(_base_font()).getmetrics()
    x, y = place
    if centred:
        x, y = x - length(text) / 2, y - (above + below) / 2
    for font, part in runs:  # on one base line
        pen.text((x, y + above), part, fill="black", font=font, anchor="ls")
        x += font.getlength(part)


def length(text: str) -> float:
    """How wide a line is, in pixels."""
    return sum(font.getlength(part) for font, part in _runs(text))


def _runs(text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """A text in as few parts as there are changes of the font."""
    fonts = _fonts_of("".join(sorted(set(text))))
    groups = itertools.groupby(text, key=lambda char: fonts.get(char, _base_font()))
    return [(_font(path), "".join(chars)) for path, chars in groups]


@functools.lru_cache(maxsize=8)
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, _FONT_SIZE)


@functools.lru_cache(maxsize=1024)
def _fonts_of(needed: str) -> dict[str, str]:
    """The first font that has each of the characters, of those that one has at all."""
    found = {
        char: _base_font() for char in _characters(_base_font(), set(needed)) | ({" "} & {*needed})
    }
    found |= {char: _CHINESE_FONT for char in set(needed) - found.keys() if is_chinese(char)}
    missing = set(needed) - found.keys()
    for path in _system_fonts() if missing else []:
        has = _characters(path, missing)
        found |= dict.fromkeys(has, path)
        missing -= has
        if not missing:
            break
    return found


@functools.cache
def _base_font() -> str:
    import matplotlib as mpl  # late: a run that draws no letters does not wait for it

    return str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


_CHINESE_FONT = str(Path(__file__).with_name("fonts") / "dojo-cjk.otf")
# Rows of GB 2312: punctuation, full-width Latin letters, both Japanese syllabaries, characters.
_CHINESE_ROWS = {1, 3, 4, 5, *range(16, 88)}


def is_chinese(char: str) -> bool:
    """Whether the font of this package has a character."""
    try:
        first, *second = char.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return bool(second) and first - 0xA0 in _CHINESE_ROWS


@functools.cache
def _system_fonts() -> list[str]:
    """The machine's fonts, those with Chinese, Japanese and Korean in their names first."""
    from matplotlib import font_manager  # the import alone may build a list of fonts on disk

    wide = re.compile("cjk|wqy|hei|song|ming|fang|gothic|noto|droid|fallback|unifont", re.I)
    paths = font_manager.findSystemFonts()
    return sorted(paths, key=lambda path: (not wide.search(Path(path).name), path))


def _characters(path: str, wanted: set[str]) -> set[str]:
    """Which of the characters a font file has."""
    from matplotlib.ft2font import FT2Font

    try:
        known = FT2Font(path).get_charmap()
    except (OSError, RuntimeError):  # a bitmap font, or a broken file
        return set()
    return {char for char in wanted if ord(char) in known}


def _wrapped(label: str, width: int) -> list[str]:
    """A label in lines of at most `width` pixels."""
    return _wrap(drawable(label), width)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words and between Chinese characters."""
    lines = [""]
    for word in re.findall(rf"{_WIDE.pattern}|\s+|(?:(?!{_WIDE.pattern})\S)+", text):
        if length(lines[-1] + word.rstrip()) > width and lines[-1]:
            lines.append("")
        for char in word:
            if length(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char if lines[-1] or not char.isspace() else ""
    return [line.rstrip() for line in lines if line.strip()]
