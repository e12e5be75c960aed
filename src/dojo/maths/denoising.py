"""Sampling with a network: all the way to the picture, or part of it.

A `Way` fixes the timesteps and the sampler of a network that predicts noise (or v) before it is
asked, a `FlowWay` the sigmas of one that predicts the velocity of a rectified flow. `sample` goes
to the end without gradients. `estimate` stops early and tells the clean latents that the last step
points to, with gradients through the last few steps: what a reward is back-propagated into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, TypeAlias

from dojo import rng
from dojo.lazy import no_grad, torch
from dojo.maths import ddpm, flow
from dojo.maths.ddpm import Prediction, Schedule
from dojo.maths.transitions import transition

Predict: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""(latents float32 [B, ...], level [B]) -> what the network says of them [B, ...]; a level is an
int64 timestep on a `Way`, a float32 sigma on a `FlowWay`"""

Grid = Literal["even", "pipeline"]
"""where the sigmas of a flow's steps lie, see `FlowWay.of`"""


class Course(Protocol):
    """From noise to picture in steps, which are counted from 0."""

    @property
    def num_steps(self) -> int:
        """How many there are."""
        ...

    def step(
        self,
        predict: Predict,
        latents: torch.Tensor,
        number: int,
        keys: Sequence[tuple[rng.Key, ...]],
    ) -> torch.Tensor:
        """The latents after step `number`."""
        ...

    def clean(self, predict: Predict, latents: torch.Tensor, number: int) -> torch.Tensor:
        """The clean latents that the prediction of step `number` points to."""
        ...


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

    @property
    def num_steps(self) -> int:
        """One for each timestep."""
        return len(self.timesteps)

    def step(
        self,
        predict: Predict,
        latents: torch.Tensor,
        number: int,
        keys: Sequence[tuple[rng.Key, ...]],
    ) -> torch.Tensor:
        """The latents after step `number`, counted from 0."""
        timestep, previous = ddpm.pairwise(self.timesteps)[number]
        predicted = predict(latents, _all(timestep, latents))
        gaussian = ddpm.transition(
            *(latents, predicted, timestep, previous, self.schedule, self.eta, self.prediction)
        )
        if gaussian.std == 0:
            return gaussian.mean
        own = [(*key, number) for key in keys]
        return gaussian.sample(rng.normal(latents.shape[1:], own, latents.device))

    def clean(self, predict: Predict, latents: torch.Tensor, number: int) -> torch.Tensor:
        """The clean latents that the prediction of step `number` points to."""
        timestep = _all(self.timesteps[number], latents)
        predicted = predict(latents, timestep)
        return ddpm.clean_estimate(latents, predicted, timestep, self.schedule, self.prediction)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowWay:
    """The same along the ODE of a rectified flow, where the first noise is all there is.

    Raises:
        ValueError: the sigmas do not fall from 1 to 0.
    """

    sigmas: tuple[float, ...]
    """T + 1 numbers from 1 to 0"""

    def __post_init__(self) -> None:
        falling = all(one > other for one, other in pairwise(self.sigmas))
        if not falling or (self.sigmas[0], self.sigmas[-1]) != (1, 0):
            raise ValueError(f"sigmas have to fall from 1 to 0: {self.sigmas}")

    @classmethod
    def of(cls, steps: int, shift: float, grid: Grid = "even") -> FlowWay:
        """So many steps on a schedule with this shift.

        A change of the velocity moves the clean estimate by sigma times as much, and so the last
        step decides what a chain to the picture's end can teach. On the even grid, 1, 1 - 1/T, ..,
        1/T shifted, it begins at shift / (T - 1 + shift). diffusers' pipeline has the other one,
        whose last step begins at 0.009 at SD3's shift of 3, however many there are.
        """
        if grid == "pipeline":
            return cls(sigmas=flow.sigma_schedule(steps, shift))
        even = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        shifted = flow.shift_sigma(even, shift).float()
        return cls(sigmas=(*(float(sigma) for sigma in shifted), 0.0))

    @property
    def num_steps(self) -> int:
        """One from each sigma above 0."""
        return len(self.sigmas) - 1

    def step(
        self,
        predict: Predict,
        latents: torch.Tensor,
        number: int,
        keys: Sequence[tuple[rng.Key, ...]],
    ) -> torch.Tensor:
        """The latents after step `number`, an Euler step; nothing is drawn."""
        sigma, sigma_next = self.sigmas[number : number + 2]
        velocity = predict(latents, _all(sigma, latents))
        return transition("ode", latents, velocity, sigma, sigma_next, 0.0).mean

    def clean(self, predict: Predict, latents: torch.Tensor, number: int) -> torch.Tensor:
        """The clean latents that the velocity of step `number` points to."""
        sigma = _all(self.sigmas[number], latents)
        return flow.clean_estimate(latents, predict(latents, sigma), sigma)


def _all(level: float, latents: torch.Tensor) -> torch.Tensor:
    """One level for a whole batch, [B]: int64 of a timestep, float32 of a sigma."""
    return torch.full(latents.shape[:1], level, device=latents.device)


@no_grad
def sample(
    predict: Predict, noise: torch.Tensor, way: Course, keys: Sequence[tuple[rng.Key, ...]] = ()
) -> torch.Tensor:
    """Latents of finished pictures [B, ...], from standard normal noise of that shape.

    Args:
        keys: one per picture; the noise of a step is drawn from the key and the step's number, so
            that a picture does not depend on its batch. Not needed at eta 0, nor along an ODE.
    """
    latents = noise.float()
    for number in range(way.num_steps):
        latents = way.step(predict, latents, number, keys)
    return latents


def estimate(
    predict: Predict,
    noise: torch.Tensor,
    way: Course,
    keys: Sequence[tuple[rng.Key, ...]],
    *,
    last: int,
    grad_steps: int = 1,
) -> torch.Tensor:
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
    if not 0 <= last < way.num_steps:
        raise ValueError(f"step {last} of {way.num_steps}")
    if not 1 <= grad_steps <= last + 1:
        raise ValueError(f"{grad_steps} steps with gradient, of {last + 1}")
    latents = noise.float()
    for number in range(last):
        with nullcontext() if number > last - grad_steps else torch.no_grad():
            latents = way.step(predict, latents, number, keys)
    return way.clean(predict, latents, last)
