"""What asks a training to stop, to save or to show: signals, and files in its folder.

A signal is noticed by a thread and not by the code that trains, which may be waiting for another
process: so a second one ends a process in any case. Where nothing can be kept that is not on the
disk already, the first one does. Ending at once is what `kill -9` does, which harms nothing; it
only says more.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

from dojo import launch
from dojo.cli import TrainingStopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FILES = ("stop", "save", "sample")
# Seconds within which signals are one. The terminal's group, a scheduler and a launcher may all
# send what a user asked for once: torchrun passes a signal on to its processes as it comes.
SAME = 2.0
STOP_FILE_CODE = 130  # as Ctrl-C: a run that was stopped has no result, so not 0


class Interrupted(TrainingStopped):
    """A run that was asked to stop.

    Args:
        farewell: called when it is said, for it names what was kept on the way out.
    """

    def __init__(self, exit_code: int, farewell: Callable[[], str]) -> None:
        super().__init__()
        self.exit_code = exit_code
        self.farewell = farewell

    def __str__(self) -> str:
        return self.farewell()


class Watch:
    """What signals have told this process."""

    def __init__(self) -> None:
        self.command = launch.command()
        self.promise = ""  # what follows the first signal; empty: the end
        self.signal: signal.Signals | None = None  # the first one
        self._since = 0.0
        self._parent = os.getppid()
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        self.end: Callable[[int], object] = os._exit

    def take(self, number: int) -> None:
        """Takes one signal in."""
        if number not in SIGNALS:
            return
        caught, now = signal.Signals(number), time.monotonic()
        orphaned, self._parent = os.getppid() != self._parent, os.getppid()
        if caught == signal.SIGHUP:
            self._leave_terminal()
        if self.signal is None:
            self.signal, self._since = caught, now
            if self.promise:
                _print(f"{caught.name}: {self.promise}; a second signal ends the run at once")
            else:
                self._end(f"{caught.name}: ended; what is on the disk is whole")
        # The kernel's own signal, when the launcher dies first of the user's, is no second one.
        elif not orphaned and now - self._since >= SAME:
            self._end(f"{caught.name} again: ended at once; the last checkpoint counts")

    def _end(self, why: str) -> None:
        _print(f"{why}; to go on:\n{self.command}")
        self.end(128 + (self.signal or signal.SIGINT))

    def _leave_terminal(self) -> None:
        """A terminal that is gone takes no words: writing to it would fail."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


def _print(text: str) -> None:
    """Says something on one process, past Python's buffers: another thread may be writing."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


_watch: Watch | None = None


def watch() -> None:
    """Lets signals end this program decently; for its main thread, before all work."""
    global _watch
    _watch = Watch()
    listening, noticing = os.pipe()
    os.set_blocking(noticing, False)
    signal.set_wakeup_fd(noticing, warn_on_full_buffer=False)
    for number in SIGNALS:
        # Python's own handler may come late; it only must not be the system's. A program under
        # nohup goes on without its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(_watch, listening), daemon=True).start()
    if launch.parent():
        _end_with_parent()


def _listen(watched: Watch, listening: int) -> None:
    while numbers := os.read(listening, 16):
        for number in numbers:
            watched.take(number)


def _end_with_parent() -> None:
    """Asks for SIGTERM when the launcher dies: a process that is left alone is no run.

    accelerate's launcher of one process passes no signal on, and none can when it is killed.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM))


@contextmanager
def patience(promise: str) -> Iterator[None]:
    """Inside, the first signal is left to the run, which does what `promise` says."""
    if _watch is not None:
        _watch.promise = promise
    try:
        yield
    finally:
        if _watch is not None:
            _watch.promise = ""


def command() -> str:
    """The command line that goes on."""
    return _watch.command if _watch is not None else launch.command()


def stand_apart(_: int = 0) -> None:
    """For the helpers of a process (a DataLoader's workers): signals to its group pass them by.

    A worker that dies of a signal takes its process with it, by an exception in the loop. Their
    process ends them itself, and they end when it is gone.
    """
    os.setpgid(0, 0)


class Requests:
    """What is asked of a run while it trains; the same on all processes once they have agreed.

    Args:
        folder: of the run, where `touch FOLDER/stop` (save, sample) is looked for.
        main: whether this process looks.
        minutes: between two checkpoints, by the main process's clock.
    """

    def __init__(self, folder: Path, *, main: bool, minutes: float | None) -> None:
        self.folder, self.main, self.minutes = folder, main, minutes
        self.stop = ""  # what asked for it
        self.exit_code = 0
        self.save = self.sample = False
        self._since: int | None = None  # when the run opened its folder, by the folder's own clock
        self._saved = time.monotonic()

    def begin(self) -> list[str]:
        """Opens the ears; returns what is to be said of files that an earlier run was meant for."""
        self._saved = time.monotonic()
        opened = self.folder / "args.json"
        if not self.main or not opened.is_file():
            return []
        self._since = opened.stat().st_mtime_ns
        old = [name for name in FILES if _time(self.folder / name) and not self._touched(name)]
        return [
            f"{self.folder / name} is older than this run and not obeyed: touch it again"
            for name in old
        ]

    def _touched(self, name: str) -> bool:
        return self._since is not None and _time(self.folder / name) >= self._since

    def local(self) -> list[float]:
        """What this process knows, as numbers of which the largest over all processes counts."""
        caught = _watch.signal if _watch is not None else None
        files = [float(self._touched(name)) for name in FILES]
        if self.main and self.minutes is not None:
            late = time.monotonic() - self._saved >= 60 * self.minutes
            files[FILES.index("save")] += late
        return [*(float(caught == number) for number in SIGNALS), *files]

    def agree(self, numbers: Sequence[float]) -> None:
        """Takes over what all processes know together; files are removed: they are obeyed."""
        asked = [number > 0 for number in numbers]
        signals, files = asked[: len(SIGNALS)], dict(zip(FILES, asked[len(SIGNALS) :], strict=True))
        for number, given in zip(SIGNALS, signals, strict=True):
            if given and not self.stop:
                self.stop, self.exit_code = number.name, 128 + number
        if files["stop"] and not self.stop:
            self.stop, self.exit_code = str(self.folder / "stop"), STOP_FILE_CODE
        self.save |= files["save"]
        self.sample |= files["sample"]
        for name, given in files.items():
            if given and self._touched(name):
                (self.folder / name).unlink(missing_ok=True)

    def saved(self) -> None:
        """A checkpoint was written."""
        self.save, self._saved = False, time.monotonic()


def _time(path: Path) -> int:
    """When a file was touched last, in ns; 0 where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_mtime_ns if S_ISREG(found.st_mode) else 0
