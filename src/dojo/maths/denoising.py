"""Sampling with a network: all the way to the picture, or part of it.

A `Way` fixes the timesteps and the sampler of a network that predicts noise (or v) before it is
asked, a `FlowWay` the sigmas of one that predicts the velocity of a rectified flow. `sample` goes
to the end without gradients. `estimate` stops early and tells the clean latents that the last step
points to, with gradients through the last few steps: what a reward is back-propagated into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, TypeAlias

from dojo import rng
from dojo.lazy import no_grad, torch
from dojo.maths import ddpm, flow
from dojo.maths.ddpm import Prediction, Schedule
from dojo.maths.flow import Grid
from dojo.maths.transitions import transition

Predict: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""(latents float32 [B, ...], level [B]) -> what the network says of them [B, ...]; a level is an
int64 timestep on a `Way`, a float32 sigma on a `FlowWay`"""

Move: TypeAlias = "Callable[[torch.Tensor, int], torch.Tensor]"
"""(latents [B, ...], number of a step) -> the latents after it; called for step after step"""

Solver = Literal["euler", "heun", "ab2", "dpm2m"]
"""how a flow's ODE is solved, see `FlowWay`"""


class Course(Protocol):
    """From noise to picture in steps, which are counted from 0."""

    @property
    def num_steps(self) -> int:
        """How many there are."""
        ...

    def mover(self, predict: Predict, keys: Sequence[tuple[rng.Key, ...]]) -> Move:
        """What goes this way once, from its first step on; it may remember what it passed."""
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

    def mover(self, predict: Predict, keys: Sequence[tuple[rng.Key, ...]]) -> Move:
        """What goes this way once; see `Course`. Nothing is remembered."""

        def move(latents: torch.Tensor, number: int) -> torch.Tensor:
            return self.step(predict, latents, number, keys)

        return move

    def clean(self, predict: Predict, latents: torch.Tensor, number: int) -> torch.Tensor:
        """The clean latents that the prediction of step `number` points to."""
        timestep = _all(self.timesteps[number], latents)
        predicted = predict(latents, timestep)
        return ddpm.clean_estimate(latents, predicted, timestep, self.schedule, self.prediction)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowWay:
    """The same along the ODE of a rectified flow, where the first noise is all there is.

    Every solver's step is Euler's with a velocity of its own:

        euler  v(z, sigma), one prediction a step, first order
        heun   the mean of v at both ends, two predictions but for the last step, second order
        ab2    Adams and Bashforth's, one prediction, second order: v is taken to go on, in sigma,
               as it went in the step before
        dpm2m  DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2), the same of the
               clean estimate in lambda = log((1 - sigma) / sigma). Where lambda has no number, in
               the first two steps and the last one, it is Euler's.

    Raises:
        ValueError: the sigmas do not fall from 1 to 0.
    """

    sigmas: tuple[float, ...]
    """T + 1 numbers from 1 to 0"""
    solver: Solver = "euler"

    def __post_init__(self) -> None:
        falling = all(one > other for one, other in pairwise(self.sigmas))
        if not falling or (self.sigmas[0], self.sigmas[-1]) != (1, 0):
            raise ValueError(f"sigmas have to fall from 1 to 0: {self.sigmas}")

    @classmethod
    def of(cls, steps: int, shift: float, grid: Grid = "even", solver: Solver = "euler") -> FlowWay:
        """So many steps on a schedule with this shift: see `flow.sigmas`.

        A change of the velocity moves the clean estimate by sigma times as much, and so the last
        step decides what a chain to the picture's end can teach: next to nothing on the pipeline's
        grid.
        """
        return cls(sigmas=flow.sigmas(steps, shift, grid), solver=solver)

    @property
    def num_steps(self) -> int:
        """One from each sigma above 0."""
        return len(self.sigmas) - 1

    @property
    def predictions(self) -> int:
        """How often the network is asked on the whole way."""
        return 2 * self.num_steps - 1 if self.solver == "heun" else self.num_steps

    def mover(self, predict: Predict, keys: Sequence[tuple[rng.Key, ...]]) -> Move:
        """What goes this way once; see `Course`. Nothing is drawn."""
        before: torch.Tensor | None = None  # what is carried on, as it was in the step before

        def move(latents: torch.Tensor, number: int) -> torch.Tensor:
            nonlocal before
            ends = sigma, sigma_next = self.sigmas[number], self.sigmas[number + 1]
            level = _all(sigma, latents)
            velocity = predict(latents, level).float()
            if self.solver == "heun" and sigma_next > 0:
                there = transition("ode", latents, velocity, *ends, 0.0).mean
                velocity = (velocity + predict(there, _all(sigma_next, latents)).float()) / 2
            elif self.solver in ("ab2", "dpm2m"):
                clean = flow.clean_estimate(latents, velocity, level)
                now = velocity if self.solver == "ab2" else clean
                if before is not None:
                    velocity = velocity + self._ahead(number) * (now - before)
                before = now
            return transition("ode", latents, velocity, *ends, 0.0).mean

        return move

    def _ahead(self, number: int) -> float:
        """What a step from the second on adds to its velocity, per change since the step before.

        Half the step's length over that of the step before: of velocities in sigma (ab2), of clean
        estimates in lambda (dpm2m), where it is 0 as long as one of the two is infinite.
        """
        sigmas = first, now, then = self.sigmas[number - 1 : number + 2]
        if self.solver == "ab2":
            return (then - now) / (now - first) / 2
        if first == 1 or then == 0:
            return 0.0
        first, _, then = (math.log((1 - s) / s) - math.log((1 - now) / now) for s in sigmas)
        return then / first / 2 / now  # x0 = z - sigma v: the sign of `first` turns it round

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
    latents, move = noise.float(), way.mover(predict, keys)
    for number in range(way.num_steps):
        latents = move(latents, number)
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
    latents, move = noise.float(), way.mover(predict, keys)
    for number in range(last):
        with nullcontext() if number > last - grad_steps else torch.no_grad():
            latents = move(latents, number)
    return way.clean(predict, latents, last)
