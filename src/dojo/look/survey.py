"""Every picture read once: its size, its fingerprint, its captions, and what is wrong with it.

Of a picture about a hundred bytes are kept, and its name and captions where the data are a folder;
the pictures themselves are read a few at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dojo import data
from dojo.bars import Bar
from dojo.cli import UserError
from dojo.data.buckets import check_multiple, enlargement
from dojo.data.images import decode
from dojo.data.sources.captioned import told_unread
from dojo.look import prints
from dojo.look.prints import Print
from dojo.models import truncation

Kind = Literal["broken", "caption", "long", "same", "near", "small", "left out"]

TITLES: dict[Kind, str] = {
    "broken": "Files that cannot be read",
    "caption": "Captions that are missing or cannot be used",
    "long": "Captions that are cut",
    "same": "The same picture",
    "near": "Nearly the same picture",
    "small": "Pictures that are blown up",
    "left out": "Too small for --max_upscale",
}
"""The kinds of findings, in the order in which they are told."""

_AT_ONCE = 256  # rows of a part
_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that may be wrong with a picture, or with several together."""

    kind: Kind
    names: tuple[str, ...]
    """Of the pictures."""
    words: str
    """What it is."""
    places: tuple[int, ...] = ()
    """Of the pictures among the samples."""


Part = Callable[[], data.Captioned]


@dataclass
class Samples:
    """The samples of a source in parts, which are opened one at a time."""

    description: str
    parts: Sequence[Part]
    starts: Sequence[int]
    """The number of each part's first sample."""
    count: int
    captioned: bool = True
    """Whether the source has captions at all."""
    whole: data.Captioned | None = None
    """All of them, where they lie in a folder or a table."""

    def __iter__(self) -> Iterator[tuple[int, data.Captioned]]:
        for start, part in zip(self.starts, self.parts, strict=True):
            yield start, part()

    def at(self, places: Sequence[int]) -> Iterator[tuple[int, data.Captioned, int]]:
        """The samples at places, which are sorted: place, part, index in the part."""
        left = list(places)[::-1]
        for number, start in enumerate(self.starts):
            end = self.starts[number + 1] if number + 1 < len(self.starts) else self.count
            if not left or left[-1] >= end:
                continue
            part = self.parts[number]()
            while left and left[-1] < end:
                place = left.pop()
                yield place, part, place - start


def open_samples(args: data.DataArgs) -> Samples:
    """The training samples that the options name.

    A folder of pictures without any captions is opened too.

    Raises:
        UserError: there are none, or they are latents.
    """
    if data.is_streamed(args.location):
        return _of_shards(args)
    uncaptioned = args.data_config is None and _without_captions(args)
    source = data.open_training(replace(args, instance_prompt="none") if uncaptioned else args)
    source, _ = data.split(
        source, eval_fraction=0.0, seed=0, max_train_samples=args.max_train_samples
    )
    description = source.description
    if uncaptioned:
        source = replace(source, captions=[()] * len(source))
        description = "; ".join(
            [
                f"{args.location}: {len(source)} pictures",
                "no captions (python -m dojo.caption writes some, or see --caption_strategy)",
                *told_unread(source.unread),
            ]
        )
    starts = range(0, len(source), _AT_ONCE)

    def part(start: int) -> data.Captioned:
        return source.select(range(start, min(start + _AT_ONCE, len(source))))

    parts = [partial(part, start) for start in starts]
    return Samples(description, parts, starts, len(source), not uncaptioned, source)


def _without_captions(args: data.DataArgs) -> bool:
    """Whether a folder holds pictures, and nothing that could be their captions."""
    root = Path(args.location).expanduser()
    auto = args.caption_strategy == "auto" and not (args.instance_prompt or args.caption_column)
    if not auto or not root.is_dir():
        return False
    found = data.scan(root, args)
    others = found.metadata_files or found.sidecars or found.has_tables
    return bool(found.pictures) and not others


def _of_shards(args: data.DataArgs) -> Samples:
    stream = data.open_shards(args)
    if isinstance(stream, data.Made):
        raise UserError(
            f"{args.location} holds latents and no pictures: name the pictures that it was made of"
        )
    parts, starts = list[Part](), list[int]()
    for shard, first, rows in stream.cut(_AT_ONCE):
        starts.append(first)
        parts.append(partial(stream.part, shard, rows))
    return Samples(stream.description, parts, starts, len(stream))


@dataclass
class Survey:
    """What was found."""

    samples: Samples
    prints: dict[int, Print] = field(default_factory=dict[int, Print])
    """By the places of the pictures that can be read."""
    sizes: dict[int, data.Size] = field(default_factory=dict[int, data.Size])
    """(height, width) of those pictures, upright, in pixels."""
    targets: dict[int, data.Size] = field(default_factory=dict[int, data.Size])
    """(height, width) that each of those that are used is first trained at."""
    findings: list[Finding] = field(default_factory=list[Finding])
    notes: Counter[str] = field(default_factory=Counter[str])
    """How many pictures were read in a way that their owner may want to know."""
    buckets: str = ""
    """A table of the sizes."""

    def of(self, kind: Kind) -> list[Finding]:
        """The findings of a kind."""
        return [one for one in self.findings if one.kind == kind]

    def marks(self) -> dict[int, list[Finding]]:
        """What was found of each picture that has something."""
        marks: dict[int, list[Finding]] = {}
        for one in self.findings:
            for place in one.places:
                marks.setdefault(place, []).append(one)
        return marks


def survey(
    samples: Samples,
    args: data.DataArgs,
    readers: Sequence[truncation.Reader],
    *,
    step: int,
    near: int,
) -> Survey:
    """Reads every picture once.

    Args:
        args: how they will be cut.
        readers: tokenizers of the encoders that read the captions.
        step: the sides that the model takes are multiples of it, in pixels.
        near: bits of 256 that the hashes of two pictures may differ in that are told as nearly the
            same; 0 compares none.
    Raises:
        UserError: no picture can be read, or a size does not fit.
    """
    found = Survey(samples)
    bar = Bar(total=samples.count, desc="Looking at pictures", unit="picture")
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for start, part in samples:
            found.findings += _captions(start, part, readers, told=samples.captioned)
            for index, one in enumerate(pool.map(partial(_look, part), range(len(part)))):
                _enter(found, start + index, part, index, one)
                bar.update()
    if not found.prints:
        raise UserError(f"no picture can be read: {found.findings[0].words}")
    _deal(found, args, step)
    found.findings += _copies(found, near)
    order = list(TITLES)
    found.findings.sort(key=lambda one: (order.index(one.kind), one.places))
    return found


_Seen = tuple[data.Size, Print, tuple[str, ...]]


def _look(part: data.Captioned, index: int) -> _Seen | str:
    """A picture's size, fingerprint and notes, or why it cannot be read."""
    name = part.names[index]
    try:
        place = part.store(part.rows[index])
        content = place if isinstance(place, bytes) else place.read_bytes()
        decoded = decode(content, name)
        picture = decoded.on("white")
        size = picture.height, picture.width
        part.read_mask(index, size)
    except (OSError, UserError) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        return (words or str(error)).removeprefix(f"{name}: ")
    return size, prints.print_of(content, picture), decoded.notes


def _enter(found: Survey, place: int, part: data.Captioned, index: int, one: _Seen | str) -> None:
    if isinstance(one, str):
        # A row that is at fault need not name a picture at all, and is told of already.
        if not part.problems[index] or not _names_nothing(part, index):
            found.findings.append(_finding("broken", part, index, place, one))
        return
    size, fingerprint, notes = one
    found.sizes[place], found.prints[place] = size, fingerprint
    found.notes.update(notes)


def _names_nothing(part: data.Captioned, index: int) -> bool:
    place = part.store(part.rows[index])
    return isinstance(place, Path) and not place.exists()


def _finding(kind: Kind, part: data.Captioned, index: int, place: int, words: str) -> Finding:
    return Finding(kind=kind, names=(part.names[index],), words=words, places=(place,))


def _captions(
    start: int, part: data.Captioned, readers: Sequence[truncation.Reader], *, told: bool
) -> Iterator[Finding]:
    """What is wrong with the captions of a part; that none has any is said once, elsewhere."""
    cut = truncation.find_cut({text for some in part.captions for text in some}, readers).texts
    limits = {reader.name: reader.limit for reader in readers}
    for index, captions in enumerate(part.captions):
        if told and (part.problems[index] or not captions):
            words = part.problems[index] or "the caption is missing"
            yield _finding("caption", part, index, start + index, words)
        for text in captions:
            if tokens := cut.get(text):
                words = _too_long(tokens, limits)
                yield _finding("long", part, index, start + index, f"{words}: {text}")


def _too_long(tokens: Mapping[str, int], limits: Mapping[str, int]) -> str:
    parts = [f"{count} tokens, {name} reads {limits[name]}" for name, count in tokens.items()]
    return "; ".join(parts)


def _deal(found: Survey, args: data.DataArgs, step: int) -> None:
    """Finds the size that each picture is trained at, as training does."""
    samples, places = found.samples, sorted(found.sizes)
    if samples.whole is None:
        for flag, side in zip(("height", "width"), args.size, strict=True):
            check_multiple(f"--{flag if getattr(args, flag) else 'resolution'}", side, step)
        found.targets = dict.fromkeys(places, args.size)
    else:
        good = samples.whole.select(places)
        good = replace(good, sizes=[found.sizes[place] for place in places])
        plan = data.assign(good, args, step)
        found.buckets = plan.table(1)
        for one in reversed(plan.rounds):
            for size, members in one.items():
                found.targets.update((places[index], size) for index in members)
        found.findings += [
            _finding("left out", good, index, places[index], why) for index, why in plan.left_out
        ]
    blown_up = [
        place for place, size in found.targets.items() if enlargement(found.sizes[place], size) > 1
    ]
    for place, part, index in samples.at(sorted(blown_up)):
        height, width = found.sizes[place]
        to = found.targets[place]
        words = (
            f"{width} x {height} px, blown up {enlargement((height, width), to):.2f} times to "
            f"cover {to[1]} x {to[0]}"
        )
        found.findings.append(_finding("small", part, index, place, words))


def _copies(found: Survey, near: int) -> list[Finding]:
    """Pictures that are equal, and those that are nearly so. Of equal ones the first stands for all
    when others are compared."""
    places = sorted(found.prints)
    some = [found.prints[place] for place in places]
    equal = [[places[i] for i in group] for group in prints.same([one.pixels for one in some])]
    copies = {place for group in equal for place in group[1:]}
    rest = [place for place in places if place not in copies]
    alike = prints.near([found.prints[place] for place in rest], near) if near else []
    near_groups = [[rest[i] for i in group] for group in alike]
    wanted = sorted({place for group in [*equal, *near_groups] for place in group})
    names = {place: part.names[index] for place, part, index in found.samples.at(wanted)}
    told: list[Finding] = []
    kinds: list[tuple[Kind, list[list[int]]]] = [("same", equal), ("near", near_groups)]
    for kind, groups in kinds:
        for group in groups:
            contents = {found.prints[place].content for place in group}
            words = {
                "same": "equal files" if len(contents) == 1 else "equal pixels in other files",
                "near": f"at most {near} of {prints.BITS} bits apart, one from the next",
            }[kind]
            told.append(
                Finding(
                    kind=kind,
                    names=tuple(names[place] for place in group),
                    words=words,
                    places=tuple(group),
                )
            )
    return told


def as_row(one: Finding) -> dict[str, Any]:
    """A finding as a row of look.jsonl."""
    return {"kind": one.kind, "pictures": list(one.names), "what": one.words}
