"""Claims about buckets: which sizes there are, and which picture is used at which of them."""

import itertools
import json
import math
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dojo.cli import UserError
from dojo.data import Captioned, DataArgs, Plan, Recipe, Size, assign
from dojo.data.buckets import bucket_sizes, enlargement, nearest

SD3_STEP = 16  # pixels: the autoencoder's 8 times the patch's 2


def no_picture(row: int) -> Path:
    raise AssertionError("a picture was read")


def source_of(sizes: list[Size], *recipes: Recipe, recipe_of: list[int] | None = None) -> Captioned:
    """Samples of which nothing but the size is known."""
    count = len(sizes)
    return Captioned(
        description="pictures",
        names=[f"{i}.png" for i in range(count)],
        ids=[f"{i}.png|1" for i in range(count)],
        captions=[(f"picture {i}",) for i in range(count)],
        problems=[""] * count,
        rows=list(range(count)),
        store=no_picture,
        recipes=recipes,
        recipe_of=recipe_of or [0] * count,
        sizes=sizes,
    )


def plan_of(sizes: list[Size], **options: Any) -> Plan:
    args = DataArgs(dataset_name="x", **options)
    return assign(source_of(sizes, Recipe.of(args)), args, SD3_STEP)


def camera_sizes(count: int = 400) -> list[Size]:
    """Sizes of photographs between 4:1 and 1:4."""
    rng = random.Random(0)
    aspects = [math.exp(rng.uniform(-math.log(4), math.log(4))) for _ in range(count)]
    return [(round(1000 * a**0.5), round(1000 / a**0.5)) for a in aspects]


def crop_loss(picture: Size, size: Size) -> float:
    """Share of a picture's area that is cut off when it is made to cover a size."""
    scale = enlargement(picture, size)
    return 1 - size[0] * size[1] / (picture[0] * scale * picture[1] * scale)


# Which sizes there are


@pytest.mark.parametrize(
    ("resolution", "step"), [(64, 8), (256, 64), (512, 64), (512, 16), (768, 64), (1024, 64)]
)
def test_buckets_keep_the_rule_of_their_docstring(resolution: int, step: int) -> None:
    low, high = resolution // 2, resolution * 2
    sizes = bucket_sizes(resolution, step, low, high)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)  # both orientations
    for size in sizes:
        long, short = max(size), min(size)
        assert long % step == short % step == 0
        assert low <= short <= long <= high
        # No other short side of the step brings the area nearer.
        error = abs(long * short - resolution**2)
        assert error <= min(abs(long * (short + d) - resolution**2) for d in (-step, step))
        assert long * short - resolution**2 <= long * step / 2
    longs = {max(size) for size in sizes}
    assert longs == set(range(resolution, high + 1, step))  # every long side has its bucket


@pytest.mark.parametrize("resolution", [100, 500, 600, 1000])
def test_a_resolution_between_two_steps_has_a_square_within_one_strip(resolution: int) -> None:
    sizes = bucket_sizes(resolution, 64, 32, 2048)
    squares = [size for size in sizes if size[0] == size[1]]
    assert len(squares) == 1
    for height, width in sizes:
        assert height * width - resolution**2 <= max(height, width) * 64


def test_the_buckets_of_512_are_these() -> None:
    wide = [(256, 1024), (256, 960), (320, 896), (320, 832), (320, 768)]
    wide += [(384, 704), (384, 640), (448, 576)]
    sizes = bucket_sizes(512, 64, 256, 1024)
    assert sizes == [*((b, a) for a, b in wide), (512, 512), *reversed(wide)]


def test_limits_cut_the_list() -> None:
    tall = [(704, 384), (640, 384), (576, 448)]
    wide = [(448, 576), (384, 640), (384, 704)]
    assert bucket_sizes(512, 64, 384, 704) == [*tall, (512, 512), *wide]
    assert bucket_sizes(512, 64, 512, 512) == [(512, 512)]
    assert bucket_sizes(512, 64, 600, 700) == []


def test_the_step_is_64_and_the_models_own_below_256() -> None:
    large = plan_of([(100, 300)], aspect_buckets=True, resolution=(1024,))
    assert large.sizes == [(576, 1728)]
    small = DataArgs(dataset_name="x", aspect_buckets=True, resolution=(64,))
    assert assign(source_of([(100, 300)], Recipe.of(small)), small, 8).sizes == [(40, 112)]
    # 64 is no multiple of such a model's step.
    odd = DataArgs(dataset_name="x", aspect_buckets=True, resolution=(480,))
    assert assign(source_of([(100, 100)], Recipe.of(odd)), odd, 24).sizes == [(480, 480)]


def test_sizes_that_the_model_cannot_take_are_refused_with_the_nearest_that_it_can() -> None:
    with pytest.raises(UserError, match=r"--bucket_step 40 .*multiple of 16.* 32"):
        plan_of([(100, 100)], aspect_buckets=True, bucket_step=40)
    with pytest.raises(UserError, match=r"--resolution 500 .*multiple of 16.* 496"):
        plan_of([(100, 100)], resolution=(512, 500))
    with pytest.raises(UserError, match=r"--width 8 .*multiple of 16.* 16"):
        plan_of([(100, 100)], height=512, width=8)
    with pytest.raises(UserError, match="--bucket_min"):
        plan_of([(100, 100)], aspect_buckets=True, bucket_min=520, bucket_max=540)


# Which picture goes where


def test_a_picture_goes_to_the_nearest_aspect() -> None:
    sizes = bucket_sizes(512, 64, 256, 1024)
    for picture in camera_sizes():
        taken = nearest(picture, sizes)
        off = [abs(math.log(picture[0] / picture[1] / (h / w))) for h, w in sizes]
        assert abs(off[sizes.index(taken)] - min(off)) < 1e-12


def test_portraits_stay_portraits_and_squares_squares() -> None:
    sizes = bucket_sizes(512, 64, 256, 1024)
    for height, width in camera_sizes():
        bucket = nearest((height, width), sizes)
        assert (height - width) * (bucket[0] - bucket[1]) >= 0
        assert nearest((width, height), sizes) == (bucket[1], bucket[0])
    assert nearest((3000, 2000), sizes) == (640, 384)
    assert nearest((77, 77), sizes) == (512, 512)


def test_ties_are_settled_the_same_way_whatever_the_order() -> None:
    sizes = [(64, 128), (128, 64), (256, 128), (128, 256)]
    assert nearest((100, 100), sizes) == nearest((100, 100), sizes[::-1]) == (256, 128)


def test_buckets_cut_off_little() -> None:
    pictures = camera_sizes()
    plan = plan_of(pictures, aspect_buckets=True)
    losses = [
        crop_loss(pictures[i], size) for size, members in plan.rounds[0].items() for i in members
    ]
    squares = [crop_loss(picture, (512, 512)) for picture in pictures]
    # A picture half-way between two buckets, whose aspects differ by a factor r, loses 1 - r^-0.5.
    aspects = [width / height for height, width in bucket_sizes(512, 64, 256, 1024)]
    widest_gap = max(wide / narrow for narrow, wide in itertools.pairwise(aspects))
    assert widest_gap < 1.34
    assert max(losses) <= 1 - widest_gap**-0.5 + 1e-9
    assert sum(losses) / len(losses) < 0.06 < 0.35 < sum(squares) / len(squares)


def test_every_sample_is_in_one_bucket_per_epoch() -> None:
    pictures = camera_sizes(50)
    for options in ({}, {"aspect_buckets": True}, {"aspect_buckets": True, "repeats": 3}):
        plan = plan_of(pictures, resolution=(512, 768, 1024), **options)
        repeats = options.get("repeats", 1)
        assert plan.samples_per_epoch == 50 * repeats
        for one in plan.rounds:
            places = [(i, size) for size, members in one.items() for i in members]
            assert Counter(i for i, _ in places) == dict.fromkeys(range(50), repeats)
            assert len(set(places)) == 50


def test_without_buckets_there_is_one_size() -> None:
    pictures = camera_sizes(20)
    assert plan_of(pictures).rounds == ({(512, 512): tuple(range(20))},)
    assert plan_of(pictures, height=512, width=768).sizes == [(512, 768)]


def test_sizes_need_to_be_known_only_where_they_matter() -> None:
    plain = DataArgs(dataset_name="x")
    source = replace(source_of([(1, 1)] * 4, Recipe.of(plain)), sizes=[])  # not verified
    assert assign(source, plain, SD3_STEP).rounds == ({(512, 512): (0, 1, 2, 3)},)
    for args in (
        DataArgs(dataset_name="x", aspect_buckets=True),
        DataArgs(dataset_name="x", max_upscale=2.0),
    ):
        with pytest.raises(ValueError, match="verified"):
            assign(replace(source, recipes=(Recipe.of(args),)), args, SD3_STEP)


def test_several_resolutions_take_turns() -> None:
    plan = plan_of([(900, 900)] * 10, resolution=(512, 768, 1024))
    assert len(plan.rounds) == 3
    squares = [(512, 512), (768, 768), (1024, 1024)]
    for epoch, one in enumerate(plan.rounds):
        for number, size in enumerate(squares):
            assert one[size] == tuple(i for i in range(10) if (i + epoch) % 3 == number)
    assert plan.needed() == {size: list(range(10)) for size in squares}


def test_each_resolution_has_buckets_of_its_own() -> None:
    plan = plan_of([(900, 450)] * 2, resolution=(512, 1024), aspect_buckets=True)
    assert plan.rounds == (
        {(704, 384): (0,), (1472, 704): (1,)},
        {(1472, 704): (0,), (704, 384): (1,)},
    )


def test_no_picture_is_enlarged_beyond_the_limit() -> None:
    pictures = [(400, 400), (600, 600), (800, 800), (1024, 1024), (100, 2000)]
    plan = plan_of(pictures, resolution=(512, 768, 1024), max_upscale=1.3)
    assert {size: members for size, members in plan.needed().items()} == {
        (512, 512): [0, 1, 2, 3],
        (768, 768): [1, 2, 3],
        (1024, 1024): [2, 3],
    }
    for one in plan.rounds:  # used once an epoch even where a resolution is out of reach
        assert sorted(i for members in one.values() for i in members) == [0, 1, 2, 3]
        for size, members in one.items():
            assert all(enlargement(pictures[i], size) <= 1.3 for i in members)
    assert plan.left_out == ((4, "2000 x 100 px, to be enlarged 5.12 times (--max_upscale 1.3)"),)
    assert plan.samples_per_epoch == 4


def test_a_picture_of_just_the_size_is_not_enlarged() -> None:
    assert plan_of([(512, 512)], max_upscale=1.0).left_out == ()
    assert len(plan_of([(511, 512)], max_upscale=1.0).left_out) == 1
    assert plan_of([(511, 512)], max_upscale=1.0).samples_per_epoch == 0


def test_recipes_are_followed_sample_by_sample() -> None:
    args = DataArgs(dataset_name="x", resolution=(512,))
    plain, wide = Recipe.of(args), Recipe.of(DataArgs(dataset_name="x", aspect_buckets=True))
    both = Recipe.of(DataArgs(dataset_name="x", resolution=(256, 768), repeats=2))
    source = source_of([(450, 900)] * 3, plain, wide, both, recipe_of=[0, 1, 2])
    assert assign(source, args, SD3_STEP).rounds == (
        {(512, 512): (0,), (384, 704): (1,), (256, 256): (2, 2)},
        {(512, 512): (0,), (384, 704): (1,), (768, 768): (2, 2)},
    )


# Regularisation


def with_regularisation(**options: Any) -> tuple[Captioned, DataArgs]:
    """Three instance pictures, then two class pictures, the second one small."""
    args = DataArgs(dataset_name="x", aspect_buckets=True, **options)
    instance = Recipe.of(args)
    of_class = replace(instance, is_regularisation=True, repeats=2)
    sizes = [(900, 900), (450, 900), (900, 450), (900, 900), (300, 300)]
    return source_of(sizes, instance, of_class, recipe_of=[0, 0, 0, 1, 1]), args


def test_partners_stand_beside_the_rounds_and_are_needed_at_every_size() -> None:
    source, args = with_regularisation()
    plan = assign(source, args, SD3_STEP, pair_regularisation=True)
    assert plan.partners == (3, 3, 4, 4)
    assert plan.rounds == ({(512, 512): (0,), (384, 704): (1,), (704, 384): (2,)},)
    assert plan.needed() == {
        (384, 704): [1, 3, 4],
        (512, 512): [0, 3, 4],
        (704, 384): [2, 3, 4],
    }
    assert plan.samples_per_epoch == 3


def test_without_pairing_regularisation_samples_are_samples() -> None:
    source, args = with_regularisation()
    plan = assign(source, args, SD3_STEP)
    assert plan.partners == ()
    assert plan.rounds[0][512, 512] == (0, 3, 3, 4, 4)


def test_a_partner_must_not_be_enlarged_too_much_at_any_size() -> None:
    source, args = with_regularisation(max_upscale=1.8)
    plan = assign(source, args, SD3_STEP, pair_regularisation=True)
    assert plan.partners == (3, 3)
    assert [index for index, _ in plan.left_out] == [4]
    assert "2.35" in plan.left_out[0][1]  # 704 / 300, the worst of the sizes
    source, args = with_regularisation(max_upscale=1.0)
    small = source.select([0, 4])
    with pytest.raises(UserError, match="--max_upscale"):
        assign(small, args, SD3_STEP, pair_regularisation=True)


# The report


def test_the_table_counts_pictures_uses_and_batches() -> None:
    plan = Plan(
        rounds=(
            {(512, 512): (0, 0, 1, 1, 2, 2), (384, 704): (3, 3)},
            {(512, 512): (0, 0, 1, 1), (384, 704): (2, 2, 3, 3)},
        ),
        partners=(4, 4),
        left_out=((5, "too small"),),
    )
    narrow, square = plan.rows(4)
    assert narrow == {
        "height": 384,
        "width": 704,
        "aspect": 704 / 384,
        "pictures": 2,
        "uses_per_epoch": 3.0,
        "batches_per_epoch": 0.75,
    }
    assert (square["pictures"], square["uses_per_epoch"], square["batches_per_epoch"]) == (
        3,
        5,
        1.25,
    )
    assert json.loads(json.dumps(plan.rows(4))) == plan.rows(4)
    lines = plan.table(4).splitlines()
    assert lines[1].split()[:6] == ["384", "704", "1.83", "2", "3.0", "0.75"]
    assert "one batch in 1.3 epochs" in lines[1]
    assert lines[2].split() == ["512", "512", "1.00", "3", "5.0", "1.25"]
    assert lines[3:] == [
        "beside each sample, one of 1 class pictures",
        "1 pictures fit in no bucket and are left out",
    ]


def test_a_hundred_thousand_pictures_are_assigned_in_seconds() -> None:
    rng = random.Random(1)
    pictures = [(rng.randint(300, 4000), rng.randint(300, 4000)) for _ in range(10_000)]
    start = time.perf_counter()
    plan = plan_of(pictures * 10, aspect_buckets=True, resolution=(512, 1024), max_upscale=2.0)
    assert plan.samples_per_epoch + len(plan.left_out) == 100_000
    assert time.perf_counter() - start < 20  # less than 1 s on an idle core
