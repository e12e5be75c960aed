"""How much of a compositional caption holds in a pocket picture, atom by atom.

An atom is one thing that the caption says: that there is such an object, how many, of which colour
and size, where, before what, and that there is nothing else. Each has a value in [0, 1], as the
probability that a model would say yes to it has in Soft-TIFA (GenEval2, arXiv:2512.16853). Their
arithmetic mean is partial credit; their geometric mean is near 1 only where everything holds.

Colour and size are asked of objects of the shape, and a relation of shapes that are there: where
there is no star, none is red.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from dojo.lazy import torch
from dojo.pocket import scenes, verifier
from dojo.pocket.scenes import Part, Spec
from dojo.pocket.verifier import COLOR_WIDTH, SIZE_WIDTH, Found, closeness

if TYPE_CHECKING:
    from torch import Tensor

Mean = Literal["arithmetic", "geometric"]

LEAST = 1e-3  # an atom counts for this at least in the geometric mean, which keeps a slope
NUMBER_WIDTH = 0.5  # objects; one too many or too few leaves a fifth


def atoms(picture: np.ndarray, spec: Spec) -> dict[str, float]:
    """The value in [0, 1] of everything that a caption says, in a uint8 [64, 64, 3] picture.

    Of all ways to deal the objects in the picture out to the noun phrases the best counts. The keys
    are as `0 star`, `0 number`, `0 color`, `0 size`, `1 ring`, `relation`, `position`, `background`
    and `nothing else`.

    Raises:
        ValueError: the picture has another shape.
    """
    _, ground, found = verifier.look(picture)
    things = found[:8]
    fixed = {"nothing else": _near(sum(item.presence for item in found) - spec.num_objects)}
    for k, part in enumerate(spec.parts):
        if part.count > 1:
            number = sum(_is(item, part.shape) for item in found)
            fixed[f"{k} number"] = _near(number - part.count)
    if spec.background:
        away = np.linalg.norm(ground - np.array(scenes.BACKGROUNDS[spec.background]))
        fixed["background"] = closeness(float(away), COLOR_WIDTH)
    dealt = (_dealt(things, spec, groups) for groups in verifier.assignments(len(things), spec))
    return max(dealt, key=lambda one: sum(one.values())) | fixed


def _dealt(
    things: Sequence[Found], spec: Spec, groups: Sequence[Sequence[int]]
) -> dict[str, float]:
    """The atoms that hang on which object is which."""
    values: dict[str, float] = {}
    for k, (part, group) in enumerate(zip(spec.parts, groups, strict=True)):
        own = [things[i] for i in group]
        there = [_is(item, part.shape) for item in own]
        values[f"{k} {part.shape}"] = max(there, default=0.0)
        if part.color:
            values[f"{k} color"] = _all(part, there, [one.color_scores[part.color] for one in own])
        if part.size:
            values[f"{k} size"] = _all(part, there, [_size(one, part) for one in own])
    if spec.relation or spec.position:
        all_there = min(values[f"{k} {part.shape}"] for k, part in enumerate(spec.parts))
        lie = verifier.layout(spec, verifier.middles(spec, things, groups))
        values["relation" if spec.relation else "position"] = all_there * lie
    return values


def _is(item: Found, shape: str) -> float:
    """Whether it is an object of this shape, in [0, 1]."""
    return item.presence * verifier.likeness(item, shape)


def _size(item: Found, part: Part) -> float:
    assert part.size is not None
    radius = verifier.radius(part.shape, item.area)
    return closeness(radius - scenes.SIZES[part.size], SIZE_WIDTH)


def _all(part: Part, there: Sequence[float], values: Sequence[float]) -> float:
    """The worst of as many objects as the phrase asks for; one that is missing has 0."""
    if len(there) < part.count:
        return 0.0
    return min(one * value for one, value in zip(there, values, strict=True))


def _near(more: float) -> float:
    return closeness(more, NUMBER_WIDTH)


def mean(values: Sequence[float], kind: Mean) -> float:
    """The mean of a caption's atoms."""
    if kind == "arithmetic":
        return sum(values) / len(values)
    return math.exp(sum(math.log(max(value, LEAST)) for value in values) / len(values))


def score(images: Tensor, prompts: Sequence[str], kind: Mean) -> Tensor:
    """The mean of each picture's atoms: float32 [batch] on the CPU.

    Args:
        images: [batch, 3, height, width] in [0, 1]; other sizes than 64x64 are resized.
        prompts: one caption of the pocket grammar per picture.

    Raises:
        ValueError: a caption is outside the grammar (the message names it), or the numbers of
            pictures and captions differ.
    """
    specs = verifier.specs_of(images, prompts)
    pairs = zip(verifier.pictures(images), specs, strict=True)
    scores = [mean([*atoms(picture, spec).values()], kind) for picture, spec in pairs]
    return torch.tensor(scores, dtype=torch.float32)
