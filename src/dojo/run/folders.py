"""The output folder: whose it is, the record args.json of the run in it, what may change in it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError, incidental_options, masking
from dojo.cli.masking import hide
from dojo.files import outputs, records
from dojo.run import checkpoint, machine
from dojo.run.processes import Processes
from dojo.run.renamed import as_named_now

if TYPE_CHECKING:
    import accelerate


def take(folder: Path, *, overwrite: bool) -> None:
    """Makes the folder this process's.

    Raises:
        UserError: it holds a user's files, another run's checkpoints, or another process is at
            work in it.
    """
    held = outputs.claim(folder, "run", overwrite=overwrite)
    found = [path.name for _, path in checkpoint.existing(folder)]
    foreign = [name for name in found if not held.lists(f"{name}/state.json")]
    if overwrite and foreign:
        outputs.release(folder)
        raise UserError(
            f"--output_dir {folder}: {', '.join(foreign)} was not written by a run in this folder, "
            "so --overwrite_output_dir leaves it, and it would be taken for the new run's: move it"
        )


@dataclass(frozen=True)
class Found:
    """What an output folder holds of earlier runs."""

    folder: Path
    origin: Path
    """folder of the run that goes on: a checkpoint may come from another one"""
    occupied: bool
    changed: Sequence[str]
    """what differs from the options of that run, in words"""
    finished: bool
    """the run that is wanted is over"""
    num_steps: int
    """of the run that is wanted"""

    @property
    def elsewhere(self) -> bool:
        """Whether the run that goes on lies in another folder."""
        return self.origin.resolve() != self.folder.resolve()

    @property
    def nothing_to_do(self) -> str:
        """What is said of a finished run."""
        return (
            f"{self.folder} is finished ({self.num_steps} steps): nothing to do "
            f"(to upload it: python -m dojo.publish {self.folder})"
        )

    def refuse_changed(self) -> None:
        """Refuses to go on with other options.

        Raises:
            UserError: naming them.
        """
        if self.changed:
            raise UserError(
                f"--output_dir {self.origin} holds a run with other options: "
                f"{'; '.join(self.changed)}; continue it with its own, or choose another folder"
            )

    def refuse_occupied(self) -> None:
        """Refuses to begin where another run lies.

        Raises:
            UserError: one does.
        """
        if self.occupied:
            raise UserError(
                f"--output_dir {self.folder} holds a run already: continue it with "
                "--resume_from_checkpoint latest, replace it with --overwrite_output_dir, or "
                "choose another folder"
            )

    def refuse_other(self, checkpoint: Path) -> None:
        """Refuses to go on from a run's checkpoint where another run lies, which it would replace.

        Raises:
            UserError: one does.
        """
        if self.occupied and self.elsewhere:
            raise UserError(
                f"--output_dir {self.folder} holds a run already, and --resume_from_checkpoint "
                f"{checkpoint} is another's: choose another folder, or continue the one that is "
                "there with --resume_from_checkpoint latest"
            )


def look(
    args: Any, result: str, resumed: Path | None, num_steps: int, processes: Processes
) -> Found:
    """What lies in the folder, compared with the options given now.

    Args:
        args: the script's options.
        result: file or folder that a finished run has.
        resumed: the checkpoint that the run goes on from.
        num_steps: the run's length.
    Raises:
        UserError: the run would read its model from the folder, or a record is damaged.
    """
    folder = args.run.output_dir
    _refuse_own_sources(folder, args)
    marker = folder / "finished.json"
    ended, early = _finished_at(marker, processes.say)
    if early is not None and early == args.run.patience:
        num_steps = min(num_steps, int(ended))
    done = ended >= num_steps
    fresh = args.run.overwrite_output_dir
    occupied = marker.is_file() or bool(checkpoint.existing(folder))
    origin = resumed.parent if resumed else folder
    changed, precision = [], processes.accelerator.mixed_precision
    if (occupied or resumed) and not fresh:
        changed = _changed_options(origin, args, precision)
    finished = done and not changed and (folder / result).exists() and not fresh
    if finished and origin != folder:  # it is the folder's own run that is over
        finished = not _changed_options(folder, args, precision)
    return Found(folder, origin, occupied and not fresh, changed, finished, num_steps)


def _finished_at(marker: Path, say: Callable[[str], None]) -> tuple[float, str | None]:
    """The step at which an earlier run was finished, -1 where none was; and, if it ended early,
    what it was told of that."""
    if not marker.is_file():
        return -1, None
    with suppress(UserError, KeyError, TypeError, ValueError):
        table = records.read_table(marker)
        return float(table["step"]), table.get("early")
    say(f"{marker} is damaged: the run is taken for unfinished")
    return -1, None


def clear(folder: Path, say: Callable[[str], None]) -> None:
    """Removes what runs wrote into the folder, and nothing else that may lie in it."""
    held = outputs.claim(folder, "run")
    held.remove()
    held.start_list()
    if left := outputs.others(folder):
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        say(f"{folder}: no run wrote these files, so they stay: {shown}")


def write_finished(folder: Path, step: int, early: str | None = None) -> None:
    """Marks the run as over.

    Args:
        early: if it ended before its last step, what it was told of that.
    """
    record = {"step": step, **({} if early is None else {"early": early})}
    checkpoint.write_file(folder / "finished.json", json.dumps(record))


def recorded_seed(folder: Path) -> int | None:
    """The seed of a run that was killed before its first checkpoint, where args.json has one.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "args.json"
    seed = _options_of(path).get("seed") if path.is_file() else None
    return seed if type(seed) is int else None


def _refuse_own_sources(folder: Path, args: Any) -> None:
    """A run must not write into the folder that it reads its model from.

    Raises:
        UserError: it would.
    """
    names = ("pretrained_model_name_or_path", "single_file_config", "init_lora_weights_path")
    groups = [vars(group) for group in vars(args).values()]
    for name, value in [(name, group.get(name)) for group in groups for name in names]:
        path = Path(value).expanduser().resolve() if value else None
        if path and path.exists() and folder.resolve() in (path, path.parent):
            raise UserError(
                f"--output_dir {folder}: the run would overwrite its own --{name}; choose another "
                "folder"
            )


def options(args: Any) -> dict[str, Any]:
    """The resolved options by group, ready for JSON; tokens and secrets of addresses stay out."""

    return _plain(asdict(args))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(item) for k, item in value.items() if not masking.is_secret(k)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return hide(str(value)) if isinstance(value, str | Path) else value


def write_record(
    folder: Path, args: Any, seed: int, num_steps: int, accelerator: accelerate.Accelerator
) -> None:
    """Writes args.json: options, seed, processes, git revision, versions.

    Args:
        num_steps: for who watches; the options may say epochs.
    """
    found = record(args, seed, accelerator) | {"num_steps": num_steps}
    checkpoint.write_file(folder / "args.json", json.dumps(found, indent=1, ensure_ascii=False))


def record(args: Any, seed: int, accelerator: accelerate.Accelerator) -> dict[str, Any]:
    """What a run is known by: options, seed, processes, git revision, versions."""
    return {
        "script": Path(sys.argv[0]).name,
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "args": options(args),
        "seed": seed,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "mixed_precision_from": _precision_from(args),
        "device": machine.device_name(accelerator.device),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("sd-dojo", "torch", "diffusers", "transformers", "accelerate", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _changed_options(folder: Path, args: Any, mixed_precision: str) -> list[str]:
    """What differs from the options of the run in `folder`, in words."""
    path = folder / "args.json"
    if not path.is_file():
        return []

    # Data, seed, the schedule's length and the sizes of batches have checks of their own.
    incidental = incidental_options(vars(args))

    def essential(groups: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for group, values in groups.items()
            if isinstance(values, dict)
            for name, value in values.items()
            if f"{group}.{name}" not in incidental
        }

    record = _options_of(path)
    # As accelerate resolved it: its configuration may have changed while the flag did not.
    then = as_named_now(essential(record["args"]))
    then["mixed_precision"] = record["mixed_precision"]
    now = {**essential(options(args)), "mixed_precision": mixed_precision}
    names = sorted(then.keys() | now.keys())
    # A run from before an option was there did what its default says.
    usual = {field.name: field.default for group in vars(args).values() for field in fields(group)}
    then = {**{name: _plain(usual.get(name)) for name in now}, **then}
    changed = {name: (then.get(name), now.get(name)) for name in names}
    whence = {"mixed_precision": (_whence(record), f" ({_precision_from(args)})")}
    return [
        f"--{name} was {old}{whence.get(name, ('', ''))[0]}, now {new}"
        f"{whence.get(name, ('', ''))[1]}"
        for name, (old, new) in changed.items()
        if old != new
    ]


def _options_of(path: Path) -> dict[str, Any]:
    """What args.json says.

    Raises:
        UserError: it is damaged.
    """
    advice = (
        ": whether the run's options are still the same cannot be told; remove it to go on with "
        "those that are given now"
    )
    table = json.loads(hide(json.dumps(records.read_table(path, advice))))  # older: passwords
    if not isinstance(table.get("args"), dict) or "mixed_precision" not in table:
        raise UserError(f"{path} is damaged (it holds no options){advice}")
    return table


def _precision_from(args: Any) -> str:
    """What settled the precision: the flag, or what accelerate launch puts into the environment."""
    if args.run.mixed_precision is not None:
        return "by the flag"
    if os.environ.get("ACCELERATE_MIXED_PRECISION"):
        return "by accelerate's configuration"
    return "by default: python and torchrun read no configuration of accelerate's"


def _whence(record: Mapping[str, Any]) -> str:
    words = record.get("mixed_precision_from")
    return f" ({words})" if words else ""
