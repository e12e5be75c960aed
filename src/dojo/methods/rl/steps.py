"""The options of a rollout: how pictures are sampled, and which steps of their way are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dojo import rng
from dojo.cli import ranges
from dojo.maths import flow
from dojo.maths.rollout import DiffusionPlan, FlowPlan
from dojo.maths.transitions import NOISE_LEVELS

if TYPE_CHECKING:
    from dojo.maths.denoising import Way

# By --train_timesteps: options that no other choice reads.
OF_CHOICE = {
    "window": "window_size window_range window_first window_schedule window_every",
    "fraction": "timestep_fraction",
}


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
        ranges.check_choice(self, "train_timesteps", OF_CHOICE)
        ranges.check_choice(self, "window_schedule", {"sliding": "window_every"})
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

    def plan(self, way: Way, seed: int, epoch: int) -> DiffusionPlan:
        """The plan of an epoch's rollouts along `way`, whose `eta` the trained steps have."""
        return DiffusionPlan(
            way=way,
            trained=self.trained_steps(seed, epoch),
            step_weighting=self.step_weighting,
        )
