"""Updates added up and cut down: exactly by stacking factors, or best by singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.finetune.lora.layers import Factors
from dojo.finetune.lora.lycoris import Update
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def delta(update: Factors | Update, shape: torch.Size) -> Tensor:
    """What an update adds to a weight of a shape, in float32.

    A DoRA's magnitudes are left out: see `merged`.
    """
    if isinstance(update, Update):
        return update.delta().reshape(shape)
    product = update.up.float().flatten(1) @ update.down.float().flatten(1)
    return update.scale * product.reshape(shape)


def merged(weight: Tensor, update: Factors | Update, strength: float) -> Tensor:
    """A weight with an update in it, in float32.

    A DoRA's rows get their norms after the update, at any strength, as peft computes it.
    """
    new = weight.float() + strength * delta(update, weight.shape)
    if isinstance(update, Update) or update.magnitude is None:
        return new
    norms = new.flatten(1).norm(dim=1)
    ratio = update.magnitude.float() / norms
    return new * ratio.reshape(-1, *(1 for _ in weight.shape[1:]))


def added(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """The sum of updates of one layer by weights, as one update: the factors side by side.

    The ranks add up. Of one scale, nothing is rounded; else scales and weights go into the
    up-projections, and the scale is 1.

    Raises:
        UserError: the layers have different sizes.
    """
    downs = [factors.down.float() for factors, _ in parts]
    if len({(factors.down.shape[1:], factors.up.shape[0]) for factors, _ in parts}) > 1:
        raise UserError("the LoRAs are for models of different sizes")
    strengths = [factors.scale * weight for factors, weight in parts]
    scale = strengths[0] if len(set(strengths)) == 1 and strengths[0] else 1.0
    ups = [
        factors.up.float() if strength == scale else factors.up.float() * (strength / scale)
        for (factors, _), strength in zip(parts, strengths, strict=True)
    ]
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    return Factors(down, up, scale * len(down))


def resized(factors: Factors, rank: int, energy: float | None = None) -> tuple[Factors, float]:
    """The best update of at most a rank, and the share of the squared norm that it keeps.

    The rule for alpha: it is scaled with the rank, so that alpha / rank stays what it was, and the
    factors alone carry the loss. The singular values are shared out evenly between the factors.

    Args:
        energy: take no more ranks than keep this share of the squared norm.
    """
    down, up = factors.down.double(), factors.up.double()
    # P = (Qu Ru)(Qd Rd)^T: the singular values of P are those of the small Ru Rd^T.
    left, upper = torch.linalg.qr(up.flatten(1))
    right, lower = torch.linalg.qr(down.flatten(1).T)
    u, values, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return _cut(factors, left @ u, values, vh @ right.T, rank, energy)


def factored(
    update: Update, shape: torch.Size, rank: int, energy: float | None = None
) -> tuple[Factors, float]:
    """A LoHa or LoKr as a LoRA of at most a rank: the best there is, of scale 1."""
    u, values, vh = torch.linalg.svd(delta(update, shape).double().flatten(1), full_matrices=False)
    like = Factors(torch.empty(1, *shape[1:]), torch.empty(shape[0], 1, *(1 for _ in shape[2:])), 1)
    return _cut(like, u, values, vh, rank, energy)


def _cut(
    like: Factors, u: Tensor, values: Tensor, vh: Tensor, rank: int, energy: float | None
) -> tuple[Factors, float]:
    shares = values.square().cumsum(0) / values.square().sum().clamp(min=1e-300)
    kept = min(rank, len(values))
    if energy is not None:
        kept = min(kept, int((shares < energy).sum()) + 1)
    root = values[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * vh[:kept]
    share = float(shares[kept - 1]) if values.any() else 1.0
    return (
        replace(
            like,
            down=down.float().reshape(kept, *like.down.shape[1:]).contiguous(),
            up=up.float().reshape(like.up.shape[0], kept, *like.up.shape[2:]).contiguous(),
            alpha=like.scale * kept,
        ),
        share,
    )
