"""The machine that a run is on: its memory, its name, how fast it could be."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil

from dojo.lazy import torch

# Dense bfloat16 peak in FLOP/s by the device's name (vendors' data sheets), for the utilisation; of
# the names that stand in a device's, the longest counts.
PEAK_FLOPS = {
    **{"GH200": 989e12, "H200": 989e12, "H200 NVL": 835e12},
    **{"H100": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12},
    **{"A100": 312e12, "L40S": 362e12, "4090": 165e12},
}
# A part of a card, or a smaller one of its name: their peaks are not in the table.
_PARTS = ("MIG", "GRID", "Laptop", "4090 D")


def peak_memory_gib(device: torch.device) -> float:
    """Peak of allocated GPU memory, or of the process's resident memory without a GPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def used_memory_gib(device: torch.device) -> float:
    """Allocated GPU memory, or the process's resident memory without a GPU, in GiB, now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def device_name(device: torch.device) -> str:
    """The GPU's name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def threads_beside(main: torch.device, device: torch.device) -> int | None:
    """On how many threads a network computes on the CPU while all else does on a GPU.

    Launchers set OMP_NUM_THREADS=1, for a process that leaves its arithmetic to a GPU. Here every
    process of this machine gets its share of the cores; a larger number is the user's, and stays.

    Args:
        main: where the run computes.
        device: where this network does.
    Returns:
        None where threads are to stay as they are: all of the run is on the CPU, or none of it.
    """
    if device.type != "cpu" or main.type == "cpu":
        return None
    if os.environ.get("OMP_NUM_THREADS", "1") not in ("", "1"):
        return None
    return max(1, _usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _usable_cores() -> int:
    """Of this machine, those that the process may run on; two threads of one core count once."""
    linux = sys.platform == "linux"
    usable = len(psutil.Process().cpu_affinity() or ()) if linux else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


@contextmanager
def on_threads(number: int | None) -> Iterator[None]:
    """Computes inside on so many threads of the CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def arithmetic(device: torch.device, threads: int | None = None) -> dict[str, str]:
    """What, besides a network and its input, decides the last bits of what is computed here.

    On a CPU the threads share a sum out among them, so their number decides how it is rounded. It
    belongs into the fingerprint of every cache: a run of one thread would leave numbers that a run
    of two does not make. On a GPU TensorFloat-32 has other digits than float32, of which parts of a
    network in half precision may have some too.

    Args:
        threads: on which a CPU computes; None is as many as now.
    """
    if device.type == "cuda":
        backends = torch.backends
        tf32 = backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32
        return {"tf32": "yes"} if tf32 else {}
    return {"device": device.type, "threads": str(threads or torch.get_num_threads())}


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a known whole GPU, in FLOP/s."""
    name = device_name(device)
    if _stands_in(name, _PARTS):
        return None
    known = _stands_in(name, PEAK_FLOPS)
    return PEAK_FLOPS[max(known, key=len)] if known else None


def _stands_in(name: str, words: Iterable[str]) -> list[str]:
    """Those that stand in a name as whole words: an RTX A1000 is no A100."""
    return [one for one in words if re.search(rf"\b{re.escape(one)}\b", name)]
