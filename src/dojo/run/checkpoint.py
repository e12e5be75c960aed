"""Checkpoints that are whole or absent, and everything a run needs to go on exactly.

A checkpoint is a folder `checkpoint-N`. It is written under another name, flushed and renamed, so
that a process killed while writing leaves nothing that could be taken for whole. It carries the
checksums of its files, so that what a disk did to it later is noticed before a run goes on from it.
Draws derive from the seed and the position, so no generator is saved.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dojo import files
from dojo.cli import TrainingStopped, UserError
from dojo.files import outputs
from dojo.files.records import DamagedFile, read_table
from dojo.files.tensors import obey_umask
from dojo.lazy import safetensors_torch, torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.lr_scheduler import LRScheduler

_NAME = re.compile(r"checkpoint-(\d+)")
CHECKSUMS = "checksums.json"
_CHUNK = 2**24  # bytes that are hashed at a time


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    step: int
    """optimizer steps done"""
    samples: int
    """samples used so far, over all processes (steps that fp16 skipped used some too)"""
    seed: int
    batch_size: int
    """samples per optimizer step over all processes"""
    data: str
    """fingerprint of the training samples in their order"""
    loss_sum: float = 0.0
    """loss since the last logged step, so that a resumed run logs the same averages"""
    loss_count: int = 0
    means: dict[str, tuple[float, int]] = field(default_factory=dict)
    """the other averages likewise: sum and count by name"""
    peaks: dict[str, float] = field(default_factory=dict)
    """the largest values likewise"""
    micro_batch: int = 0
    """samples of a micro-batch over all processes; 0 is unknown, below likewise"""
    together: dict[str, int] = field(default_factory=dict)
    """batches, over all processes, on whose size the numbers hang: by option"""
    lr_start: int = 0
    """optimizer step at which the learning rate's schedule began"""
    lr_steps: int = 0
    """optimizer steps that it spans"""


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder and gives it its name only when every byte is on the disk.

    Raises:
        TrainingStopped: the disk is full.
    """
    temporary = begin(folder)
    with files.room_in(folder.parent):
        write(temporary)
    seal(temporary, folder)


def begin(folder: Path) -> Path:
    """An empty folder to be filled, which `seal` will give its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    outputs.own_folder(folder)
    temporary = partial_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def partial_name(folder: Path) -> Path:
    """What a folder is called while it is filled."""
    return folder.with_name(f".{folder.name}.partial")


def seal(temporary: Path, folder: Path) -> None:
    """Gives a filled folder its name, when every byte is on the disk."""
    for path in [*temporary.rglob("*"), temporary]:
        if path.suffix == ".safetensors":
            obey_umask(path)
        _flush(path)
    if folder.exists():
        _remove(folder)
    for path in temporary.rglob("*"):
        if path.is_file():
            outputs.own(folder / path.relative_to(temporary))
    temporary.rename(folder)
    _flush(folder.parent)


def write_file(path: Path, text: str) -> None:
    """Replaces a small text file as a whole."""
    outputs.own(path)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    files.flush(path)


def _remove(folder: Path) -> None:
    """Takes the name away first: a half-deleted checkpoint must not be found."""
    outputs.rescue(folder)
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def existing(output_dir: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run with their steps, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def choose(output_dir: Path, request: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None starts from zero.

    Args:
        request: None, `latest`, `checkpoint-N`, or a path to one.
    Raises:
        UserError: a named checkpoint is not there.
    """
    if request is None:
        return None
    found = existing(output_dir)
    if request == "latest":
        return found[-1][1] if found else None
    for path in (output_dir / request, Path(request)):
        if path.is_dir() and _NAME.fullmatch(path.name):
            return path
    there = ", ".join(path.name for _, path in found) or "none"
    raise UserError(f"--resume_from_checkpoint: there is no {request} in {output_dir} ({there})")


def rotate(output_dir: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints over `--checkpoints_total_limit`, and what a kill left."""
    if limit is not None:
        for _, path in existing(output_dir)[: -limit or None]:
            _remove(path)
    for leftover in output_dir.glob(".checkpoint-*.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def forget_after(output_dir: Path, step: int) -> None:
    """Removes the checkpoints of later steps, and the mark of a run that was finished there."""
    (output_dir / "finished.json").unlink(missing_ok=True)
    for later, path in existing(output_dir):
        if later > step:
            _remove(path)


def save_training(folder: Path, state: State, schedule: LRScheduler, scaler: Any | None) -> None:
    """Writes where the run stands into a folder: everything but weights and optimizer."""
    torch.save(schedule.state_dict(), folder / "schedule.pt")
    if scaler is not None:
        (folder / "scaler.json").write_text(json.dumps(scaler.state_dict()))
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))


def read_state(folder: Path) -> State:
    """Reads where a checkpoint stands.

    Raises:
        UserError: a part is missing or damaged.
    """
    for part in ("state.json", "schedule.pt"):
        _require(folder, part)
    with reading(folder):
        table = read_table(folder / "state.json")
        whole = [field.name for field in fields(State) if field.type in ("int", int)]
        if any(type(table.get(name)) is not int for name in whole):
            raise ValueError(f"state.json lacks one of {', '.join(whole)}")
        return State(**table)


def load_part(folder: Path, name: str) -> dict[str, Tensor]:
    """Reads a safetensors file of a checkpoint.

    Raises:
        UserError: it is missing.
    """
    _require(folder, name)
    return safetensors_torch.load_file(folder / name)


def _require(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise damaged(folder, f"{name} is missing")


def save_optimizer(folder: Path, saved: Mapping[str, Any]) -> None:
    """Writes an optimizer's state."""
    torch.save(saved, folder / "optimizer.pt")


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Reads an optimizer's state; it moves that to where its weights are.

    Raises:
        UserError: it is missing.
    """
    _require(folder, "optimizer.pt")
    return torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)


def load_training(folder: Path, schedule: LRScheduler, scaler: Any | None) -> None:
    """Puts everything but weights and optimizer back.

    Raises:
        UserError: the checkpoint was made under fp16 and the run is not, or the reverse.
    """
    made = torch.load(folder / "schedule.pt", map_location="cpu", weights_only=True)
    schedule.load_state_dict(made)
    saved = folder / "scaler.json"
    if saved.is_file() != (scaler is not None):
        raise UserError(f"{folder}: --mixed_precision fp16 must be the same when a run goes on")
    if scaler is not None:
        scaler.load_state_dict(read_table(saved))


# -- damage -----------------------------------------------------------------------------------


def add_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes the checksums of all files of a checkpoint beside them, as its last part.

    xxHash's 128 bits tell a flipped bit, not a forger, and cost little beside the writing.

    Args:
        known: those that other processes have found, of files that they wrote.
    """
    sums = dict(known or {})
    for path in _files(folder):
        name = str(path.relative_to(folder))
        sums[name] = sums.get(name) or _checksum(path)
    text = json.dumps({"xxh3_128": dict(sorted(sums.items()))}, indent=1)
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def check_whole(folder: Path, process: int = 0, num_processes: int = 1) -> bool:
    """Reads a checkpoint and compares it with its checksums; files beside these are not minded.

    Args:
        process: this one, where several share the reading.
    Returns:
        False where it carries none: it was made before there were any.
    Raises:
        UserError: it is not as it was written; the message names the one before it.
    """
    fault = _fault(folder, slice(process, None, num_processes))
    if fault:
        raise damaged(folder, fault)
    return (folder / CHECKSUMS).is_file()


def damaged(folder: Path, why: str) -> UserError:
    """What is wrong with a checkpoint, and the last one before it that is whole, as an error."""
    name = _NAME.fullmatch(folder.name)
    step = int(name[1]) if name else 0
    before = [path for number, path in existing(folder.parent) if number < step]
    whole = next((path for path in reversed(before) if not _fault(path)), None)
    advice = "there is none before it: start again with --overwrite_output_dir"
    if whole is not None:
        advice = f"go on from the one before it: --resume_from_checkpoint {whole}"
    return UserError(f"{folder} is no complete checkpoint: {why}; {advice}")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """What goes wrong inside, while a checkpoint is read, is laid to its damage.

    Raises:
        UserError: naming the checkpoint and the one before it.
    """
    try:
        yield
    except (TrainingStopped, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # every reader has its own kinds
        if isinstance(error, UserError) and not isinstance(error, DamagedFile):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise damaged(folder, f"it cannot be read ({lines[0][:300]})") from error


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if path != folder / CHECKSUMS]


def _checksum(path: Path) -> str:
    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def settled(path: Path) -> str:
    """The checksum of a file whose bytes are on the disk then."""
    _flush(path)
    return _checksum(path)


def _fault(folder: Path, share: slice = slice(None)) -> str:
    """What is not as it was written, in words; nothing where all is, or nothing is known.

    Args:
        share: of the files, which are looked at.
    """
    if not (folder / CHECKSUMS).is_file():
        return ""
    try:
        sums = read_table(folder / CHECKSUMS)["xxh3_128"]
        for name, expected in [*sums.items()][share]:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _checksum(folder / name) != expected:
                return f"{name} is not as it was written (its checksum differs)"
    except (OSError, UserError, KeyError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return ""


# -- the same run -----------------------------------------------------------------------------


def check_same_run(folder: Path, saved: State, now: State) -> None:
    """Refuses to go on with other data, seed or batch: the result would be neither run's.

    The number of processes may change as long as the samples per step stay the same.

    Raises:
        UserError: naming what differs.
    """
    for name, advice in (
        ("seed", "the --seed"),
        ("batch_size", "the samples per step (batch size, accumulation, processes)"),
        ("data", "the training data (pictures, captions, resolution)"),
    ):
        if getattr(saved, name) != getattr(now, name):
            raise UserError(
                f"{folder} was made with another value of {advice}: "
                f"{getattr(saved, name)}, now {getattr(now, name)}; start a new --output_dir"
            )


def check_batches(folder: Path, saved: State, now: State, processes: int) -> None:
    """Refuses to go on with other batches than those on which the numbers hang.

    Args:
        processes: how many there are now.
    Raises:
        UserError: saying with which options it could go on.
    """

    def fitting() -> str:
        return _batches_of(saved, processes)

    if saved.batch_size != now.batch_size:
        raise UserError(
            f"{folder} was made with another number of samples per step (batch size, "
            f"accumulation, processes): {saved.batch_size}, now {now.batch_size}; {fitting()}"
        )
    for name, then in saved.together.items():
        if now.together.get(name, then) != then:
            raise UserError(
                f"{folder} was made with batches of {then} samples over all processes "
                f"(--{name}), now {now.together[name]}: other numbers would come out; {fitting()}"
            )
    if saved.data != now.data and saved.micro_batch not in (0, now.micro_batch):
        raise UserError(
            f"{folder} was made from other data, or its pictures of several sizes were dealt "
            f"into batches of {saved.micro_batch} over all processes, now {now.micro_batch}; "
            f"with the same data, {fitting()}"
        )


def _batches_of(saved: State, processes: int) -> str:
    """The options with which a checkpoint goes on with as many processes as there are now."""
    whole = saved.batch_size
    together = {"train_batch_size": saved.micro_batch or whole, **saved.together}
    if any(size % processes for size in together.values()):
        fitting = [n for n in range(1, whole + 1) if not any(v % n for v in together.values())]
        return (
            f"with {processes} processes it cannot go on exactly, with "
            f"{' or '.join(map(str, fitting))} it can"
        )
    flags = [f"--{name} {size // processes}" for name, size in together.items()]
    flags.append(f"--gradient_accumulation_steps {whole // together['train_batch_size']}")
    several = "1 process" if processes == 1 else f"{processes} processes"
    return f"{' '.join(flags)} on {several} goes on exactly"
