"""The page, the summary and the list of what `survey` found.

The page is written picture by picture, as it is read again: none of them is kept.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from dojo import data, files
from dojo.bars import Bar
from dojo.cli import UserError
from dojo.data.images import cover_box
from dojo.look.survey import TITLES, Finding, Kind, Survey, as_row
from dojo.report.html import table
from dojo.report.style import PAGE, STYLE

PAGE_NAME, SUMMARY, LIST = "look.html", "look.txt", "look.jsonl"
_LISTED = 10  # findings of a kind in the summary
_GROUPS, _IN_GROUP = 60, 6  # of copies that are shown as pictures
_CAPTIONS, _LETTERS = 3, 400  # of a picture that are shown, and of a caption

_LOOK = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--side), 1fr));
  gap: 14px; }
.sheet figure { content-visibility: auto; contain-intrinsic-size: var(--side); margin: 0;
  font-size: .8rem; overflow-wrap: anywhere; }
.sheet img { width: auto; max-width: 100%; }
.sheet p { margin: 3px 0 0; }
.name { color: var(--soft); }
.mark { color: var(--c4); }
.copies { margin-bottom: 24px; }
main { max-width: 1500px; }
"""


def write(
    found: Survey, pictures: Draws, folder: Path, title: str, *, most: int, side: int
) -> list[str]:
    """Writes the page, the summary and the list into a folder; returns the summary's lines.

    Args:
        pictures: how training cuts them.
        most: pictures that are shown; of more, so many from all over the set.
        side: of a picture on the page, in pixels.
    Raises:
        UserError: another file has a name that is wanted.
    """
    lines = summary(found, title)
    files.check_output(folder / PAGE_NAME, "--output_dir", is_ours=lambda text: STYLE[:200] in text)
    files.check_output(
        folder / SUMMARY, "--output_dir", is_ours=lambda text: text.startswith(_head(""))
    )
    with files.whole(folder / LIST) as file:
        for one in found.findings:
            file.write((json.dumps(as_row(one), ensure_ascii=False) + "\n").encode())
    with files.whole(folder / SUMMARY) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    with files.whole(folder / PAGE_NAME) as file:
        for text in _page(found, pictures, title, most, side):
            file.write(text.encode("utf-8", "replace"))
    return lines


def _head(title: str) -> str:
    return f"look at {title}"


def summary(found: Survey, title: str) -> list[str]:
    """What there is to know, for the screen and look.txt."""
    samples = found.samples
    lines = [_head(title), *samples.description.splitlines()]
    lines.append(f"pictures: {samples.count:,}, of which {len(found.prints):,} can be read")
    lines += [f"  {count:,} pictures {note}" for note, count in sorted(found.notes.items())]
    if found.buckets:
        lines += found.buckets.splitlines()
    for kind, title_of_kind in TITLES.items():
        some = found.of(kind)
        lines.append(f"{title_of_kind}: {_count(kind, some)}")
        for one in some[:_LISTED]:
            lines.append(f"  {', '.join(one.names[:4])}{_more(one)}: {_short(one.words)}")
        if len(some) > _LISTED:
            lines.append(f"  and {len(some) - _LISTED:,} more, in {LIST}")
    return lines


def _more(one: Finding) -> str:
    return f" and {len(one.names) - 4} more" if len(one.names) > 4 else ""


def _count(kind: Kind, some: Sequence[Finding]) -> str:
    if kind in ("same", "near"):
        pictures = sum(len(one.names) for one in some)
        return f"{pictures:,} pictures in {len(some):,} groups" if some else "0"
    return f"{len(some):,}"


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} ..."


# -- the page -----------------------------------------------------------------------------------


class Draws:
    """The pictures of a source as training cuts them: the first use of each."""

    def __init__(
        self, found: Survey, args: data.DataArgs, captions: data.CaptionArgs, seed: int
    ) -> None:
        self.found = found
        self.args = args
        self.captions = captions
        self.seed = seed

    def cut(self, part: data.Captioned, index: int, place: int, side: int) -> Image.Image:
        """The crop of one sample, shrunk to `side` pixels along its longer side.

        Raises:
            BadSample: the picture can no longer be read.
        """
        size = self.found.targets[place]
        one = part.select([index])
        if self.args.crop_variants > 1:  # where these lie hangs on what the file contains
            one = data.identified(one, None)
        framed = data.Pictures(one, self.args, self.captions, seed=self.seed)
        anchor, flip = framed.framing(data.Draw(0, place, size))
        picture = _read(part, index)
        box = cover_box(picture.size, *size, anchor)
        small = picture.resize(_within(size, side), Image.Resampling.LANCZOS, box, 3.0)
        return small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small


def _read(part: data.Captioned, index: int) -> Image.Image:
    """A picture, whatever is wrong with its caption."""
    return data.read_image(_stored(part, index), part.names[index])


def _stored(part: data.Captioned, index: int) -> Path | bytes:
    return part.store(part.rows[index])


def _within(size: data.Size, side: int) -> tuple[int, int]:
    """(width, height) of the aspect of a size whose longer side is `side`."""
    height, width = size
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _page(found: Survey, pictures: Draws, title: str, most: int, side: int) -> Iterator[str]:
    head, _, tail = PAGE.partition("{body}")
    facts = {
        "pictures": f"{found.samples.count:,}",
        "that can be read": f"{len(found.prints):,}",
        **{TITLES[kind].lower(): _count(kind, found.of(kind)) for kind in TITLES},
    }
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    yield head.format(
        title=escape(_head(title).capitalize()),
        style=f"{STYLE}{_LOOK}",
        facts="".join(cells),
    )
    yield f"<p>{escape(found.samples.description)}</p>"
    if found.buckets:
        yield f"<details><summary>sizes</summary><pre>{escape(found.buckets)}</pre></details>"
    for kind in TITLES:
        yield from _findings(found, pictures, kind, side)
    yield from _sheet(found, pictures, most, side)
    yield tail


def _findings(found: Survey, pictures: Draws, kind: Kind, side: int) -> Iterator[str]:
    some = found.of(kind)
    if not some:
        return
    yield f"<section><h2>{escape(TITLES[kind])} ({_count(kind, some)})</h2>"
    if kind in ("same", "near"):
        for one in some[:_GROUPS]:
            yield f'<div class="copies"><p>{escape(one.words)}{escape(_more_in(one))}</p>'
            yield from _figures(found, pictures, one.places[:_IN_GROUP], side)
            yield "</div>"
        if len(some) > _GROUPS:
            yield f"<p>and {len(some) - _GROUPS:,} more groups, in {LIST}</p>"
    else:
        yield table(["picture", ""], [[*one.names, _short(one.words)] for one in some])
    yield "</section>"


def _more_in(one: Finding) -> str:
    left = len(one.places) - _IN_GROUP
    return f"; {left:,} more of them are not shown" if left > 0 else ""


def _sheet(found: Survey, pictures: Draws, most: int, side: int) -> Iterator[str]:
    """The pictures as they are cut, or as many of them, from all over the set."""
    places = sorted(found.targets)
    count = min(most, len(places))
    shown = [places[i * len(places) // count] for i in range(count)]
    part = f"{count:,} of {len(places):,}" if count < len(places) else f"{count:,}"
    yield f"<section><h2>As training cuts them ({part})</h2>"
    bar = Bar(total=count, desc="Drawing the page", unit="picture")
    with bar:
        for text in _figures(found, pictures, shown, side):
            yield text
            bar.update(text.startswith("<figure>"))
    yield "</section>"


def _figures(found: Survey, pictures: Draws, places: Iterable[int], side: int) -> Iterator[str]:
    marks = found.marks()
    yield f'<div class="sheet" style="--side: {side}px">'
    for place, part, index in found.samples.at(sorted(places)):
        try:
            if place in found.targets:
                picture = pictures.cut(part, index, place, side)
            else:  # left out
                picture = _read(part, index)
                picture.thumbnail((side, side))
            image = f'<img alt="" src="{_source(picture)}">'
        except UserError as error:
            image = f'<p class="mark">{escape(str(error))}</p>'
        yield f"<figure>{image}{_words(found, marks.get(place, []), part, index, place)}</figure>"
    yield "</div>"


def _words(
    found: Survey, marks: Sequence[Finding], part: data.Captioned, index: int, place: int
) -> str:
    """What stands below a picture: its captions, its name and size, and what was found."""
    captions = part.captions[index]
    lines = [f"<p>{escape(_short(text))}</p>" for text in captions[:_CAPTIONS]]
    if len(captions) > _CAPTIONS:
        lines.append(f"<p>and {len(captions) - _CAPTIONS} more captions</p>")
    height, width = found.sizes[place]
    size = f"{width} x {height}"
    if target := found.targets.get(place):
        size += f", trained at {target[1]} x {target[0]}"
    lines.append(f'<p class="name">{escape(part.names[index])}<br>{size}</p>')
    for one in marks:
        others = [name for name in one.names if name != part.names[index]]
        words = f"{TITLES[one.kind]}: {', '.join(others[:3]) or _short(one.words)}"
        lines.append(f'<p class="mark">{escape(words)}</p>')
    return "".join(lines)


def _source(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
