"""Opens what the options name as training data: one folder or hub id, or a list of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.data.images import has_alpha
from dojo.data.options import DataArgs
from dojo.data.sources.captioned import Captioned, join
from dojo.data.sources.config import args_for, read_config
from dojo.data.sources.folders import Folder, folder_source, scan
from dojo.data.sources.tables import SAVED, load_dataset, load_saved, table_source
from dojo.data.streams.places import is_streamed

if TYPE_CHECKING:
    import datasets


def open_training(args: DataArgs) -> Captioned:
    """The samples to train on: of ``args.location``, or of all folders of ``args.data_config``.

    Raises:
        UserError: as ``open_source``; the data_config is wrong.
    """
    if args.data_config is None:
        return open_source(args.location, args)
    sources: list[Captioned] = []
    for entry in read_config(args.data_config, args):
        try:
            source = open_source(entry.location, entry.args)
        except UserError as error:
            raise UserError(f"{entry.place}: {error}") from error
        source = source.with_recipes(weight=entry.weight, is_regularisation=entry.is_regularisation)
        sources.append(replace(source, description=f"{source.description}{_uses(source)}"))
    return join(sources)


def _uses(source: Captioned) -> str:
    """How the samples of an entry are used, where that is not the ordinary way."""
    recipe = source.recipes[0]
    told = [f"repeats {recipe.repeats}"] if recipe.repeats != 1 else []
    told += [f"weight {recipe.weight:g}"] if recipe.weight != 1.0 else []
    told += ["regularisation"] if recipe.is_regularisation else []
    return f"; used with {', '.join(told)}" if told else ""


def open_evaluation(args: DataArgs) -> Captioned | None:
    """The samples of ``--eval_data_dir``, captioned as the flags say; None without it.

    ``--mask_dir`` belongs to the training pictures, so these have no masks.

    Raises:
        UserError: as ``open_source``.
    """
    if not args.eval_data_dir:
        return None
    unmasked = {"mask_dir": "", "mask_from_alpha": False}
    return open_source(args.eval_data_dir, args_for(args, args.eval_data_dir, unmasked))


def open_source(location: str, args: DataArgs) -> Captioned:
    """Finds captioned pictures in a local folder or on the hub; reads captions, not pictures.

    ``args`` gives everything but the place, so that several places can be opened alike. Samples
    that cannot be used are kept with their problem, for ``verify`` to report.

    Raises:
        UserError: nothing usable is there, a column is missing, a metadata file is broken, or
            masks were asked for and there are none.
    """
    source = _open(location, args)
    if args.mask_from_alpha:
        pictures = (source.store(row) for row in source.rows)
        if not any(has_alpha(picture) for picture in pictures):
            raise UserError(f"{location}: --mask_from_alpha, but no picture has transparency")
    return source


def _open(location: str, args: DataArgs) -> Captioned:
    found = find(location, args)
    if isinstance(found, Folder):
        return folder_source(found, args)
    return table_source(location, found, args)


def find(location: str, args: DataArgs) -> Folder | datasets.Dataset:
    """What lies in a local folder or on the hub: a folder of pictures or a table of them.

    Raises:
        UserError: nothing is there, or not the split.
    """
    root = Path(location).expanduser()
    if is_streamed(location):
        raise UserError(
            f"{location}: shards stand alone, as --dataset_name or --train_data_dir of the scripts "
            "that train on captioned pictures (full, LoRA, DreamBooth), not beside others, for "
            "evaluation or as pairs: unpack them, or name a folder or a hub id"
        )
    if not root.exists():
        if location.startswith((".", "~", "/")) or location.count("/") > 1:
            raise UserError(f"{location}: there is no such folder")
        return load_dataset(location, args)
    if not root.is_dir():
        raise UserError(f"{location}: a file, where a folder or a hub id is expected")
    if any((root / marker).is_file() for marker in SAVED):
        return load_saved(root, args)
    folder = scan(root, args)
    from_files = args.caption_strategy in ("sidecar", "filename", "folder")
    if folder.has_tables and not (folder.metadata_files or folder.sidecars or from_files):
        return load_dataset(str(root), args)
    if not folder.prefix and args.dataset_split != "train":
        raise UserError(f"{location}: --dataset_split names no folder {args.dataset_split!r} here")
    return folder
