"""DPO beside its loop: the cost of a step, and what becomes of the held-out pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dojo import data, rewards
from dojo.bars import Bar
from dojo.finetune import cost_of
from dojo.inputs import texts
from dojo.lazy import no_grad, torch
from dojo.maths import preference

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dojo.finetune import Trained
    from dojo.inputs.pairs import Inputs
    from dojo.inputs.steering import Steering
    from dojo.maths.objective import Objective
    from dojo.models.family import Model
    from dojo.run import Key, Run, phases
    from dojo.run.cost import Cost


def pair_cost(
    run: Run,
    trained: Trained,
    model: Model,
    batch_size: int,
    shape: tuple[int, int, int],
    *,
    with_reference: bool,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The cost of a batch of pairs, both pictures through network and reference; without a
    reference, of the winners alone."""
    rows = batch_size * (2 if with_reference else 1)
    network, step = cost_of(run, trained, model, rows, shape, checkpointing=checkpointing)
    more = step.forward_flops if with_reference else 0
    return network, replace(step, flops=step.flops + more)


def needs(run: Run, model: Model, args: Any, size: tuple[int, int], *, drawn: bool) -> phases.Needs:
    """What a run holds beside its network, for the dry run; the watched rewards are loaded.

    Args:
        args: the script's options.
        drawn: prompts are drawn at evaluations.
    Raises:
        UserError: weights are not there, or a reward cannot be loaded.
    """
    watched = args.scorers.load_all(run.device, args.evaluation.held_out_rewards)
    pair_by_pair = 2 * args.optim.train_batch_size * args.cache.no_cache_latents
    return model.needs(
        run.dtype,
        size,
        encoded=pair_by_pair or data.encoded_at_a_time(size),
        encoded_in_training=pair_by_pair,
        live_text=texts.live(model, args.cache),
        decoded=(args.evaluation.eval_batch_size or args.optim.train_batch_size) * drawn,
        before_texts=["autoencoder"],
        scored=bool(watched),
        scorers=rewards.networks(watched),
    )


_NAMES = ("eval_loss", "eval_accuracy", "eval_winner_drift", "eval_loser_drift")


class Judge:
    """What the network makes of the held-out pairs, with the same noise at every evaluation.

    Without held-out pairs it says nothing.

    Args:
        steering: without guidance.
        num_levels: levels of noise at which each pair is looked at, evenly spread over those that
            are trained.
    """

    def __init__(
        self,
        inputs: Inputs,
        steering: Steering,
        objective: Objective,
        trained: Trained,
        beta: float,
        batch_size: int,
        *,
        num_levels: int = 4,
    ) -> None:
        self.run, self.inputs, self.steering = inputs.run, inputs, steering
        self.objective, self.trained = objective, trained
        self.beta, self.batch_size, self.num_levels = beta, batch_size, num_levels

    @property
    def metrics(self) -> list[str]:
        """The numbers that it writes into metrics.jsonl."""
        return [*_NAMES] if self.inputs.held_out is not None else []

    def catch_up(self, *, due: bool) -> None:
        """The look before the first step, or the one that a run did not stay for.

        Args:
            due: whether one belongs where the run stands.
        """
        if due and not (self.run.step and self.run.has_logged("eval_accuracy")):
            self()

    @no_grad
    def __call__(self) -> None:
        """Loss, accuracy and drifts into metrics.jsonl: a collective.

        Raises:
            Interrupted: the run was asked to stop.
        """
        pairs = self.inputs.held_out
        if pairs is None:
            return
        run = self.run
        # In thousandths: of a diffusion of a thousand timesteps these are the timesteps.
        middles = [(2 * k + 1) * 500 // self.num_levels for k in range(self.num_levels)]
        draws = pairs.draws()
        mine = draws[run.share["process"] :: run.share["num_processes"]]
        sums = torch.zeros(5, dtype=torch.float64)
        share = run.stopping.paused(mine, len(draws), self.batch_size)
        total = -(-len(mine) // self.batch_size)
        with run.phase("validation"):
            for part in Bar(share, "held-out pairs", total, disable=not run.main, leave=False):
                rows = data.collate([pairs[draw] for draw in part])
                for thousandth in middles:
                    sums += self._look(rows, thousandth)
            if run.accelerator.num_processes > 1:
                reduced: Any = run.accelerator.reduce(sums.to(run.device), "sum")
                sums = reduced.cpu()
        means = (sums[:4] / sums[4]).tolist()
        run.write_metrics(dict(zip(_NAMES, means, strict=True)))

    def _look(self, rows: data.Batch, thousandth: int) -> Tensor:
        """Sums over a batch, and how many pairs it has: float64 [5]."""
        # Of the picture's place in the set and not of the run: every evaluation sees the same.
        keys: list[Key] = [("held-out pairs", place, thousandth) for place in rows["place"]]
        clean = self.inputs.latents(rows, keys)  # [2B, C, h, w], winners before losers
        noise = self.inputs.noise(keys, clean)
        uniform = torch.full((len(clean),), 1 - thousandth / 1000)
        level = self.objective.level(uniform).to(clean.device)
        weight = self.objective.weight(level)
        noisy = self.objective.noisy(clean, noise, level)
        captions = [*rows["caption"], *rows["caption"]]
        geometry = self.inputs.geometry(rows)

        def errors(network: nn.Module) -> Tensor:
            predicted = self.steering(network, captions, geometry)(noisy, level)
            return weight * self.objective.errors(predicted, noisy, level, clean=clean, noise=noise)

        own = errors(self.trained.network)
        with self.trained.reference() as before:
            reference = errors(before)
        found = preference.dpo(*own.chunk(2), *reference.chunk(2), beta=self.beta)
        columns = (found.loss, found.accuracy, found.winner_drift, found.loser_drift)
        each = [column.cpu().double().sum() for column in columns]
        return torch.stack([*each, torch.tensor(float(len(keys)), dtype=torch.float64)])
