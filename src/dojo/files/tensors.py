"""safetensors files, written tensor by tensor, whole or not at all, equal weights as equal bytes.

The safetensors library wants every tensor in memory at once, orders the header's free text at
random and writes under the final name. The format is simple: 8 bytes of header length, a JSON
header padded with spaces, the tensors' bytes (little-endian, row-major).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from safetensors import SafetensorError, safe_open

from dojo import files
from dojo.lazy import torch

# Makes a tensor on a device: "meta" to learn its size, "cpu" when its turn to be written comes.
Source: TypeAlias = "Callable[[str], torch.Tensor]"

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


def save(
    path: Path,
    tensors: Mapping[str, torch.Tensor] | Mapping[str, Source],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a .safetensors file; a process killed meanwhile leaves nothing under its name.

    Args:
        tensors: by name; as sources they are made one at a time.
        metadata: free text for the header.
    """

    def make(name: str, device: str) -> torch.Tensor:
        entry = tensors[name]
        return (entry.to(device) if isinstance(entry, torch.Tensor) else entry(device)).detach()

    empty = {name: make(name, "meta") for name in tensors}
    # Large elements first, as the library does: every tensor is then aligned.
    order = sorted(empty, key=lambda name: (-empty[name].itemsize, name))
    header: dict[str, Any] = {
        "__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))
    }
    end = 0
    for name in order:
        tensor = empty[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _CODES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with files.whole(path) as file:  # runs may share a cache
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = make(name, "cpu").contiguous()
            if tensor.shape != empty[name].shape or tensor.dtype != empty[name].dtype:
                raise ValueError(f"{name} is {tensor.shape}, announced as {empty[name].shape}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Name to `{"dtype", "shape", "data_offsets"}` (offsets from the file's start), and free text.

    Raises:
        ValueError: the file is no whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # the library checks header, sizes and overlaps
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata: dict[str, str] = header.pop("__metadata__", {})
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header, metadata


def read_tensor(file: BinaryIO, entry: Mapping[str, Any]) -> torch.Tensor:
    """One tensor of an open safetensors file, in its own precision and memory.

    Unlike the library's it is not mapped: pages of a mapped file count as a process's memory, and
    stay in it.

    Args:
        entry: as `read_header` has it.
    Raises:
        ValueError: its precision is none that is read here, or the file ends too early.
    """
    kind = _dtype(entry["dtype"])
    begin, end = entry["data_offsets"]
    data = torch.empty(end - begin, dtype=torch.uint8)
    file.seek(begin)
    if file.readinto(data.numpy()) != end - begin:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("the file ends too early")
    return data.view(kind).reshape(entry["shape"])


def read_part(file: BinaryIO, entry: Mapping[str, Any], place: Sequence[int]) -> bytearray:
    """The bytes at a place of the first axes of a tensor; nothing else is read.

    Args:
        entry: as `read_header` has it.
    Raises:
        IndexError: there is no such place.
        ValueError: as for `read_tensor`.
    """
    shape, (begin, _) = entry["shape"], entry["data_offsets"]
    number = 0
    for index, length in zip(place, shape, strict=False):
        if not 0 <= index < length:
            raise IndexError(f"there is no row {index} among {length}")
        number = number * length + index
    size = math.prod(shape[len(place) :]) * _dtype(entry["dtype"]).itemsize
    data = bytearray(size)
    file.seek(begin + number * size)
    if file.readinto(data) != size:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("the file ends too early")
    return data


def from_part(data: bytearray, entry: Mapping[str, Any], place: Sequence[int]) -> torch.Tensor:
    """The tensor of what `read_part` has read, in its memory."""
    kind, shape = _dtype(entry["dtype"]), entry["shape"][len(place) :]
    return (torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)).view(shape)


@cache
def _dtype(code: str) -> torch.dtype:
    names = {code: name for name, code in _CODES.items()}
    if code not in names:
        raise ValueError(f"{code} is not read here")
    return getattr(torch, names[code])


def obey_umask(path: Path) -> None:
    """Gives a file the permissions of any new file.

    safetensors 0.8 writes for the owner's eyes only, which shuts a machine's other users out.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
