"""Folders of pictures: captions from metadata, sidecar files, file names, or one for all; masks."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dojo.cli import UserError
from dojo.data.columns import (
    CAPTION_COLUMNS,
    caption_column,
    clean_captions,
    one_line,
    spare_columns,
)
from dojo.data.contents import Origin, file_origin
from dojo.data.images import PICTURE_SUFFIXES
from dojo.data.metadata import METADATA_NAMES, Record, file_column, file_path, read_metadata
from dojo.data.options import DataArgs
from dojo.data.sources import Captioned, Recipe

_TABLE_SUFFIXES = (".parquet", ".arrow")
_COUNTER = re.compile(r"(\s+\d+)?(\s*[(（]\d+[)）])?$")


@dataclass(frozen=True)
class Folder:
    """What lies in a folder. Paths are relative to its root."""

    root: Path
    prefix: str
    """Sub-folder of the split with a slash at its end; empty where there is none."""
    pictures: list[str]
    """Of the split."""
    metadata: str | None
    sidecars: set[str]
    has_tables: bool
    """Whether there are parquet or arrow files that are no metadata."""


def scan(root: Path, args: DataArgs) -> Folder:
    """Lists a folder; hidden files and the files in ``--mask_dir`` are passed over.

    Raises:
        UserError: several metadata files, or ``--mask_dir`` is the folder itself.
    """
    files = _visible_files(root)
    if args.mask_dir:
        masks = Path(args.mask_dir).expanduser().resolve()
        if masks == root.resolve():
            raise UserError(f"--mask_dir {args.mask_dir} is the folder of the pictures")
        if masks.is_relative_to(root.resolve()):
            within = f"{masks.relative_to(root.resolve()).as_posix()}/"
            files = [file for file in files if not file.startswith(within)]
    prefix = f"{args.dataset_split}/" if (root / args.dataset_split).is_dir() else ""
    pictures = [file for file in files if Path(file).suffix.lower() in PICTURE_SUFFIXES]
    pictures = [file for file in pictures if file.startswith(prefix)]
    tables = (Path(file) for file in files if file.endswith(_TABLE_SUFFIXES))
    return Folder(
        root=root,
        prefix=prefix,
        pictures=pictures,
        metadata=_find_metadata(root, files, prefix),
        sidecars={_sidecar(picture) for picture in pictures}.intersection(files),
        has_tables=any(table.stem != "metadata" for table in tables),
    )


def folder_source(folder: Folder, args: DataArgs) -> Captioned:
    """The pictures of a folder as samples, captioned as ``--caption_strategy`` says.

    Raises:
        UserError: there are no pictures or no captions, metadata is broken, or masks are missing.
    """
    if not folder.metadata and not folder.pictures:
        raise UserError(
            f"{folder.root}: no data found; looked for {', '.join(METADATA_NAMES)} (also in "
            f"{args.dataset_split}/), pictures, parquet or arrow files, and a folder written by "
            "save_to_disk"
        )
    may_need_metadata = args.caption_strategy in ("auto", "column") and not args.instance_prompt
    metadata = _Metadata.read(folder) if folder.metadata and may_need_metadata else None
    strategy, why = _strategy(folder, metadata, args)
    if strategy == "column":
        if metadata is None:
            raise UserError(f"{folder.root}: {why} needs one of {', '.join(METADATA_NAMES)}")
        column = caption_column(str(metadata.path), metadata.columns, args.caption_column)
        rows = metadata.rows(folder, column, args.image_column)
        taken = f"captions from column {column!r} of {folder.metadata}"
    elif strategy == "sidecar":
        if not folder.sidecars:
            raise UserError(f"{folder.root}: {why}, but no picture has a .txt file beside it")
        rows = [_sidecar_row(folder, picture) for picture in folder.pictures]
        taken = "captions from the lines of .txt files beside the pictures"
    elif strategy == "filename":
        rows = [_Row(picture, *caption_of_name(Path(picture).stem)) for picture in folder.pictures]
        taken = "captions from file names"
    else:
        prompt = one_line(args.instance_prompt or "")
        rows = [_Row(picture, (prompt,)) for picture in folder.pictures]
        taken = f"one caption for all: {prompt!r}"
    if not rows:
        raise UserError(f"{folder.root}: there is no picture in {folder.prefix or 'it'}")
    parts = [f"{folder.root}: {len(rows)} pictures", f"{taken} ({why})"]
    if several := sum(len(row.captions) > 1 for row in rows):
        parts.append(f"several captions for {several} of them")
    masks = _Masks.find(folder, rows, args)
    parts += masks.told
    if unused := _unused(folder, metadata, strategy, args):
        parts.append(f"not used: {', '.join(unused)}")
    names = [printable(row.path) for row in rows]
    return Captioned(
        description="; ".join(parts),
        names=[printable(str(folder.root / row.path)) for row in rows],
        ids=[f"{name}|" for name in names],
        captions=[row.captions for row in rows],
        problems=[row.problem for row in rows],
        rows=list(range(len(rows))),
        store=Files(str(folder.root), [row.path for row in rows]),
        recipes=(Recipe.of(args),),
        recipe_of=[0] * len(rows),
        masks=masks.paths,
        has_masks=bool(masks.told),
    )


def caption_of_name(stem: str) -> tuple[tuple[str, ...], str]:
    """The caption that a file's name holds, and what is wrong with it.

    Underscores and hyphens become blanks; a number that stands alone at the end and a counter in
    brackets behind it are dropped: ``a_red-car_003 (2)`` is "a red car".
    """
    try:
        stem.encode()
    except UnicodeEncodeError:
        return (), "the file name is not UTF-8"
    # Composed: a Mac stores accents as characters of their own, which tokenizers read otherwise.
    words = unicodedata.normalize("NFC", re.sub(r"[_\-\s]+", " ", f" {stem}"))
    caption = _COUNTER.sub("", words).strip()
    return ((caption,), "") if caption else ((), "the file name holds no caption but a number")


# Which captions are taken


def _strategy(folder: Folder, metadata: _Metadata | None, args: DataArgs) -> tuple[str, str]:
    """The way to captions, and why it is this one."""
    if args.caption_strategy != "auto":
        return args.caption_strategy, f"--caption_strategy {args.caption_strategy}"
    if args.instance_prompt:
        return "instance", "--instance_prompt"
    if args.caption_column:
        return "column", "--caption_column"
    if metadata and (metadata.has_captions or not folder.sidecars):
        return "column", f"the first of {', '.join(CAPTION_COLUMNS)}"
    if folder.sidecars:
        return "sidecar", "no metadata with captions is there"
    raise UserError(
        f"{folder.root}: {len(folder.pictures)} pictures but no captions; choose a "
        "--caption_strategy: column (metadata.csv, .jsonl or .parquet with file_name and text), "
        "sidecar (a .txt file beside each picture), filename (the names of the files), or instance "
        "(--instance_prompt, one caption for all)"
    )


def _unused(folder: Folder, metadata: _Metadata | None, strategy: str, args: DataArgs) -> list[str]:
    """What else could have given captions."""
    unused: list[str] = []
    if metadata and strategy == "column":
        taken = caption_column(str(metadata.path), metadata.columns, args.caption_column)
        unused += spare_columns(metadata.columns, taken)
    elif folder.metadata:
        unused.append(folder.metadata)
    if folder.sidecars and strategy != "sidecar":
        unused.append(f"{len(folder.sidecars)} .txt files")
    if folder.has_tables:
        unused.append("parquet or arrow files")
    return unused


@dataclass(frozen=True)
class _Row:
    path: str  # relative to the root of the data set
    captions: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class _Metadata:
    path: Path
    records: list[Record]
    columns: list[str]

    @classmethod
    def read(cls, folder: Folder) -> _Metadata:
        path = folder.root / str(folder.metadata)
        records = read_metadata(path)
        columns = dict.fromkeys(column for record in records for column in record.fields)
        return cls(path, records, list(columns))

    @property
    def has_captions(self) -> bool:
        return any(column in self.columns for column in CAPTION_COLUMNS)

    def rows(self, folder: Folder, column: str, image_column: str | None) -> list[_Row]:
        """A row per record, and one for each picture that no record names."""
        name = str(folder.metadata)
        within = posixpath.dirname(name)
        files = file_column(self.path, self.columns, image_column)
        rows: list[_Row] = []
        seen: dict[str, Record] = {}
        for record in self.records:
            path, problem = file_path(within, record.fields.get(files), folder.root)
            if problem:
                rows.append(_Row(f"{name} {record.place}", (), problem))
                continue
            self._refuse_duplicate(seen.get(path), record, path, column)
            seen[path] = record
            if path.startswith(folder.prefix):
                captions, problem = clean_captions(record.fields.get(column))
                problem = record.problem or problem
                rows.append(_Row(path, () if problem else captions, problem))
        return rows + [
            _Row(picture, (), f"{name} has no row for it")
            for picture in folder.pictures
            if picture not in seen and picture.startswith(posixpath.join(within, ""))
        ]

    def _refuse_duplicate(
        self, first: Record | None, second: Record, path: str, column: str
    ) -> None:
        if first is None:
            return
        same = first.fields.get(column) == second.fields.get(column)
        raise UserError(
            f"{self.path} names {path} twice, in {first.place} and {second.place}, with "
            f"{'the same caption' if same else 'different captions'}; keep one of them"
        )


def _sidecar_row(folder: Folder, picture: str) -> _Row:
    sidecar = _sidecar(picture)
    if sidecar not in folder.sidecars:
        return _Row(picture, (), f"there is no caption file {sidecar}")
    path = folder.root / sidecar
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        return _Row(picture, (), f"caption file {path.name} is not UTF-8 (byte {error.start + 1})")
    except OSError as error:
        return _Row(picture, (), f"caption file {path.name} cannot be read ({error.strerror})")
    captions, problem = clean_captions(lines)
    return _Row(picture, captions, f"{problem} ({path.name})" if problem else "")


# Files


@dataclass(frozen=True)
class Files:
    """Pictures in files: the root of the data set and the paths of its rows below it."""

    root: str
    paths: list[str]

    def __call__(self, row: int) -> Path:
        return Path(self.root, self.paths[row])

    def origin(self, row: int) -> Origin | None:
        """What would tell that the file of a row has changed."""
        return file_origin(self.root, self.paths[row])


@dataclass(frozen=True)
class _Masks:
    """Masks of the rows: paths ([] without --mask_dir), what to tell."""

    paths: list[str]
    told: list[str]

    @classmethod
    def find(cls, folder: Folder, rows: Sequence[_Row], args: DataArgs) -> _Masks:
        if args.mask_from_alpha:
            return cls([], ["masks from the alpha channel"])
        if not args.mask_dir:
            return cls([], [])
        root = Path(args.mask_dir).expanduser()
        if not root.is_dir():
            raise UserError(f"--mask_dir {args.mask_dir}: there is no such folder")
        by_stem: dict[str, str] = {}
        for file in _visible_files(root):
            stem, suffix = posixpath.splitext(file)
            if suffix.lower() not in PICTURE_SUFFIXES:
                continue
            if stem in by_stem:
                raise UserError(f"{root}: {by_stem[stem]} and {file} are masks of the same picture")
            by_stem[stem] = file
        # The masks of a split may lie in a folder of its name, as the pictures do, or not.
        stems = [posixpath.splitext(row.path)[0] for row in rows]
        found = [
            by_stem.get(stem) or by_stem.get(stem.removeprefix(folder.prefix)) for stem in stems
        ]
        count = sum(file is not None for file in found)
        if not count:
            raise UserError(
                f"--mask_dir {args.mask_dir}: no picture of {folder.root} has a mask there; masks "
                "have the picture's name and sub-folder"
            )
        return cls(
            [str(root / file) if file else "" for file in found],
            [f"masks for {count} of {len(rows)} in {root}"],
        )


def _visible_files(root: Path) -> list[str]:
    """Paths of all files that are not hidden, relative to the root, sorted."""
    found: list[str] = []
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        # A link may lead back up the tree; each folder is entered once.
        folders[:] = sorted(name for name in folders if name[0] != "." and real not in visited)
        if real not in visited:
            relative = Path(folder).relative_to(root)
            found += [(relative / name).as_posix() for name in files if name[0] != "."]
        visited.add(real)
    return sorted(found)


def _find_metadata(root: Path, files: Sequence[str], prefix: str) -> str | None:
    """The metadata file of a split, in its own folder or at the root."""
    for folder in dict.fromkeys((prefix, "")):
        found = sorted({folder + name for name in METADATA_NAMES}.intersection(files))
        if len(found) > 1:
            raise UserError(f"{root}: both {found[0]} and {found[1]}; keep one of them")
        if found:
            return found[0]
    return None


def _sidecar(picture: str) -> str:
    return f"{posixpath.splitext(picture)[0]}.txt"


def printable(path: str) -> str:
    """A path that can be printed: names that are not UTF-8 show their bytes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
