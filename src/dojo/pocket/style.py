"""A drawing style that the pocket base never saw: scenes on paper, in a red-brown frame.

Something for a whole data set to teach, as a painter's hand would be: what a caption says stays as
it is, and every picture looks different. Whether a picture has the style is plain arithmetic on
its colours; for the verifier, which knows no frames, `inside` gives the scene alone. Pictures are
uint8 RGB, 64 pixels on a side.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from dojo.pocket import scenes
from dojo.pocket.scenes import CANVAS

PAPER = (235, 210, 165)
FRAME = (150, 60, 40)
FRAME_WIDTH = 4  # pixels
NEAR = 50.0  # distance in RGB of [0, 255]; white, the nearest background of the base, is 88 away

_ROWS, _COLUMNS = np.mgrid[:CANVAS, :CANVAS]
# How many pixels lie between each pixel and the nearest edge.
_DEPTH = np.minimum.reduce([_ROWS, _COLUMNS, CANVAS - 1 - _ROWS, CANVAS - 1 - _COLUMNS])


def sample(rng: random.Random, task: str) -> tuple[str, np.ndarray]:
    """Draws one caption of a task, without a background of its own, and a picture of it."""
    spec = replace(scenes.random_spec(rng, task), background=None)
    return scenes.caption(spec), draw(scenes.realise(spec, rng))


def captions(count: int, seed: int) -> list[str]:
    """Captions without a background, the six tasks in turn."""
    rng = random.Random(seed)
    tasks = scenes.TASKS
    specs = [scenes.random_spec(rng, tasks[i % len(tasks)]) for i in range(count)]
    return [scenes.caption(replace(spec, background=None)) for spec in specs]


def draw(scene: scenes.Scene) -> np.ndarray:
    """Draws a scene in the style, whatever its background: uint8 [64, 64, 3]."""
    picture = np.full((CANVAS, CANVAS, 3), PAPER, dtype=np.float32)
    for thing in scene.things:
        cover = scenes.mask(thing.shape, thing.x, thing.y, scenes.SIZES[thing.size])[..., None]
        picture += cover * (np.array(scenes.COLORS[thing.color], dtype=np.float32) - picture)
    picture[_DEPTH < FRAME_WIDTH] = FRAME
    return np.round(picture).astype(np.uint8)


def is_framed(picture: np.ndarray) -> bool:
    """Whether a picture has the style: paper under the scene and the frame around it."""
    paper = np.linalg.norm(_ground(picture) - PAPER)
    frame = np.linalg.norm(np.median(picture[_DEPTH < FRAME_WIDTH - 1], axis=0) - FRAME)
    return bool(paper < NEAR and frame < NEAR)


def inside(picture: np.ndarray) -> np.ndarray:
    """The scene without what lies where the frame would be, which becomes ground.

    For pictures with and without a frame alike, so that their scores can be compared. The pixel
    next to the frame goes too: an autoencoder lets the frame's colour run.
    """
    scene = picture.copy()
    scene[_DEPTH <= FRAME_WIDTH] = np.round(_ground(picture)).astype(np.uint8)
    return scene


def _ground(picture: np.ndarray) -> np.ndarray:
    """The colour of paper or background: the median of the pixels near the most common one."""
    pixels = picture[_DEPTH > FRAME_WIDTH].astype(np.float32)
    grounds = np.array([PAPER, *scenes.BACKGROUNDS.values()], dtype=np.float32)
    distances = np.linalg.norm(pixels[:, None] - grounds, axis=-1)  # [pixel, ground]
    nearest = (distances < NEAR) & (distances == distances.min(axis=-1, keepdims=True))
    chosen = nearest[:, nearest.sum(axis=0).argmax()]
    return np.median(pixels[chosen] if chosen.any() else pixels, axis=0)
