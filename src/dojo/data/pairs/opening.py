"""Preference pairs found: rows of two labelled pictures or of a ranked list, in files or tables.

A row of two pictures is a list of two whose scores its label gives, so there is one way from a
row to its pairs.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.data.contents import MISSING, Content, Remembered, hashes
from dojo.data.pairs.columns import Columns, listed
from dojo.data.pairs.options import PairArgs
from dojo.data.pairs.pairs import Pair, Pairs
from dojo.data.sources.captioned import (
    BadReport,
    Captioned,
    PictureStore,
    Recipe,
    Stores,
    Unread,
    told_unread,
)
from dojo.data.sources.folders import Files, Folder, printable
from dojo.data.sources.metadata import METADATA_NAMES, file_path, read_metadata
from dojo.data.sources.opening import find
from dojo.data.sources.tables import Lists, Table, named_files, picture_column

if TYPE_CHECKING:
    import datasets

_UIDS = ("image_0_uid", "image_1_uid")  # Pick-a-Pic names its pictures


def open_pairs(args: PairArgs, root: Path | None = None, *, progress: bool = True) -> Pairs:
    """Finds preference pairs in a local folder or on the hub; decodes no picture.

    Ties are dropped and counted, unless ``--choice_model`` will choose; rows that are bad are kept
    with their problem, for `check_pairs` to report. Files are the same picture if they have the
    same path, pictures in tables if they have the same uid (Pick-a-Pic) or the same content.

    Args:
        root: folder of the caches, where it is remembered how the pictures of a table were told
            apart; None remembers nothing.
        progress: show a bar while they are.

    Raises:
        UserError: nothing usable is there, a column is missing, or a metadata file is broken.
    """
    found = find(args.location, args.pictures)
    if isinstance(found, Folder):
        rows, pictures, place, taken = _of_folder(found, args)
    else:
        rows, pictures, place, taken = _of_table(found, args, root, progress)
    pairs: list[Pair] = []
    bad: list[BadReport] = []
    num_ties = num_same = 0
    for row in rows:
        if row.problem:
            bad.append(BadReport(row.name, row.problem))
        for first, second in row.ranked(args.ranked_pairs):
            if row.pictures[first] == row.pictures[second]:
                num_same += 1
            elif row.scores[first] == row.scores[second] and args.choice_model is None:
                num_ties += 1
            else:
                winner, loser = row.pictures[first], row.pictures[second]
                pairs.append(Pair(winner, loser, row.caption, row.name))
    dropped = f"{num_ties:,} ties and {num_same:,} pairs of twice the same picture dropped"
    if not pairs and not bad:
        raise UserError(f"{place}: there is no pair with a preference; {dropped}")
    count = len({index for pair in pairs for index in pair[:2]})
    told = [f"{place}: {len(pairs):,} pairs of {count:,} pictures", *taken]
    told += [dropped] if num_ties or num_same else []
    return Pairs(
        description="; ".join(told),
        pictures=pictures,
        pairs=(),
        bad=bad,
        num_ties=num_ties,
        num_same=num_same,
    ).with_pairs(pairs)


@dataclass(frozen=True)
class _Row:
    """A row as a list of pictures with scores, of which higher ones are better."""

    name: str
    pictures: Sequence[int] = ()
    scores: Sequence[float] = ()
    caption: str = ""
    problem: str = ""

    def ranked(self, which: str) -> Iterator[tuple[int, int]]:
        """Places of the better and the other picture of each pair; ties as they stand."""
        order = sorted(range(len(self.scores)), key=lambda place: -self.scores[place])
        if which == "all" or len(order) < 2:
            return itertools.combinations(order, 2)
        return iter([(order[0], order[-1])])


_Found = tuple[list[_Row], Captioned, str, list[str]]  # rows, pictures, what and how it was read


def _source(
    args: PairArgs, names: list[str], ids: list[str], rows: list[int], store: PictureStore
) -> Captioned:
    count = len(rows)
    return Captioned(
        description=args.location,
        names=names,
        ids=ids,
        captions=[("",)] * count,
        problems=[""] * count,
        rows=rows,
        store=store,
        recipes=(Recipe.of(args.pictures),),
        recipe_of=[0] * count,
    )


# Files


def _of_folder(folder: Folder, args: PairArgs) -> _Found:
    if not folder.metadata:
        looked_for = (
            f"{folder.root}: no pairs found; looked for {', '.join(METADATA_NAMES)} (also in "
            f"{args.dataset_split}/), parquet or arrow files, and a folder written by save_to_disk"
        )
        raise UserError("; ".join([looked_for, *told_unread(folder.unread)]))
    metadata = folder.root / folder.metadata
    within = posixpath.dirname(folder.metadata)
    records = read_metadata(metadata)
    columns = Columns.of(
        str(metadata), list(dict.fromkeys(itertools.chain(*(one.fields for one in records)))), args
    )
    places: dict[str, int] = {}
    rows: list[_Row] = []
    for record in records:
        name = f"{metadata} {record.place}"
        try:
            if record.problem:
                raise ValueError(record.problem)
            paths = _paths(columns, folder.root, within, record.fields)
            if not all(path.startswith(folder.prefix) for path in paths):
                continue  # of another split
            scores = columns.scores_of(record.fields, len(paths))
            caption = columns.caption_of(record.fields)
            numbers = [places.setdefault(path, len(places)) for path in paths]
            rows.append(_Row(name, numbers, scores, caption))
        except ValueError as error:
            rows.append(_Row(name, problem=str(error)))
    pictures = _source(
        args,
        [printable(str(folder.root / path)) for path in places],
        [f"{printable(path)}|" for path in places],
        list(range(len(places))),
        Files(str(folder.root), list(places)),
    )
    unread = folder.unread
    if spare := sum(picture not in places for picture in folder.pictures):
        unread = (
            Unread(kind=f"pictures that {folder.metadata} does not name", count=spare),
            *unread,
        )
    taken = [*columns.taken, *told_unread(unread)]
    return rows, replace(pictures, unread=unread), str(metadata), taken


def _paths(columns: Columns, root: Path, within: str, fields: Mapping[str, object]) -> list[str]:
    """The files of a row's pictures, relative to the root.

    Raises:
        ValueError: a name is missing, or leads out of the folder.
    """
    cells = [fields.get(column) for column in columns.pictures]
    if columns.of_lists:
        cells = listed(cells[0], columns.pictures[0])
    paths: list[str] = []
    for cell in cells:
        path, problem = file_path(within, cell, root)
        if problem:
            raise ValueError(problem)
        paths.append(path)
    return paths


# Tables


def _of_table(
    dataset: datasets.Dataset, args: PairArgs, root: Path | None, progress: bool
) -> _Found:
    location, count = args.location, len(dataset)
    columns = Columns.of(location, dataset.column_names, args)
    cells = [
        picture_column(location, dataset, column, lists=columns.of_lists)
        for column in columns.pictures
    ]
    named = [
        named_files(some, column, location, args.pictures)
        for some, column in zip(cells, columns.pictures, strict=True)
    ]
    faults = dict(named[0][1])
    if columns.of_lists:
        lengths = _lengths(cells[0], columns.pictures[0])
        starts = list(itertools.accumulate(lengths, initial=0))
        members = [range(start, stop) for start, stop in itertools.pairwise(starts)]
        store = Lists(cells[0], columns.pictures[0], named[0][0], tuple(starts[:-1]))
        titles = [f"images[{k}]" for length in lengths for k in range(length)]
        row_of = [row for row, length in enumerate(lengths) for _ in range(length)]
    else:
        members = [range(row, 2 * count, count) for row in range(count)]
        stores = [
            Table(some, column, files)
            for some, column, (files, _) in zip(cells, columns.pictures, named, strict=True)
        ]
        store = Stores(tuple(stores), (0, count))
        faults |= {count + row: fault for row, fault in named[1][1].items()}
        titles = [column for column in columns.pictures for _ in range(count)]
        row_of = [*range(count), *range(count)]
    names = [f"{location} row {row} {title}" for row, title in zip(row_of, titles, strict=True)]
    ids = _uids(dataset, columns) or _hashes(store, names, root, progress)
    firsts: dict[str, int] = {}  # the first picture of each id
    for number, sample in enumerate(ids):
        firsts.setdefault(sample, number)
    places = {sample: place for place, sample in enumerate(firsts)}
    kept = list(firsts.values())
    pictures = _source(args, [names[number] for number in kept], list(firsts), kept, store)
    rows: list[_Row] = []
    cells_of_rows = zip(*(dataset[name][:] for name in columns.others), strict=True)
    for row, values in enumerate(cells_of_rows):
        fields = dict(zip(columns.others, values, strict=True))
        name = f"{location} row {row}"
        try:
            for number in members[row]:
                if number in faults:
                    raise ValueError(faults[number])
            scores = columns.scores_of(fields, len(members[row]))
            mine = [places[ids[number]] for number in members[row]]
            rows.append(_Row(name, mine, scores, columns.caption_of(fields)))
        except ValueError as error:
            rows.append(_Row(name, problem=str(error)))
    return rows, pictures, location, columns.taken


def _lengths(lists: datasets.Dataset, column: str) -> list[int]:
    """How many pictures each row holds; their content is not read."""
    import pyarrow.compute

    found: list[int] = []
    for table in lists.with_format("arrow").iter(1000):
        counts = pyarrow.compute.list_value_length(table[column])  # pyright: ignore
        found += [count or 0 for count in counts.to_pylist()]
    return found


def _uids(dataset: datasets.Dataset, columns: Columns) -> list[str] | None:
    """Ids from the names that Pick-a-Pic gives its pictures, first all of one column."""
    if columns.of_lists or not set(_UIDS) <= set(dataset.column_names):
        return None
    uids = [uid for column in _UIDS for uid in dataset[column][:]]
    return [f"uid {uid}|" for uid in uids] if all(uids) else None


def _hashes(
    store: PictureStore, names: Sequence[str], root: Path | None, progress: bool
) -> list[str]:
    """Ids from the pictures' content; what cannot be read has an id of its own."""
    contents = [
        Content(
            store.origin(number) if isinstance(store, Remembered) else None, partial(store, number)
        )
        for number in range(len(names))
    ]
    found = hashes(contents, root, progress=progress)
    nothing = (MISSING, hashlib.blake2b(digest_size=16).hexdigest())
    return [
        f"{name}|empty" if one in nothing else f"content|{one}"
        for name, one in zip(names, found, strict=True)
    ]
