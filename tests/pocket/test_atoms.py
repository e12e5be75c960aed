"""Claims about captions of up to four objects, and about how much of them a picture holds."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from dojo import rewards
from dojo.pocket import atoms, compositions, datasets, scenes, score, verifier
from dojo.pocket.scenes import CANVAS, SIZES, Part, Scene, Spec, Thing

CAPTION = "two small red stars left of a blue ring on a gray background"
SPEC = Spec(
    (Part("star", "red", "small", 2), Part("ring", "blue")), relation="left of", background="gray"
)


def right(**changes: str) -> Scene:
    """What `CAPTION` says, with changes to the first star."""
    first = Thing("star", "red", "small", 16, 16)
    first = Thing(**{**vars(first), **changes})
    others = (Thing("star", "red", "small", 16, 48), Thing("ring", "blue", "large", 48, 32))
    return Scene((first, *others), "gray")


def value(scene: Scene, spec: Spec = SPEC) -> dict[str, float]:
    return atoms.atoms(scenes.draw(scene), spec)


def draws(count: int, seed: int = 0) -> list[tuple[Spec, Scene]]:
    rng = random.Random(seed)
    specs = [compositions.random_spec(rng) for _ in range(count)]
    return [(spec, scenes.realise(spec, rng)) for spec in specs]


# ---- Captions ----


def test_compositional_captions_are_of_the_grammar_and_of_up_to_four_objects() -> None:
    captions = compositions.captions(400, seed=1)
    assert captions == compositions.captions(400, seed=1)
    assert len(set(captions)) == 400
    specs = [scenes.parse(text) for text in captions]
    assert [scenes.caption(spec) for spec in specs] == captions
    numbers = Counter(spec.num_objects for spec in specs)
    assert set(numbers) == {1, 2, 3, 4}
    assert min(numbers.values()) > 60
    assert {len(spec.parts) for spec in specs} == {1, 2}
    assert max(len(text.split()) for text in captions) <= 18  # CLIP's 20 tokens


def test_more_captions_than_the_grammar_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only = scenes.parse("a star")

    def same(rng: random.Random, num_objects: int) -> Spec:
        return only

    monkeypatch.setattr(compositions, "random_spec", same)
    assert compositions.captions(1, seed=0) == ["a star"]
    with pytest.raises(ValueError, match="2 different compositional captions"):
        compositions.captions(2, seed=0)


def test_compositional_scenes_hold_what_they_should_inside_the_canvas_and_apart() -> None:
    for spec, scene in draws(150):
        assert len(scene.things) == spec.num_objects
        assert verifier.strict(scenes.draw(scene), spec), scenes.caption(spec)
        for thing in scene.things:
            reach = 1.2 * SIZES[thing.size]
            assert reach - 1.5 < min(thing.x, thing.y)
            assert max(thing.x, thing.y) < CANVAS - reach + 1.5


@pytest.mark.parametrize(
    "text", ["four stars and a ring", "three stars left of a ring", "a ring above three stars"]
)
def test_what_the_canvas_has_no_room_for_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no room for the objects"):
        scenes.realise(scenes.parse(text), random.Random(0))


# ---- Atoms ----


def test_every_thing_that_is_said_is_an_atom() -> None:
    assert scenes.parse(CAPTION) == SPEC
    assert set(value(right())) == {
        *("0 star", "0 number", "0 color", "0 size", "1 ring", "1 color"),
        *("relation", "background", "nothing else"),
    }
    lone = Spec((Part("star"),), position="at the top")
    assert set(value(right(), lone)) == {"0 star", "position", "nothing else"}


def test_a_right_picture_has_all_atoms_and_both_means_near_one() -> None:
    for spec, scene in draws(100, seed=3):
        values = [*value(scene, spec).values()]
        assert min(values) > 0.7, scenes.caption(spec)
        assert atoms.mean(values, "arithmetic") > 0.9
        assert atoms.mean(values, "geometric") > 0.9


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"color": "green"}, {"0 color"}),
        ({"size": "large"}, {"0 size"}),
        ({"shape": "cross"}, {"0 number", "0 color", "0 size"}),
    ],
)
def test_one_wrong_thing_costs_its_own_atoms_and_no_others(
    changes: dict[str, str], wrong: set[str]
) -> None:
    values = value(right(**changes))
    assert {name for name, one in values.items() if one < 0.5} == wrong
    others = [one for name, one in values.items() if name not in wrong]
    assert min(others) > 0.7


def test_a_wrong_layout_background_or_number_costs_its_own_atom() -> None:
    scene = right()
    things = scene.things
    mirrored = tuple(Thing(**{**vars(one), "x": CANVAS - one.x}) for one in things)
    values = value(Scene(mirrored, "gray"))
    assert [name for name, one in values.items() if one < 0.5] == ["relation"]
    values = value(Scene(things, "black"))
    assert [name for name, one in values.items() if one < 0.5] == ["background"]
    rings = [Thing("ring", "blue", "large", 48, y) for y in (16, 48)]
    values = value(Scene((*things[:2], *rings), "gray"))
    assert {name for name, one in values.items() if one < 0.5} == {"nothing else"}


def test_an_empty_picture_has_hardly_anything() -> None:
    empty = np.full((CANVAS, CANVAS, 3), scenes.BACKGROUNDS["gray"], dtype=np.uint8)
    values = atoms.atoms(empty, SPEC)
    assert values["background"] > 0.9
    assert sum(one for name, one in values.items() if name != "background") < 0.2
    assert atoms.mean([*values.values()], "geometric") < 0.02


def test_the_means_are_what_they_are_called() -> None:
    assert atoms.mean([0.25, 1.0], "arithmetic") == 0.625
    assert atoms.mean([0.25, 1.0], "geometric") == pytest.approx(0.5)
    assert atoms.mean([0.0, 1.0], "geometric") == pytest.approx(math.sqrt(atoms.LEAST))


def test_the_geometric_mean_tells_right_from_wrong_where_strict_does() -> None:
    """One object of another colour, shape or number: below every right picture's mean."""
    rng = random.Random(5)
    rights, wrongs = [], []
    for spec, scene in draws(90, seed=5):
        rights.append(atoms.mean([*value(scene, spec).values()], "geometric"))
        changed = scenes.changed(scene, rng.choice(["shape", "color", "count"]), rng)
        if not verifier.strict(scenes.draw(changed), spec):
            wrongs.append(atoms.mean([*value(changed, spec).values()], "geometric"))
    assert len(wrongs) > 60
    assert max(wrongs) < min(rights)


# ---- Where they are used ----


def test_the_reward_is_the_mean_of_the_atoms_and_has_no_score_for_other_texts() -> None:
    picture = scenes.draw(right(color="green"))
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    values = [*value(right(color="green")).values()]
    reward = rewards.load("pocket_atoms,pocket_atoms[mean=geometric,name=all]=0")
    output = reward(image.repeat(2, 1, 1, 1), [CAPTION, "a photograph"], None)
    assert output.valid.tolist() == [True, False]
    assert float(output.components["pocket_atoms"][0]) == pytest.approx(np.mean(values), abs=1e-5)
    geometric = math.exp(np.mean(np.log(values)))
    assert float(output.components["all"][0]) == pytest.approx(geometric, abs=1e-5)


def test_scores_are_told_by_the_number_of_objects_and_by_both_means() -> None:
    drawn = draws(24, seed=9)
    pictures = np.stack([scenes.draw(scene) for _, scene in drawn])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    captions = [scenes.caption(spec) for spec, _ in drawn]
    rows = score.judged(images, captions, by_atoms=True)
    assert list(rows) == [
        *("1 object", "2 objects", "3 objects", "4 objects", "all", "graded"),
        *("atoms, arithmetic mean", "atoms, geometric mean"),
    ]
    assert rows["all"] == rows["4 objects"] == 1.0
    with pytest.raises(ValueError, match="--compositional and --shape"):
        score.Args(compositional=True, shape="heart")


def test_careless_compositional_captions_are_right_for_three_of_four() -> None:
    judged = [
        verifier.strict(picture, scenes.parse(caption))
        for caption, picture in datasets.careless_compositional(200)
    ]
    assert 0.70 < np.mean(judged) < 0.82
