"""Captioned pictures in data sets of the datasets library: from the hub, parquet, arrow, disk."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.data.contents import Origin, file_origin
from dojo.data.options import DataArgs
from dojo.data.shards import digest
from dojo.data.sources.captioned import Captioned, Recipe
from dojo.data.sources.columns import caption_column, clean_captions, one_line, shown, spare_columns
from dojo.data.sources.metadata import file_path

if TYPE_CHECKING:
    import datasets

SAVED = ("state.json", "dataset_dict.json")
"""Files by which a folder that save_to_disk wrote is known."""


def load_saved(root: Path, args: DataArgs) -> datasets.Dataset:
    """The split of a folder that save_to_disk wrote.

    Raises:
        UserError: it cannot be read, or has no such split.
    """
    import datasets  # takes seconds, and folders of pictures do without

    try:
        loaded = datasets.load_from_disk(str(root))
    except (OSError, ValueError) as error:
        raise UserError(f"{root}: save_to_disk's folder cannot be read: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if args.dataset_split not in loaded:
        raise UserError(
            f"{root}: no split {args.dataset_split!r}; it has {shown(map(str, loaded))} "
            "(--dataset_split)"
        )
    return loaded[args.dataset_split]


def load_dataset(location: str, args: DataArgs) -> datasets.Dataset:
    """The split of a hub id, or of a folder of parquet or arrow files.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(
            location,
            args.dataset_config_name,
            split=args.dataset_split,
            cache_dir=args.cache_dir,
            **(_tables_alone(Path(location), args) if Path(location).is_dir() else {}),
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{location}: neither a local folder nor a data set that can be loaded, split "
            f"{args.dataset_split!r}: {error}"
        ) from error


def _tables_alone(root: Path, args: DataArgs) -> dict[str, Any]:
    """The tables of a folder by name, where datasets would take it for a folder of pictures.

    It takes what there are most of; pictures that a table names are more than the tables.
    """
    for suffix in ("parquet", "arrow"):
        found = (path.relative_to(root) for path in root.rglob(f"*.{suffix}"))
        visible = (path for path in found if not any(part[0] == "." for part in path.parts))
        tables = sorted(str(root / path) for path in visible)
        if tables and type(_builder(root, args)).__name__.lower() not in ("parquet", "arrow"):
            return {"data_files": {"train": tables}}
    return {}


def _builder(root: Path, args: DataArgs, **options: Any) -> datasets.DatasetBuilder:
    """What datasets would read a folder with; only the names of files are looked at."""
    import datasets

    return datasets.load_dataset_builder(
        str(root), args.dataset_config_name, cache_dir=args.cache_dir, **options
    )


def table_source(location: str, dataset: datasets.Dataset, args: DataArgs) -> Captioned:
    """The rows of a data set as samples.

    Raises:
        UserError: a column is missing, holds no pictures, or a table cannot give what is asked for.
    """
    columns = dataset.column_names
    image_column = args.image_column or "image"
    if image_column not in columns:
        raise UserError(
            f"{location} has no column {image_column!r}; it has {shown(columns)} (--image_column)"
        )
    if args.repeats_from_folder_names:
        raise UserError(
            f"{location}: --repeats_from_folder_names needs pictures in files, and these are rows "
            "of a table"
        )
    if args.mask_dir:
        raise UserError(
            f"{location}: --mask_dir needs pictures in files, and these are rows of a table; "
            "--mask_from_alpha works"
        )
    captions, taken, unused = _captions(location, dataset, args)
    pictures = picture_column(location, dataset, image_column, " (--image_column)")
    files, faults = named_files(pictures, image_column, location, args)
    rows = list(range(len(dataset)))
    return Captioned(
        description=f"{location}: pictures from column {image_column!r}, {taken}"
        + (f"; not used: {', '.join(unused)}" if unused else ""),
        names=[files.get(row) or f"{location} row {row}" for row in rows],
        ids=[f"row {row}|" for row in rows],
        captions=[caption for caption, _ in captions],
        problems=[faults.get(row) or problem for row, (_, problem) in enumerate(captions)],
        rows=rows,
        store=Table(pictures, image_column, files),
        recipes=(Recipe.of(args),),
        recipe_of=[0] * len(rows),
        has_masks=args.mask_from_alpha,
    )


def picture_column(
    location: str, dataset: datasets.Dataset, column: str, hint: str = "", *, lists: bool = False
) -> datasets.Dataset:
    """A column of pictures by itself; its cells are the contents of files, see `file_of`.

    Args:
        lists: its cells are lists of them.
        hint: what to add to an error message: the flag that chose the column.

    Raises:
        UserError: the column holds something else.
    """
    import datasets

    pictures = dataset.select_columns([column])
    feature = pictures.features[column]
    content = feature.feature if lists and isinstance(feature, datasets.List) else feature
    if lists == isinstance(feature, datasets.List) and isinstance(content, datasets.Image):
        # Not decoded by datasets: every picture goes through the same read_image.
        files = datasets.Image(decode=False)
        return pictures.cast_column(column, datasets.List(files) if lists else files)
    if lists != isinstance(feature, datasets.List) or not _holds_files(content):
        raise UserError(f"{location}: column {column!r} holds no pictures but {feature}{hint}")
    return pictures


@dataclass(frozen=True)
class Table:
    """The pictures in a column of a data set."""

    dataset: datasets.Dataset
    column: str
    files: Mapping[int, str]
    """Of the rows that name a file instead of holding its content."""

    def __call__(self, row: int) -> Path | bytes:
        return Path(self.files[row]) if row in self.files else bytes_of(self.cell(row))

    def cell(self, row: int) -> Any:
        """The cell that holds or names a picture."""
        return self.dataset[row][self.column]

    def origin(self, row: int) -> Origin | None:
        """What would tell that the picture of a row has changed."""
        if row in self.files:
            folder, name = os.path.split(self.files[row])
            return file_origin(folder, name)
        home, state, changed = self._table
        return Origin(home, f"{self.column} {row}", state, changed) if home else None

    @cached_property
    def _table(self) -> tuple[str, tuple[int | str, ...], float]:
        """Of the whole table: home, state and time of change; no home where it is in memory."""
        paths = [Path(file["filename"]) for file in self.dataset.cache_files]
        origins = [file_origin(str(path.parent), path.name) for path in paths]
        found = [one for one in origins if one is not None]
        if not found or len(found) < len(origins):
            return "", (), 0.0
        # The fingerprint is that of the selection from the files, within this version of datasets.
        words = [self.dataset._fingerprint, *(str((one.key, *one.state)) for one in found)]
        return found[0].home, (digest(words),), max(one.changed for one in found)


@dataclass(frozen=True)
class Lists(Table):
    """The pictures of a column of lists; those of row r are numbered from starts[r] on."""

    starts: tuple[int, ...]

    def cell(self, row: int) -> Any:
        """The cell that holds or names a picture."""
        place = bisect_right(self.starts, row) - 1
        return self.dataset[place][self.column][row - self.starts[place]]


def bytes_of(cell: Any) -> bytes:
    """The content of the file that a cell holds; no picture reads as an empty file."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else b""


def named_files(
    pictures: datasets.Dataset, column: str, location: str, args: DataArgs
) -> tuple[dict[int, str], dict[int, str]]:
    """The files that cells name instead of holding them, and what is wrong with such names.

    A relative path begins at the folder of the table that it stands in, never at the folder that
    the program was started from. Absolute paths are for the datasets library alone, which keeps
    there what it downloaded.

    Args:
        pictures: with the column of pictures alone, or of lists of them.
        location: of the data set.

    Returns:
        Paths and problems by the number of the picture, lists being counted through.
    """
    files: dict[int, str] = {}
    problems: dict[int, str] = {}
    names = _names(pictures, column)
    if not names:
        return files, problems
    own = [Path(one).resolve() for one in _library_folders(args)]
    root = Path(location).expanduser()
    base = _base(root, pictures, args) if root.is_dir() else None
    for number, name in names.items():
        if any(Path(name).is_absolute() and Path(name).is_relative_to(one) for one in own):
            files[number] = name
            continue
        path, problem = file_path("", name, base)
        if base is None and not problem:
            problem = (
                f"{name!r} is a file beside the table, and where that lies is not known; put the "
                "tables into one folder, or the pictures into the table"
            )
        if problem or base is None:
            problems[number] = problem
        else:
            files[number] = str(base / path)
    return files, problems


def _names(pictures: datasets.Dataset, column: str) -> dict[int, str]:
    """The names of files in cells without content, by number; no content is read or copied."""
    found: dict[int, str] = {}
    count = 0
    for table in pictures.with_format("arrow").iter(1000):
        for chunk in table[column].chunks:  # pyright: ignore
            names = _names_in(chunk)
            found |= {count + place: name for place, name in enumerate(names) if name}
            count += len(names)
    return found


def _names_in(cells: Any) -> list[str | None]:
    """The names of files in an array of cells or of lists of them; None where there is content."""
    from pyarrow import compute, types

    if types.is_list(cells.type) or types.is_large_list(cells.type):
        return _names_in(cells.flatten())
    if types.is_string(cells.type) or types.is_large_string(cells.type):
        return cells.to_pylist()
    fields = [field.name for field in cells.type] if types.is_struct(cells.type) else []
    if "path" not in fields:
        return [None] * len(cells)
    names: list[str | None] = cells.field("path").to_pylist()
    if "bytes" not in fields or types.is_null(cells.field("bytes").type):
        return names
    sizes: list[int | None] = compute.binary_length(cells.field("bytes")).to_pylist()  # pyright: ignore
    return [None if size else name for name, size in zip(names, sizes, strict=True)]


def _library_folders(args: DataArgs) -> list[str]:
    """Where datasets keeps what it has downloaded and unpacked."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return [str(one) for one in (*folders, args.cache_dir) if one]


def _base(root: Path, pictures: datasets.Dataset, args: DataArgs) -> Path | None:
    """The folder that holds the tables of a split; None where there are several."""
    if any((root / marker).is_file() for marker in SAVED):
        files = [str(one["filename"]) for one in pictures.cache_files]
    else:
        builder = _builder(root, args, **_tables_alone(root, args))
        split = re.sub(r"\[.*", "", args.dataset_split)
        files = [str(one) for one in (builder.config.data_files or {}).get(split, ())]
    folders = {Path(one).parent for one in files}
    return folders.pop() if len(folders) == 1 else None


def _captions(
    location: str, dataset: datasets.Dataset, args: DataArgs
) -> tuple[list[tuple[tuple[str, ...], str]], str, list[str]]:
    """Captions and problem of each row, where they come from, and what is not used."""
    if args.caption_strategy in ("sidecar", "filename", "folder"):
        raise UserError(
            f"{location}: --caption_strategy {args.caption_strategy} needs pictures in files, and "
            "these are rows of a table; column and instance work"
        )
    if args.instance_prompt:
        prompt = one_line(args.instance_prompt)
        taken = f"one caption for all: {prompt!r} (--instance_prompt)"
        return [((prompt,), "")] * len(dataset), taken, spare_columns(dataset.column_names, None)
    column = caption_column(location, dataset.column_names, args.caption_column)
    taken = f"captions from column {column!r}"
    spare = spare_columns(dataset.column_names, column)
    return [clean_captions(cell) for cell in dataset[column][:]], taken, spare


def _holds_files(feature: Any) -> bool:
    """Whether a column holds the bytes of files, or names them, as other programs write tables."""
    import datasets

    if isinstance(feature, dict):
        content, path = feature.get("bytes"), feature.get("path")
        return any(_holds_files(one) for one in (content, path) if one is not None)
    kinds = ("binary", "large_binary", "string", "large_string")
    return isinstance(feature, datasets.Value) and feature.dtype in kinds
