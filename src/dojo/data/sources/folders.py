"""Folders of pictures: captions from metadata, sidecar files, file names, or one for all; masks."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from dojo.cli import UserError
from dojo.data.contents import Origin, file_origin
from dojo.data.formats import picture_suffixes, remedy
from dojo.data.options import DataArgs
from dojo.data.sources.captioned import Captioned, Recipe, Unread, told_unread
from dojo.data.sources.columns import (
    CAPTION_COLUMNS,
    caption_column,
    clean_captions,
    one_line,
    spare_columns,
)
from dojo.data.sources.metadata import (
    METADATA_JSON,
    METADATA_NAMES,
    Record,
    file_column,
    file_path,
    names_pictures,
    read_metadata,
)

_TABLE_SUFFIXES = (".parquet", ".arrow")
_SIDECARS = (".txt", ".caption")
_REPEATED = re.compile(r"(\d+)_(.+)")  # kohya's folders: how often, and of what
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
    """Of the split or of the root."""
    nested: tuple[str, ...]
    """Metadata files in sub-folders, where there is none above them."""
    sidecars: set[str]
    has_tables: bool
    """Whether there are parquet or arrow files that are no metadata."""
    unread: tuple[Unread, ...] = ()
    """What else is there."""

    @property
    def metadata_files(self) -> tuple[str, ...]:
        """The metadata file, or those in the sub-folders."""
        return (self.metadata,) if self.metadata else self.nested


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
    pictures = [file for file in files if Path(file).suffix.lower() in picture_suffixes()]
    pictures = [file for file in pictures if file.startswith(prefix)]
    present = set(files)
    metadata = _find_metadata(root, present, prefix)
    nested = () if metadata else _find_nested(root, present, prefix)
    stems = (posixpath.splitext(picture)[0] for picture in pictures)
    sidecars = {stem + ending for stem in stems for ending in _SIDECARS}.intersection(present)
    tables = [file for file in files if file.endswith(_TABLE_SUFFIXES)]
    read = {*pictures, *sidecars, *tables, *nested, *([metadata] if metadata else [])}
    return Folder(
        root=root,
        prefix=prefix,
        pictures=pictures,
        metadata=metadata,
        nested=nested,
        sidecars=sidecars,
        has_tables=any(Path(table).stem != "metadata" for table in tables),
        unread=_unread([file for file in files if file not in read], prefix),
    )


def _unread(files: Sequence[str], prefix: str) -> tuple[Unread, ...]:
    """Files by kind, the most frequent kinds first."""
    kinds = Counter(_kind(file, prefix) for file in files)
    return tuple(
        Unread(kind=kind, count=count, remedy=remedy(kind.split(" ")[0]))
        for kind, count in kinds.most_common()
    )


def _kind(file: str, prefix: str) -> str:
    """What a file is that is not read, as it follows a number."""
    if prefix and "/" in file and not file.startswith(prefix):
        return f"files outside {prefix} (--dataset_split)"
    ending = posixpath.splitext(file)[1].lower()
    if ending in _SIDECARS:
        return f"{ending} files without a picture that is read"
    return f"{ending} files" if ending else "files without an ending"


def folder_source(folder: Folder, args: DataArgs) -> Captioned:
    """The pictures of a folder as samples, captioned as ``--caption_strategy`` says.

    Raises:
        UserError: there are no pictures or no captions, metadata is broken, or masks are missing.
    """
    if not folder.metadata_files and not folder.pictures:
        looked_for = (
            f"{folder.root}: no data found; looked for {', '.join(METADATA_NAMES)} (also in "
            f"{args.dataset_split}/), pictures, parquet or arrow files, and a folder written by "
            "save_to_disk"
        )
        raise UserError("; ".join([looked_for, *told_unread(folder.unread)]))
    may_need_metadata = args.caption_strategy in ("auto", "column") and not args.instance_prompt
    metadata = _Metadata.read(folder) if folder.metadata_files and may_need_metadata else None
    strategy, why = _strategy(folder, metadata, args)
    if strategy == "column":
        if metadata is None:
            raise UserError(f"{folder.root}: {why} needs one of {', '.join(METADATA_NAMES)}")
        column = caption_column(metadata.place, metadata.columns, args.caption_column)
        rows = metadata.rows(folder, column, args.image_column)
        taken = f"captions from column {column!r} of {', '.join(folder.metadata_files)}"
    elif strategy == "sidecar":
        if not folder.sidecars:
            raise UserError(
                f"{folder.root}: {why}, but no picture has a .txt or .caption file beside it"
            )
        rows = [_sidecar_row(folder, picture) for picture in folder.pictures]
        taken = f"captions from the lines of {_endings(folder)} files beside the pictures"
    elif strategy == "filename":
        rows = [_Row(picture, *caption_of_name(Path(picture).stem)) for picture in folder.pictures]
        taken = "captions from file names"
    elif strategy == "folder":
        rows = [_Row(picture, *_caption_of_folder(folder, picture)) for picture in folder.pictures]
        taken = "captions from the names of folders"
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
    repeats = _Repeats.find(folder, rows, args)
    parts += repeats.told
    if unused := _unused(folder, metadata, strategy, args):
        parts.append(f"not used: {', '.join(unused)}")
    parts += told_unread(folder.unread)
    names = [printable(row.path) for row in rows]
    return Captioned(
        description="; ".join(parts),
        names=[printable(str(folder.root / row.path)) for row in rows],
        ids=[f"{name}|" for name in names],
        captions=[row.captions for row in rows],
        problems=[row.problem for row in rows],
        rows=list(range(len(rows))),
        store=Files(str(folder.root), [row.path for row in rows]),
        recipes=repeats.recipes,
        recipe_of=repeats.recipe_of,
        masks=masks.paths,
        has_masks=bool(masks.told),
        unread=folder.unread,
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


def _caption_of_folder(folder: Folder, picture: str) -> tuple[tuple[str, ...], str]:
    """The caption that the name of a picture's folder holds, without kohya's repeats."""
    parent = posixpath.dirname(picture.removeprefix(folder.prefix))
    if not parent:
        return (), "it lies in no sub-folder whose name could be its caption"
    name = posixpath.basename(parent)
    match = _REPEATED.match(name)
    return caption_of_name(match[2] if match else name)


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
        "sidecar (a .txt or .caption file beside each picture), filename (the names of the files), "
        "folder (the names of their folders), or instance (--instance_prompt, one caption for all)"
    )


def _unused(folder: Folder, metadata: _Metadata | None, strategy: str, args: DataArgs) -> list[str]:
    """What else could have given captions."""
    unused: list[str] = []
    if metadata and strategy == "column":
        taken = caption_column(metadata.place, metadata.columns, args.caption_column)
        unused += spare_columns(metadata.columns, taken)
    else:
        unused += folder.metadata_files
    if folder.sidecars and strategy != "sidecar":
        unused.append(f"{len(folder.sidecars)} {_endings(folder)} files")
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
    place: str  # what messages call it
    records: list[tuple[str, Record]]  # each with its file, relative to the root
    columns: list[str]

    @classmethod
    def read(cls, folder: Folder) -> _Metadata:
        names = folder.metadata_files
        records = [(name, record) for name in names for record in read_metadata(folder.root / name)]
        columns = dict.fromkeys(column for _, record in records for column in record.fields)
        place = ", ".join(str(folder.root / name) for name in names)
        return cls(place, records, list(columns))

    @property
    def has_captions(self) -> bool:
        return any(column in self.columns for column in CAPTION_COLUMNS)

    def rows(self, folder: Folder, column: str, image_column: str | None) -> list[_Row]:
        """A row per picture that a record names, and one for each picture that none names.

        Several records of one picture are its several captions.
        """
        cells = file_column(self.place, self.columns, image_column)
        rows: list[_Row] = []
        places: dict[str, int] = {}  # where in rows a picture is
        for name, record in self.records:
            within = posixpath.dirname(name)
            path, problem = file_path(within, record.fields.get(cells), folder.root)
            if problem:
                rows.append(_Row(f"{name} {record.place}", (), problem))
                continue
            captions, problem = clean_captions(record.fields.get(column))
            problem = record.problem or problem
            row = _Row(path, () if problem else captions, problem)
            if path in places:
                rows[places[path]] = _merged(rows[places[path]], row)
            elif path.startswith(folder.prefix):
                places[path] = len(rows)
                rows.append(row)
        return rows + [
            _Row(picture, (), f"{_over(picture, folder.metadata_files)} has no row for it")
            for picture in folder.pictures
            if picture not in places
        ]


def _over(picture: str, metadata: Sequence[str]) -> str:
    """The metadata file in the picture's folder or nearest above it."""
    folders = {name: posixpath.join(posixpath.dirname(name), "") for name in metadata}
    above = [name for name, folder in folders.items() if picture.startswith(folder)]
    return max(above, key=len, default="the metadata of other folders")


def _merged(first: _Row, second: _Row) -> _Row:
    """Two records of one picture; what is wrong with either is wrong with both."""
    problem = first.problem or second.problem
    captions = tuple(dict.fromkeys(first.captions + second.captions))
    return _Row(first.path, () if problem else captions, problem)


def _sidecar_row(folder: Folder, picture: str) -> _Row:
    stem = posixpath.splitext(picture)[0]
    beside = [stem + ending for ending in _SIDECARS if stem + ending in folder.sidecars]
    if not beside:
        return _Row(picture, (), f"there is no caption file {stem}.txt")
    if len(beside) > 1:
        return _Row(picture, (), f"both {' and '.join(beside)} are there; keep one of them")
    sidecar = beside[0]
    path = folder.root / sidecar
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        return _Row(picture, (), f"caption file {path.name} is not UTF-8 (byte {error.start + 1})")
    except OSError as error:
        return _Row(picture, (), f"caption file {path.name} cannot be read ({error.strerror})")
    captions, problem = clean_captions(lines)
    return _Row(picture, captions, f"{problem} ({path.name})" if problem else "")


def _endings(folder: Folder) -> str:
    """The endings of the caption files that there are."""
    found = {posixpath.splitext(sidecar)[1] for sidecar in folder.sidecars}
    return " and ".join(ending for ending in _SIDECARS if ending in found)


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
            if suffix.lower() not in picture_suffixes():
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


@dataclass(frozen=True)
class _Repeats:
    """The repeats that kohya's folder names say: the recipes, each row's, and what to tell."""

    recipes: tuple[Recipe, ...]
    recipe_of: list[int]
    told: list[str]

    @classmethod
    def find(cls, folder: Folder, rows: Sequence[_Row], args: DataArgs) -> _Repeats:
        recipe = Recipe.of(args)
        tops = [row.path.removeprefix(folder.prefix).partition("/") for row in rows]
        found = [_REPEATED.match(top) if slash else None for top, slash, _ in tops]
        names = list(dict.fromkeys(match[0] for match in found if match))
        if not args.repeats_from_folder_names:
            told = f"{', '.join(names)} count once; --repeats_from_folder_names takes their numbers"
            return cls((recipe,), [0] * len(rows), [told] if names else [])
        if not names:
            raise UserError(
                f"{folder.root}: --repeats_from_folder_names, but no sub-folder with pictures has "
                "a name like 10_sks dog"
            )
        counts = [int(match[1]) if match else 1 for match in found]
        if 0 in counts:
            raise UserError(
                f"{folder.root}: --repeats_from_folder_names: {rows[counts.index(0)].path} would "
                "be used 0 times; move its folder away"
            )
        kinds = sorted(set(counts))
        return cls(
            tuple(replace(recipe, repeats=recipe.repeats * count) for count in kinds),
            [kinds.index(count) for count in counts],
            [f"repeats by the names of {', '.join(names)}"],
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


def _find_metadata(root: Path, files: Set[str], prefix: str) -> str | None:
    """The metadata file of a split, in its own folder or at the root."""
    found = (_metadata_in(root, files, folder) for folder in dict.fromkeys((prefix, "")))
    return next(filter(None, found), None)


def _find_nested(root: Path, files: Set[str], prefix: str) -> tuple[str, ...]:
    """The metadata files in sub-folders of a split."""
    below = {posixpath.dirname(file) for file in files if file.startswith(prefix)}
    found = (_metadata_in(root, files, posixpath.join(folder, "")) for folder in sorted(below))
    return tuple(filter(None, found))


def _metadata_in(root: Path, files: Set[str], folder: str) -> str | None:
    """The metadata file of a folder, which is given with a slash at its end, or empty."""
    found = [folder + name for name in METADATA_NAMES if folder + name in files]
    if len(found) > 1:
        raise UserError(f"{root}: both {found[0]} and {found[1]}; keep one of them")
    if found:
        return found[0]
    other = folder + METADATA_JSON
    if other in files and names_pictures(root / other, folder, files):
        return other
    return None


def printable(path: str) -> str:
    """A path that can be printed: names that are not UTF-8 show their bytes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
