"""Rectified flow as Stable Diffusion 3 trains it (Esser et al. 2024, arXiv:2403.03206).

Pure functions of tensors. B is the batch; `clean`, `noise`, `noisy` and velocities are [B, ...],
`sigma` is float32 [B] in (0, 1] with 1 pure noise. The model's timestep is 1000 * sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

from dojo.lazy import torch

WeightingScheme = Literal["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"]
Grid = Literal["even", "pipeline"]
"""where the sigmas of a sampler's steps lie, see `sigmas`"""

# The finest sigma that SD3 was trained on: 1/1000 of the path. Below it the x0 form loses its
# digits (sigma * velocity drowns in the rounding of `noisy`).
MIN_SIGMA = 1e-3


@dataclass(frozen=True, kw_only=True)
class ShiftArgs:
    """The schedule of a rectified flow."""

    flow_shift: float | Literal["auto"] | None = None
    """shift of sigma: unset is the scheduler's own, auto is that times sqrt(latent tokens / the
    model's native tokens); also used in validation and saved with the result"""

    def __post_init__(self) -> None:
        if isinstance(self.flow_shift, float) and self.flow_shift <= 0:
            raise ValueError("--flow_shift must be positive")


def along(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """A number per sample, to be multiplied with latents: [B] -> [B, 1, ..., 1]."""
    return values.view(-1, *[1] * (latents.dim() - 1))


def interpolate(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The straight path z = (1 - sigma) x0 + sigma eps (Equation 13)."""
    s = along(sigma, clean)
    return (1 - s) * clean + s * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The path's derivative by sigma, eps - x0: what the network predicts."""
    return noise - clean


def clean_estimate(
    noisy: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The x0 that a velocity at `noisy` points to: z - sigma v."""
    return noisy - along(sigma, noisy) * velocity


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Moves sigmas towards noise for larger pictures: a s / (1 + (a - 1) s) (Equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """The inverse of `shift_sigma`: s / (a - (a - 1) s)."""
    return sigma / (shift - (shift - 1) * sigma)


def earlier_sigma(sigma: torch.Tensor, steps: int, total: int, shift: float) -> torch.Tensor:
    """Where a sampler of `total` steps was `steps` of them before it came to `sigma`: [B].

    Its steps are even before the shift, and nothing is noisier than noise.
    """
    return shift_sigma((unshift_sigma(sigma, shift) + steps / total).clamp(max=1.0), shift)


def velocity_to(clean: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The velocity that leads from `noisy` straight to `clean`, (z - x0) / sigma.

    On the path itself it is eps - x0; beside it, it leads back.
    """
    return (noisy - clean) / along(sigma, noisy)


def draw_sigma(
    uniform: torch.Tensor,
    scheme: WeightingScheme,
    *,
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> torch.Tensor:
    """Turns uniform numbers into sigmas of the scheme's density, shifted.

    Deterministic in `uniform`, so evenly spread numbers give stratified sigmas. A positive
    `logit_mean` means more noise. cosmap and sigma_sqrt are uniform here and weigh the loss.

    Args:
        uniform: float32 [B] in (0, 1].
    Returns:
        float32 [B] in [MIN_SIGMA, 1].
    """
    if scheme == "logit_normal":  # Equation 19, by the inverse of the normal's distribution
        quantile = cast(torch.Tensor, torch.special.ndtri(uniform))  # pyright: ignore[reportUnknownMemberType]
        sigma = torch.sigmoid(logit_mean + logit_std * quantile)
    elif scheme == "mode":  # Equation 20
        cosine = torch.cos(math.pi / 2 * uniform) ** 2
        sigma = 1 - uniform - mode_scale * (cosine - 1 + uniform)
    elif scheme in get_args(WeightingScheme):
        sigma = uniform
    else:
        raise ValueError(f"unknown weighting scheme {scheme!r}")
    return shift_sigma(sigma.float(), shift).clamp(MIN_SIGMA, 1.0)


def loss_weight(sigma: torch.Tensor, scheme: WeightingScheme) -> torch.Tensor:
    """The weight of the squared error at `sigma`: [B].

    cosmap is the density that Equation 21 samples, here as a weight on uniform sigmas; sigma_sqrt
    is sigma^-2, which turns the x0 error back into the velocity error.
    """
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    if scheme == "sigma_sqrt":
        return sigma**-2
    return torch.ones_like(sigma)


def squared_error(
    predicted: torch.Tensor, target: torch.Tensor, area: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of every sample, in float32: [B, C, h, w] -> [B].

    Args:
        area: how much each place counts, float32 [B, 1, h, w]; the mean is over what counts, so
            that a small subject teaches as much as a large one. None counts every place alike.

    Of two policies' velocities it is the divergence of their transitions (`Gaussian.kl`) without
    its factor, which depends on the step alone: every step is held to the reference alike.
    """
    return mean_over((predicted.float() - target.float()).square(), area)


def mean_over(errors: torch.Tensor, area: torch.Tensor | None) -> torch.Tensor:
    """The mean of every sample's errors, over what counts: [B, C, h, w] -> [B]."""
    if area is None:
        return errors.flatten(1).mean(1)
    weights = area.expand_as(errors)
    total = weights.flatten(1).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (weights * errors).flatten(1).sum(1) / total


def sigma_schedule(steps: int, shift: float) -> tuple[float, ...]:
    """The sigmas of SD3's pipeline: `steps` + 1 float32 numbers from 1 to 0.

    Even from 1 to the smallest sigma of training, and then shifted, as diffusers'
    FlowMatchEulerDiscreteScheduler does: the smallest has been shifted before, so it is shifted
    twice.
    """
    smallest = float(shift_sigma(torch.tensor(MIN_SIGMA), shift))
    even = torch.linspace(1, smallest, steps, dtype=torch.float64)
    return (*(float(sigma) for sigma in shift_sigma(even, shift).float()), 0.0)


def sigmas(steps: int, shift: float, grid: Grid) -> tuple[float, ...]:
    """The sigmas of so many steps: `steps` + 1 float32 numbers from 1 to 0.

    On the even grid, 1, 1 - 1/T, .., 1/T shifted, the last step begins at shift / (T - 1 + shift).
    On the pipeline's (`sigma_schedule`) it begins at 0.009 at SD3's shift of 3, however many there
    are: hardly anything happens in it, and T steps go as far as T - 1 of the even grid.
    """
    if grid == "pipeline":
        return sigma_schedule(steps, shift)
    even = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    return (*(float(sigma) for sigma in shift_sigma(even, shift).float()), 0.0)
