"""A folder of latents and embeddings that stands for its pictures and captions, wherever it lies.

`python -m dojo.data cache` writes it. It holds

- `made.json`: what the numbers depend on, which who trains from the folder compares; how they are
  made and of what, which who goes on with the folder compares;
- files `JOB-HEIGHTxWIDTH.safetensors` of rows of one size: `mean` and `std`
  [rows, crop, mirrored, C, h, w], `mask` where there are masks, `text.NAME` [texts, ...] for every
  embedding, and in the header which rows there are and which texts;
- `texts.safetensors`: embeddings of the empty caption and of prompts;
- `JOB.json`: a part of the work that is done; `index.json`: all of it, when nothing is missing.

A file is known by a hash of its content: one that was made anew elsewhere is fetched anew, and
one that has another content is not read. What was found right is read once and remembered.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dojo.cli import UserError
from dojo.data.contents import file_hashes
from dojo.data.dataset import Dataset
from dojo.data.images import Size
from dojo.data.options import DataArgs
from dojo.data.order import Draw
from dojo.data.samples import Batch, Pictures
from dojo.data.shards import digest
from dojo.data.sources.captioned import BadReport, Captioned, Recipe
from dojo.data.sources.captions import CaptionArgs
from dojo.data.streams import places
from dojo.data.streams.disk import Disk
from dojo.data.streams.places import MADE, Place
from dojo.data.streams.rows import Rows
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
TEXTS = "texts.safetensors"
PREFIX = "text."
FORMAT = 2  # to be raised when a folder would be read otherwise


@dataclass(frozen=True, kw_only=True)
class MadeFile:
    """Rows of one size."""

    name: str
    rows: int
    size: Size
    """(height, width) of the pictures, in pixels."""
    num_bytes: int
    digest: str
    """Of its content."""


@dataclass(frozen=True, kw_only=True)
class MadeWords:
    """The file of texts that are no rows' captions."""

    texts: list[str]
    num_bytes: int
    digest: str
    """Of its content."""


@dataclass(frozen=True, kw_only=True)
class MadeRow:
    """What the header of a file says of a row."""

    name: str
    id: str
    """What random crops of the picture are drawn from."""
    captions: list[str]
    original: Size
    """(height, width) of the picture in its file, in pixels."""


class Opened:
    """One file of the folder; its numbers are read row by row."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: it is damaged.
        """
        self.path = path
        try:
            self._stat = os.stat(path)
            self._file = safe_open(path, framework="pt").__enter__()
            told: dict[str, Any] = json.loads((self._file.metadata() or {})["made"])
            self.rows = [MadeRow(**row) for row in told["rows"]]
            self.texts = {text: place for place, text in enumerate(told["texts"])}
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise _damaged(path, error) from error

    @property
    def is_gone(self) -> bool:
        """Whether the file has no name any more, and goes when nobody reads it."""
        try:
            return not os.path.samestat(self._stat, os.stat(self.path))
        except FileNotFoundError:
            return True

    def latents(self, row: int, crop: int, flip: bool) -> dict[str, Tensor]:
        """One view of a row: `mean`, `std` and, where there are masks, `mask`."""
        names = [name for name in self._names if not name.startswith(PREFIX)]
        return {name: self._part(name, (row, crop, int(flip))) for name in names}

    def embeds(self, text: str) -> dict[str, Tensor]:
        """The embeddings of a text, by name.

        Raises:
            UserError: the file does not hold it.
        """
        if text not in self.texts:
            raise UserError(f"{self.path.name} does not hold the embeddings of {text!r}")
        names = [name for name in self._names if name.startswith(PREFIX)]
        place = (self.texts[text],)
        return {name.removeprefix(PREFIX): self._part(name, place) for name in names}

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self._file.keys())

    def _part(self, name: str, place: tuple[int, ...]) -> Tensor:
        try:
            return self._file.get_slice(name)[place]
        except (OSError, SafetensorError, IndexError) as error:
            raise _damaged(self.path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}, a file of a folder that python -m dojo.data cache wrote, cannot be read "
        f"({error}): the command that wrote the folder makes it anew when it is given again"
    )


@dataclass
class Made:
    """The folder, opened; pickles small, holds no numbers."""

    location: str
    settings: dict[str, Any]
    """What the numbers depend on."""
    source: str
    """What they were made from, in words."""
    samples: str
    """Tells the pictures and captions that it was made from."""
    files: tuple[MadeFile, ...]
    prompts: MadeWords
    left_out: list[BadReport]
    disk: Disk
    window: int
    limit: int | None = None
    """Rows that are used, from the first on; None is all."""
    _open: OrderedDict[int, Opened] = field(default_factory=OrderedDict[int, Opened], repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        total = sum(file.rows for file in self.files)
        return total if self.limit is None else min(total, self.limit)

    @property
    def is_remote(self) -> bool:
        """Whether the files have to be fetched."""
        return "://" in self.location

    @property
    def places(self) -> list[Place]:
        """Where the files lie."""
        return [self._place(file.name, file) for file in self.files]

    @property
    def places_by_size(self) -> list[list[Place]]:
        """The same for each size of pictures: those are read beside each other."""
        found: dict[Size, list[Place]] = {}
        for file, place in zip(self.files, self.places, strict=True):
            found.setdefault(file.size, []).append(place)
        return list(found.values())

    def _place(self, name: str, file: MadeFile | MadeWords) -> Place:
        root = self.location if self.is_remote else str(Path(self.location).expanduser())
        return Place(f"{root.rstrip('/')}/{name}", name, file.num_bytes, file.digest)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of each file's first row."""
        return tuple(accumulate((file.rows for file in self.files), initial=0))[:-1]

    @property
    def description(self) -> str:
        """Where the samples come from, for the screen."""
        size = sum(file.num_bytes for file in self.files) / 2**30
        return (
            f"{self.location}: latents and embeddings of {len(self):,} rows in "
            f"{len(self.files):,} files ({size:.2f} GiB), made from {self.source}"
        )

    @property
    def words(self) -> list[object]:
        """What tells these data from others, wherever they lie."""
        files = [(file.name, file.rows, file.size) for file in self.files]
        return [files, self.settings, self.samples, len(self), self.window]

    def rounds(self) -> dict[Size, Rows]:
        """The rows of each size, to be put in order."""
        left = len(self)
        some: dict[Size, list[tuple[int, int]]] = {}
        for start, file in zip(self.starts, self.files, strict=True):
            if used := min(file.rows, left):
                some.setdefault(file.size, []).append((start, used))
            left -= used
        return {
            size: Rows(tuple(a for a, _ in pairs), tuple(b for _, b in pairs), self.window)
            for size, pairs in some.items()
        }

    def where(self, index: int) -> tuple[int, int]:
        """The file of a row, and its place there."""
        file = bisect_right(self.starts, index) - 1
        return file, index - self.starts[file]

    def bring(self, shard: int) -> None:
        """Sees to it that a file is on the disk."""
        if self.is_remote:
            self._at_hand(self._place(self.files[shard].name, self.files[shard]))

    def fetch(self, shard: int) -> Opened:
        """A file, open.

        Raises:
            UserError: it cannot be fetched, or is damaged.
        """
        if shard not in self._open:
            opened = self._opened(self._place(self.files[shard].name, self.files[shard]))
            for gone in [one for one, other in self._open.items() if other.is_gone]:
                del self._open[gone]  # it takes room on the disk until it is closed
            self._open[shard] = opened
            while len(self._open) > 2 * self.window * len({one.size for one in self.files}):
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def texts(self) -> Opened:
        """The empty caption and the prompts that the folder was made with."""
        return self._opened(self._place(TEXTS, self.prompts))

    def _opened(self, place: Place) -> Opened:
        try:
            return self._whole(place)
        except UserError:
            if not place.is_remote:
                raise
        self.disk.drop(self._key(place))  # damaged on our disk, or gone again
        return self._whole(place)

    def _whole(self, place: Place) -> Opened:
        """A file, open, with the content that was written.

        Raises:
            UserError: it has another.
        """
        opened = Opened(self._at_hand(place))
        if file_hashes([opened.path], self.disk.folder) != [place.version]:
            raise _damaged(opened.path, ValueError("its content is not what was written"))
        return opened

    def _at_hand(self, place: Place) -> Path:
        if not place.is_remote:
            return Path(place.path)
        fetch = partial(places.fetch, place.path)
        return self.disk.hold(self._key(place), place.size, fetch)

    def _key(self, place: Place) -> str:
        return f"{Path(place.name).stem}-{digest([place.path, place.version])[:16]}"


def is_made(location: str) -> bool:
    """Whether a folder was written by `python -m dojo.data cache`."""
    if any(letter in location for letter in "*?[{") or location.endswith(places.SUFFIXES):
        return False
    return places.exists(f"{location.rstrip('/')}/{MADE}")


def open_made(location: str, disk: Disk, window: int, limit: int | None) -> Made:
    """Opens such a folder; no file of rows is read.

    Raises:
        UserError: it is not whole, or was written by another version.
    """
    root = location.rstrip("/")
    settings = _read(f"{root}/{MADE}")
    if settings.get("format") != FORMAT:
        raise UserError(
            f"{location}: {MADE} is of format {settings.get('format')}, and {FORMAT} is read here: "
            "make the folder again"
        )
    if not places.exists(f"{root}/{INDEX}"):
        raise UserError(
            f"{location}: {INDEX} is missing, so the folder is not whole: give the command that "
            "began it again, it goes on where it stood"
        )
    index = _read(f"{root}/{INDEX}")
    if "://" in location:
        disk.open()
    return Made(
        location=location,
        settings=settings["settings"],
        source=index["source"],
        samples=settings["samples"],
        files=tuple(MadeFile(**{**one, "size": tuple(one["size"])}) for one in index["files"]),
        prompts=MadeWords(**index["texts"]),
        left_out=[BadReport(**one) for one in index["left_out"]],
        disk=disk,
        window=window,
        limit=limit,
    )


def _read(path: str) -> dict[str, Any]:
    try:
        table = json.loads(places.read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} is damaged: it holds no table")
    return table


class MadeTexts:
    """Looks up the embeddings of the texts that a folder holds beside its rows."""

    def __init__(self, made: Made) -> None:
        self._opened = made.texts()

    def __contains__(self, text: str) -> bool:
        return text in self._opened.texts

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions [B] -> tensors [B, ...]."""
        rows = [self._opened.embeds(caption) for caption in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class MadeRows(Dataset[Batch]):
    """The folder's rows: latents in place of pixels, and the embeddings of their captions."""

    def __init__(self, made: Made, data: DataArgs, captions: CaptionArgs, *, seed: int) -> None:
        self.made = made
        self.data = data
        self.captions = captions
        self.seed = seed
        self.recipe = Recipe.of(data)

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, draw: Draw) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        shard, row = self.made.where(draw.index)
        opened = self.made.fetch(shard)
        pictures = self._pictures(opened.rows[row], opened.path.name, row)
        here = Draw(0, draw.place, draw.size)
        crop, flip = pictures.view(here)
        told = pictures.row(here)
        return {
            **told,
            **pictures.geometry(0, draw.size, (pictures.anchor(0, crop), flip)),
            **opened.latents(row, crop, flip),
            **opened.embeds(told["caption"]),
        }

    def _pictures(self, row: MadeRow, file: str, place: int) -> Pictures:
        """The row as a picture that is not read."""
        source = Captioned(
            description=file,
            names=[row.name],
            ids=[row.id],
            captions=[tuple(row.captions)],
            problems=[""],
            rows=[place],
            store=_no_picture,
            recipes=(self.recipe,),
            recipe_of=[0],
            sizes=[(row.original[0], row.original[1])],
        )
        return Pictures(source, self.data, self.captions, seed=self.seed)


def _no_picture(row: int) -> bytes:
    raise AssertionError(f"row {row} has latents and no picture")


# -- writing ------------------------------------------------------------------------------------


def header(rows: Sequence[MadeRow], texts: Sequence[str]) -> dict[str, str]:
    """What the header of a file says of its rows and texts."""
    told = {"rows": [asdict(row) for row in rows], "texts": list(texts)}
    return {"made": json.dumps(told, ensure_ascii=False)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that are not as they were, in words; those missing from `now` do not count."""
    return [
        f"{name} was {then.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if then.get(name) != value
    ]
