"""Captioned pictures in data sets of the datasets library: from the hub, parquet, arrow, disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.data.columns import caption_column, clean_captions, one_line, shown, spare_columns
from dojo.data.options import DataArgs
from dojo.data.sources import Captioned, Recipe

if TYPE_CHECKING:
    import datasets


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
            location, args.dataset_config_name, split=args.dataset_split, cache_dir=args.cache_dir
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{location}: neither a local folder nor a data set that can be loaded, split "
            f"{args.dataset_split!r}: {error}"
        ) from error


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
    fingerprint = f"{dataset._fingerprint}{'+alpha' if args.mask_from_alpha else ''}"
    pictures = picture_column(location, dataset, image_column, " (--image_column)")
    rows = list(range(len(dataset)))
    return Captioned(
        description=f"{location}: pictures from column {image_column!r}, {taken}"
        + (f"; not used: {', '.join(unused)}" if unused else ""),
        names=[f"{location} row {row}" for row in rows],
        ids=[f"row {row}|{fingerprint}" for row in rows],
        captions=[caption for caption, _ in captions],
        problems=[problem for _, problem in captions],
        rows=rows,
        store=Table(pictures, image_column),
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

    def __call__(self, row: int) -> Path | bytes:
        return file_of(self.dataset[row][self.column])


def file_of(cell: Any) -> Path | bytes:
    """The file that a cell holds or names."""
    if isinstance(cell, dict):
        path = cell.get("path")
        cell = cell["bytes"] or (Path(path) if path else None)
    return cell or b""  # no picture reads as an empty file


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
    """Whether a column holds the bytes of files, as tables not written by datasets have them."""
    import datasets

    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(content, datasets.Value) and content.dtype in ("binary", "large_binary")
