"""How a run ends before its last step: asked to, on all processes, where it can be gone on from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from dojo.launch import interrupt
from dojo.lazy import torch
from dojo.run import checkpoint
from dojo.run.metrics import Metrics

if TYPE_CHECKING:
    import accelerate

Item = TypeVar("Item")


class Going(Protocol):
    """The run that may be stopped."""

    step: int
    accelerator: accelerate.Accelerator
    output_dir: Path
    metrics: Metrics

    def say(self, text: str) -> None:
        """Prints on one process only."""
        ...


class Stopping:
    """What is asked of a run from outside, and how it obeys.

    Args:
        minutes: between two checkpoints.
    """

    def __init__(self, run: Going, minutes: float | None) -> None:
        self.run = run
        main = run.accelerator.is_main_process
        self.requests = interrupt.Requests(run.output_dir, main=main, minutes=minutes)
        self._told = False  # that an epoch is finished first

    def listen(self) -> None:
        """Takes over what any process knows: a collective."""
        self.hear(self._together(self.requests.local()))

    def hear(self, numbers: Sequence[float]) -> None:
        """Takes over what all processes know together, and says what is new."""
        before = self.requests.stop, self.requests.save, self.requests.sample
        self.requests.agree(numbers)
        stop, save, sample = self.requests.stop, self.requests.save, self.requests.sample
        step = self.run.step
        if stop and not before[0]:
            self.run.say(f"step {step}: stopping ({stop})")
        if save and not before[1]:
            self.run.say(f"step {step}: a checkpoint is due")
        if sample and not before[2]:
            self.run.say(f"step {step}: pictures were asked for")

    def end_if_asked(self) -> None:
        """Ends the loop on all processes where one was asked to stop: a collective.

        Only where what was learned is kept on the way out, or nothing was.

        Raises:
            Interrupted: one was.
        """
        self.listen()
        if self.requests.stop:
            raise self._interrupted()

    def paused(self, mine: Sequence[Item], total: int, size: int = 1) -> Iterator[Sequence[Item]]:
        """This process's share of `total` items, `size` at a time; the run may stop before each.

        A collective, and as often on every process: see `end_if_asked`.
        """
        for start in range(0, -(-total // self.run.accelerator.num_processes), size):
            self.end_if_asked()
            if some := mine[start : start + size]:
                yield some

    def end_if_kept(self) -> None:
        """Ends the loop where it was asked to, if a checkpoint has this step."""
        if self.requests.stop and self._kept(self.run.step):
            raise self._interrupted()

    def end_within_epoch(self, began: int, left: int) -> None:
        """Between two steps of an epoch that cannot be kept in part: ends where its beginning is
        kept, and says how long it takes where it is not.

        Args:
            began: the step at which the epoch began.
            left: optimizer steps until its end.
        """
        if not self.requests.stop or left <= 0:
            return
        if not began or self._kept(began):
            raise self._interrupted()
        if not self._told:
            self._told = True
            self.run.say(
                f"no checkpoint has the beginning of this epoch: its last {left} optimizer steps "
                f"are done first, about {left * self.run.metrics.step_seconds:.0f} s; a second "
                "signal ends the run at once"
            )

    def pictures_due(self, due: bool) -> bool:
        """Whether a validation comes now: it is its turn or was asked for, and nobody waits.

        One whose turn it is when the run stops is made up for when it goes on.
        """
        asked, self.requests.sample = self.requests.sample, False
        return (asked or due) and not self.requests.stop

    def _kept(self, step: int) -> bool:
        return (self.run.output_dir / f"checkpoint-{step}").exists()

    def _together(self, numbers: Sequence[float]) -> list[float]:
        """Their means over all processes: a collective."""
        accelerator = self.run.accelerator
        if accelerator.num_processes == 1:
            return [*numbers]
        own = torch.tensor(numbers, device=accelerator.device)
        return accelerator.reduce(own, "mean").tolist()  # pyright: ignore

    def _interrupted(self) -> interrupt.Interrupted:
        self.run.metrics.close_bar()
        asked, step = self.requests.stop, self.run.step

        def farewell() -> str:
            if not self.run.accelerator.is_main_process:
                return ""
            whole = checkpoint.existing(self.run.output_dir)
            kept = "no step is kept yet"
            if whole:
                again = "" if whole[-1][0] == step else "; the steps after it are done again"
                kept = f"{whole[-1][1]} is kept{again}"
            return f"{asked} at step {step}: {kept}. To go on:\n{interrupt.command()}"

        return interrupt.Interrupted(self.requests.exit_code, farewell)
