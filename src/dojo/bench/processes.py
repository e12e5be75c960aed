"""Programs that are started, watched and ended with all that they have started themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil


@contextmanager
def started(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs for a while and is ended afterwards, if it has not ended by itself.

    A SIGTERM for us does not leave it behind.

    Args:
        options: for Popen; it gets a session of its own.
    """
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process: Any = None
    try:
        process = subprocess.Popen(words, start_new_session=True, **options)
        yield process
    finally:
        if process is not None:
            end(process)
        signal.signal(signal.SIGTERM, previous)


def with_compiled_modules(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of a program whose start is timed: Python keeps what it compiles, as ever.

    Where the environment forbids that, a checkout's own modules would be compiled at every start,
    which takes half a second, and libraries that pip has compiled would not.
    """
    return {name: one for name, one in variables.items() if name != "PYTHONDONTWRITEBYTECODE"}


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all below it; torchrun gives its workers sessions of their own."""
    if process.poll() is None:
        whole = psutil.Process(process.pid)
        for one in [whole, *whole.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
