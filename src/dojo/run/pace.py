"""How long the rest of a run takes: steps, and the pauses to come, by what they took so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MEMORY = 0.98  # what a step's share in the mean loses with every further one


class Pace:
    """The times of one run on this process; nothing is kept over a resume."""

    def __init__(self) -> None:
        self.every: dict[str, int] = {}
        """steps between two pauses of a kind that will come; there is one at the end, too"""
        self._steps = 0.0
        self._spent = 0.0
        self._pauses: dict[str, tuple[int, int, float]] = {}  # how many, the last's step, seconds

    def add_steps(self, steps: int, seconds: float) -> None:
        """Takes optimizer steps in; the last ones count most."""
        kept = MEMORY**steps
        self._steps = kept * self._steps + steps
        self._spent = kept * self._spent + seconds

    def add_pause(self, kind: str, step: int, seconds: float) -> None:
        """Takes a pause in, or a further part of the one at this step."""
        count, last, spent = self._pauses.get(kind, (0, -1, 0.0))
        self._pauses[kind] = (count + (step != last), step, spent + seconds)

    def seconds_left(self, step: int, num_steps: int) -> float | None:
        """Until the last step is done with its pauses.

        A kind of pause that has not come yet counts nothing: how long it takes is not known.

        Returns:
            None before the first step.
        """
        if not self._steps:
            return None
        left = (num_steps - step) * self._spent / self._steps
        for kind, every in self.every.items():
            if kind in self._pauses:
                count, _, spent = self._pauses[kind]
                left += to_come(step, num_steps, every) * spent / count
        return max(left, 0.0)


def to_come(step: int, num_steps: int, every: int) -> int:
    """How many pauses come after a step: at multiples of `every`, and at the last step."""
    if step >= num_steps:
        return 0
    return (num_steps - 1) // every - step // every + 1


def pauses(groups: Mapping[str, Any], epoch_length: float) -> Iterator[tuple[str, int]]:
    """The kinds of pauses that a script's options ask for, with the steps between two.

    Args:
        groups: its groups of options.
        epoch_length: steps of an epoch, in which some evaluations count.
    """
    for group in groups.values():
        if hasattr(group, "checkpointing_steps"):
            yield "checkpoint", group.checkpointing_steps
        if hasattr(group, "eval_every"):
            yield "validation", max(1, round(group.eval_every * epoch_length))
        elif hasattr(group, "validation_steps"):
            yield "validation", group.validation_steps
