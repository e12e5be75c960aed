"""Compositional captions of the pocket world: up to four objects in up to two noun phrases.

GenEval's tasks ask for a thing or two at a time, and a good policy soon has them right; GenEval2
(arXiv:2512.16853) asks for several at once and counts what holds. In small, in the same grammar and
vocabulary:

    two small red stars
    a blue circle and three large crosses on a gray background
    two red stars left of a small ring

No pocket model was trained on two phrases with numbers; what it knows of one has to carry over.
"""

from __future__ import annotations

import random

from dojo.pocket import scenes
from dojo.pocket.scenes import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SIZES, Part, Spec

MOST = 4  # objects
LONE_SHARE = 0.25  # of the captions with several objects those with one noun phrase


def random_spec(rng: random.Random, num_objects: int | None = None) -> Spec:
    """Draws what a compositional caption says.

    Args:
        num_objects: 1 to 4; drawn too when it is None.
    """
    total = num_objects or rng.randint(1, MOST)
    shapes = rng.sample(scenes.SHAPES, 2)
    colors = rng.sample(list(COLORS), 2)
    background = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.3 else None
    lone = total == 1 or rng.random() < LONE_SHARE
    counts = [total] if lone else _split(total, rng)
    parts = tuple(
        Part(
            shape,
            color=color if rng.random() < 0.75 else None,
            size=rng.choice(list(SIZES)) if rng.random() < 0.4 else None,
            count=count,
        )
        for shape, color, count in zip(shapes, colors, counts, strict=False)
    )
    placed = rng.random() < 0.3
    position = rng.choice(list(POSITIONS)) if placed and total == 1 else None
    relation = None
    if placed and len(parts) == 2 and max(counts) <= 2:
        relation = rng.choice(list(RELATIONS))
    return Spec(parts, position=position, relation=relation, background=background)


def _split(total: int, rng: random.Random) -> list[int]:
    """Two positive numbers with this sum."""
    first = rng.randint(1, total - 1)
    return [first, total - first]


def captions(count: int, seed: int) -> list[str]:
    """Different captions, one to four objects in turn as long as there are new ones.

    Raises:
        ValueError: the grammar has not so many.
    """
    rng = random.Random(seed)
    found: dict[str, None] = {}
    for i in range(40 * count):
        if len(found) == count:
            break
        found.setdefault(scenes.caption(random_spec(rng, i % MOST + 1)))
    if len(found) < count:
        raise ValueError(f"{count} different compositional captions were not found")
    return list(found)
