"""What a network learns from noised pictures, for any kind of model: one step of supervision.

    level = objective.level(uniform)                   # how much noise
    noisy = objective.noisy(clean, noise, level)       # what the network sees
    errors = objective.errors(predicted, noisy, level, clean=clean, noise=noise)
    loss = (objective.weight(level) * errors).mean()

`Flow` is rectified flow, whose level is sigma; `Diffusion` is the older kind, whose level is a
timestep, with a network that predicts the noise or the velocity v. Pure functions of tensors: B is
the batch; `clean`, `noise`, `noisy` and `predicted` are [B, ...], a level is [B].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from dojo.maths import ddpm, flow
from dojo.maths.ddpm import Prediction, Schedule
from dojo.maths.flow import WeightingScheme


class Objective(Protocol):
    """How a model is trained: levels of noise, what is predicted there, and what it counts."""

    def level(self, uniform: Tensor) -> Tensor:
        """The levels that uniform numbers in (0, 1] stand for: [B] -> [B].

        Deterministic, so evenly spread numbers give stratified levels.
        """
        ...

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the network sees at a level."""
        ...

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the network should predict there."""
        ...

    def clean_estimate(self, noisy: Tensor, predicted: Tensor, level: Tensor) -> Tensor:
        """The picture that a prediction points to; exact for the target."""
        ...

    def errors(
        self,
        predicted: Tensor,
        noisy: Tensor,
        level: Tensor,
        *,
        clean: Tensor,
        noise: Tensor,
        area: Tensor | None = None,
    ) -> Tensor:
        """The mean squared error of every sample, float32 [B], not yet weighed by `weight`.

        Args:
            area: how much each place counts, see `flow.squared_error`.
        """
        ...

    def weight(self, level: Tensor) -> Tensor:
        """What a sample's error counts: float32 [B]."""
        ...

    def of_timestep(self, timestep: Tensor) -> Tensor:
        """The level of a timestep as diffusers' scheduler of such a model gives it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Rectified flow: the network predicts the velocity eps - x0 of a straight path (`flow`).

    A level is sigma, float32 in [MIN_SIGMA, 1].
    """

    shift: float = 1.0
    """moves sigmas towards noise (`flow.shift_sigma`)"""
    weighting_scheme: WeightingScheme = "logit_normal"
    """density of sigma, or weight of the error; sigma_sqrt wants `precondition_outputs`"""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    precondition_outputs: bool = False
    """the errors are those of the clean estimate, not of the velocity"""

    def level(self, uniform: Tensor) -> Tensor:
        """Sigmas of the scheme's density: float32 [B]."""
        return flow.draw_sigma(
            uniform,
            self.weighting_scheme,
            shift=self.shift,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
        )

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """z = (1 - sigma) x0 + sigma eps."""
        return flow.interpolate(clean, noise, level)

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The velocity, eps - x0, the same at every level."""
        return flow.velocity(clean, noise)

    def clean_estimate(self, noisy: Tensor, predicted: Tensor, level: Tensor) -> Tensor:
        """z - sigma v."""
        return flow.clean_estimate(noisy, predicted, level)

    def errors(
        self,
        predicted: Tensor,
        noisy: Tensor,
        level: Tensor,
        *,
        clean: Tensor,
        noise: Tensor,
        area: Tensor | None = None,
    ) -> Tensor:
        """|v - (eps - x0)|^2, or |z - sigma v - x0|^2 with `precondition_outputs`: [B]."""
        if self.precondition_outputs:
            return flow.squared_error(self.clean_estimate(noisy, predicted, level), clean, area)
        return flow.squared_error(predicted, self.target(clean, noise, level), area)

    def weight(self, level: Tensor) -> Tensor:
        """The scheme's weight: [B]."""
        return flow.loss_weight(level, self.weighting_scheme)

    def of_timestep(self, timestep: Tensor) -> Tensor:
        """Sigma, float64: the network is asked at 1000 times that, which gives back the bits."""
        return timestep.double() / 1000


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Denoising diffusion: the network predicts the noise, or the velocity v (`ddpm`).

    A level is a timestep, int64 in 0 .. T - 1.

    Raises:
        ValueError: another kind of prediction, noise where the schedule ends without signal, or an
            `snr_gamma` that is not positive.
    """

    schedule: Schedule
    prediction_type: Prediction = "epsilon"
    snr_gamma: float | None = None
    """min-SNR weights (Hang et al. 2023, arXiv:2303.09556) with this gamma, 5 in the paper; None
    counts every timestep alike"""

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(Prediction):
            raise ValueError(
                f"a network that predicts {self.prediction_type!r} is not known here: only one of "
                f"{' and '.join(get_args(Prediction))}"
            )
        if self.prediction_type == "epsilon":
            ddpm.require_signal(self.schedule)
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"snr_gamma has to be positive, not {self.snr_gamma}")

    def level(self, uniform: Tensor) -> Tensor:
        """Timesteps, all equally likely: int64 [B]; the largest number is the first timestep."""
        return ((1 - uniform) * self.schedule.num_timesteps).long()

    def noisy(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps."""
        return ddpm.add_noise(clean, noise, level, self.schedule)

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0."""
        if self.prediction_type == "epsilon":
            return noise
        return ddpm.velocity(clean, noise, level, self.schedule)

    def clean_estimate(self, noisy: Tensor, predicted: Tensor, level: Tensor) -> Tensor:
        """The x0 that a predicted eps or v points to."""
        return ddpm.clean_estimate(noisy, predicted, level, self.schedule, self.prediction_type)

    def errors(
        self,
        predicted: Tensor,
        noisy: Tensor,
        level: Tensor,
        *,
        clean: Tensor,
        noise: Tensor,
        area: Tensor | None = None,
    ) -> Tensor:
        """|prediction - target|^2: [B]."""
        return flow.squared_error(predicted, self.target(clean, noise, level), area)

    def weight(self, level: Tensor) -> Tensor:
        """1, or min(SNR, gamma) / SNR where eps is predicted, / (SNR + 1) where v is: [B].

        Both are min(SNR, gamma) as a weight on the error of x0. That of v is 0 where no signal is
        left: nothing is learned of the last timestep then.
        """
        snr = self.schedule.snr(level)
        if self.snr_gamma is None:
            return torch.ones_like(snr)
        return snr.clamp_max(self.snr_gamma) / (snr + (self.prediction_type == "v_prediction"))

    def of_timestep(self, timestep: Tensor) -> Tensor:
        """The timestep itself."""
        return timestep
