"""Sampling as a policy: from noise to picture, with what training needs of the way.

A `Plan` fixes a rollout before any network is asked: its levels, which steps are trained, and the
sampler. `FlowPlan` is that of a rectified flow, whose levels are sigmas, `DiffusionPlan` that of a
diffusion, whose levels are timesteps. A step is taken with noise exactly when it is trained; the
others are Euler steps of the ODE, or DDIM's without noise (Flow-GRPO-Fast; MixGRPO, Li et al. 2025,
arXiv:2507.21802). The last step is never trained: its noise is so small, or zero, that rounding
decides its likelihood.

`predict` is the one way to a transition. `sample` calls it without gradients and keeps the
distribution that it drew from; training calls it with gradients at the stored latents. Before the
first update both give the same bits, and so a ratio of exactly 1, if the network computes the
same: the same batch in the same order (the batch size picks the kernels), the same autocast and
guidance, no dropout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

from dojo import rng
from dojo.lazy import no_grad, torch
from dojo.maths import ddpm, flow
from dojo.maths.denoising import Way
from dojo.maths.gaussian import Gaussian
from dojo.maths.transitions import Sampler, sensitivity, transition

Velocity: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""(latents float32 [B, ...], level [B]) -> what the network says there, [B, ...]: of a flow at
sigmas (float32) the velocity, of a diffusion at timesteps (int64) the noise, or v"""

NOISE_LEVELS: dict[Sampler, float] = {"sde": 0.7, "cps": 0.8, "dance": 0.3}
"""The noise levels of the samplers' authors."""


@dataclass(frozen=True, kw_only=True)
class StepArgs:
    """Which steps of a picture's way are trained, on any schedule."""

    sample_steps: int = 10
    """denoising steps of a rollout"""
    train_timesteps: Literal["all", "fraction", "window"] = "window"
    """which steps are trained: all but the last, the first --timestep_fraction, or a window of a
    few; the others are steps without noise"""
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
            raise ValueError(f"--sample_steps must be at least {self._least}")
        for name in ("timestep_fraction", "window_range"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in (0, 1]")
        if self.window_every < 1:
            raise ValueError("--window_every must be at least 1")
        if self.window_size < 1 and self.train_timesteps != "window":
            raise ValueError("--window_size must be at least 1")
        if self.window_first < 0:
            raise ValueError("--window_first must not be negative")
        room = self._first(self.window_range)
        if self.train_timesteps != "window":
            return
        if self.window_first >= room:
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
    def trainable(self) -> int:
        """How many steps can be trained: all but the last."""
        return self.sample_steps - 1

    @property
    def _least(self) -> str:
        """The fewest steps, for the user."""
        return "2"

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


@dataclass(frozen=True, kw_only=True)
class RolloutArgs(StepArgs):
    """How pictures are sampled for training, and which steps of their way are trained."""

    sampler: Literal["sde", "cps", "dance"] = "cps"
    """how a trained step draws its noise: sde (Flow-GRPO), cps (coefficients-preserving, no noise
    left in the picture), dance (DanceGRPO)"""
    noise_level: float | None = None
    """strength of that noise; unset: 0.7 for sde, 0.8 for cps, 0.3 for dance"""
    sigma_grid: flow.Grid = "pipeline"
    """where the steps begin: pipeline is diffusers' table, whose last step, from a sigma of 0.009
    or less, moves next to nothing; even is 1, 1 - 1/T, .., 1/T, shifted: as good with one step
    less"""
    train_timesteps: Literal["all", "fraction", "window"] = "window"
    """which steps are trained: all but the last (two with cps on the pipeline's grid, which hardly
    has noise there), the first --timestep_fraction, or a window of a few; the others are ODE steps
    without noise"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_level is not None and self.noise_level <= 0:
            raise ValueError("--noise_level must be above 0: without noise nothing is explored")
        if self.sampler == "cps" and self.level > 1:
            raise ValueError("--noise_level must be at most 1 with --sampler cps: all noise is new")

    @property
    def level(self) -> float:
        """The noise level, its default filled in."""
        return NOISE_LEVELS[self.sampler] if self.noise_level is None else self.noise_level

    @property
    def trainable(self) -> int:
        """How many steps can be trained.

        The noise of CPS goes with the sigma that a step reaches, and on the pipeline's grid the
        last one above 0 is 0.009: a change of the policy would move the ratio of that step a
        hundred times as far as the ratio of the step before.
        """
        faint = self.sampler == "cps" and self.sigma_grid == "pipeline"
        return self.sample_steps - (2 if faint else 1)

    @property
    def _least(self) -> str:
        return "2 (3 with --sampler cps)"

    def plan(self, shift: float, seed: int, epoch: int) -> FlowPlan:
        """The plan of an epoch's rollouts on the pipeline's schedule with this `shift`."""
        return FlowPlan(
            sigmas=flow.sigmas(self.sample_steps, shift, self.sigma_grid),
            trained=self.trained_steps(seed, epoch),
            sampler=self.sampler,
            noise_level=self.level,
            step_weighting=self.step_weighting,
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionRolloutArgs(StepArgs):
    """How pictures are sampled for training, and which steps of their way are trained."""

    eta: float = 1.0
    """how much noise a trained step of DDIM draws (TRL's sample_eta): 1 is as much as DDPM, smaller
    ones less; at 0 a step has no likelihood and cannot be trained"""
    sample_steps: int = 20
    """denoising steps of a rollout; DDPO's authors took 50"""
    train_timesteps: Literal["all", "fraction", "window"] = "all"
    """which steps are trained: all but the last, the first --timestep_fraction, or a window of a
    few; the others are steps of DDIM without noise"""
    step_weighting: Literal["none", "velocity"] = "none"
    """none: steps count as their likelihoods do, which gives those with little noise most of the
    gradient; velocity: by what a step's ratio moves per unit of what the network says, so that all
    pull alike"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eta <= 1:
            raise ValueError(
                f"--eta {self.eta:g} must lie in (0, 1]: at 0 a step is drawn without noise and "
                "has no likelihood, above 1 it draws more noise than its timestep holds"
            )
        for option in fields(self):
            choice = "window" if option.name.startswith("window_") else None
            choice = "fraction" if option.name == "timestep_fraction" else choice
            changed = getattr(self, option.name) != option.default
            if changed and choice not in (None, self.train_timesteps):
                raise ValueError(
                    f"--{option.name} does nothing with --train_timesteps {self.train_timesteps}: "
                    f"it is for --train_timesteps {choice}"
                )

    def plan(self, way: Way, seed: int, epoch: int) -> DiffusionPlan:
        """The plan of an epoch's rollouts along `way`, whose `eta` the trained steps have."""
        return DiffusionPlan(
            way=way,
            trained=self.trained_steps(seed, epoch),
            step_weighting=self.step_weighting,
        )


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """What is fixed about a rollout before it starts.

    Raises:
        ValueError: trained steps outside the schedule, or its last step among them.
    """

    trained: range
    """the steps, of 0 .. T - 2, that draw noise and are trained"""
    step_weighting: Literal["none", "velocity"] = "none"

    def __post_init__(self) -> None:
        if not all(0 <= step < self.num_steps - 1 for step in self.trained):
            raise ValueError(
                f"trained steps {list(self.trained)} of {self.num_steps}: the last is never trained"
            )

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """T, the number of steps."""

    @abstractmethod
    def level(self, step: int) -> float:
        """Where a step begins: what the network is asked at; an int where levels are timesteps."""

    @abstractmethod
    def transition(self, step: int, latents: torch.Tensor, predicted: torch.Tensor) -> Gaussian:
        """The distribution of the latents after a step, with noise where it is trained."""

    @abstractmethod
    def sensitivity(self, step: int) -> float:
        """How many standard deviations a trained step's mean moves per unit of what is predicted.

        The gradient of the step's log-probability is as large.
        """

    def weight(self, step: int) -> float:
        """What a trained step's loss counts."""
        return 1.0 if self.step_weighting == "none" else 1 / self.sensitivity(step)


@dataclass(frozen=True, kw_only=True)
class FlowPlan(Plan):
    """That of a rectified flow: the network says the velocity at sigma."""

    sigmas: tuple[float, ...]
    """T + 1 falling numbers from 1 to 0"""
    sampler: Sampler
    noise_level: float

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return len(self.sigmas) - 1

    def level(self, step: int) -> float:
        """Sigma."""
        return self.sigmas[step]

    def transition(self, step: int, latents: torch.Tensor, predicted: torch.Tensor) -> Gaussian:
        """The sampler's step where it is trained, else the ODE's: see `transitions.transition`."""
        sampler = self.sampler if step in self.trained else "ode"
        return transition(sampler, latents, predicted, *self._ends(step), self.noise_level)

    def sensitivity(self, step: int) -> float:
        """Per unit of velocity: see `transitions.sensitivity`."""
        return sensitivity(self.sampler, *self._ends(step), self.noise_level)

    def _ends(self, step: int) -> tuple[float, float]:
        return self.sigmas[step], self.sigmas[step + 1]


@dataclass(frozen=True, kw_only=True)
class DiffusionPlan(Plan):
    """That of a diffusion: the network says the noise, or v, at a timestep.

    Its last step leads to the picture itself, without noise, whatever is trained.
    """

    way: Way
    """its `eta` is the noise of the trained steps"""

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return len(self.way.timesteps)

    def level(self, step: int) -> int:
        """The timestep."""
        return self.way.timesteps[step]

    def transition(self, step: int, latents: torch.Tensor, predicted: torch.Tensor) -> Gaussian:
        """DDIM's step, with `eta` where it is trained, else without noise: `ddpm.transition`."""
        eta = self.way.eta if step in self.trained else 0.0
        ends, way = ddpm.pairwise(self.way.timesteps)[step], self.way
        return ddpm.transition(latents, predicted, *ends, way.schedule, eta, way.prediction)

    def sensitivity(self, step: int) -> float:
        """Per unit of predicted noise, or v: the transition is linear in it.

        Raises:
            ValueError: a step without noise.
        """
        one = torch.ones(1, dtype=torch.float64)
        moved = self.transition(step, torch.zeros_like(one), one)
        if moved.std == 0:
            raise ValueError("a step without noise has no standard deviation")
        return abs(moved.mean.item()) / moved.std


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """A trained step of a batch: where it began, what it drew from, where it came to."""

    latents: torch.Tensor
    """float32 [B / copies, ...], at the step's level"""
    policy: Gaussian
    """the distribution of the policy that made the rollout, [B, ...]"""
    reached: torch.Tensor
    """float32 [B, ...], drawn from it; the next trained step's latents are this very tensor"""
    copies: int = 1
    """draws from each of the latents"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """A batch's way from noise to picture."""

    plan: Plan
    steps: dict[int, Step]
    """the trained steps, by number"""
    final: torch.Tensor
    """float32 [B, ...], the latents to decode"""


def predict(
    velocity: Velocity, latents: torch.Tensor, step: int, plan: Plan, copies: int = 1
) -> tuple[Gaussian, torch.Tensor]:
    """The distribution of the next latents, and what the network says, which it follows from.

    Args:
        latents: float32 [B, ...].
        copies: repeats every row of both as often: [B * copies, ...].
    """
    level = torch.full(latents.shape[:1], plan.level(step), device=latents.device)
    predicted = velocity(latents, level)
    policy = plan.transition(step, latents, predicted)
    if copies == 1:
        return policy, predicted
    repeated = replace(policy, mean=policy.mean.repeat_interleave(copies, 0))
    return repeated, predicted.repeat_interleave(copies, 0)


@no_grad
def sample(
    velocity: Velocity,
    noise: torch.Tensor,
    plan: Plan,
    keys: Sequence[tuple[rng.Key, ...]] = (),
    *,
    copies: int = 1,
) -> Trajectory:
    """Takes a batch from noise to picture and keeps the trained steps.

    Args:
        velocity: the policy, guidance included.
        noise: standard normal [B / copies, ...], the latents where the way begins.
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
