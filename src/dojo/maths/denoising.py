"""Sampling with a network that predicts noise (or v): all the way to the picture, or part of it.

A `Way` fixes the timesteps and the sampler before the network is asked. `sample` goes to the end
without gradients. `estimate` stops early and tells the clean latents that the last step points to,
with gradients through the last few steps: what a reward is back-propagated into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dojo import rng
from dojo.maths import ddpm
from dojo.maths.ddpm import Prediction, Schedule

Epsilon = Callable[[Tensor, Tensor], Tensor]
"""(latents float32 [B, ...], timestep int64 [B]) -> predicted noise [B, ...], or what `Way` says"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """From noise to picture: which timesteps, and how much fresh noise."""

    schedule: Schedule
    timesteps: tuple[int, ...]
    """the noisiest first"""
    eta: float
    """0 is DDIM, deterministic; 1 is DDPM's ancestral sampling"""
    prediction: Prediction = "epsilon"
    """what the network says"""

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        steps: int,
        *,
        eta: float,
        offset: int = 1,
        prediction: Prediction = "epsilon",
    ) -> Way:
        """`steps` evenly spaced timesteps (`Schedule.sampling_timesteps`).

        They begin at the last one where that has no signal: the picture's mean is decided there.
        """
        spacing = "trailing" if schedule.ends_without_signal else "leading"
        timesteps = schedule.sampling_timesteps(steps, offset, spacing)
        return cls(schedule=schedule, timesteps=timesteps, eta=eta, prediction=prediction)

    def step(
        self, epsilon: Epsilon, latents: Tensor, number: int, keys: Sequence[tuple[rng.Key, ...]]
    ) -> Tensor:
        """The latents after step `number`, counted from 0."""
        timestep, previous = ddpm.pairwise(self.timesteps)[number]
        predicted = epsilon(latents, _all(timestep, latents))
        gaussian = ddpm.transition(
            *(latents, predicted, timestep, previous, self.schedule, self.eta, self.prediction)
        )
        if gaussian.std == 0:
            return gaussian.mean
        own = [(*key, number) for key in keys]
        return gaussian.sample(rng.normal(latents.shape[1:], own, latents.device))


def _all(timestep: int, latents: Tensor) -> Tensor:
    """One timestep for a whole batch: int64 [B]."""
    return torch.full(latents.shape[:1], timestep, device=latents.device)


@torch.no_grad()
def sample(
    epsilon: Epsilon, noise: Tensor, way: Way, keys: Sequence[tuple[rng.Key, ...]] = ()
) -> Tensor:
    """Latents of finished pictures [B, ...], from standard normal noise of that shape.

    Args:
        keys: one per picture; the noise of a step is drawn from the key and the step's number, so
            that a picture does not depend on its batch. Not needed at eta 0.
    """
    latents = noise.float()
    for number in range(len(way.timesteps)):
        latents = way.step(epsilon, latents, number, keys)
    return latents


def estimate(
    epsilon: Epsilon,
    noise: Tensor,
    way: Way,
    keys: Sequence[tuple[rng.Key, ...]],
    *,
    last: int,
    grad_steps: int = 1,
) -> Tensor:
    """The clean latents that step `last` points to: ReFL (Xu et al. 2023, arXiv:2304.05977,
    Algorithm 1).

    The steps before are taken without gradients, but for `grad_steps` - 1 of them, so that the
    network learns through the last `grad_steps` calls in a chain; with the final step for `last`
    that is DRaFT-K (Clark et al. 2023, arXiv:2309.17400).

    Args:
        noise: standard normal [B, ...].
        last: number of the step whose prediction is taken, from 0.
        grad_steps: network calls that are learned through.
    Raises:
        ValueError: there is no such step, or fewer steps than are to be learned through.
    """
    if not 0 <= last < len(way.timesteps):
        raise ValueError(f"step {last} of {len(way.timesteps)}")
    if not 1 <= grad_steps <= last + 1:
        raise ValueError(f"{grad_steps} steps with gradient, of {last + 1}")
    latents = noise.float()
    for number in range(last):
        with nullcontext() if number > last - grad_steps else torch.no_grad():
            latents = way.step(epsilon, latents, number, keys)
    timestep = _all(way.timesteps[last], latents)
    predicted = epsilon(latents, timestep)
    return ddpm.clean_estimate(latents, predicted, timestep, way.schedule, way.prediction)
