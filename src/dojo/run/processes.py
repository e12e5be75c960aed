"""The processes of a run: which one this is, where it computes, who prints."""

from __future__ import annotations

import os
import platform
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dojo.bars import Bar
from dojo.cli import UserError
from dojo.lazy import accelerate, torch

if TYPE_CHECKING:
    import accelerate

ABOUT_SIZE = "size of the pictures"  # a topic that is said once, wherever it is known first

_EACH_A_PART = "each makes only a part of what all read"
_PATIENCE = 90.0  # seconds: NFS may keep for one minute what it knew of a folder


class Processes:
    """What this process knows of itself and the others."""

    def __init__(self, accelerator: accelerate.Accelerator) -> None:
        self.accelerator = accelerator
        self._said: set[str] = set()
        self._shared: set[Path] = set()

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.accelerator.is_main_process

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the frozen parts."""
        names = {"fp16": torch.float16, "bf16": torch.bfloat16}
        return names.get(self.accelerator.mixed_precision, torch.float32)

    @property
    def share(self) -> dict[str, int]:
        """This process's number and how many there are, as keyword arguments."""
        return {
            "process": self.accelerator.process_index,
            "num_processes": self.accelerator.num_processes,
        }

    def check_shared(
        self, folder: Path, flag: str, *, lacking: bool = True, why: str = _EACH_A_PART
    ) -> None:
        """Refuses a folder that the processes fill together and not all of them see: a collective.

        Args:
            lacking: whether anything is to be made; nothing is compared where all say no.
            why: it has to be one folder, in words.
        Raises:
            UserError: a machine has another one of that name, which would lack the others' shares.
        """
        if self.accelerator.num_processes == 1 or folder in self._shared:
            return
        if not any(accelerate.utils.gather_object([lacking])):
            return
        name = accelerate.utils.broadcast_object_list([f".seen-{secrets.token_hex(8)}"])[0]
        sign = folder / str(name)
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            sign.touch()
        self.accelerator.wait_for_everyone()
        found = accelerate.utils.gather_object(["" if _appears(sign) else platform.node()])
        if self.main:
            sign.unlink(missing_ok=True)
        if blind := sorted({machine for machine in found if machine}):
            raise UserError(
                f"{flag} {folder} is not the same folder on all machines ({', '.join(blind)} does "
                f"not see what the first process writes there), and {why}: give {flag} a folder "
                "that all of them share"
            )
        self._shared.add(folder)

    def say(self, text: str) -> None:
        """Prints on one process only."""
        if self.main:
            Bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def say_once(self, topic: str, text: str) -> None:
        """Prints on one process only, what belongs to a topic a single time."""
        if topic not in self._said:
            self._said.add(topic)
            self.say(text)


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes within the patience."""
    deadline = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def check_output(accelerator: accelerate.Accelerator, folder: Path) -> None:
    """Refuses an output folder that every machine has for itself: a collective.

    On one machine, as its launcher says, nothing is looked at.

    Raises:
        UserError: a machine does not see what the first one writes there.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == str(accelerator.num_processes):
        return
    why = "all processes look there for checkpoints and write their pictures there"
    Processes(accelerator).check_shared(folder, "--output_dir", why=why)


def alone(accelerator: accelerate.Accelerator, act: Callable[[], None]) -> None:
    """Lets one process act before the others go on; what it refuses, all refuse."""
    trouble = ""
    if accelerator.is_main_process:
        try:
            act()
        except UserError as error:
            trouble = str(error)
    trouble = str(accelerate.utils.broadcast_object_list([trouble])[0])
    if trouble:
        raise UserError(trouble)
