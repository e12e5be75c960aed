"""The processes of a run: which one this is, where it computes, who prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from dojo.bars import Bar
from dojo.cli import UserError
from dojo.lazy import accelerate, torch

if TYPE_CHECKING:
    import accelerate

ABOUT_SIZE = "size of the pictures"  # a topic that is said once, wherever it is known first


class Processes:
    """What this process knows of itself and the others."""

    def __init__(self, accelerator: accelerate.Accelerator) -> None:
        self.accelerator = accelerator
        self._said: set[str] = set()

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
