"""Processes of their own: as a user starts them, or forked from one that has imported all."""

import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dojo.data import shards
from dojo.maths import rollout
from dojo.run import checkpoint
from dojo.run.learner import Learner
from tests.conftest import ROOT

# -- as a user starts them ----------------------------------------------------------------------

# Runs a training script as a user would.
_DEADLY = """
import os, sys
sys.path.insert(0, {root!r})
from dojo.data import shards
from tests.processes import Death, _run, prepare

shards.SHARD_SIZE = int(os.environ.get("SHARD_SIZE", shards.SHARD_SIZE))
if place := os.environ.get("DIE_AT"):
    prepare(Death(place=place, count=int(os.environ["DIE_COUNT"])))
_run(sys.argv[1], sys.argv[2:])
"""


def launch(
    script: str, flags: Sequence[str], folder: Path, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Starts a training script in processes of its own.

    DIE_AT and DIE_COUNT kill it with SIGKILL at that call: place and count of a `Death`. With a
    SHARD_SIZE of 2 its ten pictures make several files.
    """
    wrapper = folder / "deadly.py"
    folder.mkdir(exist_ok=True, parents=True)
    wrapper.write_text(_DEADLY.format(root=str(ROOT)))
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        python += ["--master_port", str(random.randint(20_000, 50_000))]
    return subprocess.run(
        [*python, str(wrapper), script, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


# -- forked from a server that has imported what takes seconds ----------------------------------

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.preloaded"])
_USUAL = multiprocessing.get_all_start_methods()[0]  # the platform's own


def _start_server() -> None:
    """Starts what is forked from, once; its hashes are others than this process's."""
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is not None:  # unset: both are random
        os.environ["PYTHONHASHSEED"] = "2" if seed == "1" else "1"
    try:
        forkserver.ensure_running()
    finally:
        if seed is not None:
            os.environ["PYTHONHASHSEED"] = seed


@dataclass(frozen=True, kw_only=True)
class Death:
    """SIGKILL for a process at the so-many-th call of a place."""

    place: str
    """sample (of a batch), step (a backward pass), checkpoint (a file of it is flushed), cache (a
    file of it is written), class picture (one is written)"""
    count: int
    victim: int = 0
    """process to kill; 0 is the one that makes the call"""


def _deadly(function: Callable[..., Any], death: Death) -> Callable[..., Any]:
    calls = iter(range(1, 10**6))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # Other files are flushed by the same function.
        counts = death.place != "checkpoint" or ".checkpoint-" in str(args[0])
        if counts and next(calls) == death.count:
            os.kill(death.victim or os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapper


_PLACES: dict[str, tuple[Any, str]] = {
    "sample": (rollout, "sample"),
    "step": (Learner, "step"),
    "checkpoint": (checkpoint, "_flush"),
    "cache": (shards.tensors, "save"),
    "class picture": (Image.Image, "save"),
}


def _begin(
    work: Callable[..., object],
    arguments: Sequence[Any],
    log: Path,
    environment: dict[str, str],
    death: Death | None,
) -> None:
    """In the new process: works as one that was started with this environment."""
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    # Or its workers would be forked from one more process that first imports everything.
    multiprocessing.set_start_method(_USUAL, force=True)
    if death is not None:
        prepare(death)
    work(*arguments)


def prepare(death: Death) -> None:
    """Puts a death in this process's way."""
    place, name = _PLACES[death.place]
    setattr(place, name, _deadly(getattr(place, name), death))


def _run(script: str, flags: Sequence[str]) -> None:
    """Runs a script or a module as a command line does."""
    sys.argv = [script, *flags]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def spawn(
    script: str,
    flags: Sequence[str],
    folder: Path,
    death: Death | None = None,
    processes: int = 1,
    **environment: str,
) -> tuple[int, str]:
    """Runs a script or a module in new processes, as `together` does."""
    return together(_run, (script, flags), folder, death, processes, **environment)


def together(
    work: Callable[..., object],
    arguments: Sequence[Any],
    folder: Path,
    death: Death | None = None,
    processes: int = 1,
    **environment: str,
) -> tuple[int, str]:
    """Works in new processes: the first exit code that is not 0, and what they said.

    Of several processes the last one dies.

    Args:
        environment: variables that they have beside this process's.
    """
    _start_server()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    log.write_text("")
    group: list[Any] = []
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    several |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    for rank in range(processes):
        own = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        last = rank == processes - 1
        rest = (log, {**environment, **own}, death if last else None)
        group.append(_forks.Process(target=_begin, args=(work, arguments, *rest)))
        group[-1].start()
    code = 0
    deadline = time.monotonic() + 400
    while code == 0 and any(one.is_alive() for one in group) and time.monotonic() < deadline:
        time.sleep(0.05)
        code = next((one.exitcode for one in group if one.exitcode), 0)
    for one in group:
        if one.is_alive():  # as torchrun does when another has died
            one.kill()
        one.join()
    return code or next((one.exitcode for one in group if one.exitcode), 0), log.read_text()


class Forked:
    """What a script is to whoever started it and watches: a Popen of one that was forked."""

    def __init__(self, words: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        """Starts `python SCRIPT FLAG ...`."""
        _start_server()
        self._log = folder / "log.txt"
        self._log.write_text("")
        python, script, *flags = words
        assert python == sys.executable
        arguments = (_run, (script, flags), self._log, environment, None)
        self._process = _forks.Process(target=_begin, args=arguments)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        if self._process.exitcode not in (None, 0):
            print(self._log.read_text(), file=sys.stderr)
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self.poll()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


@contextmanager
def served(reward: str, port: int, folder: Path) -> Iterator[Any]:
    """A reward server that answers: its process."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.txt"
    log.write_text("")
    flags = ["serve", reward, "--port", str(port), "--device", "cpu"]
    _start_server()
    server = _forks.Process(target=_begin, args=(_run, ("dojo.rewards", flags), log, {}, None))
    server.start()
    try:
        while "serving" not in log.read_text():
            assert server.is_alive(), log.read_text()
            time.sleep(0.05)
        yield server
    finally:
        server.kill()
        server.join()
