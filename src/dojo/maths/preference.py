"""Learning from preferred pairs: the loss of Diffusion-DPO and what it says of a pair.

Pure functions of denoising errors. Every argument is float32 [B], the mean squared error of
what is predicted of a picture, noise or velocity, winner and loser noised alike (the same noise,
the same level).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dojo.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Preference:
    """What a policy makes of B pairs, against the reference; all but the loss without gradient."""

    loss: Tensor
    """[B]; log 2 exactly where the policy is the reference"""
    accuracy: Tensor
    """[B]: 1 where the policy has moved towards the winner, 1/2 where it has not moved"""
    margin: Tensor
    """[B]: the argument of the sigmoid, the implicit reward's lead of the winner"""
    winner_drift: Tensor
    """[B]: how far the winner's own error has moved from the reference's; above 0 the policy draws
    the winner worse than before, and the loss falls because the loser fares worse still"""
    loser_drift: Tensor
    """[B]: likewise for the loser"""

    def row(self) -> dict[str, Tensor]:
        """What metrics say of it, by name."""
        return {
            "accuracy": self.accuracy,
            "margin": self.margin,
            "winner_drift": self.winner_drift,
            "loser_drift": self.loser_drift,
        }


def dpo(
    winner: Tensor,
    loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float,
) -> Preference:
    """Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908, Equation 14), to be minimised.

        loss = -log sigmoid(-beta / 2 [(winner - reference) - (loser - reference)])

    The paper's T omega(lambda) is absorbed into beta, as in its code, and the errors are means over
    the latent's D dimensions: a form with summed errors has beta / D for the same loss, and
    diffusers' example writes beta for this beta / 2.

    Raises:
        ValueError: a beta that is not positive.
    """
    if beta <= 0:
        raise ValueError(f"--beta_dpo must be above 0, not {beta}")
    winner_drift = winner - reference_winner
    loser_drift = loser - reference_loser
    margin = -0.5 * beta * (winner_drift - loser_drift)
    loss = F.softplus(-margin)
    margin, winner_drift, loser_drift = margin.detach(), winner_drift.detach(), loser_drift.detach()
    return Preference(
        loss=loss,
        accuracy=(margin.sign() + 1) / 2,
        margin=margin,
        winner_drift=winner_drift,
        loser_drift=loser_drift,
    )


def guard(winner: Tensor, loser: Tensor, mu: float) -> Tensor:
    """How much of the loser's pull leaves the winner drawn no worse: [B], from 0 to 1.

    SDPO's bound (2025, arXiv:2511.03317), here for every pair and not for a batch: with the
    errors' gradients g_w and g_l at the predictions, the loser's is scaled by

        (1 - mu) |g_w|^2 / <g_w, g_l>    where they point the same way, at most 1.

    Where it binds, a small step changes the winner's error by exactly -mu |g_w|^2, if both
    predictions moved alike: a bound in the space of predictions, not in that of the weights.

    Args:
        winner: prediction less target, [B, ...]; to it the gradient of a mean square is
            proportional.
        loser: the same of the loser.
        mu: 0 lets the winner stand still, 1 takes the loser's pull away wherever it harms.
    """
    winner, loser = winner.detach().float().flatten(1), loser.detach().float().flatten(1)
    along = (winner * loser).mean(1)
    bound = (1 - mu) * winner.square().mean(1) / along.where(along > 0, 1.0)
    return torch.where(along > 0, bound.clamp(max=1), 1.0)


def scaled_pull(error: Tensor, scale: Tensor) -> Tensor:
    """The same error, whose gradient is scaled: both [B]."""
    return error.detach() + scale * (error - error.detach())


def shortfall(scores: Tensor, margin: float | None) -> Tensor:
    """ReFL's loss of a picture (Xu et al. 2023, arXiv:2304.05977, Equation 5): relu(margin - r).

    Zero, with no gradient, where the reward has reached the margin: a picture that is good enough
    is left alone.

    Args:
        scores: rewards, float32 [B].
        margin: in the reward's own units; None is one that is never reached, and the loss -r.
    """
    return -scores if margin is None else F.relu(margin - scores)
