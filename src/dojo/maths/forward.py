"""Learning from finished pictures: losses on the forward process of a rectified flow.

No likelihood is asked and no trajectory kept. A finished picture x0 is noised anew,
x = (1 - sigma) x0 + sigma eps, and the velocity v that the network predicts there is pulled towards
the picture's own, u = eps - x0, where the picture was better than its group (advantage A > 0), and
away from it where it was worse. To first order all of them move v along -A (v_old - u); they differ
by how a level counts, by what v is tied to, and by what bounds the step.

Velocities are float32 [B, ...], everything else [B]; a loss is [B] too. What is not `velocity`
carries no gradient. Why there is a group's mean in A: a constant added to all scores would pull v
towards the pictures of a sampler that takes few steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dojo.lazy import torch
from dojo.maths.flow import along, squared_error
from dojo.maths.precise import wide

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Objective = Literal["nft", "ram", "awm", "dgpo"]
LEAST_ERROR = 1e-5  # below it NFT's adaptive weight does not grow


def nft(
    velocity: Tensor,
    old: Tensor,
    target: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    *,
    beta: float = 1.0,
    limit: float = 5.0,
    adaptive: bool = True,
) -> Tensor:
    """DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117), to be minimised.

    Two branches about the old policy, one that the good pictures pull and one that the bad ones do:

        v+ = beta v + (1 - beta) v_old,    v- = (1 + beta) v_old - beta v
        loss = limit (r |x0(v+) - x0|^2 + (1 - r) |x0(v-) - x0|^2) / beta
        r = (A / limit + 1) / 2

    which for a plain square is the regression of v on v_old + A / (limit beta) (u - v_old). The
    gradient at v = v_old does not hang on beta: beta says how strongly v_old holds.

    Args:
        limit: advantages are clamped to it, and it is the loss's scale (its authors' 5).
        adaptive: divide each branch by its own mean absolute error, as the authors' code does.
    Raises:
        ValueError: a beta that is not positive.
    """
    if beta <= 0:
        raise ValueError(f"--nft_beta must be above 0, not {beta}")
    good = (advantages.clamp(-limit, limit) / limit + 1) / 2
    towards = beta * velocity + (1 - beta) * old
    against = (1 + beta) * old - beta * velocity
    errors = [_clean_error(branch, target, sigma, adaptive) for branch in (towards, against)]
    return limit * (good * errors[0] + (1 - good) * errors[1]) / beta


def _clean_error(velocity: Tensor, target: Tensor, sigma: Tensor, adaptive: bool) -> Tensor:
    """The mean squared error of the clean estimate, x0(v) - x0 = sigma (u - v)."""
    error = sigma**2 * squared_error(velocity, target)
    if not adaptive:
        return error
    absolute = wide(velocity.detach() - target).abs().flatten(1).mean(1) * wide(sigma)
    return error / absolute.clamp_min(LEAST_ERROR).to(error.dtype)


def ram(
    velocity: Tensor,
    old: Tensor,
    reference: Tensor,
    target: Tensor,
    advantages: Tensor,
    *,
    multiplier: float,
) -> Tensor:
    """Reinforce Adjoint Matching (2026, arXiv:2605.10759, Equation 17), to be minimised.

    |v - (v_ref + m A (u - v_old))|^2: the same regression, tied to the reference. It stops by
    itself, at a temperature of 1 / m; exactly so for a Gaussian reference and a linear reward only.
    """
    push = multiplier * along(advantages, velocity) * (target - old)
    return squared_error(velocity, reference + push)


def awm(
    velocity: Tensor,
    sampled: Tensor,
    target: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    *,
    power: float = 0.25,
    limit: float = 5.0,
    clip_range: float = 1.0,
) -> Tensor:
    """Advantage weighted matching (Xue et al. 2025, arXiv:2509.25050), to be minimised.

    The matching loss stands for minus the log-likelihood, with errors m under a power:

        l(v) = -sigma / p ((m + c)^p - c^p),  c = 1e-10,    r = exp(l(v) - l(v_sampled))
        loss = max(-a r, -a clip(r, 1 +- clip range)),    a = A / limit within [-1, 1]

    A picture that was worse pushes without bound within one rollout: tie v to something.

    Args:
        sampled: what the policy of the rollout predicts.
    """
    likelihood = _matched(velocity, target, sigma, power)
    ratio = (likelihood - _matched(sampled, target, sigma, power)).exp()
    scaled = advantages.clamp(-limit, limit) / limit
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-scaled * ratio, -scaled * clipped)


def _matched(velocity: Tensor, target: Tensor, sigma: Tensor, power: float) -> Tensor:
    least = 1e-10
    error = (wide(velocity) - wide(target)).square().flatten(1).mean(1)
    return (-sigma / power * ((error + least) ** power - least**power)).float()


def dgpo(
    velocity: Tensor,
    sampled: Tensor,
    reference: Tensor,
    target: Tensor,
    advantages: Tensor,
    *,
    group: int,
    beta: float = 100.0,
    clip_range: float = 1e-2,
) -> Tensor:
    """Direct group preference optimization (Luo et al. 2025, arXiv:2510.08425), to be minimised.

    The pictures of a prompt are one preference, the better ones against the worse, as a pair is in
    DPO: with the error d(v) = |v - u|^2, a mean over its numbers,

        x = beta mean over the group of A (d(v) - d(v_ref)),    loss = sigmoid(x) A d(v)

    whose sigmoid carries no gradient: times beta it is the gradient of -log sigmoid(-x). A picture
    whose error has left that of the policy that drew it, in its own direction, pulls no further.
    All pictures of a group should be noised by the same noise, to the same level.

    Args:
        group: pictures of a prompt; they lie side by side, [B] = whole groups.
        beta: how soon a group that is told apart pulls no further.
        clip_range: how far exp(d(v_sampled) - d(v)) may leave 1.
    Raises:
        ValueError: a batch that does not hold whole groups.
    """
    if len(velocity) % group:
        raise ValueError(f"{len(velocity)} pictures are no whole groups of {group}")
    error, before = squared_error(velocity, target), squared_error(reference, target)
    pulls = (advantages * (error.detach() - before)).unflatten(0, (-1, group)).mean(1)  # [groups]
    weight = torch.sigmoid(beta * pulls).repeat_interleave(group)
    ratio = (squared_error(sampled, target) - error.detach()).exp()
    far = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return weight * advantages * torch.where(far, error.detach(), error)


def norm_ratio(velocity: Tensor, reference: Tensor) -> Tensor:
    """|v| / |v_ref|: [B], with gradient. Reinforcement lets norms grow; pictures burn out then."""
    own = velocity.flatten(1).norm(dim=1)
    return own / reference.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def norm_excess(ratio: Tensor) -> Tensor:
    """A hinge on `norm_ratio`, after NormGuard (2026, arXiv:2606.27771): zero up to 1."""
    return (ratio - 1).clamp_min(0).square()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """An objective with its numbers: one loss for whoever learns from finished pictures, or asks
    what could be learned."""

    objective: Objective
    limit: float = 5.0
    """advantages are clamped to it"""
    beta: float = 1.0
    """nft"""
    adaptive: bool = True
    """nft"""
    multiplier: float = 100.0
    """ram"""
    power: float = 0.25
    """awm"""
    clip_range: float = 1.0
    """awm"""
    tie: float = 1.0
    """awm: weight of the squared distance from the old policy"""
    group_beta: float = 100.0
    """dgpo"""
    group_clip: float = 1e-2
    """dgpo"""

    def __call__(
        self,
        group: int,
        velocity: Tensor,
        target: Tensor,
        sigma: Tensor,
        advantages: Tensor,
        said: Mapping[str, Tensor],
    ) -> Tensor:
        """The loss [B] at one level.

        Args:
            group: pictures side by side that are of one prompt and noised alike (dgpo).
            said: what the policies `old`, `reference` (ram, dgpo) and `sampled` (awm) say there.
        """
        v, old, u, a = velocity, said["old"], target, advantages
        if self.objective == "nft":
            own = {"beta": self.beta, "limit": self.limit, "adaptive": self.adaptive}
            return nft(v, old, u, sigma, a, **own)
        if self.objective == "ram":
            return ram(v, old, said["reference"], u, a, multiplier=self.multiplier)
        if self.objective == "dgpo":
            # Who drew is the old policy.
            bounds = {"beta": self.group_beta, "clip_range": self.group_clip}
            return dgpo(v, old, said["reference"], u, a, group=group, **bounds)
        own = {"power": self.power, "limit": self.limit, "clip_range": self.clip_range}
        return awm(v, said["sampled"], u, sigma, a, **own) + self.tie * squared_error(v, old)
