"""Claims about the pocket world's captions and pictures."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from dojo.pocket import scenes
from dojo.pocket.scenes import CANVAS, SIZES, Part, Scene, Spec, Thing

SPECS = 2_000


def specs(count: int = SPECS, seed: int = 0) -> list[Spec]:
    rng = random.Random(seed)
    shapes = scenes.SHAPES + scenes.NOVEL_SHAPES
    return [scenes.random_spec(rng, shapes=shapes) for _ in range(count)]


def cover(thing: Thing) -> np.ndarray:
    return scenes.mask(thing.shape, thing.x, thing.y, SIZES[thing.size])


def lone(**changes: object) -> Scene:
    values = {"shape": "circle", "color": "red", "size": "large", "x": 32.0, "y": 32.0} | changes
    return Scene((Thing(**values),), "white")  # pyright: ignore[reportArgumentType]


# ---- Captions ----


def test_parse_is_the_inverse_of_caption() -> None:
    for spec in specs():
        assert scenes.parse(scenes.caption(spec)) == spec


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("a star", "single_object"),
        ("a star and a ring", "two_object"),
        ("three blue circles", "counting"),
        ("two crosses", "counting"),
        ("a small red star on a gray background", "colors"),
        ("a red star left of a ring", "position"),
        ("a star at the top", "position"),
        ("a red star and a blue ring", "color_attr"),
    ],
)
def test_the_documented_captions_belong_to_their_tasks(text: str, task: str) -> None:
    spec = scenes.parse(text)
    assert spec.task == task
    assert scenes.caption(spec) == text


def test_parse_forgives_capitals_spaces_and_a_full_stop() -> None:
    assert scenes.parse("  A red star. ") == Spec((Part("star", "red"),))


@pytest.mark.parametrize(
    "text", ["", "a dog", "a photo of sks dog", "five circles", "a red", "a star a ring"]
)
def test_parse_names_a_caption_outside_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="pocket grammar") as error:
        scenes.parse(text)
    assert repr(text) in str(error.value)


def test_every_task_appears_and_a_demanded_task_is_kept() -> None:
    assert {spec.task for spec in specs(200)} == set(scenes.TASKS)
    rng = random.Random(1)
    for task in scenes.TASKS:
        assert all(scenes.random_spec(rng, task).task == task for _ in range(50))


def test_novel_shapes_appear_only_on_request() -> None:
    rng = random.Random(2)
    drawn = {thing.shape for _ in range(300) for thing in scenes.sample(rng)[1].things}
    assert drawn == set(scenes.SHAPES)
    _, scene = scenes.sample(rng, "single_object", shapes=("heart",))
    assert scene.things[0].shape == "heart"


def test_evaluation_captions_are_fixed_and_take_the_tasks_in_turn() -> None:
    captions = scenes.evaluation_captions(60, seed=0)
    assert captions == scenes.evaluation_captions(60, seed=0)
    assert captions != scenes.evaluation_captions(60, seed=1)
    assert [scenes.parse(text).task for text in captions] == list(scenes.TASKS) * 10


# ---- Scenes and pictures ----


def test_scenes_are_deterministic_from_the_seed() -> None:
    def draws(seed: int) -> list[tuple[str, Scene]]:
        rng = random.Random(seed)
        return [scenes.sample(rng) for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    for (_, scene), (_, again) in zip(draws(3), draws(3), strict=True):
        assert np.array_equal(scenes.draw(scene), scenes.draw(again))


def test_a_scene_holds_what_its_caption_says() -> None:
    rng = random.Random(5)
    for spec in specs(500, seed=5):
        scene = scenes.realise(spec, rng)
        assert scene.background == (spec.background or "white")
        things = list(scene.things)
        for part in spec.parts:
            group, things = things[: part.count], things[part.count :]
            assert {thing.shape for thing in group} == {part.shape}
            assert part.color in (None, group[0].color)
            assert part.size in (None, group[0].size)
        assert not things


def test_what_is_drawn_never_overlaps_and_stays_inside_the_canvas() -> None:
    rng = random.Random(6)
    for spec in specs(600, seed=6):
        things = scenes.realise(spec, rng).things
        for thing in things:
            corners = scenes.outline(thing.shape)[0]
            xs = [thing.x + SIZES[thing.size] * x for x, _ in corners]
            ys = [thing.y + SIZES[thing.size] * y for _, y in corners]
            assert min(xs + ys) >= 0
            assert max(xs + ys) <= CANVAS
        covers = [cover(thing) for thing in things]
        for first, second in itertools.combinations(covers, 2):
            assert not ((first > 0.5) & (second > 0.5)).any()
            assert (first * second).sum() < 0.5  # no more than one shared edge pixel


def test_a_picture_shows_background_and_colour_as_they_are() -> None:
    picture = scenes.draw(lone(color="blue"))
    assert picture.shape == (CANVAS, CANVAS, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == scenes.BACKGROUNDS["white"]
    assert tuple(picture[32, 32]) == scenes.COLORS["blue"]


def test_a_ring_has_a_hole_and_a_circle_has_none() -> None:
    assert scenes.mask("ring", 32, 32, 9)[32, 32] == 0
    assert scenes.mask("circle", 32, 32, 9)[32, 32] == 1


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="'blob'"):
        scenes.outline("blob")


# ---- Changes ----


@pytest.mark.parametrize("attribute", ["shape", "color", "count", "position"])
def test_a_change_touches_the_one_attribute(attribute: str) -> None:
    rng = random.Random(7)
    task = "position" if attribute == "position" else None
    for _ in range(200):
        before = scenes.sample(rng, task)[1]
        after = scenes.changed(before, attribute, rng)
        assert after.background == before.background
        if attribute == "count":
            assert abs(len(after.things) - len(before.things)) == 1
            assert 1 <= len(after.things) <= 4
            continue
        differing = {
            name
            for old, new in zip(before.things, after.things, strict=True)
            for name in ("shape", "color", "size", "x", "y")
            if getattr(old, name) != getattr(new, name)
        }
        assert differing
        assert differing <= ({"x", "y"} if attribute == "position" else {attribute})


def test_a_second_object_never_touches_the_first() -> None:
    rng = random.Random(8)
    for shape in scenes.SHAPES:
        for x, y in scenes.POSITIONS.values():
            scene = lone(shape=shape, x=CANVAS * x + 1, y=CANVAS * y - 1)
            first, second = (cover(thing) for thing in scenes.changed(scene, "count", rng).things)
            assert (first * second).sum() == 0


def test_a_change_that_makes_no_sense_is_refused() -> None:
    rng = random.Random(9)
    with pytest.raises(ValueError, match="'mood'"):
        scenes.changed(lone(), "mood", rng)
    crowd = scenes.realise(scenes.parse("three stars"), rng)
    with pytest.raises(ValueError, match="one or two"):
        scenes.changed(crowd, "position", rng)
