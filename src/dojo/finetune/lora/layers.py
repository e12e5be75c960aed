"""One layer's update, and the exact way between diffusers' layers of an MMDiT and the original's.

The original formats adapt query, key and value as one layer: three adapters become one by stacking
the downs and laying the ups on a block diagonal; one becomes three that share the down, each
without the ranks that its rows of up do not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.lazy import torch
from dojo.models import keys

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """One layer's update: (alpha / rank) up @ down."""

    down: Tensor
    """[rank, in], of a convolution [rank, in, height, width]"""
    up: Tensor
    """[out, rank], of a convolution [out, rank, 1, 1]"""
    alpha: float
    magnitude: Tensor | None = None
    """of a DoRA (arXiv:2402.09353), [out]: the norms that the rows of the updated weight get"""

    @property
    def rank(self) -> int:
        """Columns of the up-projection."""
        return self.up.shape[1]

    @property
    def columns(self) -> int:
        """Numbers, or channels, that the layer reads."""
        return self.down.shape[1]

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank


Layers = dict[str, Factors]
Lora = dict[str, Layers]
"""By part (transformer or unet, text_encoder, text_encoder_2), then by diffusers' layer name; the
text encoders' names begin with text_model, whatever a release of transformers calls it."""


def is_dora(layers: Layers) -> bool:
    """Whether any of the layers has magnitudes."""
    return any(factors.magnitude is not None for factors in layers.values())


def from_original(name: str, factors: Factors) -> Layers:
    """An original layer of the MMDiT under diffusers' names: qkv split, swapped halves put right.

    Raises:
        KeyError: the MMDiT has no such layer.
    """
    parts = keys.diffusers_modules(name)
    up, magnitude = factors.up, factors.magnitude
    if keys.is_swapped(name, up.shape[0], factors.down.shape[1]):
        up = keys.swap_halves(up)
        magnitude = None if magnitude is None else keys.swap_halves(magnitude)
    if len(parts) == 1:
        return {parts[0]: replace(factors, up=up, magnitude=magnitude)}
    norms = [None] * len(parts) if magnitude is None else magnitude.chunk(len(parts))
    found: Layers = {}
    for part, piece, norm in zip(parts, up.chunk(len(parts)), norms, strict=True):
        used = piece.flatten(1).any(0)
        if norm is not None and not used.any():
            used[0] = True  # the norms are an update of their own
        if used.any():
            alpha = factors.scale * int(used.sum())
            down, rows = factors.down[used].clone(), piece[:, used].clone()
            found[part] = Factors(down, rows, alpha, None if norm is None else norm.clone())
    return found


def to_original(layers: Layers) -> Layers:
    """The transformer's layers under their original names: qkv joined, halves swapped back.

    Raises:
        UserError: a layer has no original name.
    """
    groups: dict[str, dict[int, Factors]] = {}
    for name, factors in layers.items():
        try:
            original, place = keys.original_module(name)
        except KeyError as error:
            raise UserError(f"the layer {name} has no original name") from error
        groups.setdefault(original, {})[place] = factors
    joined: Layers = {}
    for name, group in groups.items():
        count = len(keys.diffusers_modules(name))
        factors = group[0] if count == 1 else _joined(group, count)
        if keys.is_swapped(name, factors.up.shape[0], factors.down.shape[1]):
            factors = replace(factors, up=keys.swap_halves(factors.up))
        joined[name] = factors
    return joined


def _joined(group: Mapping[int, Factors], count: int) -> Factors:
    """One adapter that does what up to `count` do side by side, exactly; absent ones are zero."""
    first = next(iter(group.values()))
    rows, rank = first.up.shape[0], sum(factors.rank for factors in group.values())
    up = first.up.new_zeros(count * rows, rank)
    # All have one scale in practice; where not, the difference goes into the numbers.
    scale = max((factors.scale for factors in group.values()), key=abs)
    column = 0
    for place in sorted(group):
        factors = group[place]
        block = factors.up if factors.scale == scale else factors.up * (factors.scale / scale)
        up[place * rows : (place + 1) * rows, column : column + factors.rank] = block
        column += factors.rank
    down = torch.cat([group[place].down for place in sorted(group)])
    return Factors(down, up, scale * rank)
