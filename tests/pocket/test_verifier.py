"""Claims about the verifier: it reads what was drawn, notices errors, and grades smoothly."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from dojo.pocket import scenes, verifier
from dojo.pocket.scenes import COLORS, Part, Scene, Spec

NUM_SCENES = 2_000
WHITE = scenes.BACKGROUNDS["white"]


@functools.cache
def drawn(count: int = NUM_SCENES, seed: int = 0) -> tuple[tuple[Spec, Scene], ...]:
    """Fresh scenes, each with the spec of its caption."""
    rng = random.Random(seed)
    samples = [scenes.sample(rng) for _ in range(count)]
    return tuple((scenes.parse(text), scene) for text, scene in samples)


def full(spec: Spec, scene: Scene) -> Spec:
    """Everything that can be said about a scene: its caption with no attribute left open."""
    things = list(scene.things)
    parts: list[Part] = []
    for part in spec.parts:
        parts.append(Part(part.shape, things[0].color, things[0].size, part.count))
        things = things[part.count :]
    position = spec.position
    if len(scene.things) == 1:
        x, y = scene.things[0].x / scenes.CANVAS, scene.things[0].y / scenes.CANVAS
        places = scenes.POSITIONS.items()
        position = min(places, key=lambda item: (item[1][0] - x) ** 2 + (item[1][1] - y) ** 2)[0]
    return replace(spec, parts=tuple(parts), position=position, background=scene.background)


def paint(
    *items: tuple[np.ndarray, Sequence[float]], ground: Sequence[float] = WHITE
) -> np.ndarray:
    """A picture of coverage maps in colours, on a background."""
    picture = np.full((scenes.CANVAS, scenes.CANVAS, 3), ground, dtype=np.float32)
    for cover, color in items:
        picture += cover[..., None] * (np.array(color, dtype=np.float32) - picture)
    return np.round(picture).astype(np.uint8)


def one(text: str, seed: int = 0) -> np.ndarray:
    return scenes.draw(scenes.realise(scenes.parse(text), random.Random(seed)))


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(picture.astype(np.float32), (sigma, sigma, 0))


def roughened(picture: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """A Gaussian blur of `sigma` pixels and noise of 4/255."""
    noise = np.random.default_rng(seed).normal(0, 4, picture.shape)
    return np.clip(np.round(blurred(picture, sigma) + noise), 0, 255).astype(np.uint8)


def tensor(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


# ---- Agreement with what was drawn ----


def test_strict_agrees_with_the_full_description_of_drawn_scenes() -> None:
    agrees = [verifier.strict(scenes.draw(scene), full(spec, scene)) for spec, scene in drawn()]
    assert np.mean(agrees) >= 0.99


def test_strict_agrees_with_the_caption_of_drawn_scenes() -> None:
    agrees = [verifier.strict(scenes.draw(scene), spec) for spec, scene in drawn(300, seed=1)]
    assert np.mean(agrees) >= 0.99


@pytest.mark.parametrize(("sigma", "least"), [(0.7, 0.97), (1.2, 0.97), (2.0, 0.95)])
def test_strict_survives_blur_and_noise(sigma: float, least: float) -> None:
    agrees = [
        verifier.strict(roughened(scenes.draw(scene), sigma, seed), full(spec, scene))
        for seed, (spec, scene) in enumerate(drawn(300, seed=2))
    ]
    assert np.mean(agrees) >= least


@pytest.mark.parametrize("attribute", ["shape", "color", "count", "position"])
def test_strict_notices_one_changed_attribute(attribute: str) -> None:
    rng = random.Random(f"changed {attribute}")
    noticed: list[bool] = []
    while len(noticed) < NUM_SCENES // 4:
        text, scene = scenes.sample(rng, "position" if attribute == "position" else None)
        spec = scenes.parse(text)
        if attribute == "color" and spec.parts[0].color is None:  # a caption names all or none
            continue
        picture = scenes.draw(scenes.changed(scene, attribute, rng))
        noticed.append(not verifier.strict(picture, spec))
    assert np.mean(noticed) >= 0.98


def test_read_finds_places_sizes_and_background() -> None:
    for _, scene in drawn(100, seed=3):
        background, found = verifier.read(scenes.draw(scene))
        assert background == scene.background
        assert len(found) == len(scene.things)
        for thing in scene.things:
            item = min(found, key=lambda item: (item.x - thing.x) ** 2 + (item.y - thing.y) ** 2)
            assert (item.shape, item.color, item.size) == (thing.shape, thing.color, thing.size)
            assert abs(item.x - thing.x) < 0.5
            assert abs(item.y - thing.y) < 0.5
            assert item.definite
            assert item.shape == max(item.shape_scores, key=item.shape_scores.__getitem__)
            assert item.color == max(item.color_scores, key=item.color_scores.__getitem__)


@pytest.mark.parametrize("size", list(scenes.SIZES))
@pytest.mark.parametrize("shape", verifier.ALL_SHAPES)
def test_every_shape_is_known_softened_too_and_hearts_steal_none(shape: str, size: str) -> None:
    for seed, color in enumerate(COLORS):
        for background in scenes.BACKGROUNDS:
            picture = one(f"a {size} {color} {shape} on a {background} background", seed)
            for view in (picture, roughened(picture, 1.2, seed)):
                name, found = verifier.read(view)
                assert [(f.shape, f.color, f.size) for f in found] == [(shape, color, size)]
                assert name == background


def test_colours_that_touch_are_two_objects() -> None:
    left, right = scenes.mask("square", 22, 32, 11), scenes.mask("square", 41, 32, 11)
    picture = paint((left, COLORS["red"]), (right, COLORS["blue"]))
    assert verifier.strict(picture, scenes.parse("a red square left of a blue square"))


def test_objects_of_one_colour_that_touch_are_two_objects() -> None:
    left, right = scenes.mask("circle", 20, 32, 11), scenes.mask("circle", 41.5, 32, 11)
    picture = paint((left, COLORS["red"]), (right, COLORS["red"]))
    assert verifier.strict(picture, scenes.parse("two red circles"))


def test_an_extra_object_fails_and_a_speck_does_not() -> None:
    star = (scenes.mask("star", 20, 20, 11), COLORS["red"])
    spec = scenes.parse("a star")
    assert verifier.strict(paint(star), spec)
    assert verifier.strict(paint(star, (scenes.mask("circle", 50, 50, 1.5), COLORS["red"])), spec)
    assert not verifier.strict(paint(star, (scenes.mask("circle", 50, 50, 6), (90, 90, 90))), spec)


def test_colours_belong_to_their_objects() -> None:
    picture = one("a red star and a blue ring")
    assert verifier.strict(picture, scenes.parse("a red star and a blue ring"))
    assert verifier.strict(picture, scenes.parse("a blue ring and a red star"))
    assert not verifier.strict(picture, scenes.parse("a blue star and a red ring"))


def test_what_the_caption_leaves_open_is_not_checked() -> None:
    picture = one("a small red star at the top on a black background")
    for text in ("a star", "a red star", "a small star", "a star at the top"):
        assert verifier.strict(picture, scenes.parse(text))
    for text in (
        "a large star",
        "a blue star",
        "a star on the left",
        "a star on a gray background",
    ):
        assert not verifier.strict(picture, scenes.parse(text))


@pytest.mark.parametrize("color", [(25, 25, 25), (120, 70, 30), (200, 200, 200)])
def test_a_colour_of_no_name_is_not_taken_for_the_nearest(color: tuple[int, int, int]) -> None:
    picture = paint((scenes.mask("circle", 32, 32, 13), color))
    for name in COLORS:
        assert not verifier.strict(picture, scenes.parse(f"a {name} circle"))


def test_noise_and_plain_pictures_are_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for text in ("a circle", "four stars", "a red star and a blue ring"):
        spec = scenes.parse(text)
        assert not verifier.strict(noise, spec)
        assert verifier.graded(noise, spec) < 0.3
        for ground in (*scenes.BACKGROUNDS.values(), COLORS["red"]):
            assert not verifier.strict(paint(ground=ground), spec)
            assert verifier.graded(paint(ground=ground), spec) < 0.02


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="64"):
        verifier.read(np.zeros((32, 32, 3), dtype=np.uint8))


# ---- Graded ----


def test_drawn_scenes_earn_nearly_everything() -> None:
    grades = [verifier.graded(scenes.draw(scene), spec) for spec, scene in drawn(300, seed=4)]
    assert min(grades) >= 0.95
    assert max(grades) <= 1


def test_a_changed_attribute_costs_credit() -> None:
    rng = random.Random(5)
    for attribute in ("shape", "color", "count", "position"):
        for _ in range(25):
            text, scene = scenes.sample(
                rng, "position" if attribute == "position" else "color_attr"
            )
            spec = scenes.parse(text)
            wrong = scenes.changed(scene, attribute, rng)
            right = verifier.graded(scenes.draw(scene), spec)
            assert verifier.graded(scenes.draw(wrong), spec) < right - 0.05


def otherwise(scene: Scene, defect: str, rng: random.Random) -> Scene:
    """The scene with one thing wrong."""
    if defect == "background":
        others = [name for name in scenes.BACKGROUNDS if name != scene.background]
        return replace(scene, background=rng.choice(others))
    if defect == "size":
        size = {"large": "small", "small": "large"}
        return replace(scene, things=tuple(replace(t, size=size[t.size]) for t in scene.things))
    return scenes.changed(scene, defect, rng)


@pytest.mark.parametrize("defect", ["shape", "color", "count", "position", "size", "background"])
def test_what_strict_counts_alike_costs_about_alike(defect: str) -> None:
    rng = random.Random(15)
    grades: list[float] = []
    for spec, scene in drawn(240, seed=16):
        if len(scene.things) > 2 and defect == "position":
            continue
        wrong = scenes.draw(otherwise(scene, defect, rng))
        if not verifier.strict(wrong, spec):  # the caption may leave it open
            grades.append(verifier.graded(wrong, spec))
    assert len(grades) >= 20
    assert 0.4 < np.mean(grades) < 0.7


def test_blur_costs_a_little() -> None:
    for spec, scene in drawn(40, seed=6):
        picture = scenes.draw(scene)
        sharp = verifier.graded(picture, spec)
        soft = verifier.graded(np.round(blurred(picture, 0.7)).astype(np.uint8), spec)
        softer = verifier.graded(np.round(blurred(picture, 1.5)).astype(np.uint8), spec)
        assert sharp > soft > softer
        assert soft > sharp - 0.1


def disc(
    x: float, y: float, color: str = "red", radius: float = 11
) -> tuple[np.ndarray, list[int]]:
    return scenes.mask("circle", x, y, radius), list(COLORS[color])


def mixed(first: str, second: str, t: float) -> list[float]:
    pairs = zip(COLORS[first], COLORS[second], strict=True)
    return [a * (1 - t) + b * t for a, b in pairs]


def morphed(first: str, second: str, t: float) -> np.ndarray:
    masks = [scenes.mask(shape, 32, 32, 11) for shape in (first, second)]
    return ndimage.gaussian_filter(masks[0] * (1 - t) + masks[1] * t, 0.7)


CIRCLE = scenes.mask("circle", 32, 32, 11)
PATHS: dict[str, tuple[str, Callable[[float], np.ndarray]]] = {
    "an object gains contrast": (
        "a red circle",
        lambda t: paint((CIRCLE * (0.1 + 0.9 * t), COLORS["red"])),
    ),
    "a colour comes nearer": (
        "a blue circle",
        lambda t: paint((CIRCLE, mixed("red", "blue", t))),
    ),
    "a neighbouring colour comes nearer": (
        "a purple circle",
        lambda t: paint((CIRCLE, mixed("blue", "purple", t))),
    ),
    "a circle becomes a square": (
        "a square",
        lambda t: paint((morphed("circle", "square", t), COLORS["green"])),
    ),
    "a triangle becomes a star": (
        "a star",
        lambda t: paint((morphed("triangle", "star", t), COLORS["green"])),
    ),
    "a circle becomes a ring": (
        "a ring",
        lambda t: paint((morphed("circle", "ring", t), COLORS["green"])),
    ),
    "an object grows": ("a large circle", lambda t: paint(disc(32, 32, radius=9 + 4 * t))),
    "an object moves to its place": (
        "a circle on the left",
        lambda t: paint(disc(50 - 34 * t, 32)),
    ),
    "two objects move to their sides": (
        "a red circle left of a blue circle",
        lambda t: paint(disc(32 - 16 * t, 20, radius=9), disc(32 + 16 * t, 44, "blue", 9)),
    ),
    "a second object appears": (
        "two circles",
        lambda t: paint(disc(16, 16), disc(48, 48, radius=2 + 3 * t)),
    ),
    "an extra object goes": (
        "a circle",
        lambda t: paint(disc(16, 16), disc(48, 48, radius=4.5 - 3 * t)),
    ),
    "the background comes nearer": (
        "a circle on a gray background",
        lambda t: paint(disc(32, 32), ground=[245 - 105 * t] * 3),
    ),
}


@pytest.mark.parametrize("name", list(PATHS))
def test_graded_rises_all_the_way(name: str) -> None:
    text, picture = PATHS[name]
    spec = scenes.parse(text)
    grades = np.array([verifier.graded(picture(t), spec) for t in np.linspace(0, 1, 13)])
    assert grades[-1] >= 0.9
    assert grades[-1] - grades[0] > 0.08
    # A twelfth of the way is felt everywhere, up to the grain of a 64x64 picture ...
    assert np.diff(grades).min() > -0.005
    assert (np.diff(grades) > 0.0005).mean() > 0.8
    # ... and no step carries it all.
    assert np.diff(grades).max() < 0.4


def test_nearly_alike_pictures_have_different_grades() -> None:
    rng = random.Random(7)
    spec = scenes.parse("a small star")
    pictures = [roughened(scenes.draw(scenes.realise(spec, rng)), 1.5, i) for i in range(16)]
    grades = [verifier.graded(picture, spec) for picture in pictures]
    assert len({round(grade, 4) for grade in grades}) >= 14


# ---- Batches ----


def test_score_judges_a_batch() -> None:
    prompts = ["a red star", "two blue circles", "a ring"]
    images = tensor(one("a red star"), one("two blue circles"), one("a cross"))
    right = verifier.score(images, prompts, strict=True)
    assert right.dtype == torch.float32
    assert right.tolist() == [1, 1, 0]
    grades = verifier.score(images, prompts, strict=False)
    assert grades.dtype == torch.float32
    assert grades[0] > 0.95
    assert 0.2 < grades[2] < 0.8


@pytest.mark.parametrize("side", [48, 128, 256])
def test_score_resizes(side: int) -> None:
    prompts = ["a large red star on a gray background", "four small circles"]
    images = tensor(*map(one, prompts))
    images = torch.nn.functional.interpolate(images, size=(side, side), mode="bicubic")
    assert verifier.score(images, prompts, strict=True).tolist() == [1, 1]


def test_score_takes_half_precision_and_values_outside_the_range() -> None:
    images = tensor(one("a red star")).to(torch.bfloat16) * 1.05 - 0.02
    assert verifier.score(images, ["a red star"], strict=True).tolist() == [1]


def test_score_names_a_caption_outside_the_grammar() -> None:
    with pytest.raises(ValueError, match="a photo of sks dog"):
        verifier.score(torch.zeros(1, 3, 64, 64), ["a photo of sks dog"], strict=False)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (3, 64, 64), (1, 4, 64, 64)])
def test_score_refuses_a_batch_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="captions need images"):
        verifier.score(torch.zeros(shape), ["a star"], strict=True)


def test_overall_is_the_mean_of_the_task_scores() -> None:
    prompts = ["a star", "a star", "a star", "two rings"]
    images = tensor(one("a star"), one("a star"), one("a cross"), one("three rings"))
    scores = verifier.task_scores(images, prompts)
    assert scores == {
        "single_object": pytest.approx(2 / 3),
        "counting": 0,
        "overall": pytest.approx(1 / 3),
    }


def test_every_task_is_scored() -> None:
    prompts = scenes.evaluation_captions(24, seed=0)
    scores = verifier.task_scores(tensor(*map(one, prompts)), prompts)
    assert scores == dict.fromkeys((*scenes.TASKS, "overall"), 1.0)
