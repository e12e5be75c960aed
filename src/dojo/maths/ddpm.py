"""Denoising diffusion as Stable Diffusion 1 trains it (Ho et al. 2020, arXiv:2006.11239).

Pure functions of tensors. B is the batch; `clean`, `noise`, `noisy` and `epsilon` are [B, ...],
`timestep` is int64 [B] in 0 .. 999, with 999 the noisiest. The schedule is the table of abar_t, the
share of the signal's variance that is left at t:

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    eps ~ N(0, I)

and the network predicts eps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dojo.maths.gaussian import Gaussian, require_full_precision


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much signal is left at every timestep.

    Raises:
        ValueError: numbers that do not fall from below 1 to above 0.
    """

    alphas_cumprod: Tensor
    """abar, float64 [T] on the CPU"""

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if not (abar[0] < 1 and abar[-1] > 0 and bool((abar.diff() < 0).all())):
            raise ValueError("the signal's share has to fall from below 1 to above 0")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Schedule:
        """The schedule of a diffusers scheduler's configuration.

        The betas are float32 as diffusers', so that both have the same numbers; the products are
        not rounded.

        Raises:
            ValueError: an unknown `beta_schedule`, or `trained_betas`.
        """
        kind = config.get("beta_schedule", "linear")
        first, last = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        count = int(config.get("num_train_timesteps", 1000))
        if config.get("trained_betas") is not None:
            raise ValueError("a scheduler with trained_betas is not known here")
        if kind == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
        elif kind == "linear":
            betas = torch.linspace(first, last, count, dtype=torch.float32)
        else:
            raise ValueError(f"unknown beta_schedule {kind!r}")
        return cls((1 - betas.double()).cumprod(0))

    @property
    def num_timesteps(self) -> int:
        """T, 1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)

    def at(self, timestep: int) -> float:
        """abar of one timestep; before the first, 1: the picture itself."""
        return float(self.alphas_cumprod[timestep]) if timestep >= 0 else 1.0

    def sampling_timesteps(self, steps: int, offset: int = 1) -> tuple[int, ...]:
        """The timesteps of a sampler, the noisiest first: diffusers' "leading" spacing.

        Every (T / steps)-th timestep from `offset` on, which is 1 for Stable Diffusion 1.

        Raises:
            ValueError: no steps, or more than there are timesteps.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"{steps} steps of {self.num_timesteps} timesteps")
        stride = self.num_timesteps // steps
        return tuple(min(i * stride + offset, self.num_timesteps - 1) for i in range(steps))[::-1]

    def roots(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t): two float32 [B, 1, ..., 1]."""
        abar = self.alphas_cumprod[timestep.cpu()]
        shape = (-1, *[1] * (like.dim() - 1))
        pair = (abar.sqrt(), (1 - abar).sqrt())
        signal, noise = (root.float().to(like.device).view(shape) for root in pair)
        return signal, noise

    def snr(self, timestep: Tensor) -> Tensor:
        """The signal-to-noise ratio abar / (1 - abar): float32 [B]."""
        abar = self.alphas_cumprod[timestep.cpu()]
        return (abar / (1 - abar)).float().to(timestep.device)


def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor, schedule: Schedule) -> Tensor:
    """A draw of x_t given x_0 (Equation 4)."""
    signal, spread = schedule.roots(timestep, clean)
    return signal * clean + spread * noise


def clean_estimate(noisy: Tensor, epsilon: Tensor, timestep: Tensor, schedule: Schedule) -> Tensor:
    """The x_0 that a predicted noise points to (Equation 15); exact for the true one."""
    signal, spread = schedule.roots(timestep, noisy)
    return (noisy - spread * epsilon.float()) / signal


def squared_error(epsilon: Tensor, noise: Tensor) -> Tensor:
    """The mean squared error of every sample, in float32 (Equation 14): [B, ...] -> [B]."""
    return (epsilon.float() - noise.float()).square().flatten(1).mean(1)


def transition(
    latents: Tensor,
    epsilon: Tensor,
    timestep: int,
    previous: int,
    schedule: Schedule,
    eta: float,
) -> Gaussian:
    """The distribution of the latents at the timestep `previous`, given those at `timestep`.

    DDIM's step (Song et al. 2020, arXiv:2010.02502, Equations 12 and 16): at eta 0 the
    deterministic one; at eta 1 the posterior of DDPM for the same two timesteps.

    Args:
        latents: float32 [B, ...].
        epsilon: the predicted noise there.
        previous: below `timestep`; negative is the picture itself, which is reached without noise.
    Raises:
        ValueError: timesteps that do not fall, or latents in half precision.
    """
    if not previous < timestep:
        raise ValueError(f"timesteps have to fall; this step goes {timestep} -> {previous}")
    require_full_precision(latents)
    abar, before = schedule.at(timestep), schedule.at(previous)
    std = eta * math.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
    epsilon = epsilon.to(latents.dtype)
    clean = (latents - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
    rest = math.sqrt(max(1 - before - std**2, 0.0))  # what of the noise is kept
    return Gaussian(math.sqrt(before) * clean + rest * epsilon, std)


def pairwise(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    """Every timestep of a sampler with the one that its step leads to; the last leads to -1."""
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))
