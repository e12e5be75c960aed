"""One step along the rectified flow, with noise or without.

All samplers are one formula. A velocity v at latents x tells the clean estimate x - sigma v and
the noise estimate e = x + (1 - sigma) v. Every step is the Euler step, less a share of the
estimated noise, plus fresh noise in its place:

    x' = x + (sigma' - sigma) v - share e + std z

- `ode`: share = std = 0.
- `sde`, Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): the Euler-Maruyama step of the reverse
  SDE with diffusion g = a sqrt(sigma / (1 - sigma)); the score is -e / sigma, so
  share = g^2 (sigma - sigma') / (2 sigma) and std = g sqrt(sigma - sigma').
- `dance`, DanceGRPO (Xue et al. 2025, arXiv:2505.07818): the same with a constant g = a.
- `cps`, coefficients-preserving sampling (Wang & Yu 2025, arXiv:2509.05952): the noise of level
  sigma' is turned by the angle a pi / 2 out of the estimate into fresh noise, so
  share = sigma' (1 - cos) and std = sigma' sin.

CPS keeps (sigma' - share)^2 + std^2 = sigma'^2: no noise in excess. The SDEs do so to first order
in the step only, and the excess of a coarse schedule shows in the picture.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from dojo.maths.gaussian import Gaussian, require_full_precision

if TYPE_CHECKING:
    from torch import Tensor

Sampler = Literal["ode", "sde", "cps", "dance"]

NOISE_LEVELS: dict[Sampler, float] = {"sde": 0.7, "cps": 0.8, "dance": 0.3}
"""The noise levels of the samplers' authors."""


def transition(
    sampler: Sampler,
    latents: Tensor,
    velocity: Tensor,
    sigma: float,
    sigma_next: float,
    noise_level: float,
) -> Gaussian:
    """The distribution of the latents at `sigma_next`, given those at `sigma`.

    Args:
        latents: float32 [B, ...].
        velocity: what the network says there, [B, ...] in any precision; worked on in float32.
        sigma, sigma_next: numbers of the schedule, 1 >= sigma > sigma_next >= 0.
        noise_level: the `a` of the formulas above; at 0 every sampler is the Euler ODE exactly.
    Raises:
        ValueError: sigmas that do not fall, or latents in half precision.
    """
    if not 1 >= sigma > sigma_next >= 0:
        raise ValueError(f"sigma has to fall within [0, 1]; this step goes {sigma} -> {sigma_next}")
    require_full_precision(latents)
    velocity = velocity.to(latents.dtype)
    share, std = _noise(sampler, sigma, sigma_next, noise_level)
    mean = latents + (sigma_next - sigma) * velocity
    if share:
        mean = mean - share * (latents + (1 - sigma) * velocity)
    return Gaussian(mean, std)


def sensitivity(sampler: Sampler, sigma: float, sigma_next: float, noise_level: float) -> float:
    """How many standard deviations a step's mean moves per unit of velocity.

    The gradient of a step's log-probability is as large; of the steps of one way the last are the
    most sensitive, by far.

    Raises:
        ValueError: a step without noise.
    """
    share, std = _noise(sampler, sigma, sigma_next, noise_level)
    if std == 0:
        raise ValueError("a step without noise has no standard deviation")
    return abs(sigma_next - sigma - share * (1 - sigma)) / std


def _noise(sampler: Sampler, sigma: float, sigma_next: float, level: float) -> tuple[float, float]:
    """The share of the estimated noise that leaves, and the std of the fresh noise."""
    if sampler == "ode":
        return 0.0, 0.0
    if sampler == "cps":
        angle = level * math.pi / 2
        return sigma_next * (1 - math.cos(angle)), sigma_next * math.sin(angle)
    step = sigma - sigma_next
    variance = level**2  # g^2, the diffusion's variance per unit of sigma
    if sampler == "sde":
        # At sigma = 1 the formula is infinite: Flow-GRPO takes the next sigma there.
        variance *= sigma / (1 - (sigma if sigma < 1 else sigma_next))
    return variance * step / (2 * sigma), math.sqrt(variance * step)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in float32: u + scale (c - u).

    Rollout and training have to combine in one precision, or the policy's ratio is not 1.
    """
    conditional, unconditional = conditional.float(), unconditional.float()
    return unconditional + scale * (conditional - unconditional)
