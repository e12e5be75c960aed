"""A small world of 64x64 pictures: caption grammar, random scenes and their drawing.

The only source of pocket captions and pictures. A `Spec` is what a caption says, a `Scene` is one
picture that fulfils it, and `caption`/`parse` are inverse to each other:

    a star                                        single_object
    a star and a ring                             two_object
    three blue circles                            counting
    a small red star on a gray background         colors
    a red star left of a ring, a star at the top  position
    a red star and a blue ring                    color_attr

Everything random comes from the `random.Random` that is handed in.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 64  # pixels on a side

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
NOVEL_SHAPES = ("heart",)  # can be drawn and verified, but no pocket model is trained on it
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "yellow": (245, 205, 40),
    "purple": (150, 60, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
    "black": (25, 25, 25),
}
SIZES = {"large": 13.0, "small": 9.0}  # radius in pixels
COUNTS = {"two": 2, "three": 3, "four": 4}

# Centres of a lone object, as fractions of the canvas (x, y).
POSITIONS: dict[str, tuple[float, float]] = {
    "in the center": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "at the top left": (0.25, 0.25),
    "at the top right": (0.75, 0.25),
    "at the bottom left": (0.25, 0.75),
    "at the bottom right": (0.75, 0.75),
}
# Direction from the second object to the first, in picture coordinates (y grows downwards).
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

SUPERSAMPLE = 4


@dataclass(frozen=True)
class Part:
    """One noun phrase of a caption; None is an attribute that the caption leaves open."""

    shape: str
    color: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Spec:
    """What a caption says: one or two parts, how they lie, and the background.

    `position` belongs to a lone object, `relation` says how the first of two lies to the second.
    A background of None is white.
    """

    parts: tuple[Part, ...]
    position: str | None = None
    relation: str | None = None
    background: str | None = None

    @property
    def num_objects(self) -> int:
        """How many objects it asks for."""
        return sum(part.count for part in self.parts)

    @property
    def task(self) -> str:
        """The GenEval task (arXiv:2310.11513, section 3) that this caption belongs to."""
        if self.relation or self.position:
            return "position"
        if len(self.parts) == 2:
            both = all(part.color for part in self.parts)
            return "color_attr" if both else "two_object"
        if self.parts[0].count > 1:
            return "counting"
        return "colors" if self.parts[0].color else "single_object"


@dataclass(frozen=True)
class Thing:
    """One drawn object: centre in pixels, radius in pixels by `SIZES`."""

    shape: str
    color: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One picture, complete: every object and the background by name."""

    things: tuple[Thing, ...]
    background: str


def caption(spec: Spec) -> str:
    """Says a spec in words; the inverse of `parse`."""
    words = _phrase(spec.parts[0])
    if len(spec.parts) == 2:
        words += f" {spec.relation or 'and'} {_phrase(spec.parts[1])}"
    if spec.position:
        words += f" {spec.position}"
    if spec.background:
        words += f" on a {spec.background} background"
    return words


def _phrase(part: Part) -> str:
    adjectives = [word for word in (part.size, part.color) if word]
    if part.count == 1:
        return " ".join(["a", *adjectives, part.shape])
    number = next(word for word, count in COUNTS.items() if count == part.count)
    return " ".join([number, *adjectives, _plural(part.shape)])


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("ss") else "s")


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_SHAPE_WORDS = {word: shape for shape in SHAPES + NOVEL_SHAPES for word in (shape, _plural(shape))}
_PART = (
    rf"(a|{_alternatives(list(COUNTS))})"
    rf"(?: ({_alternatives(list(SIZES))}))?"
    rf"(?: ({_alternatives(list(COLORS))}))?"
    rf" ({_alternatives(list(_SHAPE_WORDS))})"
)
_CAPTION = re.compile(
    rf"{_PART}(?: (and|{_alternatives(list(RELATIONS))}) {_PART})?"
    rf"(?: ({_alternatives(list(POSITIONS))}))?"
    rf"(?: on a ({_alternatives(list(BACKGROUNDS))}) background)?"
)


def parse(text: str) -> Spec:
    """Reads a caption of the grammar back.

    Raises:
        ValueError: the text is not in the grammar.
    """
    match = _CAPTION.fullmatch(text.strip().lower().removesuffix("."))
    if match is None:
        raise ValueError(f"not a caption of the pocket grammar: {text!r}")
    groups = match.groups()
    parts = [_part(groups[:4])]
    relation = groups[4]
    if relation:
        parts.append(_part(groups[5:9]))
    return Spec(
        parts=tuple(parts),
        position=groups[9],
        relation=relation if relation in RELATIONS else None,
        background=groups[10],
    )


def _part(groups: Sequence[str | None]) -> Part:
    number, size, color, shape = groups
    assert number is not None  # the pattern demands it, and the shape
    assert shape is not None
    return Part(_SHAPE_WORDS[shape], color=color, size=size, count=COUNTS.get(number, 1))


def random_spec(
    rng: random.Random, task: str | None = None, *, shapes: Sequence[str] = SHAPES
) -> Spec:
    """Draws what a caption says; `task` (one of `TASKS`) is drawn too when it is None."""
    task = task or rng.choice(TASKS)
    color = lambda: rng.choice(list(COLORS))  # noqa: E731
    size = rng.choice([None, None, "large", "small"])
    background = rng.choice([None, None, None, "white", "gray", "black"])
    shape = rng.choice(shapes)
    if task == "single_object":
        return Spec((Part(shape, size=size),), background=background)
    if task == "colors":
        return Spec((Part(shape, color(), size),), background=background)
    if task == "counting":
        count = rng.choice(list(COUNTS.values()))
        named = rng.choice([None, color()])
        return Spec((Part(shape, named, size, count),), background=background)
    if task == "position" and rng.random() < 0.5:
        part = Part(shape, rng.choice([None, color()]), size)
        return Spec((part,), position=rng.choice(list(POSITIONS)), background=background)
    other = rng.choice([name for name in shapes if name != shape] or [shape])
    if task == "two_object":
        return Spec((Part(shape, size=size), Part(other)), background=background)
    first, second = rng.sample(list(COLORS), 2)
    if task == "color_attr":
        return Spec((Part(shape, first, size), Part(other, second)), background=background)
    named_colors = rng.random() < 0.5
    parts = (
        Part(shape, first if named_colors else None, size),
        Part(other, second if named_colors else None),
    )
    return Spec(parts, relation=rng.choice(list(RELATIONS)), background=background)


def realise(spec: Spec, rng: random.Random) -> Scene:
    """Draws one scene that fulfils `spec`; what the caption leaves open is random.

    Raises:
        ValueError: it asks for more than four objects, or for more than two on a side of a
            relation, which the canvas has no room for.
    """
    if spec.num_objects > 4 or (spec.relation and any(part.count > 2 for part in spec.parts)):
        raise ValueError(f"no room for the objects of {caption(spec)!r}")
    centres = _centres(spec, rng)
    things: list[Thing] = []
    for part in spec.parts:
        color = part.color or rng.choice(
            [name for name in COLORS if name not in {thing.color for thing in things}]
        )
        size = part.size or rng.choice(list(SIZES))
        for _ in range(part.count):
            x, y = centres[len(things)]
            things.append(Thing(part.shape, color, size, x, y))
    return Scene(tuple(things), spec.background or "white")


def _centres(spec: Spec, rng: random.Random) -> list[tuple[float, float]]:
    """Centres in pixels; a pixel of jitter keeps four large objects apart and inside."""
    if spec.relation:
        dx, dy = RELATIONS[spec.relation]
        near = [(0.5 + 0.25 * s * dx, 0.5 + 0.25 * s * dy) for s in (1, -1)]
        # Across the relation's axis the two may lie anywhere but diagonally.
        shift = [rng.uniform(-0.1, 0.1) for _ in near]
        places = [
            (x + s * abs(dy), y + s * abs(dx))
            for (x, y), own, part in zip(near, shift, spec.parts, strict=True)
            for s in ([own] if part.count == 1 else [-0.25, 0.25])
        ]
    elif len(spec.parts) == 2 or spec.parts[0].count > 1:
        cells = [(x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)]
        places = rng.sample(cells, spec.num_objects)
    else:
        places = [POSITIONS[spec.position or rng.choice(list(POSITIONS))]]
    jitter = [(rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in places]
    return [(CANVAS * x + i, CANVAS * y + j) for (x, y), (i, j) in zip(places, jitter, strict=True)]


@functools.cache
def outline(shape: str) -> list[list[tuple[float, float]]]:
    """Polygons of a shape around the origin for radius 1, y downwards; a second one is a hole."""
    if shape == "circle":
        return [_circle(1.0)]
    if shape == "ring":
        return [_circle(1.05), _circle(0.55)]
    if shape == "square":
        return [[(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]]
    if shape == "triangle":
        return [[(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)]]
    if shape == "cross":
        a, b = 0.36, 1.05
        corners = [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b)]
        return [corners + [(-x, -y) for x, y in corners]]
    if shape == "star":
        radii = [1.2 if i % 2 == 0 else 0.5 for i in range(10)]
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return [
            [(r * math.cos(t), 0.08 + r * math.sin(t)) for r, t in zip(radii, angles, strict=True)]
        ]
    if shape == "heart":
        return [[_heart(2 * math.pi * i / 60) for i in range(60)]]
    raise ValueError(f"unknown shape {shape!r}")


def _circle(radius: float) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 48 for i in range(48)]
    return [(radius * math.cos(t), radius * math.sin(t)) for t in angles]


def _heart(t: float) -> tuple[float, float]:
    """The well-known cosine heart, centred and scaled to a half-width of about 1.1."""
    x = 16 * math.sin(t) ** 3
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return 1.1 * x / 16, -1.1 * (y + 2.5) / 16


def mask(
    shape: str, x: float, y: float, radius: float, size: tuple[int, int] = (CANVAS, CANVAS)
) -> np.ndarray:
    """Coverage of one shape on a canvas of `size` (height, width): float32 [H, W] in [0, 1],
    anti-aliased."""
    height, width = (SUPERSAMPLE * extent for extent in size)
    canvas = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(canvas)
    for polygon, value in zip(outline(shape), (255, 0), strict=False):
        pen.polygon(
            [(SUPERSAMPLE * (x + radius * u), SUPERSAMPLE * (y + radius * v)) for u, v in polygon],
            fill=value,
        )
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def draw(scene: Scene, size: tuple[int, int] = (CANVAS, CANVAS)) -> np.ndarray:
    """Draws a scene: uint8 [64, 64, 3], or of another `size` (height, width), where the objects
    lie on the same shares of the canvas and have the same size in pixels."""
    picture = np.full((*size, 3), BACKGROUNDS[scene.background], dtype=np.float32)
    height, width = size
    for thing in scene.things:
        x, y = thing.x * width / CANVAS, thing.y * height / CANVAS
        cover = mask(thing.shape, x, y, SIZES[thing.size], size)[..., None]
        picture += cover * (np.array(COLORS[thing.color], dtype=np.float32) - picture)
    return np.round(picture).astype(np.uint8)


def sample(
    rng: random.Random, task: str | None = None, *, shapes: Sequence[str] = SHAPES
) -> tuple[str, Scene]:
    """Draws one caption and one scene that fulfils it."""
    spec = random_spec(rng, task, shapes=shapes)
    return caption(spec), realise(spec, rng)


def evaluation_captions(count: int, seed: int) -> list[str]:
    """A fixed set of captions, the six tasks in turn: 500 with seed 0 are the README's."""
    rng = random.Random(seed)
    return [caption(random_spec(rng, TASKS[i % len(TASKS)])) for i in range(count)]


def changed(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """The scene with one attribute wrong: `shape`, `color`, `count` or `position`.

    A shape or colour changes in one object, a count by one object more or fewer (one to four
    stay; a lone object in the middle makes room for the second), a position by a swap of two
    objects or by a move to the canvas's other side.

    Raises:
        ValueError: the attribute is unknown, or a position among more than two objects.
    """
    things = list(scene.things)
    i = rng.randrange(len(things))
    if attribute == "shape":
        others = [shape for shape in SHAPES if shape not in {thing.shape for thing in things}]
        things[i] = replace(things[i], shape=rng.choice(others))
    elif attribute == "color":
        others = [color for color in COLORS if color not in {thing.color for thing in things}]
        things[i] = replace(things[i], color=rng.choice(others))
    elif attribute == "count":
        if len(things) > 1:
            del things[i]
        else:
            added = replace(things[0], **_opposite(things[0]))
            if math.hypot(added.x - things[0].x, added.y - things[0].y) < 28:
                things[0] = replace(things[0], **_opposite(added))
            things.append(added)
    elif attribute == "position":
        if len(things) > 2:
            raise ValueError("a position is changed in scenes of one or two objects only")
        if len(things) == 2:
            a, b = things
            things = [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)]
        else:
            things[i] = replace(things[i], **_opposite(things[i]))
    else:
        raise ValueError(f"unknown attribute {attribute!r}")
    return Scene(tuple(things), scene.background)


def _opposite(thing: Thing) -> dict[str, float]:
    """The centre of the quarter of the canvas that is farthest from a thing."""
    cells = ((16, 16), (48, 48), (16, 48), (48, 16))
    x, y = max(cells, key=lambda place: (place[0] - thing.x) ** 2 + (place[1] - thing.y) ** 2)
    return {"x": float(x), "y": float(y)}
