"""Where weights lie and how they are read: safetensors, or pickles of tensors and nothing else.

A model is named by a local path or by its id on the hub, "owner/name"; a single file by a path or
by "owner/name/file". What `python -m dojo.download` has put into models/ is taken before the hub.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from dojo.cli import UserError
from dojo.lazy import safetensors_torch, torch
from dojo.models import loaded

MODELS = Path("models")
_ZIP = b"PK\x03\x04"  # how a file begins that torch.save writes by default
_OLD_PICKLES = 5  # of the old form: magic number, version, system, content, keys of the storages


def locate(model: str) -> str:
    """A local folder if there is one, else the id itself, for `from_pretrained`."""
    for path in (Path(model), MODELS / Path(model).name):
        if path.is_dir():
            return str(path)
    return model


def folder(model: str, *patterns: str) -> Path:
    """The folder of a model; of one on the hub, what `patterns` match is fetched.

    Raises:
        UserError: it is neither here nor there.
    """
    local = Path(locate(model))
    if local.is_dir():
        return local
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise missing(model, error) from error


def file(name: str) -> Path:
    """A single file: "path", "owner/name/file" or, under models/, "name/file" or "file".

    Raises:
        UserError: it is neither here nor on the hub.
    """
    if (path := _file_here(name)) is not None:
        return path
    parts = Path(name).parts
    if len(parts) < 3 or Path(name).is_absolute():
        raise UserError(f"--reward: there is no file {name}, nor one of this name in {MODELS}/")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except (OSError, ValueError) as error:
        raise missing(name, error) from error


def _file_here(name: str) -> Path | None:
    parts = Path(name).parts
    places = (Path(name), MODELS.joinpath(*parts[-2:]), MODELS / parts[-1])
    return next((path for path in places if path.is_file()), None)


def files_here(name: str) -> list[Path]:
    """The files that a name stands for on this machine, those of the hub's cache left out."""
    if (path := _file_here(name)) is not None:
        return [path]
    return [path for path in sorted(Path(locate(name)).rglob("*.*")) if path.is_file()]


def missing(name: str, error: Exception) -> UserError:
    """What is said of a model that cannot be read."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"--reward: {name} cannot be read ({lines[0]})")


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file, on the CPU.

    A file that holds them under "state_dict" is unpacked. Nothing in a file is run.

    Raises:
        UserError: it is damaged, or it holds more than tensors.
    """
    return _read(path, ())


class _Inert:
    """Stands for whatever a file names: takes everything, does nothing."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """As `read`, of a checkpoint that a training program wrote.

    Beside the tensors under "state_dict" lie its records, which name classes that are not here or
    must not be trusted. For each of them something is put that does nothing.

    Raises:
        UserError: it is damaged, or its "state_dict" holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return _read(path, ())
        names = _globals(path)
    except UserError:
        raise
    except Exception as error:  # the library has many kinds of them
        raise missing(str(path), error) from error
    return _read(path, names)


def _globals(path: Path) -> Sequence[str]:
    """The names of classes and functions in a checkpoint, of either form, without running it.

    They may be among those that torch knows as safe; it prefers its own to what is put for them.
    """
    with path.open("rb") as opened:
        if opened.read(len(_ZIP)) == _ZIP:
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
        opened.seek(0)
        told = [step for _ in range(_OLD_PICKLES) for step in pickletools.genops(opened)]
    names = [str(argument) for opcode, argument, _ in told if opcode.name == "GLOBAL"]
    return sorted(set[str]().union(*map(_spelled, names)))


def _spelled(name: str) -> set[str]:
    """A pickle's "module name" as "module.name": as it is and, if Python 2 called it so, as now.

    Torch renames some and not others.
    """
    module, _, attribute = name.partition(" ")
    new = _compat_pickle.IMPORT_MAPPING.get(module, module), attribute
    new = _compat_pickle.NAME_MAPPING.get((module, attribute), new)
    return {f"{module}.{attribute}", ".".join(new)}


def _read(path: Path, inert: Sequence[str]) -> dict[str, torch.Tensor]:
    """Reads a file; `inert` are the names in it for which something is put that does nothing."""
    stand_ins: Any = [(_Inert, name) for name in inert]
    try:
        if path.suffix == ".safetensors":
            return safetensors_torch.load_file(path)
        with torch.serialization.safe_globals(stand_ins):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two libraries have many kinds of them
        raise missing(str(path), error) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(t, torch.Tensor) for t in tensors.values()
    ):
        raise UserError(f"--reward: {path} holds no named tensors")
    return tensors


def read_folder(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and the tensors of a folder in the layout of transformers."""
    config = loaded.read_json(path / "config.json", f"--reward: {path}")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return config, read(path / name)
    raise UserError(f"--reward: {path} has neither model.safetensors nor pytorch_model.bin")


def fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Puts tensors into a network; every weight must be there, finite, and nothing over.

    Raises:
        UserError: naming what does not fit.
    """
    loaded.check_finite(tensors, f"--reward: {name}")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"--reward: {name} holds other weights than expected: {lines}") from error
