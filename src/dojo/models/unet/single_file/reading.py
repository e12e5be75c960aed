"""A file of tensors, opened: safetensors, or a pickle of tensors and nothing else.

A pickle may run any program when it is read: only `weights_only=True` is ever used, which refuses
what is no tensor, number or text.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dojo.cli import UserError
from dojo.files import tensors
from dojo.lazy import torch

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def _dtype(code: str) -> torch.dtype | None:
    return getattr(torch, _DTYPES[code]) if code in _DTYPES else None


@dataclass(frozen=True)
class Entry:
    """A tensor of a file without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None of numbers that are no floating-point ones: counts, quantised weights"""
    place: tuple[int, int] | None = None
    """where its bytes begin and end in a safetensors file"""


@dataclass(frozen=True)
class Contents:
    """What a file holds: its tensors by name, and the free text of its header."""

    path: Path
    entries: Mapping[str, Entry] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """Gives what reads a tensor by its name, as long as the file is open."""
        if self.path.suffix in PICKLES:
            yield unpickle(self.path, "").__getitem__
            return
        with safe_open(self.path, framework="pt") as file:
            yield file.get_tensor

    def beginnings(self, names: Iterable[str], size: int) -> Iterator[bytes]:
        """The first `size` bytes of tensors, without reading the rest of them."""
        if self.path.suffix in PICKLES:
            held = unpickle(self.path, "")
            for name in names:
                yield _bytes(held[name].reshape(-1)[:size])[:size]
            return
        with self.path.open("rb") as file:
            for name in names:
                start, end = self.entries[name].place or (0, 0)
                file.seek(start)
                yield file.read(min(end - start, size))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def read(path: Path, flag: str) -> Contents:
    """The names, sizes and types of a file's tensors; the numbers stay where they are.

    Args:
        flag: what the user named it with.
    Raises:
        UserError: it is missing, broken, or a pickle of more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    if path.suffix in PICKLES:
        held = unpickle(path, flag)
        entries = {
            name: Entry(tuple(one.shape), one.dtype if one.is_floating_point() else None)
            for name, one in held.items()
        }
        return Contents(path, entries, {})
    try:
        header, metadata = tensors.read_header(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag}: {path} is no whole safetensors file ({reason})") from error
    entries = {
        name: Entry(tuple(one["shape"]), _dtype(one["dtype"]), tuple(one["data_offsets"]))
        for name, one in header.items()
    }
    return Contents(path, entries, metadata)


def unpickle(
    path: Path, flag: str, inside: Sequence[str] = ("state_dict",), safe: Sequence[Any] = ()
) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, mapped from the file where its format allows that.

    Args:
        flag: what the user named it with.
        inside: under which of these names they may lie in it; the first that is there counts.
        safe: classes of plain values that it may hold beside them.
    Raises:
        UserError: it is broken, or holds more than that.
    """
    try:
        with torch.serialization.safe_globals(list(safe)):
            held = _load(path, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{flag}: {path} holds more than tensors, and to read that could run any program: "
            "it is not read; take the model's .safetensors file, or convert this one with a "
            f"program that you trust it to ({_first(error)})"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{flag}: {path} is no whole file of weights ({_first(error)})") from error
    if not isinstance(held, Mapping):
        raise UserError(f"{flag}: {path} holds no table of tensors")
    table = next((held[name] for name in inside if isinstance(held.get(name), Mapping)), held)
    return {str(name): one for name, one in table.items() if isinstance(one, torch.Tensor)}


def _load(path: Path, *, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except RuntimeError:
        if not mmap:
            raise
        return _load(path, mmap=False)  # files of torch before 1.6 cannot be mapped


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
