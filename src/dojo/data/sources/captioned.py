"""Captioned pictures, whatever they come from: read, checked, joined, and split.

Every source ends as one ``Captioned``: lists of names, ids and captions, and a way to read the
picture of a row. What is wrong with a row is kept beside it, so that a whole data set can be
reported at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dojo.bars import Bar
from dojo.cli import UserError
from dojo.data.contents import Origin, Remembered
from dojo.data.images import (
    BadSample,
    Decoded,
    Seen,
    Size,
    decode,
    examine,
    read_alpha,
    read_mask,
)
from dojo.data.options import DataArgs

if TYPE_CHECKING:
    from PIL import Image

_MAX_LISTED = 10


class PictureStore(Protocol):
    """Where the pictures of a source lie; small to pickle, holds no pictures."""

    def __call__(self, row: int) -> Path | bytes:
        """The picture of a row: a path or the bytes of a file."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the pictures of one source are used."""

    resolution: tuple[int, ...]
    """Sides in pixels; several take turns from epoch to epoch."""
    height: int | None
    """In pixels, where it differs from the resolution."""
    width: int | None
    """In pixels, where it differs from the resolution."""
    random_crop: bool
    """Crop at a random place instead of the centre."""
    random_flip: bool
    """Mirror at random."""
    aspect_buckets: bool
    """Crop to the nearest of several shapes instead of one for all."""
    repeats: int = 1
    """Uses of each picture per epoch."""
    weight: float = 1.0
    """Of a sample's loss."""
    is_regularisation: bool = False
    """Pictures of the class, which keep the model from forgetting it."""
    mask_from_alpha: bool = False
    """Take each picture's alpha channel for its mask."""

    @classmethod
    def of(cls, args: DataArgs) -> Recipe:
        """The recipe that the flags describe."""
        return cls(
            resolution=args.resolution,
            height=args.height,
            width=args.width,
            random_crop=args.random_crop,
            random_flip=args.random_flip,
            aspect_buckets=args.aspect_buckets,
            repeats=args.repeats,
            mask_from_alpha=args.mask_from_alpha,
        )


@dataclass(frozen=True, kw_only=True)
class Unread:
    """Files of one kind that lie among the pictures and are not read."""

    kind: str
    """What follows their number: ``.heic files``."""
    count: int
    remedy: str = ""
    """What would make them of use; empty where nothing is known."""

    def __str__(self) -> str:
        return f"{self.count:,} {self.kind}" + (f" ({self.remedy})" if self.remedy else "")


def told_unread(unread: Sequence[Unread]) -> list[str]:
    """What the screen says of files that are not read; nothing where there are none."""
    return [f"not read: {', '.join(map(str, unread))}"] if unread else []


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Samples with captions, of which only the pictures are still to be read.

    Pickles cheaply for data loader workers, and holds no pixels.
    """

    description: str
    """Where the samples come from and which captions were taken, for the screen."""
    names: list[str]
    """What messages call each sample; equal where two samples are the same picture."""
    ids: list[str]
    """Each sample's name in its source, and behind a bar what tells its content from others'. A
    source is opened with nothing behind the bar; ``identified`` fills it, and makes them unique."""
    captions: list[tuple[str, ...]]
    """Alternative captions of each sample, each on one line; () where ``problems`` says why."""
    problems: list[str]
    """What is wrong with each sample's row; empty where nothing is."""
    rows: list[int]
    """Where ``store`` finds the picture of each sample."""
    store: PictureStore
    """Where the pictures lie."""
    recipes: tuple[Recipe, ...]
    """The ways in which samples are used."""
    recipe_of: list[int]
    """Which of ``recipes`` each sample follows."""
    masks: list[str] = field(default_factory=list[str])
    """Path of each sample's mask, empty where it has none; [] where no source names any."""
    has_masks: bool = False
    """Whether masks were asked for; a selection keeps it even if none of its samples has one."""
    sizes: list[Size] = field(default_factory=list[Size])
    """Of the upright pictures, in pixels; [] before ``verify``."""
    unread: tuple[Unread, ...] = ()
    """Files beside the pictures that nothing is made of."""
    notes: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many pictures were read in a way that their owner may want to know; {} before
    ``verify``. A selection keeps them."""
    decoded: Mapping[int, Decoded] = field(default_factory=dict[int, Decoded])
    """Pictures that are at hand already, by their rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def recipe(self, index: int) -> Recipe:
        """How one sample is used."""
        return self.recipes[self.recipe_of[index]]

    def read(self, index: int) -> Image.Image:
        """The picture of one sample, upright 8-bit RGB.

        Raises:
            BadSample: the picture cannot be read, or its row is at fault (no caption, a path
                outside the folder).
        """
        return self.decode(index).on("white")

    def decode(self, index: int) -> Decoded:
        """The picture of one sample, with its transparency and with notes on it.

        Raises:
            BadSample: as ``read``.
        """
        self._refuse_fault(index)
        if (at_hand := self.decoded.get(self.rows[index])) is not None:
            return at_hand
        return decode(self.store(self.rows[index]), self.names[index])

    def examine(self, index: int) -> Seen:
        """The size of one sample's picture and the notes on it, for less than ``decode`` takes.

        Raises:
            BadSample: as ``read``.
        """
        self._refuse_fault(index)
        if (at_hand := self.decoded.get(self.rows[index])) is not None:
            return (at_hand.image.height, at_hand.image.width), at_hand.notes
        return examine(self.store(self.rows[index]), self.names[index])

    def _refuse_fault(self, index: int) -> None:
        if self.problems[index]:
            raise BadSample(f"{self.names[index]}: {self.problems[index]}")

    def read_mask(self, index: int, size: Size | None = None) -> Image.Image | None:
        """The mask of one sample, as large as its picture.

        Args:
            index: of the sample.
            size: of its picture, where the caller knows it; it saves reading the picture.

        Returns:
            Mode L, white is trained on; None where the sample has no mask and all of it counts.

        Raises:
            BadSample: the mask cannot be read, or it is black everywhere.
        """
        if self.recipe(index).mask_from_alpha:
            return read_alpha(self.store(self.rows[index]), self.names[index])
        if not self.masks or not self.masks[index]:
            return None
        if size is None and self.sizes:
            size = self.sizes[index]
        if size is None:
            picture = self.read(index)
            size = picture.height, picture.width
        return read_mask(Path(self.masks[index]), size, f"{self.names[index]}: mask")

    def with_recipes(self, **changes: Any) -> Captioned:
        """The same samples with these fields of their recipes changed."""
        return replace(self, recipes=tuple(replace(one, **changes) for one in self.recipes))

    def select(self, indices: Sequence[int]) -> Captioned:
        """The samples at these indices, in this order."""

        def chosen(values: Sequence[Any]) -> list[Any]:
            return [values[index] for index in indices] if values else []

        return replace(
            self,
            names=chosen(self.names),
            ids=chosen(self.ids),
            captions=chosen(self.captions),
            problems=chosen(self.problems),
            rows=chosen(self.rows),
            recipe_of=chosen(self.recipe_of),
            masks=chosen(self.masks),
            sizes=chosen(self.sizes),
        )


def nothing(description: str, recipe: Recipe) -> Captioned:
    """No sample, for samples that lie in shards: how they are used, and where they come from."""
    return Captioned(
        description=description,
        names=[],
        ids=[],
        captions=[],
        problems=[],
        rows=[],
        store=Stores((), ()),
        recipes=(recipe,),
        recipe_of=[],
    )


@dataclass(frozen=True)
class Stores:
    """Several stores as one: the rows of store k begin at starts[k]."""

    stores: tuple[PictureStore, ...]
    starts: tuple[int, ...]

    def __call__(self, row: int) -> Path | bytes:
        k = bisect_right(self.starts, row) - 1
        return self.stores[k](row - self.starts[k])

    def origin(self, row: int) -> Origin | None:
        """Where the picture of a row comes from."""
        k = bisect_right(self.starts, row) - 1
        store = self.stores[k]
        return store.origin(row - self.starts[k]) if isinstance(store, Remembered) else None


def join(sources: Sequence[Captioned]) -> Captioned:
    """The samples of several sources, one source after the other.

    Raises:
        ValueError: no source.
    """
    if not sources:
        raise ValueError("there is nothing to join")
    if len(sources) == 1:
        return sources[0]
    room = [max(source.rows, default=-1) + 1 for source in sources]
    starts = (0, *accumulate(room))[:-1]
    firsts = (0, *accumulate(len(source.recipes) for source in sources))
    masked = any(source.masks for source in sources)
    return Captioned(
        description="\n".join(source.description for source in sources),
        names=[name for source in sources for name in source.names],
        ids=[one for source in sources for one in source.ids],
        captions=[captions for source in sources for captions in source.captions],
        problems=[problem for source in sources for problem in source.problems],
        rows=[
            start + row
            for start, source in zip(starts, sources, strict=True)
            for row in source.rows
        ],
        store=Stores(tuple(source.store for source in sources), starts),
        recipes=tuple(recipe for source in sources for recipe in source.recipes),
        recipe_of=[
            first + number
            for first, source in zip(firsts, sources, strict=False)
            for number in source.recipe_of
        ],
        masks=[
            mask for source in sources for mask in (source.masks or [""] * len(source)) if masked
        ],
        has_masks=any(source.has_masks for source in sources),
        sizes=[size for source in sources for size in source.sizes]
        if all(source.sizes for source in sources)
        else [],
        unread=tuple(unread for source in sources for unread in source.unread),
    )


@dataclass(frozen=True)
class BadReport:
    """One sample that was left out, and why."""

    name: str
    reason: str


def verify(
    source: Captioned,
    *,
    on_bad_sample: Literal["skip", "error"],
    num_threads: int,
    progress: bool = True,
    notes: Counter[str] | None = None,
) -> tuple[list[int], list[BadReport], list[Size]]:
    """Decodes every picture and mask once and tells the good samples from the bad.

    Args:
        source: what to check.
        on_bad_sample: ``error`` raises if any sample is bad, ``skip`` reports them.
        num_threads: that decode at a time, at least 1.
        progress: show a bar.
        notes: counts the notes on the good pictures.

    Returns:
        The indices of good samples, in order, a report on each of the others, and the sizes of
        the good samples' pictures.

    Raises:
        BadSample: under ``error``, with the first bad samples and their number.
        ValueError: under ``skip``, when no sample is left.
    """
    found = look(source, num_threads=num_threads, progress=progress)
    verdict = judged(source, found, on_bad_sample=on_bad_sample)
    if notes is not None:
        notes.update(noted(found))
    return verdict


def look(source: Captioned, *, num_threads: int, progress: bool = True) -> list[Seen | str]:
    """Examines every picture and mask: its size and notes, or what is wrong with the sample.

    Args:
        source: what to look at.
        num_threads: that decode at a time, at least 1.
        progress: show a bar.
    """
    executor = ThreadPoolExecutor(max_workers=num_threads)
    try:
        found = executor.map(lambda index: _seen_or_fault(source, index), range(len(source)))
        bar = Bar(found, "Checking pictures", len(source), disable=not progress, unit="picture")
        return list(bar)
    finally:
        executor.shutdown(cancel_futures=True)  # an interrupt need not wait for the rest


def noted(found: Sequence[Seen | str]) -> Counter[str]:
    """How often each note was made on a good picture."""
    return Counter(note for one in found if not isinstance(one, str) for note in one[1])


def judged(
    source: Captioned, found: Sequence[Seen | str], *, on_bad_sample: Literal["skip", "error"]
) -> tuple[list[int], list[BadReport], list[Size]]:
    """The second half of `verify`: what `look` found, told apart.

    Raises:
        BadSample: under ``error``, with the first bad samples and their number.
        UserError: under ``skip``, when no sample is left.
    """
    good = [index for index, one in enumerate(found) if not isinstance(one, str)]
    sizes = [one[0] for one in found if not isinstance(one, str)]
    bad = [
        BadReport(source.names[index], one)
        for index, one in enumerate(found)
        if isinstance(one, str)
    ]
    if bad and on_bad_sample == "error":
        raise BadSample(
            f"{len(bad)} of {len(source)} samples cannot be used (--on_bad_sample skip leaves "
            f"them out):\n{listing(bad)}"
        )
    if not good:
        raise UserError(f"no usable sample in {source.description}\n{listing(bad)}".rstrip())
    return good, bad, sizes


def split(
    source: Captioned, *, eval_fraction: float, seed: int, max_train_samples: int | None = None
) -> tuple[Captioned, Captioned | None]:
    """Holds samples out for evaluation, chosen by a hash of the seed and each sample's key.

    The choice depends neither on the order of the samples nor on when their files were written.
    Samples that are the same picture stay on the same side. Regularisation samples are never held
    out, and are not counted.

    Args:
        source: what to divide.
        eval_fraction: of the samples to hold out, in [0, 1); more than 0 holds out at least one.
        seed: of the choice.
        max_train_samples: keep only the first so many of the rest for training.

    Returns:
        The training samples and the held-out ones (None for a fraction of 0), both in order.

    Raises:
        ValueError: the fraction leaves nothing to train on.
    """
    eligible = [i for i in range(len(source)) if not source.recipe(i).is_regularisation]
    names: set[str] = set()
    if eval_fraction > 0.0:
        wanted = min(max(1, round(eval_fraction * len(eligible))), len(eligible) - 1)
        by_hash = sorted(eligible, key=lambda index: _draw(seed, source.ids[index]))
        names.update(source.names[index] for index in by_hash[: max(wanted, 0)])
    held_out = [index for index in eligible if source.names[index] in names]
    rest = [index for index in eligible if source.names[index] not in names]
    if eval_fraction > 0.0 and not (held_out and rest):
        raise UserError(f"--eval_fraction {eval_fraction} needs 2 pictures or more")
    regularisation = set(range(len(source))).difference(eligible)
    train = source.select(sorted(regularisation.union(rest[:max_train_samples])))
    return train, source.select(held_out) if held_out else None


def _draw(seed: int, sample_id: str) -> bytes:
    key = sample_id.rpartition("|")[0]
    return sha256(f"{seed}|{key}".encode("utf-8", "surrogateescape")).digest()


def _seen_or_fault(source: Captioned, index: int) -> Seen | str:
    """The size of a picture and the notes on it, or what is wrong with the sample."""
    try:
        size, notes = source.examine(index)
        source.read_mask(index, size)
    except BadSample as error:
        return str(error).removeprefix(f"{source.names[index]}: ")
    return size, notes


def told_notes(*sources: Captioned) -> list[str]:
    """What the screen says of the pictures that were read with a note, a line each."""
    return [f"  {count:,} pictures {note}" for note, count in _notes(sources).items()]


def seen(*sources: Captioned) -> dict[str, Any]:
    """What data_report.json says of files that are not read and of pictures read with a note."""
    # Both parts of one source know of the same files.
    unread = dict.fromkeys(one for source in sources for one in source.unread)
    return {"not_read": [asdict(one) for one in unread], "pictures_read": dict(_notes(sources))}


def _notes(sources: Sequence[Captioned]) -> Counter[str]:
    notes: Counter[str] = Counter()
    for source in sources:
        notes.update(source.notes)
    return notes


def listing(bad: Sequence[BadReport]) -> str:
    """The first of the samples that are bad, a line each, and how many more there are."""
    lines = [f"  {report.name}: {report.reason}" for report in bad[:_MAX_LISTED]]
    if len(bad) > _MAX_LISTED:
        lines.append(f"  and {len(bad) - _MAX_LISTED} more")
    return "\n".join(lines)
