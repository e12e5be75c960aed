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
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from dojo.lazy import torch
from dojo.maths import ddpm, flow
from dojo.maths.ddpm import HuberSchedule, Prediction, Schedule
from dojo.maths.flow import WeightingScheme
from dojo.maths.precise import wide

if TYPE_CHECKING:
    from torch import Tensor

Loss = Literal["l2", "huber", "smooth_l1"]
"""what is made of the difference between a prediction and its target, by sd-scripts' names"""

LARGEST_SNR = 1000.0
"""at which debiased estimation stops to weigh the nearly clean timesteps down, as in sd-scripts"""


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
        """The mean error of every sample, float32 [B], squared unless the objective says otherwise.

        It is not yet weighed by `weight`.

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
        """Sigma, float64 where there is one: the network is asked at 1000 times that, which gives
        back the bits."""
        return wide(timestep) / 1000


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Denoising diffusion: the network predicts the noise, or the velocity v (`ddpm`).

    A level is a timestep, int64 in 0 .. T - 1.

    Raises:
        ValueError: another kind of prediction, noise where the schedule ends without signal, an
            `snr_gamma` that is not positive, two weights at once, no timestep, or a limit of the
            Huber loss that is none.
    """

    schedule: Schedule
    prediction_type: Prediction = "epsilon"
    snr_gamma: float | None = None
    """min-SNR weights (Hang et al. 2023, arXiv:2303.09556) with this gamma, 5 in the paper; None
    counts every timestep alike"""
    debiased_estimation: bool = False
    """weights of Yu et al. (2023, arXiv:2310.08442): 1 / sqrt(SNR) where noise is predicted,
    1 / (SNR + 1) where v is, with an SNR of `LARGEST_SNR` at most, as sd-scripts has them"""
    min_timestep: int = 0
    """the first timestep that is trained"""
    max_timestep: int | None = None
    """the first one behind the last that is trained; None trains to the end"""
    loss_type: Loss = "l2"
    """l2 is the squared error; huber and smooth_l1 are it for small differences, and grow like
    their size for large ones: 2 c (sqrt(d^2 + c^2) - c), and the same over c"""
    huber_c: float = 0.1
    """c of these two, or what it falls to"""
    huber_schedule: HuberSchedule = "snr"
    """see `ddpm.huber_limit`"""

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
        if self.snr_gamma is not None and self.debiased_estimation:
            raise ValueError("snr_gamma and debiased_estimation are two weights: one of them")
        first, end, every = *self.timesteps, self.schedule.num_timesteps
        if not 0 <= first < end <= every:
            raise ValueError(
                f"min_timestep {first} and max_timestep {end} have to lie in 0 .. {every}, in this "
                "order"
            )
        if not 0 < self.huber_c <= 1:
            raise ValueError(f"huber_c has to lie above 0 and not above 1, not at {self.huber_c}")

    @property
    def timesteps(self) -> tuple[int, int]:
        """The first timestep that is trained, and the first one behind the last."""
        end = self.schedule.num_timesteps if self.max_timestep is None else self.max_timestep
        return self.min_timestep, end

    def level(self, uniform: Tensor) -> Tensor:
        """Timesteps, all equally likely: int64 [B]; the largest number is the first timestep."""
        first, end = self.timesteps
        return ((1 - uniform) * (end - first)).long() + first

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
        """|prediction - target|^2, or the loss that `loss_type` names: [B]."""
        target = self.target(clean, noise, level)
        if self.loss_type == "l2":
            return flow.squared_error(predicted, target, area)
        limit = ddpm.huber_limit(level, self.schedule, self.huber_c, self.huber_schedule)
        errors = flow.mean_over(ddpm.pseudo_huber(predicted, target, limit), area)
        return errors / limit if self.loss_type == "smooth_l1" else errors

    def weight(self, level: Tensor) -> Tensor:
        """1, min-SNR's weight, or that of debiased estimation: [B].

        min-SNR is min(SNR, gamma) / SNR where eps is predicted, / (SNR + 1) where v is: both are
        min(SNR, gamma) as a weight on the error of x0. That of v is 0 where no signal is left:
        nothing is learned of the last timestep then. That of debiased estimation is 1 there.
        """
        snr, predicts_v = self.schedule.snr(level), self.prediction_type == "v_prediction"
        if self.debiased_estimation:
            snr = snr.clamp_max(LARGEST_SNR)
            return 1 / (snr + 1) if predicts_v else snr.rsqrt()
        if self.snr_gamma is None:
            return torch.ones_like(snr)
        return snr.clamp_max(self.snr_gamma) / (snr + predicts_v)

    def of_timestep(self, timestep: Tensor) -> Tensor:
        """The timestep itself."""
        return timestep
