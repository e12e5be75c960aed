"""What learns: the optimizer of what is trained, its schedule, its average, its checkpoints.

learner = Learner(run, trained, args.optim, args.ema)
for batch in run.batches(loader):
    with learner.accumulate():
        loss = ...  # of a pass through learner.network
        if learner.step(loss):
            learner.look(evaluate, due=...)
            learner.keep()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from dojo.cli import TrainingStopped
from dojo.files import tensors
from dojo.lazy import accelerate, late, torch
from dojo.run import best, checkpoint, finite
from dojo.run import optim as optimizers
from dojo.run.averaging import Averaged
from dojo.run.replicas import Learned, Written

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dojo.run import fused
    from dojo.run.averaging import EmaArgs
    from dojo.run.optim import OptimArgs
    from dojo.run.run import Run
else:
    fused = late("dojo.run.fused")

MAX_SKIPPED_STEPS = 20  # of the fp16 gradient scaler, in a row


class Trained(Written, Protocol):
    """What is trained, and how it is written down."""

    @property
    def params(self) -> Sequence[nn.Parameter]:
        """The weights that are trained."""
        ...

    @property
    def groups(self) -> optimizers.Groups:
        """The same as the optimizer takes them."""
        ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The network, and the text encoders that are trained too."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """The whole weights in the model, on the process that writes: a collective."""
        ...

    def save_result(self, folder: Path) -> Path:
        """Writes what the training is for, and returns the file or folder that holds it."""
        ...


class Part(Protocol):
    """Something else that a checkpoint keeps."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it needs to go on exactly."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from there."""
        ...


class Evaluation(Protocol):
    """What looks at the model from time to time."""

    @property
    def metrics(self) -> Sequence[str]:
        """The numbers that it writes into metrics.jsonl."""
        ...

    def __call__(self) -> None:
        """Looks now."""
        ...

    def catch_up(self, *, due: bool) -> None:
        """Looks before the first step, or where a run that goes on has not looked yet."""
        ...


class Learner:
    """Takes the optimizer steps of a run, from the checkpoint on that it resumes.

    Args:
        parts: further things that every checkpoint keeps, by the name of their file.
        passes: backward passes of a micro-batch.
    Attributes:
        modules: what is trained, as accelerate prepared it.
    Raises:
        UserError: the checkpoint is damaged, or that of another run; the optimizer cannot train
            these weights.
    """

    def __init__(
        self,
        run: Run,
        trained: Trained,
        optim: OptimArgs,
        ema: EmaArgs,
        *,
        parts: Mapping[str, Part] | None = None,
        passes: int = 1,
    ) -> None:
        self.run, self.trained, self.parts = run, trained, parts or {}
        self.max_grad_norm = optim.max_grad_norm
        self._micro_loss = torch.zeros((), device=run.device)
        self._skipped = 0
        self._kept_now = -1  # the step of the checkpoint that a new best has written
        if optim.fused_backward:
            fused.check_run(run, passes)
        if remark := optimizers.remark(optim, run.device):
            run.say(remark)
        self.optimizer, self.schedule = optimizers.make(trained.groups, optim, run)
        self._fused = self.optimizer if isinstance(self.optimizer, fused.FusedOptimizer) else None
        self._averaged = Averaged(trained.params, ema, self.optimizer)
        state = self._resume()
        self.modules, self.optimizer = run.replicas.prepare(trained.modules, self.optimizer, passes)
        self._begin(state)
        run.accelerator.gradient_accumulation_steps *= passes

    @property
    def network(self) -> Any:
        """The network, as accelerate prepared it."""
        return self.modules[0]

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights in the model for a while, where an average is kept."""
        return self._averaged.applied()

    @contextmanager
    def asked_freely(self) -> Iterator[None]:
        """For a while processes may ask the model as often as they like, each for itself; keeps
        what was learned when something outside ends the run meanwhile."""
        with self.kept_when_stopped(), self.run.replicas.gathered():
            yield

    @contextmanager
    def result(self) -> Iterator[bool]:
        """The averaged weights, whole in the model of the process that writes: a collective.

        Yields:
            Whether this is that process.
        """
        if not (self.run.main or self.run.replicas.sharded):
            yield False
            return
        with self.averaged(), self.trained.whole():
            yield self.run.main

    # -- one step -----------------------------------------------------------------------------

    def accumulate(self) -> AbstractContextManager[Any]:
        """A micro-batch, from its forward to its backward pass."""
        return self.run.replicas.accumulate(self.modules)

    def step(self, loss: Tensor) -> bool:
        """Backward pass of a micro-batch and, when its turn has come, the optimizer step.

        Returns:
            Whether the weights have moved: not between two steps, and not in one that the fp16
            scaler skipped.
        Raises:
            TrainingStopped: loss or gradients are not finite.
            Interrupted: the run was asked to stop within an epoch that cannot be kept in part.
        """
        run = self.run
        run.accelerator.backward(loss)
        self._micro_loss += loss.detach()
        if not run.accelerator.sync_gradients:
            return False
        run.samples += run.samples_per_step
        grad_norm, micro_loss, asked = self._measured()
        whole = math.isfinite(grad_norm) and math.isfinite(micro_loss)
        if not whole and run.accelerator.scaler is None:
            self._stop(f"loss {micro_loss:g}, gradient norm {grad_norm:g}")
        self.optimizer.step()
        run.replicas.zero_grad(self.optimizer)
        # Asked of the gradients and not of accelerate: GradScaler calls the fused AdamW's step in
        # any case and lets the kernel skip, so that accelerate sees no skipped step.
        if whole:
            self._count()
        else:
            self._skip()
        self._micro_loss.zero_()
        run.end_step(asked)
        if whole:
            self._averaged.update(run.step)
            run.log_step(optimizers.learning_rate(self.optimizer), grad_norm)
        return whole

    def _measured(self) -> tuple[float, float, list[float]]:
        """The gradients' norm before it is clipped, the micro-batches' loss, and what was asked of
        the run, equal on all processes: all stop, or none."""
        run = self.run
        if self._fused is not None:  # clipped and stepped already
            norm = self._fused.norm()
        else:
            norm = run.replicas.clip(self.trained.params, self.max_grad_norm)
        asked = run.stopping.requests.local()
        numbers = torch.stack([norm.float(), self._micro_loss])
        if run.accelerator.num_processes > 1:
            numbers = torch.cat([numbers, numbers.new_tensor(asked)])
            numbers = run.accelerator.reduce(numbers, "mean")
        grad_norm, micro_loss, *heard = numbers.tolist()  # pyright: ignore
        return grad_norm, micro_loss, heard or asked

    def _count(self) -> None:
        self._skipped = 0
        self.schedule.step()
        self.run.step += 1
        loss = self._micro_loss / self.run.accelerator.gradient_accumulation_steps
        self.run.metrics.add_step(loss, self.run.samples_per_step)

    def _skip(self) -> None:
        self._skipped += 1
        if self._skipped >= MAX_SKIPPED_STEPS:
            self._stop(f"{self._skipped} steps in a row overflowed under fp16")

    def _stop(self, what: str, step: int | None = None) -> NoReturn:
        run = self.run
        run.metrics.close_bar()
        whole = checkpoint.existing(run.output_dir)
        last = f"the last good checkpoint is {whole[-1][1]}" if whole else "there is no checkpoint"
        number = run.step + 1 if step is None else step
        raise TrainingStopped(
            f"step {number} is not finite: {what}; {last}. Try a lower --learning_rate, "
            "--lr_warmup_steps, a smaller --max_grad_norm, or bf16 instead of fp16"
        )

    # -- evaluation ---------------------------------------------------------------------------

    def look(self, *evaluations: Callable[[], None], due: bool) -> None:
        """Looks at the averaged model when it is due or was asked for; keeps what was learned when
        something outside ends the run meanwhile."""
        if self.run.stopping.pictures_due(due):
            with self.kept_when_stopped(), self.averaged(), self.run.replicas.gathered():
                for evaluate in evaluations:
                    evaluate()
            self._weigh()

    def catch_up(self, *evaluations: Evaluation, due: bool) -> None:
        """What is due before the first step, or was left out when the run stopped."""
        if (text := self.run.args.keep_best) is not None:
            known = [name for evaluation in evaluations for name in evaluation.metrics]
            best.refuse_unknown(best.read_wish(text), known)
        with self.averaged(), self.run.replicas.gathered():
            for evaluation in evaluations:
                evaluation.catch_up(due=due)
        self._weigh()

    def _weigh(self) -> None:
        """Keeps the weights where they are the best so far, and ends a run whose patience is at an
        end: a collective."""
        run = self.run
        if run.args.keep_best is None:
            return
        wish = best.read_wish(run.args.keep_best)
        read = best.read(run.output_dir, wish, run.step) if run.main else None
        now: best.Standing | None = accelerate.utils.broadcast_object_list([read])[0]
        if now is None:
            return
        if now.step == run.step and now.kept != run.step:
            self.keep(now=True)
            self._kept_now = run.step
            self._keep_best(wish, now)
        elif now.step != now.kept and run.main:
            run.say(
                f"{run.output_dir / best.FOLDER} does not hold the weights of step {now.step}, by "
                f"{wish.metric} the best so far: it is written anew at the next best"
            )
        patience = run.args.early_stopping_patience
        if patience is not None and now.looks >= patience:
            run.end_early(
                f"{wish.metric} was best at step {now.step} ({now.value:g}), {now.looks} "
                "evaluations ago (--early_stopping_patience)"
            )

    def _keep_best(self, wish: best.Wish, now: best.Standing) -> None:
        """Writes the weights as a result is written: a collective."""
        run = self.run
        folder = run.output_dir / best.FOLDER

        def write(inside: Path) -> None:
            self.trained.save_result(inside)
            best.write_record(inside, wish, now)

        with run.phase("checkpoint"):
            with self.result() as writing:
                if writing:
                    checkpoint.write_whole(folder, write)
            run.accelerator.wait_for_everyone()
        run.say(f"step {run.step}: the best {wish.metric} so far, {now.value:g}: {folder}")

    # -- checkpoints --------------------------------------------------------------------------

    @contextmanager
    def kept_when_stopped(self) -> Iterator[None]:
        """Keeps what was learned when something outside stops the run: a reward's server, say."""
        try:
            yield
        except TrainingStopped:
            self.run.metrics.close_bar()
            self.keep(now=True)
            raise

    def keep(self, *, since: int | None = None, now: bool = False) -> None:
        """Writes `checkpoint-<step>` when it is due: every `checkpointing_steps`, the last, and
        when one was asked for.

        Args:
            since: where steps come several at a time, the step before them: it is due when one of
                them was.
            now: it is due, unless it is there already or nothing has been learned yet.
        Raises:
            TrainingStopped: weights, average or optimizer are not finite; nothing is written.
        """
        run = self.run
        if not self._due(run.step - 1 if since is None else since, now=now):
            return
        with run.phase("checkpoint"):
            # The result is written after the last one: it is of finite numbers too. Equal on all
            # processes, so that all stop, or none.
            if broken := self._not_finite():
                self._stop(f"NaN or infinite numbers in {broken}", run.step)
            state = run.state()  # a collective: on all processes
            folder = run.output_dir / f"checkpoint-{run.step}"
            run.replicas.write(folder, self._learned(), lambda inside: self._write(inside, state))
            if run.main:
                checkpoint.rotate(run.output_dir, run.args.checkpoints_total_limit)
            run.accelerator.wait_for_everyone()
            run.stopping.requests.saved()
            # A signal that came meanwhile need not wait for another step.
            run.stopping.listen()

    def _due(self, before: int, *, now: bool) -> bool:
        run = self.run
        if now:
            return run.step > 0 and not (run.output_dir / f"checkpoint-{run.step}").exists()
        if self._kept_now == run.step:
            return False
        every, requests = run.args.checkpointing_steps, run.stopping.requests
        asked = requests.save or bool(requests.stop)
        return run.step // every > before // every or run.step >= run.num_steps or asked

    def _learned(self) -> Learned:
        return Learned(self.trained, self._averaged, self.optimizer)

    def _write(self, folder: Path, state: checkpoint.State) -> None:
        for name, part in self.parts.items():
            tensors.save(folder / name, part.state_dict())
        checkpoint.save_training(folder, state, self.schedule, self.run.accelerator.scaler)

    def _resume(self) -> checkpoint.State | None:
        """Continues from the chosen checkpoint, if there is one; sets the run's step.

        Returns:
            Where the checkpoint stands.
        """
        run, folder = self.run, self.run.resumed
        if folder is None:
            return None
        state = checkpoint.read_state(folder)
        checkpoint.check_same_run(folder, state, run.state())
        with checkpoint.reading(folder):
            run.replicas.read(folder, self._learned())
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint.load_part(folder, name))
            checkpoint.load_training(folder, self.schedule, run.accelerator.scaler)
        if broken := self._not_finite():
            raise checkpoint.damaged(folder, f"NaN or infinite numbers in {broken}")
        run.step, run.samples = state.step, state.samples
        run.metrics.load_state(state)
        return state

    def _begin(self, state: checkpoint.State | None) -> None:
        """What comes when everything has been read back, the optimizer's groups too."""
        run = self.run
        if state is not None:
            if run.span != optimizers.Span(0, run.num_steps) or (
                state.lr_steps and state.lr_start + state.lr_steps != run.num_steps
            ):
                optimizers.respan(self.optimizer, self.schedule, run.optim, run.span)
            run.say(f"resuming from {run.resumed} at step {state.step}")
        if run.main:
            self._forget_later()
        run.accelerator.wait_for_everyone()

    def _forget_later(self) -> None:
        """Checkpoints of a branch that was left would be taken for the latest."""
        run = self.run
        if run.resumed is not None:
            checkpoint.forget_after(run.output_dir, run.step)
            # A kill may have come between a checkpoint and the removal of those over the limit.
            checkpoint.rotate(run.output_dir, run.args.checkpoints_total_limit)
        if bad := run.metrics.forget_after(run.step):
            run.say(f"{run.metrics.path}: {bad} damaged lines are left out")

    def _not_finite(self) -> str:
        """What holds NaN or infinite numbers, in words; nothing where all is well."""
        groups = {
            "the weights": [p for group in self.optimizer.param_groups for p in group["params"]],
            "their moving average": self._averaged.shadows(),
            "the optimizer's state": self.run.replicas.state(self.optimizer),
        }
        return ", ".join(self.run.replicas.anywhere(finite.not_finite(groups)))
