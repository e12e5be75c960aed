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
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from dojo import rng
from dojo.lazy import no_grad, torch
from dojo.maths import ddpm
from dojo.maths.denoising import Way
from dojo.maths.gaussian import Gaussian
from dojo.maths.transitions import Sampler, sensitivity, transition

Velocity: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""(latents float32 [B, ...], level [B]) -> what the network says there, [B, ...]: of a flow at
sigmas (float32) the velocity, of a diffusion at timesteps (int64) the noise, or v"""


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
