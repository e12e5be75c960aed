"""A run's numbers: what its steps average to, where its time goes, the rows of metrics.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dojo.bars import Bar
from dojo.files import records
from dojo.lazy import torch
from dojo.run import checkpoint, machine
from dojo.run.pace import Pace

if TYPE_CHECKING:
    import accelerate
    from torch import Tensor

PAUSES = ("validation", "checkpoint", "cache")  # phases that are no training


class Metrics:
    """The numbers of one run on this process.

    Args:
        folder: of the run, where metrics.jsonl lies.
    """

    def __init__(self, accelerator: accelerate.Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.path = folder / "metrics.jsonl"
        self.flops_per_sample = 0.0
        self.step_seconds = 0.0  # of the last step
        self.pace = Pace()
        self._bar: Any = Bar(disable=True)  # until the loop begins
        self._step = 0  # the last that has ended
        self._worked = 0.0  # seconds since then that were no pauses
        self._loss = torch.zeros((), device=self.device)
        self._loss_count = 0
        self._samples = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._peaks: dict[str, Tensor] = {}
        self._notes: dict[str, float] = {}
        self._last = (0.0, 0.0)  # learning rate and gradient norm of the last step
        self._seconds: dict[str, float] = {}
        self._phased = 0.0  # seconds of all phases
        self._mark = 0.0  # the end of the last step
        self._marked = 0.0  # seconds of phases until then
        self._row_began = time.perf_counter()  # of the steps that the next row averages

    # -- time ---------------------------------------------------------------------------------

    @contextmanager
    def loop(self, step: int, num_steps: int) -> Iterator[None]:
        """Starts the clock of the steps, with a bar on one process."""
        self._step, self._worked = step, 0.0
        self._bar = Bar(
            desc="steps",
            total=num_steps,
            left=lambda: self.pace.seconds_left(self._step, num_steps),
            initial=step,
            disable=not self.accelerator.is_main_process,
            smoothing=0.1,
        )
        self._row_began = time.perf_counter() - self._pauses()
        self._mark_now()
        with self._bar:
            yield

    def close_bar(self) -> None:
        """A message that follows gets a line of its own."""
        self._bar.close()

    @contextmanager
    def phase(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Adds the time inside to `seconds_<name>`; the loop's time outside all phases is `train`.

        Args:
            wait: until the GPU has done what it was told, before and inside, so that the time is
                that of this work and not of the telling.
        """
        wait = wait and self.device.type == "cuda"
        if wait:
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        try:
            yield
            if wait:
                torch.cuda.synchronize(self.device)
        finally:
            self._add_seconds(name, time.perf_counter() - started)

    def end_step(self, step: int) -> None:
        """What the loop did since the last step, outside all phases, was training."""
        spent = time.perf_counter() - self._mark - (self._phased - self._marked)
        self._add_seconds("train", spent)
        self.step_seconds = spent
        self._mark_now()
        self.pace.add_steps(step - self._step, self._worked)
        self._step, self._worked = step, 0.0
        self._bar.update(step - self._bar.n)

    def _add_seconds(self, name: str, spent: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + spent
        self._phased += spent
        if name in PAUSES:
            self.pace.add_pause(name, self._step, spent)
        else:
            self._worked += spent

    def _mark_now(self) -> None:
        self._mark, self._marked = time.perf_counter(), self._phased

    def _pauses(self) -> float:
        """Seconds since the last row that were not training."""
        return sum(self._seconds.get(name, 0.0) for name in PAUSES)

    # -- what the next row averages -----------------------------------------------------------

    def add_step(self, loss: Tensor, samples: int) -> None:
        """Takes an optimizer step into the next row.

        Args:
            samples: that it used, over all processes.
        """
        self._loss += loss
        self._loss_count += 1
        self._samples += samples

    def average(self, **values: Tensor) -> None:
        """Takes the mean of numbers [B] of a micro-batch into the next row's mean."""
        for name, value in values.items():
            mean = value.detach().float().mean()
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean
            self._counts[name] = self._counts.get(name, 0) + 1

    def peak(self, **values: Tensor) -> None:
        """Takes the largest of numbers [B] of a micro-batch into the next row's maximum."""
        for name, value in values.items():
            most = value.detach().float().max()
            self._peaks[name] = torch.maximum(self._peaks.get(name, most), most)

    def note(self, values: Mapping[str, float]) -> None:
        """Puts numbers, the same on all processes, into the next row."""
        self._notes.update(values)

    def note_step(self, lr: float, grad_norm: float) -> None:
        """Keeps what the next row says of its last step alone."""
        self._last = (lr, grad_norm)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run logs the same: a collective."""
        sums = self._reduced("mean", self._sums)
        return {
            "loss_sum": float(self._reduced_loss()),
            "loss_count": self._loss_count,
            "means": {name: (total, self._counts[name]) for name, total in sums.items()},
            "peaks": self._reduced("max", self._peaks),
        }

    def load_state(self, state: checkpoint.State) -> None:
        """Goes on from what a checkpoint kept."""
        self._loss.fill_(state.loss_sum)
        self._loss_count = state.loss_count
        self._sums = self._tensors({name: total for name, (total, _) in state.means.items()})
        self._counts = {name: count for name, (_, count) in state.means.items()}
        self._peaks = self._tensors(state.peaks)

    def _tensors(self, values: Mapping[str, float]) -> dict[str, Tensor]:
        return {name: torch.tensor(value, device=self.device) for name, value in values.items()}

    def _reduced(
        self, how: Literal["mean", "max"], values: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Numbers of all processes as one, equal everywhere: a collective."""
        if not values:
            return {}
        stacked = torch.stack([*values.values()])
        if self.accelerator.num_processes > 1:
            table: Any = self.accelerator.gather(stacked[None])
            stacked = table.mean(0) if how == "mean" else table.amax(0)
        return dict(zip(values, stacked.tolist(), strict=True))

    def _reduced_loss(self) -> Tensor:
        """Mean over the processes of the loss since the last row."""
        if self.accelerator.num_processes == 1:
            return self._loss
        return self.accelerator.reduce(self._loss.clone(), "mean")  # pyright: ignore

    # -- rows ---------------------------------------------------------------------------------

    def write_rest(self, step: int, epoch: float, num_steps: int) -> None:
        """Writes a row of the steps since the last one, if there are any.

        `loss` is their mean over all processes; `seconds_<phase>` are totals; `eta_s` are the
        seconds until the run's last step is done, from its second row on; `memory_gib` is the peak
        of the GPU (of the process without one).
        """
        if not self._loss_count:
            return
        lr, grad_norm = self._last
        loss = float(self._reduced_loss()) / max(1, self._loss_count)
        spent = time.perf_counter() - self._row_began - self._pauses()
        row = {
            "epoch": round(epoch, 4),
            "loss": loss,
            **self._reduced("mean", {k: v / self._counts[k] for k, v in self._sums.items()}),
            **self._reduced("max", self._peaks),
            **self._notes,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": self._samples / spent if spent else 0.0,
            **{f"seconds_{name}": round(value, 4) for name, value in self._seconds.items()},
            "memory_gib": round(machine.peak_memory_gib(self.device), 3),
        }
        if (left := self.pace.seconds_left(step, num_steps)) is not None:
            row["eta_s"] = round(left, 1)
        peak = machine.device_peak_flops(self.device)
        if peak and self.flops_per_sample and spent:
            share = self._samples / self.accelerator.num_processes
            row["mfu"] = self.flops_per_sample * share / spent / peak
        self.write(step, row)
        self._loss.zero_()
        self._loss_count = self._samples = 0
        for kept in (self._seconds, self._sums, self._counts, self._peaks, self._notes):
            kept.clear()
        self._row_began = time.perf_counter()
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one row to metrics.jsonl and tells the trackers."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
        self.accelerator.log(dict(row), step=step)

    def has(self, name: str, step: int) -> bool:
        """Whether metrics.jsonl has such a number at a step."""
        rows, _ = records.read_rows(self.path)
        return any(row["step"] == step and name in row for row in rows)

    def forget_after(self, step: int) -> int:
        """Drops the rows of steps that will be done again: they would stand twice.

        Returns:
            How many damaged lines were left out.
        """
        if not self.path.is_file():
            return 0
        rows, bad = records.read_rows(self.path)
        kept = [json.dumps(row) for row in rows if row["step"] <= step and step > 0]
        checkpoint.write_file(self.path, "".join(line + "\n" for line in kept))
        return bad
