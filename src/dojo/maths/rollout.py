"""Sampling as a policy: from noise to picture, with what training needs of the way.

A `Plan` fixes a rollout before any network is asked: the sigmas, which steps are trained, and the
sampler. A step is taken with noise exactly when it is trained; the others are Euler steps of the
ODE (Flow-GRPO-Fast; MixGRPO, Li et al. 2025, arXiv:2507.21802). The last step is never trained:
its noise is so small, or zero, that rounding decides its likelihood.

`predict` is the one way to a transition. `sample` calls it without gradients and keeps the
distribution that it drew from; training calls it with gradients at the stored latents. Before the
first update both give the same bits, and so a ratio of exactly 1, if the network computes the
same: the same batch in the same order (the batch size picks the kernels), the same autocast and
guidance, no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dojo import rng
from dojo.maths import flow
from dojo.maths.gaussian import Gaussian
from dojo.maths.transitions import Sampler, sensitivity, transition

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents float32 [B, ...], sigma float32 [B]) -> velocity [B, ...]"""

NOISE_LEVELS: dict[Sampler, float] = {"sde": 0.7, "cps": 0.8, "dance": 0.3}
"""The noise levels of the samplers' authors."""


@dataclass(frozen=True, kw_only=True)
class RolloutArgs:
    """How pictures are sampled for training, and which steps of their way are trained."""

    sampler: Literal["sde", "cps", "dance"] = "cps"
    """how a trained step draws its noise: sde (Flow-GRPO), cps (coefficients-preserving, no noise
    left in the picture), dance (DanceGRPO)"""
    noise_level: float | None = None
    """strength of that noise; unset: 0.7 for sde, 0.8 for cps, 0.3 for dance"""
    sample_steps: int = 10
    """denoising steps of a rollout"""
    train_timesteps: Literal["all", "fraction", "window"] = "window"
    """which steps are trained: all but the last (two with cps, which hardly has noise there), the
    first --timestep_fraction, or a window of a few; the others are ODE steps without noise"""
    timestep_fraction: float = 0.5
    """share of the steps, from the noisiest on, that --train_timesteps fraction trains"""
    window_size: int = 3
    """steps in the window"""
    window_range: float = 0.5
    """share of the steps, from the noisiest on, that the window stays in"""
    window_first: int = 0
    """step before which the window does not begin: where the noisiest ones teach little"""
    window_schedule: Literal["random", "sliding"] = "random"
    """where the window lies: anywhere in its range, anew for every epoch, or from the noisiest step
    on, moving by one every --window_every epochs"""
    window_every: int = 25
    """epochs between two moves of a sliding window"""
    step_weighting: Literal["none", "velocity"] = "none"
    """none: steps count as their likelihoods do, which gives those with little noise most of the
    gradient; velocity: by what a step's ratio moves per unit of velocity, so that all pull alike"""

    def __post_init__(self) -> None:
        if self.trainable < 1:
            raise ValueError("--sample_steps must be at least 2 (3 with --sampler cps)")
        if self.noise_level is not None and self.noise_level <= 0:
            raise ValueError("--noise_level must be above 0: without noise nothing is explored")
        if self.sampler == "cps" and self.level > 1:
            raise ValueError("--noise_level must be at most 1 with --sampler cps: all noise is new")
        for name in ("timestep_fraction", "window_range"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in (0, 1]")
        if self.window_every < 1:
            raise ValueError("--window_every must be at least 1")
        room = self._first(self.window_range)
        if self.train_timesteps != "window":
            return
        if not 0 <= self.window_first < room:
            raise ValueError(
                f"--window_first must lie in 0 .. {room - 1}, the steps that --window_range leaves"
            )
        room -= self.window_first
        if not 1 <= self.window_size <= room:
            raise ValueError(
                f"--window_size must lie in 1 .. {room}, the steps that --window_range and "
                "--window_first leave"
            )

    @property
    def level(self) -> float:
        """The noise level, its default filled in."""
        return NOISE_LEVELS[self.sampler] if self.noise_level is None else self.noise_level

    @property
    def trainable(self) -> int:
        """How many steps can be trained.

        The noise of CPS goes with the sigma that a step reaches, and the last one above 0 is 0.009:
        a change of the policy would move the ratio of that step a hundred times as far as the
        ratio of the step before.
        """
        return self.sample_steps - (2 if self.sampler == "cps" else 1)

    def _first(self, fraction: float) -> int:
        """How many steps from the first on a share means: at least one, if it can be trained."""
        return min(max(round(fraction * self.sample_steps), 1), self.trainable)

    def trained_steps(self, seed: int, epoch: int) -> range:
        """The steps to train in an epoch: a function of seed and epoch, equal in all processes.

        A script that wants a window of its own for every batch numbers its batches over all
        processes and gives that number for the epoch.
        """
        if self.train_timesteps == "all":
            return range(self.trainable)
        if self.train_timesteps == "fraction":
            return range(self._first(self.timestep_fraction))
        places = self._first(self.window_range) - self.window_first - self.window_size + 1
        if self.window_schedule == "sliding":
            start = epoch // self.window_every % places
        else:
            start = rng.seed_for(seed, "window", epoch) % places
        start += self.window_first
        return range(start, start + self.window_size)

    def plan(self, shift: float, seed: int, epoch: int) -> Plan:
        """The plan of an epoch's rollouts on the pipeline's schedule with this `shift`."""
        return Plan(
            sigmas=sigma_schedule(self.sample_steps, shift),
            trained=self.trained_steps(seed, epoch),
            sampler=self.sampler,
            noise_level=self.level,
            step_weighting=self.step_weighting,
        )


def sigma_schedule(steps: int, shift: float) -> tuple[float, ...]:
    """The sigmas of SD3's pipeline: `steps` + 1 float32 numbers from 1 to 0.

    Even from 1 to the smallest sigma of training, and then shifted, as diffusers'
    FlowMatchEulerDiscreteScheduler does: the smallest has been shifted before, so it is shifted
    twice.
    """
    smallest = float(flow.shift_sigma(torch.tensor(flow.MIN_SIGMA), shift))
    even = torch.linspace(1, smallest, steps, dtype=torch.float64)
    return (*(float(sigma) for sigma in flow.shift_sigma(even, shift).float()), 0.0)


def ode_plan(steps: int, shift: float) -> Plan:
    """A rollout without noise on its way, of which nothing but the picture is kept."""
    return Plan(
        sigmas=sigma_schedule(steps, shift), trained=range(0), sampler="ode", noise_level=0.0
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed about a rollout before it starts.

    Raises:
        ValueError: trained steps outside the schedule, or its last step among them.
    """

    sigmas: tuple[float, ...]
    """T + 1 falling numbers from 1 to 0"""
    trained: range
    """the steps, of 0 .. T - 2, that draw noise and are trained"""
    sampler: Sampler
    noise_level: float
    step_weighting: Literal["none", "velocity"] = "none"

    def __post_init__(self) -> None:
        if not all(0 <= step < self.num_steps - 1 for step in self.trained):
            raise ValueError(
                f"trained steps {list(self.trained)} of {self.num_steps}: the last is never trained"
            )

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return len(self.sigmas) - 1

    def weight(self, step: int) -> float:
        """What a trained step's loss counts."""
        if self.step_weighting == "none":
            return 1.0
        sigma, sigma_next = self.sigmas[step : step + 2]
        return 1 / sensitivity(self.sampler, sigma, sigma_next, self.noise_level)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """A trained step of a batch: where it began, what it drew from, where it came to."""

    latents: Tensor
    """float32 [B / copies, ...], at the step's sigma"""
    policy: Gaussian
    """the distribution of the policy that made the rollout, [B, ...]"""
    reached: Tensor
    """float32 [B, ...], drawn from it; the next trained step's latents are this very tensor"""
    copies: int = 1
    """draws from each of the latents"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """A batch's way from noise to picture."""

    plan: Plan
    steps: dict[int, Step]
    """the trained steps, by number"""
    final: Tensor
    """float32 [B, ...], the latents to decode"""


def predict(
    velocity: Velocity, latents: Tensor, step: int, plan: Plan, copies: int = 1
) -> tuple[Gaussian, Tensor]:
    """The distribution of the next latents, and the velocity it follows from.

    Args:
        latents: float32 [B, ...].
        copies: repeats every row of both as often: [B * copies, ...].
    """
    sigma, sigma_next = plan.sigmas[step : step + 2]
    sampler = plan.sampler if step in plan.trained else "ode"
    predicted = velocity(latents, torch.full(latents.shape[:1], sigma, device=latents.device))
    policy = transition(sampler, latents, predicted, sigma, sigma_next, plan.noise_level)
    if copies == 1:
        return policy, predicted
    repeated = replace(policy, mean=policy.mean.repeat_interleave(copies, 0))
    return repeated, predicted.repeat_interleave(copies, 0)


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    plan: Plan,
    keys: Sequence[tuple[rng.Key, ...]] = (),
    *,
    copies: int = 1,
) -> Trajectory:
    """Takes a batch from noise to picture and keeps the trained steps.

    Args:
        velocity: the policy, guidance included.
        noise: standard normal [B / copies, ...], the latents at sigma 1.
        keys: one per sample; the noise of a step is drawn from the key and the step's number, so
            that it hangs neither on the processes nor on what was drawn before.
        copies: samples that share their way up to the first trained step and part there, as in
            the first form of Flow-GRPO-Fast; what is before is computed once for them.
    Raises:
        ValueError: not one key per sample where steps are trained.
    """
    if plan.trained and len(keys) != len(noise) * copies:
        raise ValueError(f"{len(keys)} keys for {len(noise) * copies} samples")
    latents = noise.float()
    steps: dict[int, Step] = {}
    for step in range(plan.num_steps):
        here = copies if plan.trained and step == plan.trained[0] else 1
        policy, _ = predict(velocity, latents, step, plan, here)
        reached = policy.mean
        if step in plan.trained:
            own = [(*key, step) for key in keys]
            reached = policy.sample(rng.normal(latents.shape[1:], own, latents.device))
            steps[step] = Step(latents=latents, policy=policy, reached=reached, copies=here)
        latents = reached
    return Trajectory(plan=plan, steps=steps, final=latents)
