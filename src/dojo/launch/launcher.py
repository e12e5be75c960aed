"""Processes whose launcher is gone end too.

torchrun and `accelerate launch` end all processes when one fails, but a launcher that is killed
itself (the machine's memory ran out, `kill -9`) leaves them behind, at work in a folder that is
about to be used again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

_PATIENCE = 600.0  # seconds from being told to end until being ended: a step, a checkpoint


def watch(period: float = 1.0) -> None:
    """Tells this process to end (SIGTERM) when its launcher is gone; without one does nothing.

    Args:
        period: seconds between two looks.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of those that torchrun starts, and no shell's
        threading.Thread(target=_follow, args=(os.getppid(), period), daemon=True).start()


def _follow(parent: int, period: float) -> None:
    while os.getppid() == parent:
        time.sleep(period)
    with suppress(OSError):  # the launcher may have been the one who read it
        print("stopped: the launcher of this process is gone", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)  # it may wait for ever for a process that has ended
    os._exit(128 + signal.SIGTERM)
