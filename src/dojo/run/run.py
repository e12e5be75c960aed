"""What every training script needs around its loop: the run, its length, its records.

The loop itself stands in the script. A `Run` knows the processes, the output folder, the seed and
the step; its `metrics` know the numbers, its `stopping` what is asked of it from outside, and a
`Learner` takes the steps.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dojo import bars, launch
from dojo.cli import UserError, marks, option, ranges
from dojo.files import outputs
from dojo.launch import interrupt, launcher
from dojo.lazy import accelerate, diffusers, late, torch, transformers
from dojo.run import (
    best,
    checkpoint,
    deepspeed,
    folders,
    machine,
    pace,
    resuming,
    shardable,
    trackers,
    webhook,
)
from dojo.run import optim as optimizers
from dojo.run.metrics import Metrics
from dojo.run.optim import OptimArgs
from dojo.run.processes import Processes, alone, check_output
from dojo.run.replicas import Replicas
from dojo.run.stopping import Stopping

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.run import sharding
    from dojo.run.cost import Cost
else:
    sharding = late("dojo.run.sharding")

Item = TypeVar("Item")
Tracker = Literal["tensorboard", "wandb", "swanlab", "mlflow", "all", "none"]
Key = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """The run: where it writes, how it resumes, what it reports."""

    output_dir: Path = field(metadata=marks(incidental=True))
    """folder of the result, checkpoints, metrics and validation pictures"""
    overwrite_output_dir: bool = option(False, incidental=True)
    """remove what earlier runs wrote into output_dir (manifest.jsonl lists it) instead of refusing;
    wins over resuming"""
    seed: int | None = option(None, common=True)
    """seed of every random draw; unset is drawn once, stored and resumed"""
    resume_from_checkpoint: str | None = option(None, incidental=True, common=True)
    """latest, checkpoint-N or a path; latest in an empty folder starts from zero"""
    checkpointing_steps: int = option(500, incidental=True, common=True)
    """optimizer steps between checkpoints; there is one at the end too"""
    checkpointing_minutes: float | None = option(None, incidental=True)
    """minutes after which there is one besides"""
    checkpoints_total_limit: int | None = option(None, incidental=True)
    """keep only this many checkpoints, the newest"""
    keep_best: str | None = option(None, incidental=True)
    """a metric of the evaluations (eval_loss, eval_reward, clip_score, ...) by which the best
    weights are kept in output_dir/best; :max or :min behind its name says what is better, where the
    name does not. Every new best is a checkpoint too"""
    early_stopping_patience: int | None = option(None, incidental=True)
    """with keep_best: evaluations without a new best after which the run ends, with its result"""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, common=True)
    """precision of the frozen parts and the arithmetic; unset is what accelerate's configuration
    says; trainable weights are float32 in any case but --train_dtype bf16"""
    shard: bool = False
    """each process keeps its part of weights, gradients and optimizer state (over several machines:
    each machine a set of parts); for models that one GPU cannot train"""
    allow_tf32: bool = False
    """let float32 products on Ampere and newer GPUs use TensorFloat-32"""
    report_to: tuple[Tracker, ...] = option(("tensorboard",), incidental=True)
    """trackers beside metrics.jsonl, one or several; all is every installed one"""
    tracker_project_name: str = option("sd-dojo", incidental=True)
    """project of the trackers"""
    run_name: str | None = option(None, incidental=True)
    """the run's name in the trackers, in messages, on its page and on its card; unset is the
    folder's name"""
    webhook: str | None = option(None, incidental=True)
    """address that is told when the run begins, draws, ends or fails (JSON; Discord and Slack in
    their own forms); a secret: rather set DOJO_WEBHOOK in the environment"""
    logging_steps: int = option(10, incidental=True)
    """optimizer steps between two logged ones, which average over them; step 1 is always logged"""
    dry_run: bool = option(False, incidental=True, common=True)
    """print the resolved options, sizes, steps and estimates, and exit"""
    fit: float | None = option(None, incidental=True)
    """choose what is not given so that the run fits a card of so many GB (text encoders, VAE,
    micro-batch, checkpointing, base precision, blocks on the CPU), and print it; the choice is
    computed, and a run that goes on keeps it"""

    def __post_init__(self) -> None:
        ranges.check(self, "fit", above=0)
        ranges.check(self, "checkpointing_steps logging_steps checkpoints_total_limit", least=1)
        ranges.check_seed(self, "seed")
        if not self.report_to or ("none" in self.report_to and len(self.report_to) > 1):
            raise ValueError("--report_to must be none alone, or one or several trackers")
        name = self.run_name
        if name is not None and not (name.strip() and name.isprintable()):
            raise ValueError("--run_name must be one line of text, not an empty one")
        if self.checkpointing_minutes is not None and not 0 < self.checkpointing_minutes < math.inf:
            raise ValueError("--checkpointing_minutes must be positive")
        if self.webhook is not None and not webhook.is_address(self.webhook):
            raise ValueError("--webhook must be an address that begins with https:// or http://")
        ranges.check(self, "early_stopping_patience", least=1)
        if self.keep_best is not None:
            best.read_wish(self.keep_best)
        elif self.early_stopping_patience is not None:
            raise ValueError("--early_stopping_patience needs --keep_best, which names the metric")

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.run_name or self.output_dir.resolve().name

    @property
    def patience(self) -> str:
        """What a run that ended early was told, as finished.json has it."""
        return f"{self.keep_best}, {self.early_stopping_patience}"


class Run(Processes):
    """One training run on this process; made by `start`."""

    def __init__(self, accelerator: accelerate.Accelerator, args: RunArgs, seed: int) -> None:
        super().__init__(accelerator)
        self.args = args
        self.output_dir = args.output_dir
        self.seed = seed
        self.resumed: Path | None = None  # the checkpoint that it goes on from
        self.step = 0  # optimizer steps done
        self.num_steps = 0
        self.ended_early = False  # by --early_stopping_patience
        self.samples_per_step = 0
        self.epoch_length = 1.0
        self.samples = 0  # used so far, over all processes
        self.metrics = Metrics(accelerator, args.output_dir)
        self.stopping = Stopping(self, args.checkpointing_minutes)
        self.replicas = Replicas(accelerator)  # how the processes share the weights
        self.teller = webhook.Teller(self, webhook.address(args.webhook))
        self.optim = OptimArgs()
        self.span = optimizers.Span(0, 0)  # the optimizer steps that the schedule runs over
        self._samples_per_epoch = 1
        self._whole_epochs = False
        # Where epochs are whole: the step at which this one began, and the samples that end it.
        self._began, self._epoch_ends = 0, 0
        self._data = ""
        self._micro_batch = 0
        self._batches: dict[str, int] = {}

    def keys(self, stream: str, places: Iterable[int]) -> list[Key]:
        """Keys of one random stream for samples at these places."""
        return [(self.seed, stream, place) for place in places]

    # -- length and folder --------------------------------------------------------------------

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
        processes = self.accelerator.num_processes
        self.optim = optim
        self.samples_per_step = optim.samples_per_step(processes)
        self.epoch_length = optim.epoch_length(num_samples, processes)
        self.num_steps = optim.num_steps(num_samples, processes)
        self._samples_per_epoch = num_samples
        self._data = fingerprint
        self._micro_batch = optim.train_batch_size * processes
        self._batches = {name: size * processes for name, size in (together or {}).items()}
        self._whole_epochs = whole_epochs
        if whole_epochs:
            steps = round(self.epoch_length)
            self.num_steps = _whole_epochs(optim, self.num_steps, steps, self.say)
        self.span = optimizers.Span(0, self.num_steps)

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
            going = self.check_folder(args, result)
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
                folders.clear(folder, self.say)
            outputs.own_pattern(folder, *trackers.files(self.args.tracker_project_name))
            outputs.own(self.metrics.path)
            folders.write_record(folder, args, self.seed, self.num_steps, self.accelerator)
        self.accelerator.wait_for_everyone()
        self.metrics.pace.every.update(pace.pauses(vars(args), self.epoch_length))
        trackers.start(self.accelerator, args, folder / "logs")
        self.teller.begin()
        return True

    def check_folder(self, args: Any, result: str = "") -> bool:
        """Whether there is something to do; refuses a folder that holds another run."""
        check_sharing(args, self.accelerator)
        found = folders.look(args, result, self.resumed, self.num_steps, self)
        if self.args.resume_from_checkpoint is not None:
            found.refuse_changed()
        if found.finished:
            self.say(found.nothing_to_do)
            return False
        if self.resumed is not None:
            found.refuse_other(self.resumed)
            self.span = resuming.check(
                self.resumed, self._here(), self.optim, self.num_steps, self, self.replicas
            )
        if self.args.resume_from_checkpoint is None:
            found.refuse_occupied()
        return True

    def _here(self) -> checkpoint.State:
        """Where the run stands, without its numbers."""
        return checkpoint.State(
            step=self.step,
            samples=self.samples,
            seed=self.seed,
            batch_size=self.samples_per_step,
            data=self._data,
            micro_batch=self._micro_batch,
            together=self._batches,
            lr_start=self.span.start,
            lr_steps=self.span.steps,
        )

    def state(self) -> checkpoint.State:
        """Where the run stands, for a checkpoint: a collective."""
        return replace(self._here(), **self.metrics.state())

    def finish(self) -> None:
        """Marks the run as over and closes the trackers."""
        if self.main:
            early = self.args.patience if self.ended_early else None
            folders.write_finished(self.output_dir, self.step, early)
        self.teller.end()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self.replicas.close()
        outputs.release(self.output_dir)

    # -- loop ---------------------------------------------------------------------------------

    def batches(self, loader: Iterable[Item]) -> Iterator[Item]:
        """Passes batches on until the last step is done, with a bar on one process.

        The waiting for a batch is phase `data`; what follows, until the step, is phase `train`.
        """
        iterator = iter(loader)
        with self._loop("the run stops after this optimizer step, with a checkpoint"):
            while self.step < self.num_steps:
                self.stopping.end_if_kept()
                with self.phase("data"):
                    batch = next(iterator)
                yield batch
            self.stopping.end_if_kept()

    @property
    def epoch(self) -> int:
        """The epoch that the run is in, from 0 on."""
        return self.samples // self._samples_per_epoch

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs from where the run stands until the last step is done.

        Steps that fp16's scaler skips do not count, so that the last epoch may end beyond it.
        """
        with self._loop("the run stops soon, with the last whole epoch kept"):
            while self.step < self.num_steps:
                self.stopping.end_if_kept()
                self._began = self.step
                self._epoch_ends = (self.epoch + 1) * self._samples_per_epoch
                yield self.epoch
            self.stopping.end_if_kept()

    @contextmanager
    def _loop(self, promise: str) -> Iterator[None]:
        for text in self.stopping.requests.begin():
            self.say(text)
        with self.metrics.loop(self.step, self.num_steps), interrupt.patience(promise):
            yield

    def end_step(self, asked: Sequence[float]) -> None:
        """Ends an optimizer step, with what all processes were asked in it.

        Raises:
            Interrupted: the run was asked to stop within an epoch that cannot be kept in part.
        """
        self.metrics.end_step(self.step)
        self.stopping.hear(asked)
        if self._whole_epochs:
            # Not from the steps: one that fp16's scaler skips has used up its samples as well.
            left = -((self.samples - self._epoch_ends) // self.samples_per_step)
            self.stopping.end_within_epoch(self._began, left)

    def end_early(self, reason: str) -> None:
        """Makes this step the last one; the run then ends as ever, with its result."""
        if self.step < self.num_steps:
            self.say(f"step {self.step} is the last one: {reason}")
            self.num_steps, self.ended_early = self.step, True
            self.log_rest()

    # -- numbers: see `Metrics` ---------------------------------------------------------------

    def phase(self, name: str, *, wait: bool = False) -> AbstractContextManager[None]:
        """Adds the time inside to `seconds_<name>`."""
        return self.metrics.phase(name, wait=wait)

    def average(self, **values: Tensor) -> None:
        """Takes the mean of numbers [B] of a micro-batch into the next row's mean."""
        self.metrics.average(**values)

    def peak(self, **values: Tensor) -> None:
        """Takes the largest of numbers [B] of a micro-batch into the next row's maximum."""
        self.metrics.peak(**values)

    def note(self, values: Mapping[str, float]) -> None:
        """Puts numbers, the same on all processes, into the next row."""
        self.metrics.note(values)

    def log_step(self, lr: float, grad_norm: float) -> None:
        """Writes a row when it is due: the first step, every `logging_steps`, the last."""
        self.metrics.note_step(lr, grad_norm)
        due = self.step == 1 or self.step >= self.num_steps
        if due or self.step % self.args.logging_steps == 0:
            self.log_rest()

    def log_rest(self) -> None:
        """Writes a row of the steps since the last one, if there are any."""
        self.metrics.write_rest(self.step, self.step / self.epoch_length, self.num_steps)

    def write_metrics(self, row: Mapping[str, float]) -> None:
        """Writes a row of its own at the run's step."""
        self.metrics.write(self.step, row)

    def has_logged(self, name: str) -> bool:
        """Whether metrics.jsonl has such a number at the run's step."""
        return self.metrics.has(name, self.step)

    def watch_flops(self, cost: Callable[[], Cost], batch_size: int) -> None:
        """Logs the utilisation of a known GPU from here on; `cost` is that of a micro-batch."""
        if machine.device_peak_flops(self.device):
            self.metrics.flops_per_sample = cost().flops / batch_size


def check_sharing(args: Any, accelerator: accelerate.Accelerator) -> None:
    """Refuses options of a script that do not go with how the processes share the work.

    Raises:
        UserError: naming the option.
    """
    shardable.check(args, accelerator.mixed_precision)
    deepspeed.check_script(args, accelerator)


def _whole_epochs(optim: OptimArgs, num_steps: int, steps: int, say: Callable[[str], None]) -> int:
    """The length of a run that ends with an epoch of so many steps.

    Raises:
        UserError: another one was asked for.
    """
    over = num_steps % steps
    if not over:
        return num_steps
    below, above = num_steps - over, num_steps - over + steps
    if not optim.has_length:
        say(
            f"no --max_train_steps: {above} optimizer steps, which are "
            f"{above // steps} whole epochs of {steps}"
        )
        return above
    nearest = " or ".join(str(n) for n in (below, above) if n)
    raise UserError(
        f"--max_train_steps {num_steps}: an epoch has {steps} optimizer steps and is "
        f"not broken off; take {nearest} (or --num_train_epochs)"
    )


# -- start ------------------------------------------------------------------------------------


def start(run_args: RunArgs, optim: OptimArgs) -> Run:
    """Opens the processes, takes the folder, finds the checkpoint to resume, settles the seed.

    A dry run takes nothing. What is taken is this process's until `Run.finish` or its end.

    Raises:
        UserError: a tracker is not installed, a checkpoint is not there, the folder holds a user's
            files, another process is at work in it or a machine does not see it, or the processes
            are sharded by FSDP, by DeepSpeed in a way that is not supported, or not joined, or
            accelerate would change the network by itself.
    """
    shardable.refuse_others()
    _refuse_by_accelerate()
    deepspeed.check(run_args.mixed_precision, optim, shard=run_args.shard)
    names = trackers.chosen(run_args.report_to)  # a dry run refuses what is not installed, too
    webhook.address(run_args.webhook)
    accelerator = accelerate.Accelerator(
        mixed_precision=run_args.mixed_precision,
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(
            num_steps=optim.gradient_accumulation_steps,
            adjust_scheduler=False,
            sync_with_dataloader=False,
        ),
        log_with=None if run_args.dry_run else names or None,
        project_dir=run_args.output_dir / "logs",
        # Rank 0 may check and cache a large data set while the others wait.
        kwargs_handlers=[
            accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=24)),
            # The only buffer is a constant table of positions, 0.45 GB in SD3.5-Medium.
            accelerate.DistributedDataParallelKwargs(
                broadcast_buffers=False, gradient_as_bucket_view=True
            ),
        ],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        if "LOCAL_RANK" not in os.environ:  # a scheduler's variable, say
            raise UserError(
                f"WORLD_SIZE={started} is set and no launcher started this process: unset it, or "
                f"start the script by torchrun --nproc_per_node {started}"
            )
        # torchrun on a machine without a GPU: every process would be a run of its own, and all
        # would write into one folder.
        raise UserError(
            f"{started} processes were started that know nothing of each other; without a GPU, "
            f"{_together_on_cpu(started)}"
        )
    bars.leave_out_others_in_logs()
    if not accelerator.is_main_process:
        bars.leave_out_others()
        for library in (transformers, diffusers):
            library.utils.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = run_args.allow_tf32
    torch.backends.cudnn.allow_tf32 = run_args.allow_tf32

    folder = run_args.output_dir
    resumed, overwrite = None, run_args.overwrite_output_dir
    if run_args.dry_run:
        outputs.check(folder, "run", overwrite=overwrite)
    else:
        alone(accelerator, lambda: folders.take(folder, overwrite=overwrite))
        launcher.watch()
    try:
        if not run_args.dry_run:
            check_output(accelerator, folder)
        if not overwrite:
            resumed = checkpoint.choose(folder, run_args.resume_from_checkpoint)
        seed = _settle_seed(run_args, resumed)
    except UserError:
        outputs.release(folder)
        raise
    run = Run(accelerator, run_args, seed)
    run.resumed = resumed
    if run_args.shard:
        prodigy = optim.kind == "prodigy"  # which adds up over all weights
        run.replicas = sharding.Shards(accelerator, run.dtype, summing=prodigy)
    elif deepspeed.of(accelerator):
        run.replicas = deepspeed.make(accelerator, optim)
    asked, processes = launch.asked_processes() or 1, accelerator.num_processes
    if asked > processes:
        run.say(
            f"{asked} processes were asked for and this run has {processes}: without a GPU "
            f"accelerate launch starts one; {_together_on_cpu(asked)}"
        )
    if run_args.resume_from_checkpoint == "latest" and resumed is None:
        run.say(f"no checkpoint in {folder} yet: starting from zero")
    return run


def _refuse_by_accelerate() -> None:
    """Refuses what accelerate's configuration would do to the network, unseen by the run's checks.

    Raises:
        UserError: naming the variable by which its launcher tells.
    """
    dynamo = "ACCELERATE_DYNAMO_BACKEND"
    if (backend := os.environ.get(dynamo, "no")).lower() != "no":
        raise UserError(
            f"{dynamo}={backend}: accelerate would compile the network, and neither checks nor "
            "records would know of it; take dynamo_config and --dynamo_backend out of the "
            "launcher's options and give the script --torch_compile"
        )
    if os.environ.get(precision := "ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8":
        raise UserError(f"{precision}=fp8 is not supported: take bf16, fp16 or no")
    for kind in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        name = f"ACCELERATE_USE_{kind}"
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise UserError(
                f"{name} is not supported: scripts/accelerate/multi_gpu.yaml copies the network to "
                "every GPU, and with it --shard shares it out"
            )


def _settle_seed(args: RunArgs, resumed: Path | None) -> int:
    """The given seed, that of the run to be resumed, or a drawn one; equal on all processes."""
    if args.seed is not None:
        return args.seed
    if resumed is not None:
        return checkpoint.read_state(resumed).seed
    seed = None
    if args.resume_from_checkpoint == "latest" and not args.overwrite_output_dir:
        seed = folders.recorded_seed(args.output_dir)
    if seed is not None:
        return seed
    return int(accelerate.utils.broadcast_object_list([secrets.randbits(31)])[0])


def _together_on_cpu(processes: int) -> str:
    script = Path(sys.argv[0]).name
    return f"start it with ACCELERATE_USE_CPU=true torchrun --nproc_per_node {processes} {script}"
