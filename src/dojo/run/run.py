"""What every training script needs around its loop: the run, its numbers, its optimizer.

The loop itself stands in the script. A `Run` knows the processes, the output folder, the seed and
the step, writes metrics and checkpoints, and stops when numbers are no longer finite.
"""

from __future__ import annotations

import glob
import json
import logging
import math
import os
import platform
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import accelerate
import diffusers
import psutil
import torch
import transformers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch import Tensor, nn
from tqdm import tqdm

from dojo import launch
from dojo.cli import TrainingStopped, UserError, ranges
from dojo.cli.masking import hide
from dojo.files import outputs, records
from dojo.launch import interrupt, launcher
from dojo.run import checkpoint, finite, phases
from dojo.run import optim as optimizers
from dojo.run.cost import Cost
from dojo.run.optim import OptimArgs

Item = TypeVar("Item")
Key = tuple[int | str, ...]

TRACKERS = ("tensorboard", "wandb", "swanlab")
MAX_SKIPPED_STEPS = 20  # of the fp16 gradient scaler, in a row
# Dense bfloat16 peak in FLOP/s by the device's name (vendors' data sheets), for the utilisation.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """The run: where it writes, how it resumes, what it reports."""

    output_dir: Path
    """folder of the result, checkpoints, metrics and validation pictures"""
    overwrite_output_dir: bool = False
    """remove what earlier runs wrote into output_dir (manifest.jsonl lists it) instead of refusing;
    wins over resuming"""
    seed: int | None = None
    """seed of every random draw; unset is drawn once, stored and resumed"""
    resume_from_checkpoint: str | None = None
    """latest, checkpoint-N or a path; latest in an empty folder starts from zero"""
    checkpointing_steps: int = 500
    """optimizer steps between checkpoints; there is one at the end too"""
    checkpointing_minutes: float | None = None
    """minutes after which there is one besides"""
    checkpoints_total_limit: int | None = None
    """keep only this many checkpoints, the newest"""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """precision of the frozen parts and the arithmetic; unset is what accelerate's configuration
    says; trainable weights are float32 in any case but --train_dtype bf16"""
    allow_tf32: bool = False
    """let float32 products on Ampere and newer GPUs use TensorFloat-32"""
    report_to: Literal["tensorboard", "wandb", "swanlab", "all", "none"] = "tensorboard"
    """trackers beside metrics.jsonl; all is every installed one"""
    tracker_project_name: str = "sd-dojo"
    """project of the trackers"""
    logging_steps: int = 10
    """optimizer steps between two logged ones, which average over them; step 1 is always logged"""
    dry_run: bool = False
    """print the resolved options, sizes, steps and estimates, and exit"""

    def __post_init__(self) -> None:
        ranges.check(self, "checkpointing_steps logging_steps checkpoints_total_limit", least=1)
        ranges.check_seed(self, "seed")
        if self.checkpointing_minutes is not None and not 0 < self.checkpointing_minutes < math.inf:
            raise ValueError("--checkpointing_minutes must be positive")


class Run:
    """One training run on this process; made by `start`."""

    def __init__(self, accelerator: accelerate.Accelerator, args: RunArgs, seed: int) -> None:
        self.accelerator = accelerator
        self.args = args
        self.output_dir = args.output_dir
        self.seed = seed
        self.step = 0  # optimizer steps done
        self.num_steps = 0
        self.samples_per_step = 0
        self.epoch_length = 1.0
        self.flops_per_sample = 0.0
        self.samples = 0  # used so far, over all processes
        self._samples_per_epoch = 1
        self.requests = interrupt.Requests(
            args.output_dir, main=self.main, minutes=args.checkpointing_minutes
        )
        self._resumed: Path | None = None
        self._whole_epochs = False
        self._began = 0  # the step at which the epoch began, where epochs are whole
        self._told = False  # that an epoch is finished first
        self._averages: Callable[[], Sequence[Tensor]] = tuple
        self._skipped = 0
        self._data = ""
        self._optim = OptimArgs()
        self._micro_batch = 0
        self._batches: dict[str, int] = {}
        self._span = optimizers.Span(0, 0)
        self._loss = torch.zeros((), device=accelerator.device)
        self._micro_loss = torch.zeros((), device=accelerator.device)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._peaks: dict[str, Tensor] = {}
        self._notes: dict[str, float] = {}
        self._said: set[str] = set()
        self._last = (0.0, 0.0)  # learning rate and gradient norm of the last step
        self._mark = 0.0
        self._marked = 0.0  # seconds of phases until then
        self._step_seconds = 0.0  # of the last step
        self._row_began = time.perf_counter()  # of the steps that the next row averages
        self._bar: Any = tqdm(disable=True)  # until the loop begins
        self._loss_count = 0
        self._samples = 0
        self._seconds: dict[str, float] = {}
        self._phased = 0.0  # seconds of all phases

    # -- processes ----------------------------------------------------------------------------

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
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def say_once(self, topic: str, text: str) -> None:
        """Prints on one process only, what belongs to a topic a single time."""
        if topic not in self._said:
            self._said.add(topic)
            self.say(text)

    def keys(self, stream: str, places: Iterable[int]) -> list[Key]:
        """Keys of one random stream for samples at these places."""
        return [(self.seed, stream, place) for place in places]

    # -- time ---------------------------------------------------------------------------------

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

    def _add_seconds(self, name: str, spent: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + spent
        self._phased += spent

    def _mark_now(self) -> None:
        self._mark, self._marked = time.perf_counter(), self._phased

    def batches(self, loader: Iterable[Item]) -> Iterator[Item]:
        """Passes batches on until the last step is done, with a bar on one process.

        The waiting for a batch is phase `data`; what follows, until `update`, is phase `train`.
        """
        iterator = iter(loader)
        with self._loop("the run stops after this optimizer step, with a checkpoint"):
            while self.step < self.num_steps:
                self._end_if_kept()
                with self.phase("data"):
                    batch = next(iterator)
                yield batch
            self._end_if_kept()

    @property
    def epoch(self) -> int:
        """The epoch that the run is in, from 0 on."""
        return self.samples // self._samples_per_epoch

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs from where the run stands until the last step is done."""
        with self._loop("the run stops soon, with the last whole epoch kept"):
            while self.step < self.num_steps:
                self._end_if_kept()
                self._began = self.step
                yield self.epoch
            self._end_if_kept()

    @contextmanager
    def kept_when_stopped(self, save: Callable[[], None]) -> Iterator[None]:
        """Saves what was learned when something outside stops the run: a reward's server, say."""
        try:
            yield
        except TrainingStopped:
            self._bar.close()  # the message gets a line of its own
            save()
            raise

    # -- what is asked of it -----------------------------------------------------------------

    def stop_if_asked(self) -> None:
        """Ends the loop on all processes where one was asked to stop: a collective.

        Only where `kept_when_stopped` keeps what was learned, or nothing was.

        Raises:
            Interrupted: one was.
        """
        self._hear(self._together(self.requests.local()))
        if self.requests.stop:
            raise self._interrupted()

    def paused(self, mine: Sequence[Item], total: int, size: int = 1) -> Iterator[Sequence[Item]]:
        """This process's share of `total` items, `size` at a time; the run may stop before each.

        A collective, and as often on every process: see `stop_if_asked`.
        """
        for start in range(0, -(-total // self.accelerator.num_processes), size):
            self.stop_if_asked()
            if some := mine[start : start + size]:
                yield some

    def pictures_due(self, due: bool) -> bool:
        """Whether a validation comes now: it is its turn or was asked for, and nobody waits.

        One whose turn it is when the run stops is made up for when it goes on.
        """
        wanted = due or self.requests.sample
        self.requests.sample = False
        return wanted and not self.requests.stop

    def has_logged(self, name: str) -> bool:
        """Whether metrics.jsonl has such a number at the run's step."""
        rows, _ = records.read_rows(self.output_dir / "metrics.jsonl")
        return any(row["step"] == self.step and name in row for row in rows)

    def _together(self, numbers: Sequence[float]) -> list[float]:
        """Their means over all processes: a collective."""
        if self.accelerator.num_processes == 1:
            return [*numbers]
        own = torch.tensor(numbers, device=self.device)
        return self.accelerator.reduce(own, "mean").tolist()  # pyright: ignore

    def _hear(self, numbers: Sequence[float]) -> None:
        before = self.requests.stop, self.requests.save, self.requests.sample
        self.requests.agree(numbers)
        stop, save, sample = self.requests.stop, self.requests.save, self.requests.sample
        if stop and not before[0]:
            self.say(f"step {self.step}: stopping ({stop})")
        if save and not before[1]:
            self.say(f"step {self.step}: a checkpoint is due")
        if sample and not before[2]:
            self.say(f"step {self.step}: pictures were asked for")

    def _end_if_kept(self) -> None:
        if self.requests.stop and (self.output_dir / f"checkpoint-{self.step}").exists():
            raise self._interrupted()

    def _end_within_epoch(self) -> None:
        """Between two steps of an epoch that cannot be kept in part: ends where its beginning is
        kept, and says how long it takes where it is not."""
        left = round(self.epoch_length) - (self.step - self._began)
        if not self.requests.stop or left <= 0:
            return
        if not self._began or (self.output_dir / f"checkpoint-{self._began}").exists():
            raise self._interrupted()
        if not self._told:
            self._told = True
            self.say(
                f"no checkpoint has the beginning of this epoch: its last {left} optimizer steps "
                f"are done first, about {left * self._step_seconds:.0f} s; a second signal ends "
                "the run at once"
            )

    def _interrupted(self) -> interrupt.Interrupted:
        self._bar.close()  # the message gets a line of its own
        asked, step = self.requests.stop, self.step

        def farewell() -> str:
            if not self.main:
                return ""
            whole = checkpoint.existing(self.output_dir)
            kept = "no step is kept yet"
            if whole:
                again = "" if whole[-1][0] == step else "; the steps after it are done again"
                kept = f"{whole[-1][1]} is kept{again}"
            return f"{asked} at step {step}: {kept}. To go on:\n{interrupt.command()}"

        return interrupt.Interrupted(self.requests.exit_code, farewell)

    @contextmanager
    def _loop(self, promise: str) -> Iterator[None]:
        for text in self.requests.begin():
            self.say(text)
        self._bar = tqdm(
            desc="steps",
            total=self.num_steps,
            initial=self.step,
            disable=not self.main,
            smoothing=0.1,
        )
        self._row_began = time.perf_counter() - self._pauses()
        self._mark_now()
        with self._bar, interrupt.patience(promise):
            yield

    # -- length and resume --------------------------------------------------------------------

    def plan(
        self,
        optim: OptimArgs,
        num_samples: int,
        fingerprint: str,
        *,
        whole_epochs: bool = False,
        together: Mapping[str, int] | None = None,
    ) -> None:
        """Fixes the length of the run; `fingerprint` identifies the samples and their order.

        A length that nobody gave is rounded up to whole epochs where they matter, and said.

        Args:
            num_samples: uses of samples in an epoch.
            whole_epochs: the run can only end, and be resumed, where an epoch does.
            together: the sizes of batches (of a process, by option) on which the numbers hang, so
                that over all processes they must stay when the run goes on.
        Raises:
            UserError: it would end elsewhere.
        """
        self._whole_epochs = whole_epochs
        processes = self.accelerator.num_processes
        self.num_steps = optim.num_steps(num_samples, processes)
        self._samples_per_epoch = num_samples
        self.samples_per_step = optim.samples_per_step(processes)
        self.epoch_length = optim.epoch_length(num_samples, processes)
        self._data = fingerprint
        self._optim = optim
        self._micro_batch = optim.train_batch_size * processes
        self._batches = {name: size * processes for name, size in (together or {}).items()}
        steps = round(self.epoch_length)
        if whole_epochs and self.num_steps % steps and not optim.has_length:
            self.num_steps += steps - self.num_steps % steps
            self.say(
                f"no --max_train_steps: {self.num_steps} optimizer steps, which are "
                f"{self.num_steps // steps} whole epochs of {steps}"
            )
        self._span = optimizers.Span(0, self.num_steps)
        if whole_epochs and self.num_steps % steps:
            below = self.num_steps // steps * steps
            nearest = " or ".join(str(n) for n in (below, below + steps) if n)
            raise UserError(
                f"--max_train_steps {self.num_steps}: an epoch has {steps} optimizer steps and is "
                f"not broken off; take {nearest} (or --num_train_epochs)"
            )

    def begin(self, args: Any, result: str) -> bool:
        """Opens the output folder: args.json, metrics, trackers.

        Args:
            args: the script's options, for args.json.
            result: file or folder in the output folder that a finished run has.
        Returns:
            False when the run is finished already; then nothing is touched.
        Raises:
            UserError: the folder holds another run.
        """
        folder = self.output_dir
        try:
            going = self._check_folder(args, result)
        except UserError:
            outputs.release(folder)
            raise
        if not going:
            outputs.release(folder)
            self.accelerator.end_training()
            return False
        self.accelerator.wait_for_everyone()  # everybody has looked before anybody writes
        if self.main:
            if self.args.overwrite_output_dir:
                self._remove_run()
            outputs.own_pattern(folder, *_tracker_files(self.args.tracker_project_name))
            outputs.own(folder / "metrics.jsonl")
            checkpoint.write_file(folder / "args.json", json.dumps(record(args, self), indent=1))
        self.accelerator.wait_for_everyone()
        self._start_trackers(args)
        return True

    def _check_folder(self, args: Any, result: str) -> bool:
        """Whether there is something to do; refuses a folder that holds another run."""
        folder = self.output_dir
        _refuse_own_sources(folder, args)
        marker = folder / "finished.json"
        done = self._finished_at(marker) >= self.num_steps
        overwrite, resume = self.args.overwrite_output_dir, self.args.resume_from_checkpoint
        occupied = marker.is_file() or bool(checkpoint.existing(folder))
        # A checkpoint may come from another folder: then that run's options count.
        origin = self._resumed.parent if self._resumed else folder
        changed = []
        if (occupied or self._resumed) and not overwrite:
            changed = _changed_options(origin, args, self.accelerator.mixed_precision)
        if changed and resume is not None:
            raise UserError(
                f"--output_dir {origin} holds a run with other options: {'; '.join(changed)}; "
                "continue it with its own, or choose another folder"
            )
        if done and not changed and (folder / result).exists() and not overwrite:
            self.say(
                f"{folder} is finished ({self.num_steps} steps): nothing to do "
                f"(to upload it: python -m dojo.publish {folder})"
            )
            return False
        self._check_whole()
        self._check_resumed()
        if occupied and resume is None and not overwrite:
            raise UserError(
                f"--output_dir {folder} holds a run already: continue it with "
                "--resume_from_checkpoint latest, replace it with --overwrite_output_dir, or "
                "choose another folder"
            )
        return True

    def rehearse(self, args: Any) -> None:
        """Refuses what `begin` would refuse, and writes nothing."""
        self._check_folder(args, "")

    def hours(self, flops: float) -> str:
        """What is left of the run in hours, in words, where a speed is known.

        Args:
            flops: operations per process and step.
        """
        rows, _ = records.read_rows(self.output_dir / "metrics.jsonl")
        speeds = [row["images_per_s"] for row in rows if row.get("images_per_s")]
        done = max((int(row["step"]) for row in rows), default=0)
        if speeds:
            left = max(0, self.num_steps - done) * self.samples_per_step / speeds[-1]
            return f"{left / 3600:.1f} (at the {speeds[-1]:.1f} images/s of this folder's run)"
        if peak := device_peak_flops(self.device):
            least = self.num_steps * flops / peak / 3600
            return f"{least:.1f} at the least, at this GPU's peak; trainings reach a part of it"
        return "not known (no earlier run in the folder, and no GPU whose peak is known)"

    def _remove_run(self) -> None:
        """Removes what runs wrote into the folder, and nothing else that may lie in it."""
        folder = self.output_dir
        held = outputs.claim(folder, "run")
        held.remove()
        held.start_list()
        if left := outputs.others(folder):
            shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            self.say(f"{folder}: no run wrote these files, so they stay: {shown}")

    def _start_trackers(self, args: Any) -> None:
        logs = self.output_dir / "logs"
        if self.main and self.args.report_to in ("wandb", "all"):
            (logs / "wandb").mkdir(parents=True, exist_ok=True)  # it would go elsewhere without
        places = {"wandb": {"dir": logs}, "swanlab": {"logdir": str(logs / "swanlab")}}
        try:
            with _masked_command_line():
                self.accelerator.init_trackers(
                    self.args.tracker_project_name, config=_flat(args), init_kwargs=places
                )
        except Exception as error:  # each has its own kind: no key, no network
            raise UserError(
                f"--report_to {self.args.report_to}: the tracker did not start "
                f"({str(error).strip().splitlines()[0]}); without an account or a network set "
                "WANDB_MODE=offline, SWANLAB_MODE=offline"
            ) from error

    def _check_resumed(self) -> None:
        """Refuses before the work what could not go on exactly after it.

        Raises:
            UserError: saying with which options it could.
        """
        if self._resumed is None:
            return
        state = checkpoint.read_state(self._resumed)
        self._check_batches(self._resumed, state)
        made = optimizers.Span(state.lr_start, state.lr_steps)
        self._span = optimizers.new_span(self._optim, made, state.step, self.num_steps)
        if made.steps and self._span != made:
            begun = f"from step {self._span.start} " if self._span.start else ""
            self.say(
                f"the run was {made.start + made.steps} steps long and is {self.num_steps} now; "
                f"--lr_scheduler {self._optim.lr_scheduler} runs {begun}over {self._span.steps}"
            )

    def _check_batches(self, folder: Path, saved: checkpoint.State) -> None:
        whole = saved.batch_size
        if whole != self.samples_per_step:
            raise UserError(
                f"{folder} was made with another number of samples per step (batch size, "
                f"accumulation, processes): {whole}, now {self.samples_per_step}; "
                f"{self._batches_of(saved)}"
            )
        wrong = {
            name: (size, self._batches[name])
            for name, size in saved.together.items()
            if self._batches.get(name, size) != size
        }
        for name, (then, now) in wrong.items():
            raise UserError(
                f"{folder} was made with batches of {then} samples over all processes "
                f"(--{name}), now {now}: other numbers would come out; {self._batches_of(saved)}"
            )
        if saved.data != self._data and saved.micro_batch not in (0, self._micro_batch):
            raise UserError(
                f"{folder} was made from other data, or its pictures of several sizes were dealt "
                f"into batches of {saved.micro_batch} over all processes, now {self._micro_batch}; "
                f"with the same data, {self._batches_of(saved)}"
            )

    def _batches_of(self, saved: checkpoint.State) -> str:
        """The options with which a checkpoint goes on with as many processes as there are now."""
        processes, whole = self.accelerator.num_processes, saved.batch_size
        together = {"train_batch_size": saved.micro_batch or whole, **saved.together}
        if any(size % processes for size in together.values()):
            fitting = [
                n for n in range(1, whole + 1) if not any(size % n for size in together.values())
            ]
            return (
                f"with {processes} processes it cannot go on exactly, with "
                f"{' or '.join(map(str, fitting))} it can"
            )
        flags = [f"--{name} {size // processes}" for name, size in together.items()]
        flags.append(f"--gradient_accumulation_steps {whole // together['train_batch_size']}")
        several = "1 process" if processes == 1 else f"{processes} processes"
        return f"{' '.join(flags)} on {several} goes on exactly"

    def resume(
        self,
        load_weights: Callable[[Path], None],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        averages: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        """Continues from the chosen checkpoint, if there is one; sets `step`.

        Args:
            averages: the tensors of a moving average, which have to be finite like the weights.
        Raises:
            UserError: the checkpoint is damaged, or that of another run.
        """
        folder, self._averages = self._resumed, averages
        if folder is not None:
            state = checkpoint.read_state(folder)
            checkpoint.check_same_run(folder, state, self._state())
            with checkpoint.reading(folder):
                load_weights(folder)
                checkpoint.load_training(folder, optimizer, schedule, self.accelerator.scaler)
            if broken := self._not_finite(optimizer):
                raise checkpoint.damaged(folder, f"NaN or infinite numbers in {broken}")
            if self._span != optimizers.Span(0, self.num_steps) or (
                state.lr_steps and state.lr_start + state.lr_steps != self.num_steps
            ):
                optimizers.respan(optimizer, schedule, self._optim, self._span)
            self.step, self.samples = state.step, state.samples
            self._loss.fill_(state.loss_sum)
            self._loss_count = state.loss_count
            self._sums = self._tensors({name: total for name, (total, _) in state.means.items()})
            self._counts = {name: count for name, (_, count) in state.means.items()}
            self._peaks = self._tensors(state.peaks)
            self.say(f"resuming from {folder} at step {state.step}")
        self._forget_metrics_after(self.step)

    def _finished_at(self, marker: Path) -> float:
        """The step at which an earlier run was finished; -1 where none was."""
        if not marker.is_file():
            return -1
        with suppress(UserError, KeyError, TypeError, ValueError):
            return float(records.read_table(marker)["step"])
        self.say(f"{marker} is damaged: the run is taken for unfinished")
        return -1

    def _check_whole(self) -> None:
        """Compares the checkpoint with its checksums, on one process for all: a collective."""
        folder, trouble = self._resumed, ""
        if folder is None:
            return
        if self.main:
            try:
                if not checkpoint.check_whole(folder):
                    self.say(f"{folder} has no checksums yet: whether it is whole is not known")
            except UserError as error:
                trouble = str(error)
        trouble = broadcast_object_list([trouble])[0]
        if trouble:
            raise UserError(trouble)

    def _not_finite(self, optimizer: torch.optim.Optimizer) -> str:
        """What holds NaN or infinite numbers, in words; nothing where all is well."""
        groups = {
            "the weights": [p for group in optimizer.param_groups for p in group["params"]],
            "their moving average": self._averages(),
            "the optimizer's state": finite.tensors_in(optimizer.state_dict()),
        }
        return ", ".join(finite.not_finite(groups))

    def _tensors(self, values: Mapping[str, float]) -> dict[str, Tensor]:
        return {name: torch.tensor(value, device=self.device) for name, value in values.items()}

    def _state(self) -> checkpoint.State:
        sums = self._reduced("mean", self._sums)
        return checkpoint.State(
            step=self.step,
            samples=self.samples,
            seed=self.seed,
            batch_size=self.samples_per_step,
            data=self._data,
            loss_sum=float(self._reduced_loss()),
            loss_count=self._loss_count,
            means={name: (total, self._counts[name]) for name, total in sums.items()},
            peaks=self._reduced("max", self._peaks),
            micro_batch=self._micro_batch,
            together=self._batches,
            lr_start=self._span.start,
            lr_steps=self._span.steps,
        )

    def save_checkpoint(
        self,
        save_weights: Callable[[Path], None],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        *,
        since: int | None = None,
        now: bool = False,
    ) -> None:
        """Writes `checkpoint-<step>` when it is due: every `checkpointing_steps`, the last, and
        when one was asked for.

        Raises:
            TrainingStopped: weights, average or optimizer are not finite; nothing is written.
        Args:
            since: where steps come several at a time, the step before them: it is due when one of
                them was.
            now: it is due, unless it is there already or nothing has been learned yet.
        """
        every, before = self.args.checkpointing_steps, self.step - 1 if since is None else since
        asked = self.requests.save or bool(self.requests.stop)
        due = self.step // every > before // every or self.step == self.num_steps or asked
        if now:
            written = (self.output_dir / f"checkpoint-{self.step}").exists()
            due = self.step > 0 and not written
        if not due:
            return
        with self.phase("checkpoint"):
            # The result is written after the last one: it is of finite numbers too. Equal on all
            # processes, so that all stop, or none.
            if broken := self._not_finite(optimizer):
                self._stop(f"NaN or infinite numbers in {broken}", self.step)
            state = self._state()  # a collective: on all processes

            def write(folder: Path) -> None:
                save_weights(folder)
                scaler = self.accelerator.scaler
                checkpoint.save_training(folder, state, optimizer, schedule, scaler)
                checkpoint.add_checksums(folder)

            if self.main:
                checkpoint.write_whole(self.output_dir / f"checkpoint-{self.step}", write)
                checkpoint.rotate(self.output_dir, self.args.checkpoints_total_limit)
            self.accelerator.wait_for_everyone()
            self.requests.saved()
            # A signal that came meanwhile need not wait for another step.
            self._hear(self._together(self.requests.local()))

    def watch_flops(self, cost: Callable[[], Cost], batch_size: int) -> None:
        """Logs the utilisation of a known GPU from here on; `cost` is that of a micro-batch."""
        if device_peak_flops(self.device):
            self.flops_per_sample = cost().flops / batch_size

    def finish(self) -> None:
        """Marks the run as over and closes the trackers."""
        if self.main:
            text = json.dumps({"step": self.step})
            checkpoint.write_file(self.output_dir / "finished.json", text)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        outputs.release(self.output_dir)

    # -- one step -----------------------------------------------------------------------------

    def update(
        self,
        loss: Tensor,
        params: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        max_grad_norm: float,
    ) -> float | None:
        """Backward pass of a micro-batch and, when its turn has come, the optimizer step.

        Returns:
            The gradients' norm after an optimizer step; None between two, and for a step that
            the fp16 scaler skipped.
        Raises:
            TrainingStopped: loss or gradients are not finite.
            Interrupted: the run was asked to stop within an epoch that cannot be kept in part.
        """
        self.accelerator.backward(loss)
        self._micro_loss += loss.detach()
        if not self.accelerator.sync_gradients:
            return None
        self.samples += self.samples_per_step
        norm = self.accelerator.clip_grad_norm_(params, max_grad_norm)
        assert norm is not None  # DeepSpeed alone keeps it to itself
        asked = self.requests.local()
        numbers = torch.stack([norm.float(), self._micro_loss])
        if self.accelerator.num_processes > 1:  # all stop, or none
            numbers = torch.cat([numbers, numbers.new_tensor(asked)])
            numbers = self.accelerator.reduce(numbers, "mean")
        grad_norm, micro_loss, *heard = numbers.tolist()  # pyright: ignore
        finite = math.isfinite(grad_norm) and math.isfinite(micro_loss)
        if not finite and self.accelerator.scaler is None:
            self._stop(f"loss {micro_loss:g}, gradient norm {grad_norm:g}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Asked of the gradients and not of accelerate: GradScaler calls the fused AdamW's step in
        # any case and lets the kernel skip, so that accelerate sees no skipped step.
        if not finite:
            self._skipped += 1
            if self._skipped >= MAX_SKIPPED_STEPS:
                self._stop(f"{self._skipped} steps in a row overflowed under fp16")
        else:
            self._skipped = 0
            schedule.step()
            self.step += 1
            self._loss += self._micro_loss / self.accelerator.gradient_accumulation_steps
            self._loss_count += 1
            self._samples += self.samples_per_step
        self._micro_loss.zero_()
        self._end_step()
        self._hear(heard or asked)
        if self._whole_epochs:
            self._end_within_epoch()
        return grad_norm if finite else None

    def _end_step(self) -> None:
        """What the loop did since the last step, outside all phases, was training."""
        spent = time.perf_counter() - self._mark - (self._phased - self._marked)
        self._add_seconds("train", spent)
        self._step_seconds = spent
        self._mark_now()
        self._bar.update(self.step - self._bar.n)

    def _stop(self, what: str, step: int | None = None) -> None:
        self._bar.close()  # the message gets a line of its own
        whole = checkpoint.existing(self.output_dir)
        last = f"the last good checkpoint is {whole[-1][1]}" if whole else "there is no checkpoint"
        number = self.step + 1 if step is None else step
        raise TrainingStopped(
            f"step {number} is not finite: {what}; {last}. Try a lower --learning_rate, "
            "--lr_warmup_steps, a smaller --max_grad_norm, or bf16 instead of fp16"
        )

    # -- numbers ------------------------------------------------------------------------------

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

    def log_step(self, lr: float, grad_norm: float) -> None:
        """Writes a row of metrics when it is due: the first step, every `logging_steps`, the last.

        `loss` is the mean since the last row, over all processes; `seconds_<phase>` are totals
        since the last row; `memory_gib` is the peak of the GPU (of the process without one).
        """
        self._last = (lr, grad_norm)
        if self.step in (1, self.num_steps) or self.step % self.args.logging_steps == 0:
            self.log_rest()

    def log_rest(self) -> None:
        """Writes a row of the steps since the last one, if there are any."""
        if not self._loss_count:
            return
        lr, grad_norm = self._last
        loss = float(self._reduced_loss()) / max(1, self._loss_count)
        spent = time.perf_counter() - self._row_began - self._pauses()
        row = {
            "epoch": round(self.step / self.epoch_length, 4),
            "loss": loss,
            **self._reduced("mean", {k: v / self._counts[k] for k, v in self._sums.items()}),
            **self._reduced("max", self._peaks),
            **self._notes,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": self._samples / spent if spent else 0.0,
            **{f"seconds_{name}": round(value, 4) for name, value in self._seconds.items()},
            "memory_gib": round(peak_memory_gib(self.device), 3),
        }
        peak = device_peak_flops(self.device)
        if peak and self.flops_per_sample and spent:
            share = self._samples / self.accelerator.num_processes
            row["mfu"] = self.flops_per_sample * share / spent / peak
        self.write_metrics(row)
        self._loss.zero_()
        self._loss_count = self._samples = 0
        for kept in (self._seconds, self._sums, self._counts, self._peaks, self._notes):
            kept.clear()
        self._row_began = time.perf_counter()
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}")

    def _pauses(self) -> float:
        """Seconds since the last row that were not training: validation, checkpoints, caches."""
        return sum(self._seconds.get(name, 0.0) for name in ("validation", "checkpoint", "cache"))

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

    def write_metrics(self, row: Mapping[str, float]) -> None:
        """Appends one row to metrics.jsonl and tells the trackers."""
        if self.main:
            with (self.output_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **row}) + "\n")
        self.accelerator.log(dict(row), step=self.step)

    def _forget_metrics_after(self, step: int) -> None:
        """Rows of steps that will be done again would stand twice, and checkpoints of a branch
        that was left would be taken for the latest."""
        path = self.output_dir / "metrics.jsonl"
        if self.main and self._resumed is not None:
            checkpoint.forget_after(self.output_dir, step)
            # A kill may have come between a checkpoint and the removal of those over the limit.
            checkpoint.rotate(self.output_dir, self.args.checkpoints_total_limit)
        if self.main and path.is_file():
            rows, bad = records.read_rows(path)
            if bad:
                self.say(f"{path}: {bad} damaged lines are left out")
            kept = [json.dumps(row) for row in rows if row["step"] <= step and step > 0]
            checkpoint.write_file(path, "".join(line + "\n" for line in kept))
        self.accelerator.wait_for_everyone()


# -- start ------------------------------------------------------------------------------------


def start(run_args: RunArgs, optim: OptimArgs) -> Run:
    """Opens the processes, takes the folder, finds the checkpoint to resume, settles the seed.

    A dry run takes nothing. What is taken is this process's until `Run.finish` or its end.

    Raises:
        UserError: a tracker is not installed, a checkpoint is not there, the folder holds a user's
            files or another process is at work in it, or the processes are sharded (FSDP,
            DeepSpeed) or not joined.
    """
    for kind in ("FSDP", "DEEPSPEED"):  # on a CPU accelerate would only not do it
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("1", "true"):
            raise UserError(
                f"{kind} is not supported yet: a run could not be resumed exactly; use "
                "scripts/accelerate/multi_gpu.yaml (for less memory see --train_dtype, "
                "--optimizer adamw8bit, --freeze, --gradient_checkpointing)"
            )
    trackers = _trackers(run_args.report_to)  # a dry run refuses what is not installed, too
    accelerator = accelerate.Accelerator(
        mixed_precision=run_args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=optim.gradient_accumulation_steps,
            adjust_scheduler=False,
            sync_with_dataloader=False,
        ),
        log_with=None if run_args.dry_run else trackers or None,
        project_dir=run_args.output_dir / "logs",
        # Rank 0 may check and cache a large data set while the others wait.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=24)),
            # The only buffer is a constant table of positions, 0.45 GB in SD3.5-Medium.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        # torchrun on a machine without a GPU: every process would be a run of its own, and all
        # would write into one folder.
        raise UserError(
            f"{started} processes were started that know nothing of each other; without a GPU, "
            f"{_together_on_cpu(started)}"
        )
    if not accelerator.is_main_process:
        for library in (transformers, diffusers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = run_args.allow_tf32
    torch.backends.cudnn.allow_tf32 = run_args.allow_tf32

    folder = run_args.output_dir
    resumed, overwrite = None, run_args.overwrite_output_dir
    if run_args.dry_run:
        outputs.check(folder, "run", overwrite=overwrite)
    else:
        _alone(accelerator, lambda: _take(folder, overwrite=overwrite))
        launcher.watch()
    try:
        if not overwrite:
            resumed = checkpoint.choose(folder, run_args.resume_from_checkpoint)
        seed = _settle_seed(run_args, resumed)
    except UserError:
        outputs.release(folder)
        raise
    run = Run(accelerator, run_args, seed)
    run._resumed = resumed
    asked, processes = launch.asked_processes() or 1, accelerator.num_processes
    if asked > processes:
        run.say(
            f"{asked} processes were asked for and this run has {processes}: without a GPU "
            f"accelerate launch starts one; {_together_on_cpu(asked)}"
        )
    if run_args.resume_from_checkpoint == "latest" and resumed is None:
        run.say(f"no checkpoint in {folder} yet: starting from zero")
    return run


def _together_on_cpu(processes: int) -> str:
    script = Path(sys.argv[0]).name
    return f"start it with ACCELERATE_USE_CPU=true torchrun --nproc_per_node {processes} {script}"


def _alone(accelerator: accelerate.Accelerator, act: Callable[[], None]) -> None:
    """Lets one process act before the others go on; what it refuses, all refuse."""
    trouble = ""
    if accelerator.is_main_process:
        try:
            act()
        except UserError as error:
            trouble = str(error)
    trouble = str(broadcast_object_list([trouble])[0])
    if trouble:
        raise UserError(trouble)


def _take(folder: Path, *, overwrite: bool) -> None:
    held = outputs.claim(folder, "run", overwrite=overwrite)
    found = [path.name for _, path in checkpoint.existing(folder)]
    foreign = [name for name in found if not held.lists(f"{name}/state.json")]
    if overwrite and foreign:
        outputs.release(folder)
        raise UserError(
            f"--output_dir {folder}: {', '.join(foreign)} was not written by a run in this folder, "
            "so --overwrite_output_dir leaves it, and it would be taken for the new run's: move it"
        )


def _tracker_files(project: str) -> list[str]:
    """What the trackers write below the output folder, as patterns: they choose the names."""
    board = f"logs/{glob.escape(project)}/*"
    return [
        *(f"{board}events.out.tfevents.*", f"{board}hparams.yml"),
        *("logs/wandb/*run-*/*", "logs/wandb/*latest-run", "logs/wandb/*debug*.log"),
        *("logs/swanlab/run-*/*", "logs/swanlab/.gitignore"),
    ]


def _trackers(choice: str) -> list[Any]:
    if choice == "none":
        return []
    names = [name for name in TRACKERS if choice in (name, "all") and find_spec(name)]
    if choice != "all" and not names:
        raise UserError(f"--report_to {choice}: the package {choice} is not installed")
    return names


def _settle_seed(args: RunArgs, resumed: Path | None) -> int:
    """The given seed, that of the run to be resumed, or a drawn one; equal on all processes."""
    if args.seed is not None:
        return args.seed
    if resumed is not None:
        return checkpoint.read_state(resumed).seed
    recorded = args.output_dir / "args.json"
    resume = args.resume_from_checkpoint == "latest" and not args.overwrite_output_dir
    if resume and recorded.is_file():  # killed before its first checkpoint
        seed = _options_of(recorded).get("seed")
        if type(seed) is int:
            return seed
    return int(broadcast_object_list([secrets.randbits(31)])[0])


def options(args: Any) -> dict[str, Any]:
    """The resolved options by group, ready for JSON; tokens and secrets of addresses stay out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            # hub_token and its like; max_sequence_length and keep_tokens are no secrets.
            return {k: plain(item) for k, item in value.items() if not k.endswith("_token")}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return hide(str(value)) if isinstance(value, str | Path) else value

    return plain(asdict(args))


@contextmanager
def _masked_command_line() -> Iterator[None]:
    """Trackers store the command line: they find it without the secrets of its addresses."""
    words = sys.argv
    sys.argv = [hide(word) for word in words]
    try:
        yield
    finally:
        sys.argv = words


def _flat(args: Any) -> dict[str, Any]:
    """The options as trackers want them: no groups, only simple values."""
    simple = (bool, int, float, str)
    return {
        name: value if isinstance(value, simple) else str(value)
        for group in options(args).values()
        for name, value in (group.items() if isinstance(group, dict) else [])
    }


# Options that a run may be continued with another value of: how far, how to show, where to keep
# things. By group, since two groups may have an option of one name that means two things. Data,
# seed, the schedule's length and the sizes of batches have checks of their own.
_INCIDENTAL = """
    run.resume_from_checkpoint run.overwrite_output_dir run.dry_run run.output_dir
    run.checkpointing_steps run.checkpointing_minutes run.checkpoints_total_limit run.report_to
    run.tracker_project_name run.logging_steps optim.max_train_steps optim.num_train_epochs
    optim.steps_per_epoch optim.train_batch_size optim.gradient_accumulation_steps
    optim.lr_when_length_changes model.gradient_checkpointing model.torch_compile
    data.dataset_name data.train_data_dir data.instance_data_dir data.data_config data.cache_dir
    data.dataloader_num_workers data.on_bad_sample data.eval_fraction data.eval_data_dir
    data.max_train_samples prior.class_data_dir prior.sample_batch_size
    pretrain.pretrain_data_dir pretrain.pretrain_dataset_name sample.sample_batch_size
    sample.max_invalid cache.latent_cache_dir cache.no_cache_latents
    cache.no_cache_text_embeddings prompts.prompt_file prompts.prompt_dataset_name
    prompts.eval_prompt_file reward.reward_device reward.reward_batch_size reward.list_rewards
    scorers.reward_device scorers.reward_batch_size scorers.list_rewards ema.offload_ema
    full.save_dtype full.max_shard_size full.single_file full.single_file_without_t5
    lora.lora_format
"""


def _refuse_own_sources(folder: Path, args: Any) -> None:
    """A run must not write into the folder that it reads its model from.

    Raises:
        UserError: it would.
    """
    names = ("pretrained_model_name_or_path", "single_file_config", "init_lora_weights_path")
    groups = [vars(group) for group in vars(args).values()]
    for name, value in [(name, group.get(name)) for group in groups for name in names]:
        path = Path(value).expanduser().resolve() if value else None
        if path and path.exists() and folder.resolve() in (path, path.parent):
            raise UserError(
                f"--output_dir {folder}: the run would overwrite its own --{name}; choose another "
                "folder"
            )


def _changed_options(folder: Path, args: Any, mixed_precision: str) -> list[str]:
    """What differs from the options of the run in `folder`, in words."""
    path = folder / "args.json"
    if not path.is_file():
        return []

    def essential(groups: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for group, values in groups.items()
            if isinstance(values, dict) and group not in ("validation", "evaluation", "publish")
            for name, value in values.items()
            if f"{group}.{name}" not in _INCIDENTAL.split()
        }

    record = _options_of(path)
    # As accelerate resolved it: its configuration may have changed while the flag did not.
    then = {**essential(record["args"]), "mixed_precision": record["mixed_precision"]}
    now = {**essential(options(args)), "mixed_precision": mixed_precision}
    names = sorted(then.keys() | now.keys())
    changed = {name: (then.get(name), now.get(name)) for name in names}
    whence = {"mixed_precision": (_whence(record), f" ({_precision_from(args)})")}
    return [
        f"--{name} was {old}{whence.get(name, ('', ''))[0]}, now {new}"
        f"{whence.get(name, ('', ''))[1]}"
        for name, (old, new) in changed.items()
        if old != new
    ]


def _precision_from(args: Any) -> str:
    """What settled the precision: the flag, or what accelerate launch puts into the environment."""
    if args.run.mixed_precision is not None:
        return "by the flag"
    if os.environ.get("ACCELERATE_MIXED_PRECISION"):
        return "by accelerate's configuration"
    return "by default: python and torchrun read no configuration of accelerate's"


def _whence(record: Mapping[str, Any]) -> str:
    words = record.get("mixed_precision_from")
    return f" ({words})" if words else ""


def _options_of(path: Path) -> dict[str, Any]:
    """What args.json says.

    Raises:
        UserError: it is damaged.
    """
    advice = (
        ": whether the run's options are still the same cannot be told; remove it to go on with "
        "those that are given now"
    )
    table = json.loads(hide(json.dumps(records.read_table(path, advice))))  # older: passwords
    if not isinstance(table.get("args"), dict) or "mixed_precision" not in table:
        raise UserError(f"{path} is damaged (it holds no options){advice}")
    return table


def record(args: Any, run: Run) -> dict[str, Any]:
    """What args.json says: options, seed, processes, git revision, versions."""
    return {
        "script": Path(sys.argv[0]).name,
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "args": options(args),
        "seed": run.seed,
        "num_processes": run.accelerator.num_processes,
        "mixed_precision": run.accelerator.mixed_precision,
        "mixed_precision_from": _precision_from(args),
        "device": device_name(run.device),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("sd-dojo", "torch", "diffusers", "transformers", "accelerate", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


# -- dry run ----------------------------------------------------------------------------------


def print_plan(
    run: Run,
    args: Any,
    model: nn.Module,
    cost: Cost,
    batch_size: int,
    *,
    needs: phases.Needs,
    bytes_per_weight: int = 16,
) -> None:
    """Prints what `--dry_run` promises: options, sizes, steps, memory, operations and hours.

    Args:
        model: holds the parameters in the dtype that they will have.
        cost: of a micro-batch of `batch_size`.
        bytes_per_weight: what training one weight takes: itself, its gradient, the optimizer's
            state, an average.
        needs: what is held beside the network.
    Raises:
        UserError: the run would be refused: its folder, or the checkpoint that it goes on from.
    """
    total = sum(param.numel() for param in model.parameters())
    trained = [param for param in model.parameters() if param.requires_grad]
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    frozen_bytes = sum(weights.values()) - sum(weights[id(p)] for p in trained)
    trained_bytes = bytes_per_weight * sum(param.numel() for param in trained)
    kept = frozen_bytes + trained_bytes
    gib = (kept + cost.saved_bytes) / 2**30
    found = phases.memory(needs, sum(weights.values()), kept, kept + cost.saved_bytes)
    micro_batches = run.samples_per_step / batch_size / run.accelerator.num_processes
    rows = {
        "trainable parameters": f"{sum(param.numel() for param in trained):,}",
        "total parameters": f"{total:,}",
        "effective batch size": f"{run.samples_per_step}",
        "optimizer steps": f"{run.num_steps}",
        "steps per epoch": f"{run.epoch_length:.2f}",
        "memory of training per process, estimated": f"{gib:.2f} GiB (weights "
        f"{frozen_bytes / 2**30:.2f}, training state {trained_bytes / 2**30:.2f}, "
        f"activations {cost.saved_bytes / 2**30:.2f}; the autoencoder not included)",
        **phases.told(found),
        "operations per process and step": f"{cost.flops * micro_batches / 1e12:.3f} TFLOP",
        "hours to finish": run.hours(cost.flops * micro_batches),
    }
    run.say(json.dumps(options(args), indent=1))
    for name, value in rows.items():
        run.say(f"{name}: {value}")
    run.rehearse(args)


# -- machine ----------------------------------------------------------------------------------


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


def arithmetic(device: torch.device) -> dict[str, str]:
    """What, besides a network and its input, decides the last bits of what is computed here.

    On a CPU the threads share a sum out among them, so their number decides how it is rounded. It
    belongs into the fingerprint of every cache: a run of one thread would leave numbers that a run
    of two does not make.
    """
    if device.type == "cuda":
        return {}
    return {"device": device.type, "threads": str(torch.get_num_threads())}


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a known GPU, in FLOP/s."""
    name = device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
