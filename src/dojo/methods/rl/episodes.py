"""The pictures of an epoch: which prompts in which batches, and their scores over all processes.

The place of a picture counts the epoch's pictures over all processes; groups lie side by side.
Noise hangs on seed, epoch and place, and batch b of W processes holds the places from b W B on, so
that they see together what one process with a batch of W B sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from dojo import rng
from dojo.cli import TrainingStopped
from dojo.evaluate.held_out import together
from dojo.inputs.prompts import Prompt
from dojo.lazy import F, torch
from dojo.maths import rollout
from dojo.maths.advantages import coarse

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.inputs.prompts import Prompts
    from dojo.maths.surrogate import Surrogate
    from dojo.methods.rl.args import EpochArgs
    from dojo.rewards import Reward, RewardOutput
    from dojo.run.optim import OptimArgs
    from dojo.run.run import Key, Run

Item = TypeVar("Item")

_THUMB = 16  # pixels; diversity is measured on pictures of this size


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures of an epoch that a process samples, or trains on, together."""

    epoch: int
    places: list[int]
    prompt_ids: list[int]
    prompts: list[Prompt]

    @property
    def texts(self) -> list[str]:
        """What the pictures should show."""
        return [prompt.text for prompt in self.prompts]

    @property
    def metadata(self) -> list[Mapping[str, Any]]:
        """What rewards may want to know besides."""
        return [prompt.metadata for prompt in self.prompts]

    def keys(self, run: Run, stream: str, shared: int = 1) -> list[Key]:
        """Keys of one random stream for these pictures, `shared` of them side by side the same."""
        return [(run.seed, stream, self.epoch, place - place % shared) for place in self.places]

    def noise_keys(self, run: Run, copies: int) -> list[Key]:
        """Keys of the noise that they start from, `copies` of them from the same."""
        return self.keys(run, "noise")[::copies]

    def part(self, start: int, size: int) -> Batch:
        """Some of the pictures."""
        some = slice(start, start + size)
        return replace(
            self,
            places=self.places[some],
            prompt_ids=self.prompt_ids[some],
            prompts=self.prompts[some],
        )


def plan(run: Run, args: EpochArgs, optim: OptimArgs, source: Prompts, passes: int) -> None:
    """Fixes the length of the run, which is one of whole epochs: see `Run.plan`.

    Args:
        passes: over the pictures of an epoch.
    """
    together = {
        "train_batch_size": optim.train_batch_size,
        "sample_batch_size": args.batch_size(optim),
    }
    uses = args.samples * passes
    run.plan(optim, uses, source.fingerprint, whole_epochs=True, together=together)


def batches(
    run: Run,
    args: EpochArgs,
    prompts: Sequence[Prompt],
    drawn: Sequence[int],
    epoch: int,
    size: int,
) -> list[Batch]:
    """This process's batches of an epoch.

    Args:
        drawn: ids of the epoch's prompts, each of which is used `--group_size` times.
        size: of a batch; over all processes the batches hold the epoch exactly (`check_sizes`).
    """
    process, num_processes = run.share["process"], run.share["num_processes"]
    at_once = size * num_processes
    found = []
    for first in range(process * size, len(drawn) * args.group_size, at_once):
        places = list(range(first, first + size))
        ids = [drawn[place // args.group_size] for place in places]
        found.append(
            Batch(epoch=epoch, places=places, prompt_ids=ids, prompts=[prompts[one] for one in ids])
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """A training batch: its pictures and the trained steps of their way."""

    batch: Batch
    steps: dict[int, rollout.Step]


def split(
    batch: Batch,
    trajectory: rollout.Trajectory,
    size: int,
    velocity: Callable[[Sequence[str]], rollout.Velocity],
) -> Iterator[Chunk]:
    """A sampled batch as training batches of `size`.

    The batch's size chooses the kernels, and these the rounding: of smaller batches the policy's
    distributions are computed anew, or the ratio would not begin at 1.

    Args:
        velocity: of the policy that sampled, for these prompts.
    """
    if size == len(batch.places):
        yield Chunk(batch=batch, steps=trajectory.steps)
        return
    for start in range(0, len(batch.places), size):
        own = batch.part(start, size)
        asked = velocity(own.texts)
        steps = {}
        for number, step in trajectory.steps.items():
            copies = step.copies
            latents = step.latents[start // copies :][: size // copies]
            with torch.no_grad():
                again, _ = rollout.predict(asked, latents, number, trajectory.plan, copies)
            steps[number] = rollout.Step(
                latents=latents,
                policy=again,
                reached=step.reached[start:][:size],
                copies=copies,
            )
        yield Chunk(batch=own, steps=steps)


def shuffled(chunks: Sequence[Item], run: Run, epoch: int, num_passes: int) -> Iterator[Item]:
    """All training batches `num_passes` times, in an order that all processes share."""
    for number in range(num_passes):
        source = rng.generator(run.seed, "training order", epoch, number)
        for i in torch.randperm(len(chunks), generator=source).tolist():
            yield chunks[i]


# ---- Scores ----


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of an epoch's pictures over all processes, in the order of their places.

    On the CPU; N pictures.
    """

    scores: Tensor
    """float32 [N]"""
    valid: Tensor
    """bool [N]"""
    components: dict[str, Tensor]
    """float32 [N] by name; NaN where there is none"""
    prompt_ids: Tensor
    """int64 [N]"""
    diversity: float | None
    """see `diversity`"""

    def table(self, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Scores [N, R] and weights [R] of the components: see `decoupled_advantages`."""
        columns = [self.components[name] for name in weights]
        return torch.stack(columns, dim=1), torch.tensor([*weights.values()])

    def row(self) -> dict[str, float]:
        """What metrics.jsonl says of them."""
        there = self.scores[self.valid].double()
        return {
            "reward": there.mean().item(),
            "reward_std": there.std(correction=0).item(),
            **{
                f"reward/{name}": values[self.valid].double().mean().item()
                for name, values in self.components.items()
            },
            "invalid_share": 1 - self.valid.double().mean().item(),
            **({} if self.diversity is None else {"diversity": self.diversity}),
        }


class Scoring:
    """Scores pictures in the background, while the next ones are sampled."""

    def __init__(self, run: Run, reward: Reward, max_invalid: float) -> None:
        self.run = run
        self.reward = reward
        self.max_invalid = max_invalid
        self.pending: list[tuple[Batch, Future[RewardOutput], Tensor]] = []

    def submit(self, batch: Batch, images: Tensor) -> None:
        """Hands over the pictures [B, 3, H, W] in [0, 1] of a batch.

        Raises:
            Interrupted: the run was asked to stop.
        """
        small = F.adaptive_avg_pool2d(images, _THUMB).cpu()
        self.pending.append((batch, self.reward.submit(images, batch.texts, batch.metadata), small))
        self._pause()

    def _pause(self) -> None:
        """All processes have equally many batches, and come here equally often."""
        try:
            self.run.stopping.end_if_asked()
        except TrainingStopped:
            for _, future, _ in self.pending:
                future.cancel()  # the process would not end before they are scored
            raise

    def collect(self) -> Scores:
        """Waits for all scores and gathers them: a collective.

        Raises:
            UserError, TrainingStopped: on all processes, when a reward of one has given up (see
                `held_out.together`).
            TrainingStopped: too many pictures have no valid score.
            Interrupted: the run was asked to stop.
        """
        outputs: list[RewardOutput] = []
        with together(self.run) as trouble:
            for _, future, _ in self.pending:
                self._pause()
                if trouble.error is not None:  # comes along, as the others still go on
                    continue
                with trouble.kept():  # a user's error in one process, too
                    outputs.append(future.result())
        columns = {
            "scores": [output.scores for output in outputs],
            "valid": [output.valid for output in outputs],
            "prompt_ids": [torch.tensor(batch.prompt_ids) for batch, _, _ in self.pending],
            "small": [small for _, _, small in self.pending],
        }
        names = list(outputs[0].components)
        columns |= {f"/{name}": [one.components[name] for one in outputs] for name in names}
        whole = {
            name: in_order(self.run, torch.stack([one.to(self.run.device) for one in parts]))
            for name, parts in columns.items()
        }
        self.pending.clear()
        invalid = int((~whole["valid"]).sum())
        if invalid > self.max_invalid * len(whole["valid"]):
            raise TrainingStopped(
                f"{invalid} of {len(whole['valid'])} pictures have no valid score "
                f"(--max_invalid {self.max_invalid:g}): look at the reward"
            )
        components = {name: whole[f"/{name}"] for name in names}
        self._say_coarse(components, whole["prompt_ids"], whole["valid"])
        return Scores(
            scores=whole["scores"],
            valid=whole["valid"],
            components=components,
            prompt_ids=whole["prompt_ids"],
            diversity=diversity(whole["small"], whole["prompt_ids"]),
        )

    def _say_coarse(self, components: dict[str, Tensor], prompt_ids: Tensor, valid: Tensor) -> None:
        """Says once of a reward that float32 cannot hold what its scores differ by."""
        table = torch.stack([*components.values()], dim=1)
        for number in coarse(table, prompt_ids, valid):
            name = [*components][number]
            largest = table[valid, number].abs().max().item()
            self.run.say_once(
                f"coarse {name}",
                f"warning: the scores of {name} are so large ({largest:.3g}) that float32 can "
                "hardly tell the pictures of a prompt apart: take off what all have in common",
            )


def record(run: Run, surrogate: Surrogate, *, fresh: bool) -> None:
    """What metrics.jsonl says of a training batch's step.

    Args:
        fresh: no optimizer step since the pictures were sampled: the ratio has to be 1.
    """
    deviation = (surrogate.ratio - 1).abs()
    run.peak(**{"ratio_max_deviation" if fresh else "ratio_max_deviation_later": deviation})
    run.average(
        clip_fraction=surrogate.clipped_high | surrogate.clipped_low,
        clip_fraction_high=surrogate.clipped_high,
        clip_fraction_low=surrogate.clipped_low,
        approx_kl=surrogate.approx_kl,
    )
    if surrogate.divergence is not None:
        run.average(divergence=surrogate.divergence)
        run.peak(divergence_max=surrogate.divergence)


def in_order(run: Run, stacked: Tensor) -> Tensor:
    """[batches, B, ...] of every process to [N, ...] in the order of places, on the CPU."""
    gathered: Any = run.accelerator.gather(stacked)  # [W * batches, B, ...]
    by_process = gathered.unflatten(0, (run.accelerator.num_processes, -1))
    return by_process.transpose(0, 1).flatten(0, 2).cpu()


def diversity(small: Tensor, prompt_ids: Tensor) -> float | None:
    """How much the pictures of one prompt differ: 0 where all are the same.

    The root of the mean squared difference of two of them, in pixels of [0, 1] at 16 x 16, as a
    mean over the prompts with at least two; None where there are none.

    Args:
        small: [N, 3, 16, 16].
        prompt_ids: [N].
    """
    roots = []
    for prompt in prompt_ids.unique():
        group = small[prompt_ids == prompt].double()
        if len(group) > 1:
            # The mean squared difference of two draws is twice the variance.
            roots.append((2 * group.var(0, correction=1).mean()).sqrt())
    return torch.stack(roots).mean().item() if roots else None
