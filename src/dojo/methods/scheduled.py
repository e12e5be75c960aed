"""Scheduled sampling: the network learns from where its own steps lead, too ("rollout").

Training shows a network points of the straight path z = (1 - sigma) x0 + sigma eps. Sampling asks
it wherever its earlier steps have led, beside that path, and the errors add up. Scheduled sampling
(Bengio et al. 2015, arXiv:1506.03099; for flow matching Huang et al. 2025, ReflexFlow,
arXiv:2512.04904) therefore takes some inputs from the network itself. For a share of the samples

1. sigma is drawn as ever, and k in 1 .. K evenly;
2. the point of the path at sigma_k is taken, which is k steps earlier on the schedule of a sampler
   of N steps (`flow.earlier_sigma`);
3. k Euler steps of the network as it is now, without gradient and guidance, lead from there to
   sigma: z' = z(sigma_k) + sum (sigma_{j-1} - sigma_j) v(z_j, sigma_j);
4. it learns at z' the velocity that leads to the picture, (z' - x0) / sigma (`flow.velocity_to`).
   Where the steps were exact z' = z, and that is eps - x0: nothing changes.

The idea is the papers'; the schedule, Euler's steps and the target in this form are ours, and
ReflexFlow's further terms (weights by frequency) are not in it. Draws hang on seed and place alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dojo import rng
from dojo.cli import UserError, ranges
from dojo.lazy import torch
from dojo.maths import flow

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.models.family import Model
    from dojo.run import Learner, Run

Predict = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(latents of some samples, their sigmas [b], their numbers in the batch [b]) -> velocities"""


@dataclass(frozen=True, kw_only=True)
class ScheduledArgs:
    """Inputs that the network makes itself (scheduled sampling, rollout)."""

    scheduled_sampling: float = 0.0
    """share of samples whose noisy input comes from steps of the network itself, at most; 0 is
    none"""
    scheduled_sampling_steps: int = 1
    """such steps: 1 to so many, each a forward pass more"""
    scheduled_sampling_of: int = 28
    """steps of the whole sampling whose length they have"""
    scheduled_sampling_ramp: int = 0
    """optimizer steps over which the share rises from 0"""

    def __post_init__(self) -> None:
        ranges.check(self, "scheduled_sampling", least=0, most=1)
        ranges.check(self, "scheduled_sampling_steps scheduled_sampling_of", least=1)
        ranges.check(self, "scheduled_sampling_ramp", least=0)
        if self.scheduled_sampling_steps > self.scheduled_sampling_of:
            raise ValueError(
                "--scheduled_sampling_steps must not be more than --scheduled_sampling_of: there "
                "are no more steps before a point"
            )

    def share(self, step: int) -> float:
        """The share of samples in the optimizer step that follows `step` of them."""
        if step >= self.scheduled_sampling_ramp:
            return self.scheduled_sampling
        return self.scheduled_sampling * step / self.scheduled_sampling_ramp

    def counts(self, uniform: Tensor, step: int) -> Tensor:
        """The steps that samples are led by: int64 [B], 0 for those that are noised as ever.

        Args:
            uniform: in (0, 1], one for every sample: the picked ones' share, evenly parted.
            step: optimizer steps done.
        """
        share = self.share(step)
        if not share:
            return torch.zeros_like(uniform, dtype=torch.int64)
        counts = (uniform / share * self.scheduled_sampling_steps).ceil().long()
        return torch.where(uniform <= share, counts.clamp(1, self.scheduled_sampling_steps), 0)

    def check(self, run: Run) -> None:
        """Refuses processes that share the weights: they would need as many passes each.

        Raises:
            UserError: they do.
        """
        if self.scheduled_sampling and (run.replicas.sharded or run.replicas.owns_storage):
            raise UserError("--scheduled_sampling does not go with --shard or DeepSpeed")


def led(
    predict: Predict,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    counts: Tensor,
    *,
    total: int,
    shift: float,
) -> Tensor:
    """Noisy inputs [B, ...] at `sigma`: of the path, or where steps of the network lead.

    Args:
        predict: the network, asked for those samples alone that still move.
        counts: the steps of every sample, int64 [B].
        total: steps of the sampling whose length they have.
        shift: of sigma.
    """
    noisy = flow.interpolate(clean, noise, sigma)
    for left in range(int(counts.max()), 0, -1):
        rows = (counts >= left).nonzero()[:, 0].to(clean.device)
        now = flow.earlier_sigma(sigma[rows], left, total, shift)
        then = flow.earlier_sigma(sigma[rows], left - 1, total, shift) if left > 1 else sigma[rows]
        begins = flow.along(counts.to(clean.device)[rows] == left, clean)
        start = flow.interpolate(clean[rows], noise[rows], now)
        at = torch.where(begins, start, noisy[rows])
        step = flow.along(then - now, at) * predict(at, now, rows)
        noisy = noisy.index_copy(0, rows, (at + step).to(noisy.dtype))
    return noisy


class Scheduled:
    """What a script's loop asks for noisy inputs in place of those of the path."""

    def __init__(self, run: Run, args: ScheduledArgs, model: Model, learner: Learner) -> None:
        self.run, self.args, self.model, self.learner = run, args, model, learner

    def __call__(
        self,
        objective: Any,
        clean: Tensor,
        noise: Tensor,
        sigma: Tensor,
        conditions: Mapping[str, Tensor],
        places: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Noisy inputs and the velocities to learn there, both [B, C, h, w].

        Args:
            objective: the flow; its shift is the sampler's.
            places: of the samples in the run.
        """
        noisy, target = flow.interpolate(clean, noise, sigma), flow.velocity(clean, noise)
        uniform = rng.uniform(self.run.keys("scheduled sampling", places))
        counts = self.args.counts(uniform, self.run.step)
        # A sampler's last step ends at 0, not nearer to it than one step: there the target, which
        # has 1 / sigma, would grow beyond all bounds.
        apart = flow.unshift_sigma(sigma, objective.shift) >= 1 / self.args.scheduled_sampling_of
        counts = torch.where(apart.cpu(), counts, 0)
        self.run.average(scheduled_share=(counts > 0).float().to(clean.device))
        if not int(counts.max()):
            return noisy, target
        noisy = self._led(objective, clean, noise, sigma, conditions, counts)
        picked = flow.along(counts.to(clean.device) > 0, clean)
        return noisy, torch.where(picked, flow.velocity_to(clean, noisy, sigma), target)

    def _led(
        self,
        objective: Any,
        clean: Tensor,
        noise: Tensor,
        sigma: Tensor,
        conditions: Mapping[str, Tensor],
        counts: Tensor,
    ) -> Tensor:
        """`led` by the network as it is, without dropout: as it is when it draws."""
        # Past DDP, since processes need not lead equally many samples.
        network = self.run.accelerator.unwrap_model(self.learner.network)
        training = network.training

        def predict(at: Tensor, now: Tensor, rows: Tensor) -> Tensor:
            some = {name: value[rows.to(value.device)] for name, value in conditions.items()}
            return self.model.predict(network, at, now, some, self.run.dtype)

        network.eval()
        try:
            with torch.no_grad(), self.run.replicas.autocast():
                return led(
                    *(predict, clean, noise, sigma, counts),
                    total=self.args.scheduled_sampling_of,
                    shift=objective.shift,
                )
        finally:
            network.train(training)
