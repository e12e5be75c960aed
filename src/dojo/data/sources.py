"""Captioned pictures from a folder or the hub: found, checked, and split.

Every source ends as one ``Captioned``: lists of names, ids and captions, and a way to read the
picture of a row. What is wrong with a row is kept beside it, so that a whole data set can be
reported at once.
"""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal, Protocol

from PIL import Image
from tqdm.auto import tqdm

from dojo.cli import UserError
from dojo.data.images import PICTURE_SUFFIXES, BadSample, read_image

if TYPE_CHECKING:
    import datasets

_METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
_TABLE_SUFFIXES = (".parquet", ".arrow")
_CAPTION_COLUMNS = ("text", "caption", "prompt")
_MAX_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Pictures and captions to train on."""

    dataset_name: str | None = None
    """Hub id or local folder: pictures with metadata.csv or metadata.jsonl (file_name,text),
    pictures with .txt files of the same name, parquet or arrow files, or a folder written by
    datasets' save_to_disk."""
    train_data_dir: str | None = None
    """The same as dataset_name, under the name that other trainers use for local folders."""
    dataset_config_name: str | None = None
    """Configuration of a data set that has several."""
    dataset_split: str = "train"
    """Split of the data set, or sub-folder of a local folder (the folder itself if there is no
    sub-folder train)."""
    image_column: str | None = None
    """Column of the pictures. Default: image (in metadata files: file_name)."""
    caption_column: str | None = None
    """Column of the captions. Default: the first of text, caption, prompt that there is."""
    cache_dir: str | None = None
    """Where downloaded data sets are kept. Default: the datasets library's own place."""
    max_train_samples: int | None = None
    """Train on the first N samples only."""
    resolution: int = 512
    """Height and width in pixels that pictures are resized and cropped to."""
    height: int | None = None
    """Height in pixels, where it differs from resolution."""
    width: int | None = None
    """Width in pixels, where it differs from resolution."""
    center_crop: bool = False
    """Crop at the centre. This is the default; the flag is there for familiar command lines."""
    random_crop: bool = False
    """Crop at a random place instead of the centre."""
    random_flip: bool = False
    """Mirror pictures left to right at random."""
    no_hflip: bool = False
    """Never mirror pictures. This is the default; the flag is there for familiar command lines."""
    dataloader_num_workers: int = 0
    """Processes that read pictures. 0: the main process reads them."""
    on_bad_sample: Literal["skip", "error"] = "error"
    """What to do about unreadable pictures and missing captions: stop, or leave them out and
    report them."""
    eval_fraction: float = 0.0
    """Fraction of the samples held out for the eval loss, in [0, 1)."""
    eval_data_dir: str | None = None
    """Folder or hub id of samples for the eval loss, instead of eval_fraction."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        if not self.dataset_name and not self.train_data_dir:
            yield "give --dataset_name or --train_data_dir"
        if self.dataset_name and self.train_data_dir and self.dataset_name != self.train_data_dir:
            yield "--dataset_name and --train_data_dir mean the same thing: give one of them"
        if not self.dataset_split:
            yield "--dataset_split must not be empty"
        for name in ("resolution", "height", "width", "max_train_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} must be at least 1, got {value}"
        if self.center_crop and self.random_crop:
            yield "--center_crop contradicts --random_crop"
        if self.random_flip and self.no_hflip:
            yield "--random_flip contradicts --no_hflip"
        if self.dataloader_num_workers < 0:
            yield f"--dataloader_num_workers must be 0 or more, got {self.dataloader_num_workers}"
        if self.on_bad_sample not in ("skip", "error"):
            yield f"--on_bad_sample must be skip or error, got {self.on_bad_sample!r}"
        if not 0.0 <= self.eval_fraction < 1.0:
            yield f"--eval_fraction must lie in [0, 1), got {self.eval_fraction}"
        if self.eval_fraction > 0.0 and self.eval_data_dir:
            yield "--eval_fraction and --eval_data_dir both hold out samples: give one of them"

    @property
    def location(self) -> str:
        """The folder or hub id to train on, whichever flag named it."""
        return self.dataset_name or self.train_data_dir or ""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of training pictures, in pixels."""
        return self.height or self.resolution, self.width or self.resolution


class PictureStore(Protocol):
    """Where the pictures of a source lie; small to pickle, holds no pictures."""

    def __call__(self, row: int) -> Path | bytes:
        """The picture of a row: a path or the bytes of a file."""
        ...


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Samples with captions, of which only the pictures are still to be read.

    Pickles cheaply for data loader workers, and holds no pixels.
    """

    description: str
    """Where the samples come from and which captions were taken, for the screen."""
    names: list[str]
    """What messages call each sample."""
    ids: list[str]
    """Unique per sample, and different when its file changes: ``<key>|<version>``."""
    captions: list[str]
    """Caption of each sample, on one line; empty where ``problems`` says why."""
    problems: list[str]
    """What is wrong with each sample's row; empty where nothing is."""
    rows: list[int]
    """Where ``store`` finds the picture of each sample."""
    store: PictureStore
    """Where the pictures lie."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Image.Image:
        """The picture of one sample, upright 8-bit RGB.

        Raises:
            BadSample: the picture cannot be read, or its row is at fault (no caption, a path
                outside the folder).
        """
        if self.problems[index]:
            raise BadSample(f"{self.names[index]}: {self.problems[index]}")
        return read_image(self.store(self.rows[index]), self.names[index])

    def select(self, indices: Sequence[int]) -> "Captioned":
        """The samples at these indices, in this order."""
        return replace(
            self,
            names=[self.names[index] for index in indices],
            ids=[self.ids[index] for index in indices],
            captions=[self.captions[index] for index in indices],
            problems=[self.problems[index] for index in indices],
            rows=[self.rows[index] for index in indices],
        )


@dataclass(frozen=True)
class BadReport:
    """One sample that was left out, and why."""

    name: str
    reason: str


def open_source(location: str, args: DataArgs) -> Captioned:
    """Finds captioned pictures in a local folder or on the hub; reads captions, not pictures.

    ``args`` gives the split, the columns, and the download cache; ``location`` is separate because
    ``--eval_data_dir`` is opened in the same way. Samples that cannot be used are kept with their
    problem, for ``verify`` to report.

    Raises:
        ValueError: nothing usable is there, a column is missing, or a metadata file is broken.
    """
    root = Path(location).expanduser()
    if not root.exists():
        if location.startswith((".", "~", "/")) or location.count("/") > 1:
            raise UserError(f"{location}: there is no such folder")
        return _table_source(location, _load_dataset(location, args), args)
    if not root.is_dir():
        raise UserError(f"{location}: a file, where a folder or a hub id is expected")
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        return _table_source(location, _load_saved(root, args), args)
    files = _visible_files(root)
    prefix = f"{args.dataset_split}/" if (root / args.dataset_split).is_dir() else ""
    pictures = [file for file in files if Path(file).suffix.lower() in PICTURE_SUFFIXES]
    pictures = [file for file in pictures if file.startswith(prefix)]
    metadata = _find_metadata(root, files, prefix)
    sidecars = {_sidecar(picture) for picture in pictures}.intersection(files)
    if metadata is None and not sidecars and _has_tables(files):
        return _table_source(location, _load_dataset(str(root), args), args)
    if not prefix and args.dataset_split != "train":
        raise UserError(f"{location}: --dataset_split names no folder {args.dataset_split!r} here")
    if metadata is not None:
        return _metadata_source(root, metadata, prefix, pictures, args)
    if not pictures:
        raise UserError(
            f"{location}: no data found; looked for metadata.csv or metadata.jsonl (also in "
            f"{args.dataset_split}/), pictures with .txt captions, parquet or arrow files, and a "
            "folder written by save_to_disk"
        )
    if not sidecars:
        raise UserError(
            f"{location}: {len(pictures)} pictures but no captions; write metadata.csv or "
            "metadata.jsonl with file_name and text, or a .txt file beside each picture"
        )
    return _sidecar_source(root, pictures, sidecars)


def verify(
    source: Captioned,
    *,
    on_bad_sample: Literal["skip", "error"],
    num_threads: int,
    progress: bool = True,
) -> tuple[list[int], list[BadReport]]:
    """Decodes every picture once and tells the good samples from the bad.

    Args:
        source: what to check.
        on_bad_sample: ``error`` raises if any sample is bad, ``skip`` reports them.
        num_threads: that decode at a time, at least 1.
        progress: show a bar.

    Returns:
        The indices of good samples, in order, and a report on each of the others.

    Raises:
        BadSample: under ``error``, with the first bad samples and their number.
        ValueError: under ``skip``, when no sample is left.
    """
    good: list[int] = []
    bad: list[BadReport] = []
    executor = ThreadPoolExecutor(max_workers=num_threads)
    try:
        faults = executor.map(lambda index: _fault(source, index), range(len(source)))
        bar = tqdm(faults, "Checking pictures", len(source), disable=not progress, unit="picture")
        for index, fault in enumerate(bar):
            if fault:
                bad.append(BadReport(source.names[index], fault))
            else:
                good.append(index)
    finally:
        executor.shutdown(cancel_futures=True)  # an interrupt need not wait for the rest
    if bad and on_bad_sample == "error":
        raise BadSample(
            f"{len(bad)} of {len(source)} samples cannot be used (--on_bad_sample skip leaves "
            f"them out):\n{_listing(bad)}"
        )
    if not good:
        raise UserError(f"no usable sample in {source.description}\n{_listing(bad)}".rstrip())
    return good, bad


def split(
    source: Captioned, *, eval_fraction: float, seed: int, max_train_samples: int | None = None
) -> tuple[Captioned, Captioned | None]:
    """Holds samples out for evaluation, chosen by a hash of the seed and each sample's key.

    The choice depends neither on the order of the samples nor on when their files were written.

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
    num_held_out = 0
    if eval_fraction > 0.0:
        num_held_out = min(max(1, round(eval_fraction * len(source))), len(source) - 1)
        if num_held_out < 1:
            raise UserError(f"--eval_fraction {eval_fraction} needs 2 samples or more")
    by_hash = sorted(range(len(source)), key=lambda index: _draw(seed, source.ids[index]))
    held_out = set(by_hash[:num_held_out])
    rest = [index for index in range(len(source)) if index not in held_out]
    train = source.select(rest[:max_train_samples])
    return train, source.select(sorted(held_out)) if held_out else None


def _draw(seed: int, sample_id: str) -> bytes:
    key = sample_id.rpartition("|")[0]
    return sha256(f"{seed}|{key}".encode("utf-8", "surrogateescape")).digest()


def _fault(source: Captioned, index: int) -> str:
    try:
        source.read(index)
    except BadSample as error:
        return str(error).removeprefix(f"{source.names[index]}: ")
    return ""


def _listing(bad: Sequence[BadReport]) -> str:
    lines = [f"  {report.name}: {report.reason}" for report in bad[:_MAX_LISTED]]
    if len(bad) > _MAX_LISTED:
        lines.append(f"  and {len(bad) - _MAX_LISTED} more")
    return "\n".join(lines)


def _clean_caption(caption: object) -> tuple[str, str]:
    """The caption on one line, and what is wrong with it."""
    if caption is None:
        return "", "the caption is missing"
    if not isinstance(caption, str):
        return "", f"the caption is of type {type(caption).__name__}, not text"
    lines = [line.strip() for line in caption.splitlines()]
    text = " ".join(line for line in lines if line)
    return text, "" if text else "the caption is empty"


# Local folders


@dataclass(frozen=True)
class _Files:
    root: str
    paths: list[str]

    def __call__(self, row: int) -> Path:
        return Path(self.root, self.paths[row])


@dataclass(frozen=True)
class _FolderRow:
    path: str  # relative to the root of the data set
    name: str
    caption: str
    problem: str


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


def _has_tables(files: Sequence[str]) -> bool:
    names = (Path(file) for file in files)
    return any(name.suffix in _TABLE_SUFFIXES and name.stem != "metadata" for name in names)


def _sidecar(picture: str) -> str:
    return f"{posixpath.splitext(picture)[0]}.txt"


def _find_metadata(root: Path, files: Sequence[str], prefix: str) -> str | None:
    """The metadata file of a split, in its own folder or at the root."""
    for folder in dict.fromkeys((prefix, "")):
        found = sorted({folder + name for name in _METADATA_NAMES}.intersection(files))
        if len(found) > 1:
            raise UserError(f"{root}: both {found[0]} and {found[1]}; keep one of them")
        if found:
            return found[0]
    return None


def _folder_source(root: Path, rows: Sequence[_FolderRow], description: str) -> Captioned:
    if not rows:
        raise UserError(f"{description} names no picture")
    return Captioned(
        description=description,
        names=[row.name for row in rows],
        ids=[f"{row.path}|{_file_version(root, row.path)}" for row in rows],
        captions=[row.caption for row in rows],
        problems=[row.problem for row in rows],
        rows=list(range(len(rows))),
        store=_Files(str(root), [row.path for row in rows]),
    )


def _file_version(root: Path, path: str) -> str:
    try:
        stat = os.stat(root / path)
    except (OSError, ValueError):  # ValueError: a path with a null character
        return "missing"
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _sidecar_source(root: Path, pictures: Sequence[str], sidecars: set[str]) -> Captioned:
    rows: list[_FolderRow] = []
    for picture in pictures:
        sidecar = _sidecar(picture)
        caption, problem = "", f"there is no caption file {sidecar}"
        if sidecar in sidecars:
            caption, problem = _read_sidecar(root / sidecar)
        rows.append(_FolderRow(picture, str(root / picture), caption, problem))
    return _folder_source(root, rows, f"{root}: pictures with captions in .txt files")


def _read_sidecar(path: Path) -> tuple[str, str]:
    try:
        caption, problem = _clean_caption(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        return "", f"caption file {path.name} is not UTF-8 (byte {error.start + 1})"
    except OSError as error:
        return "", f"caption file {path.name} cannot be read ({error.strerror})"
    return caption, f"{problem} ({path.name})" if problem else ""


def _metadata_source(
    root: Path, metadata: str, prefix: str, pictures: Sequence[str], args: DataArgs
) -> Captioned:
    records = _read_metadata(root / metadata)
    if not records:
        raise UserError(f"{root / metadata} has no rows")
    columns = list(dict.fromkeys(column for record in records for column in record.fields))
    file_column = _file_column(root / metadata, columns, args.image_column)
    caption_column = _caption_column(str(root / metadata), columns, args.caption_column)
    folder = posixpath.dirname(metadata)
    rows: list[_FolderRow] = []
    seen: dict[str, _Record] = {}
    for record in records:
        path, problem = _place(folder, record.fields.get(file_column))
        if problem:
            where = f"{metadata} line {record.line}"
            rows.append(_FolderRow(where, str(root / where), "", problem))
            continue
        _refuse_duplicate(root / metadata, seen.get(path), record, path, caption_column)
        seen[path] = record
        if path.startswith(prefix):
            caption, problem = _clean_caption(record.fields.get(caption_column))
            rows.append(_FolderRow(path, str(root / path), caption, record.problem or problem))
    rows += [
        _FolderRow(picture, str(root / picture), "", f"{metadata} has no row for it")
        for picture in pictures
        if picture not in seen and picture.startswith(posixpath.join(folder, ""))
    ]
    taken = f"{root / metadata}: captions from column {caption_column!r}"
    return _folder_source(root, rows, taken + (f", pictures in {prefix}" if prefix else ""))


@dataclass(frozen=True)
class _Record:
    line: int
    fields: Mapping[str, object]
    problem: str = ""


def _read_metadata(path: Path) -> list[_Record]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object, unlike raw, lacks the byte order mark that error.start does not count.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: line {line}, byte {len(raw) - len(error.object) + error.start}"
        ) from error
    read = {".csv": _read_csv, ".jsonl": _read_jsonl}[path.suffix]
    return list(read(path, text))


def _read_csv(path: Path, text: str) -> Iterator[_Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for fields in reader:
            surplus: object = fields.pop(None, None)
            problem = "more fields than the header; quote captions with commas" if surplus else ""
            yield _Record(reader.line_num, fields, problem)
    except csv.Error as error:
        # line_num is the end of the row before; a quote left open runs on to the end of the file.
        raise UserError(f"{path} line {reader.line_num + 1}: {error}") from error


def _read_jsonl(path: Path, text: str) -> Iterator[_Record]:
    # Not splitlines: JSON strings may hold U+2028, which is a line break to it.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            fields = json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {line}: not JSON ({error.msg})") from error
        if not isinstance(fields, dict):
            raise UserError(f"{path} line {line}: not a JSON object")
        yield _Record(line, fields)


def _place(folder: str, file_name: object) -> tuple[str, str]:
    """The path of a file_name relative to the root, and what is wrong with it.

    Judged by the text alone: hub snapshots are symbolic links that lead outside by design.
    """
    if not isinstance(file_name, str) or not file_name.strip():
        return "", "the file name is missing"
    if posixpath.isabs(file_name) or PureWindowsPath(file_name).drive:
        return "", f"{file_name!r} is an absolute path; paths must lie inside the folder"
    path = posixpath.normpath(file_name)
    if ".." in PureWindowsPath(path).parts:
        return "", f"{file_name!r} climbs out of the folder"
    return posixpath.join(folder, path), ""


def _refuse_duplicate(
    metadata: Path, first: _Record | None, second: _Record, path: str, caption_column: str
) -> None:
    if first is None:
        return
    same = first.fields.get(caption_column) == second.fields.get(caption_column)
    raise UserError(
        f"{metadata} names {path} twice, in lines {first.line} and {second.line}, with "
        f"{'the same caption' if same else 'different captions'}; keep one of them"
    )


def _file_column(metadata: Path, columns: Sequence[str], wanted: str | None) -> str:
    # datasets shows the files of an imagefolder as a column "image", so that name is taken too.
    as_datasets_shows_it = wanted == "image" and wanted not in columns
    column = "file_name" if wanted is None or as_datasets_shows_it else wanted
    if column not in columns:
        raise UserError(f"{metadata} has no column {column!r}; it has {_shown(columns)}")
    return column


def _caption_column(place: str, columns: Sequence[str], wanted: str | None) -> str:
    for column in [wanted] if wanted else _CAPTION_COLUMNS:
        if column in columns:
            return column
    looked_for = repr(wanted) if wanted else " or ".join(map(repr, _CAPTION_COLUMNS))
    raise UserError(
        f"{place} has no column {looked_for}; it has {_shown(columns)} (--caption_column)"
    )


def _shown(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns)) or "none"


# Data sets of the datasets library


@dataclass(frozen=True)
class _Table:
    dataset: "datasets.Dataset"
    column: str

    def __call__(self, row: int) -> Path | bytes:
        picture: Any = self.dataset[row][self.column]
        if isinstance(picture, dict):
            path = picture.get("path")
            picture = picture["bytes"] or (Path(path) if path else None)
        return picture or b""  # no picture reads as an empty file


def _table_source(location: str, dataset: "datasets.Dataset", args: DataArgs) -> Captioned:
    import datasets  # takes seconds, and folders of pictures do without

    image_column = args.image_column or "image"
    if image_column not in dataset.column_names:
        raise UserError(
            f"{location} has no column {image_column!r}; it has {_shown(dataset.column_names)} "
            "(--image_column)"
        )
    caption_column = _caption_column(location, dataset.column_names, args.caption_column)
    fingerprint = dataset._fingerprint
    captions = [_clean_caption(caption) for caption in dataset[caption_column][:]]
    pictures = dataset.select_columns([image_column])
    if isinstance(pictures.features[image_column], datasets.Image):
        # Not decoded by datasets: every picture goes through the same read_image.
        pictures = pictures.cast_column(image_column, datasets.Image(decode=False))
    elif not _holds_files(pictures.features[image_column]):
        raise UserError(
            f"{location}: column {image_column!r} holds no pictures but "
            f"{pictures.features[image_column]} (--image_column)"
        )
    rows = list(range(len(dataset)))
    return Captioned(
        description=f"{location}: pictures from column {image_column!r}, captions from column "
        f"{caption_column!r}",
        names=[f"{location} row {row}" for row in rows],
        ids=[f"row {row}|{fingerprint}" for row in rows],
        captions=[caption for caption, _ in captions],
        problems=[problem for _, problem in captions],
        rows=rows,
        store=_Table(pictures, image_column),
    )


def _holds_files(feature: Any) -> bool:
    """Whether a column holds the bytes of files, as tables not written by datasets have them."""
    import datasets

    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(content, datasets.Value) and content.dtype in ("binary", "large_binary")


def _load_saved(root: Path, args: DataArgs) -> "datasets.Dataset":
    import datasets

    try:
        loaded = datasets.load_from_disk(str(root))
    except (OSError, ValueError) as error:
        raise UserError(f"{root}: save_to_disk's folder cannot be read: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if args.dataset_split not in loaded:
        raise UserError(
            f"{root}: no split {args.dataset_split!r}; it has {_shown([*map(str, loaded)])} "
            "(--dataset_split)"
        )
    return loaded[args.dataset_split]


def _load_dataset(location: str, args: DataArgs) -> "datasets.Dataset":
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
