"""From advantages to a loss: how far the policy has moved, and where it is held back.

Two trust regions: PPO's, which clips the ratio, and one by the divergence of the transitions, which
means the same at every size of picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dojo.lazy import torch
from dojo.maths.gaussian import Gaussian

if TYPE_CHECKING:
    from torch import Tensor

Ratio = Literal["exact", "unscaled", "guard"]
"""how far the policy has moved at a sample: by the log-probability, by CPS's unscaled one, or as
GRPO-Guard measures it"""


def log_ratio(new: Gaussian, old: Gaussian, x: Tensor, kind: Ratio = "exact") -> Tensor:
    """The logarithm of how much likelier the new policy makes the transition to `x`: [B].

    `guard` is GRPO-Guard's (Wang et al. 2025, arXiv:2510.22319): the exact one times the std, less
    its bias of -|new mean - old mean|^2 / (2 std). What is left is the mean over dimensions of
    z (new mean - old mean), z being the noise that was drawn: zero on average where the others
    fall as the policy moves, and of one scale in all steps.

    Exactly 0 where the two are the same distribution.

    Raises:
        ValueError: a std of zero.
    """
    if kind == "guard":
        return (old.noise(x) * (new.mean - old.mean)).flatten(1).mean(1)
    scaled = kind == "exact"
    return new.log_prob(x, scaled=scaled) - old.log_prob(x, scaled=scaled)


@dataclass(frozen=True, kw_only=True, eq=False)
class Surrogate:
    """The surrogate of every sample; all but the loss without gradient."""

    loss: Tensor
    """[B]"""
    ratio: Tensor
    """[B]; exactly 1 before the first update after a rollout"""
    clipped_high: Tensor
    """bool [B]: a good sample, likelier than the trust region allows already, that pulls no more"""
    clipped_low: Tensor
    """bool [B]: a bad sample, less likely than it allows already"""
    approx_kl: Tensor
    """[B]: half the squared logarithm of the ratio"""
    divergence: Tensor | None = None
    """[B]: how far the policy has moved, where that and not the ratio is held back"""


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Surrogate:
    """PPO's loss (Schulman et al. 2017, arXiv:1707.06347, Equation 7), to be minimised.

    Args:
        log_ratio: [B], of the new policy to the one that made the rollout, with gradient.
        advantages: [B].
    Raises:
        ValueError: a clip range that is not positive.
    """
    if clip_range <= 0:
        raise ValueError(f"--clip_range must be above 0, not {clip_range}")
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    return Surrogate(
        loss=loss,
        ratio=ratio,
        clipped_high=(ratio > 1 + clip_range) & (advantages > 0),
        clipped_low=(ratio < 1 - clip_range) & (advantages < 0),
        approx_kl=log_ratio.square() / 2,
    )


def masked_surrogate(
    log_ratio: Tensor, advantages: Tensor, divergence: Tensor, threshold: float
) -> Surrogate:
    """The policy gradient within a bound on the divergence (Flow-DPPO, 2026), to be minimised.

    A sample counts by -advantage ratio, without a clip. It is left out where the policy has moved
    beyond the threshold and the sample would move it further away from the one that made the
    rollout: good and likelier already, or bad and less likely already. What leads back counts.

    Args:
        log_ratio: [B], of the new policy to the one that made the rollout, with gradient.
        advantages: [B].
        divergence: [B], of these two, as a mean over dimensions (`Gaussian.kl`): half the squared
            shift of the mean in units of the std, whatever the latent's size.
        threshold: of the same; 1e-5 is a shift of 0.0045 std per dimension.
    Raises:
        ValueError: a threshold that is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"--kl_mask_threshold must be above 0, not {threshold}")
    ratio, divergence = log_ratio.exp(), divergence.detach()
    beyond = divergence >= threshold
    high = beyond & (ratio > 1) & (advantages > 0)
    low = beyond & (ratio < 1) & (advantages < 0)
    return Surrogate(
        loss=torch.where(high | low, 0.0, -advantages * ratio),
        ratio=ratio.detach(),
        clipped_high=high,
        clipped_low=low,
        approx_kl=log_ratio.detach().square() / 2,
        divergence=divergence,
    )
