"""Latents and embeddings of a whole data set as a folder that scripts train from, anywhere.

    python -m dojo.data cache --pretrained_model_name_or_path MODEL \
        --dataset_name datas/pocket-hearts --resolution 64 --output_dir outputs/hearts-made

Scripts that train on captioned pictures then take outputs/hearts-made as --train_data_dir.
Training from it reads neither pictures nor encoders. Several processes, on several machines too,
may be given the same command with the same folder: they share the work, by locks. What a kill
leaves undone is done by whoever is started next.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dojo import cli, data, files
from dojo.cli import UserError, ranges
from dojo.data.contents import Remembered, write_json
from dojo.data.streams import made as folders
from dojo.data.streams.places import MADE
from dojo.files import tensors
from dojo.inputs import made, texts
from dojo.lazy import no_grad, safetensors_torch, torch
from dojo.models import family
from dojo.models.folders import posterior
from dojo.models.opening import family_of, open_model
from dojo.models.precisions import dtype_of, exact_float32
from dojo.run import heap

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

_FLAG = "--pretrained_model_name_or_path"
_AT_A_TIME = 32  # captions that an encoder is given at a time
_DRAFTS = "making"  # folder of what is made before a file is whole
_TEXTS = Path(folders.TEXTS).stem
_ROUNDS = 4
_DECODERS = 2  # threads that look at pictures before they are encoded

Part = Callable[[], data.Captioned]


@dataclass(frozen=True)
class Work:
    """What is to be made."""

    source: str
    """Where the samples come from, in words."""
    parts: list[Part]
    rows: int
    samples: str
    """Tells the samples from others, wherever they lie."""


@dataclass(frozen=True, kw_only=True)
class MakeArgs:
    """The folder that is written."""

    output_dir: Path
    """the folder; if it was begun with the same options, it is gone on with"""
    prompts: tuple[str, ...] = ()
    """texts besides the captions whose embeddings it holds too: validation and negative prompts"""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """precision of the text encoders; unset: bf16 on a GPU, float32 (no) on a CPU"""
    rows_per_file: int = 256
    """rows in a file at most, which is what is lost by a kill"""

    def __post_init__(self) -> None:
        ranges.check(self, "rows_per_file", least=1)


class Args(Protocol):
    """The groups of options; those of the model are of its family."""

    @property
    def model(self) -> family.ModelArgs: ...
    @property
    def text(self) -> family.TextArgs: ...
    @property
    def data(self) -> data.DataArgs: ...
    @property
    def captions(self) -> data.CaptionArgs: ...
    @property
    def make(self) -> MakeArgs: ...


def args_type(argv: Sequence[str]) -> type[Any]:
    """The options for a command line, which depend on the model that it names."""
    groups: tuple[type, type] = (family.ModelArgs, family.TextArgs)
    for place, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag == _FLAG:
            name = value or next(iter(argv[place + 1 :]), "")
            found = family_of(family.ModelArgs(pretrained_model_name_or_path=name))
            groups = found.ModelArgs, found.TextArgs
    fields = [
        *(("model", groups[0]), ("text", groups[1]), ("data", data.DataArgs)),
        *(("captions", data.CaptionArgs), ("make", MakeArgs)),
    ]
    return make_dataclass("Args", fields, frozen=True, kw_only=True)


def run() -> None:
    """The command, with its options in `sys.argv`."""
    try:
        if any(word.partition("=")[0] == "--config" for word in sys.argv[1:]):
            raise UserError("--config: this command's options hang on the model: it takes flags")
        kind = args_type(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    cli.run(main, kind, __doc__)


def main(args: Args) -> None:
    """Does the part of the work that nobody else does, waits for the others, and writes the end."""
    _refuse(args.data)
    model = open_model(args.model, args.text)
    model.check_step(*args.data.size)
    work = _work(args.data, args.make.rows_per_file)
    folder = args.make.output_dir
    _begin(folder, {"settings": made.settings(model, args), "how": _how(args)}, work.samples)
    print(f"{work.source}\n{folder}: {work.rows:,} rows in {len(work.parts):,} parts", flush=True)
    parts = {f"{number:05d}": part for number, part in enumerate(work.parts)}
    _Maker(args, model, folder).make(parts)
    with files.turn(folder / ".end.lock"):
        _end(folder, work.source, list(parts))


def _how(args: Args) -> dict[str, Any]:
    """What makes other numbers or other parts, and what nobody has to repeat who trains."""
    return {
        "rows_per_file": args.make.rows_per_file,
        "max_upscale": args.data.max_upscale,
        "vae_dtype": args.model.vae_dtype,
        "enable_vae_tiling": args.model.enable_vae_tiling,
        "text_encoder_precision": args.model.text_encoder_precision,
        "mixed_precision": _precision(args),
    }


def _precision(args: Args) -> str:
    """Of the text encoders."""
    cuda = torch.cuda.is_available()
    return args.make.mixed_precision or ("bf16" if cuda else "no")


def _refuse(args: data.DataArgs) -> None:
    """What a folder cannot hold.

    Raises:
        UserError: naming the flag.
    """
    if args.data_config:
        raise UserError(
            "--data_config: a folder holds pictures that are all used alike; make one of a single "
            "--dataset_name"
        )
    if args.random_crop:
        raise UserError("--random_crop needs the pictures at every use; --crop_variants N keeps N")
    if args.eval_fraction or args.eval_data_dir:
        name = "eval_fraction" if args.eval_fraction else "eval_data_dir"
        raise UserError(f"--{name} belongs to the training: name --eval_data_dir there")
    if len(args.resolution) > 1:
        raise UserError("a folder holds latents of one --resolution: make one for each")
    if args.repeats > 1 or args.repeats_from_folder_names:
        name = "repeats" if args.repeats > 1 else "repeats_from_folder_names"
        raise UserError(f"--{name}: a folder's rows come once each; --num_train_epochs in training")
    if args.mask_dir:
        raise UserError("--mask_dir cannot be told of in training; --mask_from_alpha works")


def _work(args: data.DataArgs, rows: int) -> Work:
    """The samples in parts of so many rows at most."""
    if data.is_streamed(args.location):
        stream = data.open_shards(args, to_cache=True)
        if isinstance(stream, data.Made):
            raise UserError(f"{args.location} was written by this command: name the pictures")
        samples = data.digest([json.dumps(stream.samples)])
        return Work(stream.description, _of_stream(stream, rows), len(stream), samples)
    source = data.open_training(args)
    source, _ = data.split(
        source, eval_fraction=0.0, seed=0, max_train_samples=args.max_train_samples
    )
    starts = range(0, len(source), rows)

    def part(start: int) -> data.Captioned:
        some = source.select(range(start, min(start + rows, len(source))))
        return data.identified(some, None, num_threads=_DECODERS)

    parts = [partial(part, start) for start in starts]
    return Work(source.description, parts, len(source), _digest(source))


def _digest(source: data.Captioned) -> str:
    """Tells samples from others by names, captions and the sizes of their files; reads none."""
    sizes = [_num_bytes(source.store, row) for row in source.rows]
    samples = zip(source.ids, source.captions, source.problems, sizes, strict=True)
    return data.digest([json.dumps(list(samples))])


def _num_bytes(store: object, row: int) -> int:
    """Of the file of a picture; 0 where it is none by itself."""
    origin = store.origin(row) if isinstance(store, Remembered) else None
    with suppress(OSError):
        return os.path.getsize(os.path.join(origin.home, origin.key)) if origin else 0
    return 0


def _of_stream(stream: data.Stream, rows: int) -> list[Part]:
    """The shards in order, each in parts."""
    return [partial(stream.part, shard, some) for shard, _, some in stream.cut(rows)]


def _begin(folder: Path, record: Mapping[str, Mapping[str, Any]], samples: str) -> None:
    """Marks the folder with what is made there, or compares it.

    Args:
        record: the options that it is made with, by their kind.
        samples: tells what it is made from.
    Raises:
        UserError: something else is there.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path, lock = folder / MADE, folder / ".begin.lock"
    with files.turn(lock):  # of several that are started at once, one begins
        if not path.exists():
            files.sweep(folder.glob(f".{MADE}.*"))
            if [one for one in folder.iterdir() if one != lock]:
                raise UserError(
                    f"--output_dir {folder} is not empty, and was not begun by this command"
                )
            write_json(path, {"format": folders.FORMAT, **record, "samples": samples})
            return
        changed = _changed(path, record, samples)
    if changed:
        raise UserError(
            f"--output_dir {folder} was begun otherwise: {'; '.join(changed)}: name another "
            "folder, or remove it"
        )
    files.sweep(folder.glob(".*"))
    files.sweep((folder / _DRAFTS).glob(".*"))


def _changed(path: Path, record: Mapping[str, Mapping[str, Any]], samples: str) -> list[str]:
    """What is not as it was when a folder was begun, in words."""
    begun = _read(path)
    if begun.get("format") != folders.FORMAT:
        return ["its format"]
    changed = [
        one
        for kind, options in record.items()
        for one in data.differences(begun.get(kind, {}), options)
    ]
    if begun.get("samples") != samples:
        changed.append("of other pictures or captions")
    return changed


def _read(path: Path) -> dict[str, Any]:
    """A table in a file; nothing where there is none, or it is damaged."""
    with suppress(OSError, ValueError):
        table = json.loads(path.read_text(encoding="utf-8"))
        return table if isinstance(table, dict) else {}
    return {}


def _once(
    folder: Path,
    name: str,
    done: Callable[[], bool],
    work: Callable[[], object],
    *,
    wait: bool,
) -> None:
    """Does something that is not done and that no other process is doing."""
    if done():
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(files.turn(folder / f".{name}.lock", wait=wait))
        except BlockingIOError:
            return
        if not done():
            work()


def _is_done(folder: Path, name: str, records: Path | None) -> bool:
    """Whether a part was made and its files are as they were written.

    Args:
        records: folder in which it is remembered what they contain, if it is.
    """
    job = _read(folder / f"{name}.json")
    return "files" in job and all(_is_whole(folder, one, records) for one in job["files"])


def _is_whole(folder: Path, file: Mapping[str, Any], records: Path | None) -> bool:
    path = folder / file["name"]
    try:
        if path.stat().st_size != file["num_bytes"]:
            return False
        same_rows = len(folders.Opened(path).rows) == file["rows"]
    except (OSError, UserError):
        return False
    return same_rows and data.file_hashes([path], records) == [file["digest"]]


def _told(path: Path, rows: int, size: Sequence[int]) -> dict[str, Any]:
    """What is said of a file."""
    digest = data.file_hashes([path], None)[0]
    height, width = size
    found = folders.MadeFile(
        name=path.name,
        rows=rows,
        size=(height, width),
        num_bytes=path.stat().st_size,
        digest=digest,
    )
    return asdict(found)


def _write_job(
    folder: Path, name: str, written: Sequence[Any], left_out: Sequence[Mapping[str, Any]]
) -> None:
    """Writes that the files of a part are there."""
    write_json(folder / f"{name}.json", {"files": written, "left_out": left_out})


def _end(folder: Path, source: str, names: Sequence[str]) -> None:
    """Writes what the folder holds, now that it holds all of it."""
    done = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    rows = [one for job in done for one in job["files"]]
    left_out = [one for job in done for one in job["left_out"]]
    if not rows:
        raise UserError(f"no usable sample in {source}")
    path = folder / folders.TEXTS
    words = folders.MadeWords(
        texts=list(folders.Opened(path).texts),
        num_bytes=path.stat().st_size,
        digest=data.file_hashes([path], None)[0],
    )
    index = {"source": source, "files": rows, "texts": asdict(words), "left_out": left_out}
    write_json(folder / folders.INDEX, index)
    count = sum(one["rows"] for one in rows)
    size = sum(one["num_bytes"] for one in rows) / 2**30
    print(f"done: {folder}: {count:,} rows, {size:.2f} GiB, {len(left_out)} left out", flush=True)


class _Maker:
    """What makes the files, with one model in memory at a time.

    First come the latents of all parts, then what each text encoder says of all texts, one encoder
    after another. What is made so far lies in a folder of its own below; the last encoder's words
    complete a file. Each job is done by one process at a time.
    """

    def __init__(self, args: Args, model: family.Model, folder: Path) -> None:
        rank = os.environ.get("LOCAL_RANK", "0")
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{rank}" if cuda else "cpu")
        exact_float32()
        self.args = args
        self.model = model
        self.folder = folder
        self.drafts = folder / _DRAFTS
        self.records = args.data.data_cache_dir
        self.text_device = texts.device_of(self.device, model)
        alone = texts.one_by_one(self.text_device)
        self._loader = texts.Loader(model, dtype_of(_precision(args)), self.device, alone=alone)
        self._vae: AutoencoderKL | None = None
        self._encoder: texts.Lookup | None = None
        self._found: set[str] = set()  # parts that are whole, and drafts

    def make(self, parts: Mapping[str, Part]) -> None:
        """Makes what is missing of the parts, by their names, and of the other texts.

        Raises:
            UserError: a sample is bad under `--on_bad_sample error`.
        """
        *earlier, last = self.model.text_encoders
        for _ in range(_ROUNDS):
            missing = {name: part for name, part in parts.items() if not self.has(name)}
            words = () if self.has(_TEXTS) else (_TEXTS,)
            if not missing and not words:
                with suppress(OSError):  # none there, or others are at work
                    self.drafts.rmdir()
                return
            self._stage(
                {name: partial(self._latents, name, part) for name, part in missing.items()},
                self._has_latents,
            )
            names = [*words, *missing]
            for encoder in earlier:
                self._stage(
                    {name: partial(self._say, name, encoder) for name in names},
                    partial(self._has_said, encoder=encoder),
                )
            self._stage({name: partial(self._finish, name, last) for name in names}, self.has)
        raise UserError(f"{self.folder}: others have worked against this command: give it again")

    def _stage(self, jobs: Mapping[str, Callable[[], object]], has: Callable[[str], bool]) -> None:
        """Does what nobody else does, waits for the others, and lets go of the model."""
        for wait in (False, True):  # then those that others had in their hands, if they were killed
            for name, job in jobs.items():
                _once(self.folder, name, partial(has, name), job, wait=wait)
        self._vae = self._encoder = self._loader.joiner = None
        texts.let_go(self.device)

    def has(self, name: str) -> bool:
        """Whether a part is whole, or the file of the other texts."""
        if name == _TEXTS:
            return self._has_texts()
        if name not in self._found and _is_done(self.folder, name, self.records):
            self._found.add(name)
        return name in self._found

    # -- what comes first -------------------------------------------------------------------------

    def _has_latents(self, name: str) -> bool:
        draft = f"{_DRAFTS}/{name}"
        if draft not in self._found and _is_done(self.drafts, name, None):
            self._found.add(draft)
        return draft in self._found or self.has(name)

    @no_grad
    def _latents(self, name: str, part: Part) -> None:
        if (self.folder / f"{name}.json").exists():
            print(f"part {name} is damaged, and is made again", flush=True)
        source = part()
        good, left_out = self._checked(source)
        written: list[dict[str, Any]] = []
        if len(good):
            plan = data.assign(good, self.args.data, self.model.pixel_step)
            left_out += self._too_small(good, plan)
            written = [
                self._draft(name, good, size, indices) for size, indices in plan.needed().items()
            ]
        _write_job(self.drafts, name, written, [asdict(one) for one in left_out])

    def _checked(self, source: data.Captioned) -> tuple[data.Captioned, list[data.BadReport]]:
        """The good samples, with the sizes of their pictures, and the others."""
        skip = self.args.data.on_bad_sample
        found = data.look(source, num_threads=_DECODERS, progress=False)
        if skip == "skip" and all(isinstance(one, str) for one in found):
            pairs = zip(source.names, found, strict=True)
            return source.select([]), [data.BadReport(name, str(why)) for name, why in pairs]
        indices, bad, sizes = data.judged(source, found, on_bad_sample=skip)
        return replace(source.select(indices), sizes=sizes), bad

    def _too_small(self, source: data.Captioned, plan: data.Plan) -> list[data.BadReport]:
        """Pictures that `--max_upscale` leaves out.

        Raises:
            UserError: there are some, under `--on_bad_sample error`.
        """
        found = [data.BadReport(source.names[index], why) for index, why in plan.left_out]
        if found and self.args.data.on_bad_sample == "error":
            raise UserError(
                f"{found[0].name}: {found[0].reason}: --on_bad_sample skip leaves such pictures out"
            )
        return found

    def _draft(
        self, name: str, source: data.Captioned, size: data.Size, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Writes the rows of one size, without their texts' embeddings."""
        self.model.latent_shape(*size)  # refuses what the model cannot take
        some = source.select(indices)
        pictures = data.Pictures(
            *(some, self.args.data, self.args.captions),
            seed=0,
            latent_step=self.model.pixels_per_latent,
        )
        words = sorted({*pictures.texts(), ""})
        here = list(range(len(some)))
        self._vae = vae = self._vae or self.model.load_vae(self.device)
        with heap.kept(self.device):
            latents = data.encoded_views(pictures, lambda x: posterior(vae, x), size, here)
        rows = [
            folders.MadeRow(name=name, id=one, captions=list(captions), original=original)
            for name, one, captions, original in zip(
                some.names, some.ids, some.captions, some.sizes, strict=True
            )
        ]
        path = self.drafts / f"{name}-{size[0]}x{size[1]}.safetensors"
        tensors.save(path, latents, folders.header(rows, words))
        return _told(path, len(rows), size)

    # -- texts ------------------------------------------------------------------------------------

    def _known(self) -> set[str]:
        """The texts that are there; none where the file is missing or damaged."""
        with suppress(UserError):
            return set(folders.Opened(self.folder / folders.TEXTS).texts)
        return set()

    def _ended(self) -> dict[str, Any]:
        """What was said of the file of texts when the folder was last whole, if it was."""
        return _read(self.folder / folders.INDEX).get("texts", {"texts": []})

    def _has_texts(self) -> bool:
        """Whether the file of texts is as it was written and holds those that were asked for."""
        known, ended = self._known(), self._ended()
        if known and known == set(ended["texts"]):  # else it was written since, with more of them
            path = self.folder / folders.TEXTS
            if data.file_hashes([path], self.records) != [ended["digest"]]:
                return False
        return {"", *self.args.make.prompts, *ended["texts"]} <= known

    def _wanted(self, name: str) -> dict[str, list[str]]:
        """The texts of each file of a part, or of the file of the other texts, those of earlier
        commands too; none where there is no draft."""
        if name == _TEXTS:
            words = {"", *self.args.make.prompts, *self._known(), *self._ended()["texts"]}
            return {folders.TEXTS: sorted(words)}
        files = _read(self.drafts / f"{name}.json").get("files", [])
        return {one["name"]: list(folders.Opened(self.drafts / one["name"]).texts) for one in files}

    def _said(self, file: str, words: Sequence[str], encoder: str) -> Path:
        """Where it lies what an encoder says of texts."""
        return self.drafts / f"{Path(file).stem}-{data.digest(words)}-{encoder}.safetensors"

    def _has_said(self, name: str, encoder: str) -> bool:
        if self.has(name):
            return True
        with suppress(UserError):
            wanted = self._wanted(name).items()
            return all(self._said(file, words, encoder).exists() for file, words in wanted)
        return self.has(name)  # another process has completed it just now, or the draft is damaged

    def _say(self, name: str, encoder: str) -> None:
        for file, words in self._wanted(name).items():
            tensors.save(self._said(file, words, encoder), self._embed(encoder, words))

    @no_grad
    def _embed(self, encoder: str, words: Sequence[str]) -> dict[str, Tensor]:
        """What one encoder says of texts, which are encoded a few at a time.

        Raises:
            UserError: some of it is no number.
        """
        if self._encoder is None:
            print(f"embedding texts by {encoder}", flush=True)
            self._encoder = self._loader(encoder)
        starts = range(0, len(words), _AT_A_TIME)
        parts = [self._encoder(words[start : start + _AT_A_TIME]) for start in starts]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name, values in found.items():
            if not values.isfinite().all():
                raise UserError(
                    f"the text encoders' {name} are not finite numbers: give --mixed_precision "
                    "bf16 or no, or mend the encoders"
                )
        return found

    # -- the end ----------------------------------------------------------------------------------

    @no_grad
    def _finish(self, name: str, encoder: str) -> None:
        """Joins what was made of a part to what the last encoder says."""
        *earlier, _ = self.model.text_encoders
        job = _read(self.drafts / f"{name}.json")
        if not all(self._has_said(name, one) for one in earlier) or (
            name != _TEXTS and "files" not in job
        ):
            return  # others have asked for other texts meanwhile: it comes in the next round
        sizes = {one["name"]: one["size"] for one in job.get("files", [])}
        written: list[dict[str, Any]] = []
        for file, words in self._wanted(name).items():
            made: dict[str, Tensor] = self._joined(file, words, encoder)
            rows: list[folders.MadeRow] = []
            if name != _TEXTS:
                draft = self.drafts / file
                rows = folders.Opened(draft).rows
                made |= safetensors_torch.load_file(draft)
            tensors.save(self.folder / file, made, folders.header(rows, words))
            if name != _TEXTS:
                written.append(_told(self.folder / file, len(rows), sizes[file]))
        if name != _TEXTS:
            _write_job(self.folder, name, written, job["left_out"])
            self._found.add(name)
            print(f"part {name}: {sum(one['rows'] for one in written)} rows", flush=True)
        for path in self.drafts.glob(f"{name}[.-]*"):
            path.unlink(missing_ok=True)

    def _joined(self, file: str, words: Sequence[str], last: str) -> dict[str, Tensor]:
        """Embeddings of texts, by the names that files have for them."""
        *earlier, _ = self.model.text_encoders
        said = self._embed(last, words)
        for one in earlier:
            said |= safetensors_torch.load_file(self._said(file, words, one))
        return {f"{folders.PREFIX}{name}": value for name, value in self._loader.join(said).items()}
