"""Claims about rows and caches: equal with and without, nothing mixed up, nothing stale."""

import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pickle
import shutil
import time
import tracemalloc
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from dojo.cli import UserError
from dojo.data import (
    Batch,
    Batches,
    CacheArgs,
    CachedText,
    CaptionArgs,
    Captioned,
    DataArgs,
    Draw,
    Latents,
    Pictures,
    Plan,
    Posterior,
    Recipe,
    Size,
    Turns,
    assign,
    cache,
    cache_latents,
    cache_text,
    checked,
    collate,
    identified,
    open_source,
)
from dojo.data import shards as disk
from dojo.data.images import READER, Seen
from dojo.data.shards import Shards
from dojo.data.sources.captioned import look
from dojo.models import sd3

SETTINGS: dict[str, object] = {"vae": "v1", "dtype": "no"}
SIZES: list[Size] = [(64, 64), (64, 64), (120, 60), (100, 56), (60, 120), (70, 62), (64, 90)] * 2
"""Of the painted pictures: (height, width)."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen samples then make several shards."""
    monkeypatch.setattr(disk, "SHARD_SIZE", 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for busy cores would take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Painter:
    """Paints the picture of a row: no two rows, no two corners and no two places look the same."""

    sizes: list[Size]

    def __call__(self, row: int) -> bytes:
        return paint(row, *self.sizes[row])


def colour_of(row: int) -> Tensor:
    """The colour of a picture at large, by which it is known: [3] in [0, 1]."""
    return torch.tensor([row % 3, row // 3 % 3, row // 9]) / 2


@functools.cache
def paint(seed: int, height: int, width: int) -> bytes:
    noise = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(seed))
    picture = Image.fromarray(((noise + 3 * colour_of(seed)) / 4 * 255).byte().numpy())
    file = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(file, "BMP")
    return file.getvalue()


def painted(args: DataArgs, sizes: list[Size] = SIZES, version: int = 1) -> Captioned:
    count = len(sizes)
    return Captioned(
        description="painted pictures",
        names=[f"{i}.png" for i in range(count)],
        ids=[f"{i}.png|{version}" for i in range(count)],
        captions=[(f"picture {i}, big, bright", f"number {i}") for i in range(count)],
        problems=[""] * count,
        rows=list(range(count)),
        store=Painter(sizes),
        recipes=(Recipe.of(args),),
        recipe_of=[0] * count,
        sizes=sizes,
    )


def pictures_of(
    source: Captioned | None = None,
    captions: CaptionArgs | None = None,
    *,
    seed: int = 0,
    still: bool = False,
    **options: Any,
) -> tuple[Pictures, Plan]:
    """The painted pictures, at 64 pixels in steps of 8, and their plan."""
    args = DataArgs(**{"dataset_name": "x", "resolution": (64,), **options})
    source = source or painted(args)
    pictures = Pictures(source, args, captions or CaptionArgs(), seed=seed, still=still)
    return pictures, assign(source, args, 8)


def encode(pixels: Tensor) -> Posterior:
    """An autoencoder by which a picture is known: the mean of every 8 x 8 pixels."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return mean, mean.abs() + 0.1


def filled(
    pictures: Pictures, plan: Plan, root: Path, encode: Any = encode, **options: Any
) -> Latents:
    options = {"latent_channels": 3, "settings": SETTINGS, **options}
    return cache_latents(pictures, plan.needed(), encode, root, **options)


def fail(*args: object, **options: object) -> Any:
    raise AssertionError("done again")


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.glob("*/*.safetensors")}


def some_batches(plan: Plan, count: int, **options: Any) -> list[list[Draw]]:
    options = {"batch_size": 3, "seed": 0, **options}
    return list(itertools.islice(Batches(plan, **options), count))


def assert_same_rows(cached: Batch, fresh: Batch) -> None:
    """A batch from the cache is the batch that is read and encoded now."""
    mean, std = encode(fresh["pixels"])
    torch.testing.assert_close(cached["mean"], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(cached["std"], std, rtol=0, atol=1e-6)
    assert set(cached) - {"mean", "std"} == set(fresh) - {"pixels"}
    for name in set(fresh) - {"pixels"}:
        if isinstance(fresh[name], Tensor):
            assert torch.equal(cached[name], fresh[name])
        else:
            assert cached[name] == fresh[name]


# Rows


def test_a_row_says_what_it_is() -> None:
    pictures, _ = pictures_of()
    recipe = replace(pictures.source.recipes[0], weight=0.25, is_regularisation=True)
    other = replace(pictures.source, recipes=(recipe,))
    for source, weight in ((pictures.source, 1.0), (other, 0.25)):
        row = pictures_of(source)[0][Draw(4, 17, (32, 48))]
        assert (row["place"], row["size"]) == (17, (32, 48))
        assert row["caption"] in source.captions[4]
        assert row["pixels"].shape == (3, 32, 48)
        assert row["weight"] == torch.tensor(weight)
        assert row["regularisation"].dtype == torch.bool
        assert row["regularisation"].item() == (weight < 1)
        assert "mask" not in row


def test_rows_of_a_batch_are_stacked_or_listed() -> None:
    pictures, plan = pictures_of(aspect_buckets=True)
    for draws in some_batches(plan, 8):
        batch = collate([pictures[draw] for draw in draws])
        height, width = draws[0].size
        assert batch["pixels"].shape == (3, 3, height, width)
        assert batch["weight"].shape == batch["regularisation"].shape == (3,)
        assert batch["size"] == [(height, width)] * 3
        assert batch["place"] == [draw.place for draw in draws]


def test_flips_crops_and_captions_hang_on_seed_and_place_alone() -> None:
    tags = CaptionArgs(caption_dropout=0.3, shuffle_caption=True)
    first, again, other = (
        pictures_of(None, tags, seed=seed, random_flip=True, random_crop=True)[0]
        for seed in (1, 1, 2)
    )
    draws = [Draw(2, place, (64, 64)) for place in range(40)]
    for draw in reversed(draws):
        assert torch.equal(first[draw]["pixels"], again[draw]["pixels"])
        assert first[draw]["caption"] == again[draw]["caption"]
    assert [first[d]["caption"] for d in draws] != [other[d]["caption"] for d in draws]
    assert len({first[d]["pixels"].sum().item() for d in draws}) == 40
    assert len({other[d]["pixels"].sum().item() for d in draws}) == 40


def test_dropping_captions_leaves_flips_and_crops_alone() -> None:
    options = {"random_flip": True, "crop_variants": 4}
    plain = pictures_of(**options)[0]
    dropping = pictures_of(None, CaptionArgs(caption_dropout=0.5), **options)[0]
    draws = [Draw(0, place, (64, 64)) for place in range(100)]
    assert [plain.view(d) for d in draws] == [dropping.view(d) for d in draws]
    assert 20 < sum(dropping[d]["caption"] == "" for d in draws) < 80


def test_half_of_the_uses_are_mirrored_and_every_crop_has_its_share() -> None:
    pictures, _ = pictures_of(random_flip=True, crop_variants=4)
    views = [pictures.view(Draw(0, place, (64, 64))) for place in range(800)]
    assert 330 < sum(flip for _, flip in views) < 470
    for crop in range(4):
        assert 140 < sum(one == crop for one, _ in views) < 260
    plain, _ = pictures_of()
    assert {plain.view(Draw(0, place, (64, 64))) for place in range(50)} == {(0, False)}


def test_the_numbered_crops_of_a_picture_are_the_same_in_every_run() -> None:
    one, other = (pictures_of(crop_variants=3, seed=seed)[0] for seed in (0, 1))
    for index in range(5):
        anchors = [one.anchor(index, crop) for crop in range(3)]
        assert anchors == [other.anchor(index, crop) for crop in range(3)]
        assert anchors[0] == (0.5, 0.5)
        assert len(set(anchors)) == 3
    assert one.anchor(0, 1) != one.anchor(1, 1)


def test_still_rows_are_centred_unmirrored_and_have_the_first_caption() -> None:
    tags = CaptionArgs(caption_dropout=0.9, shuffle_caption=True)
    cases: list[dict[str, Any]] = [{"crop_variants": 4}, {"random_crop": True}]
    for options in cases:
        moving, _ = pictures_of(None, tags, random_flip=True, **options)
        still, _ = pictures_of(None, tags, random_flip=True, still=True, **options)
        for place in range(10):
            draw = Draw(2, place, (64, 64))
            for row in (still[draw], moving.still()[draw]):
                expected = moving.render(2, (64, 64), [((0.5, 0.5), False)])[0]["pixels"]
                assert torch.equal(row["pixels"], expected)
                assert row["caption"] == "picture 2, big, bright"
        assert not moving.is_still


def test_the_texts_are_those_that_rows_have() -> None:
    for captions in (
        CaptionArgs(),
        CaptionArgs(caption_dropout=0.2),
        CaptionArgs(shuffle_caption=True, keep_tokens=1, caption_variants=2),
    ):
        pictures, _ = pictures_of(None, captions)
        rows = (pictures.row(Draw(i, 14 * k + i, (64, 64))) for i in range(14) for k in range(60))
        assert pictures.texts() == sorted({row["caption"] for row in rows})
        assert pictures.still().texts() == sorted(f"picture {i}, big, bright" for i in range(14))


def test_reading_pictures_leaves_none_in_memory() -> None:
    args = DataArgs(dataset_name="x", resolution=(256,))
    pictures, plan = pictures_of(painted(args, [(256, 256)] * 20), resolution=(256,))
    draws = [draw for batch in some_batches(plan, 7) for draw in batch]
    for row in range(20):
        pictures.source.store(row)  # painted once
    pictures[draws[0]]
    tracemalloc.start()
    for draw in draws:
        pictures[draw]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 256 * 256 * 3  # bytes; not one picture of twenty


def test_a_large_data_set_is_ids_and_captions_only(tmp_path: Path) -> None:
    count = 100_000
    args = DataArgs(dataset_name="x", resolution=(64,))
    small = painted(args, [(64, 64)])
    source = replace(
        small,
        names=[f"{i}.png" for i in range(count)],
        ids=[f"{i}.png|1" for i in range(count)],
        captions=[(f"picture {i}",) for i in range(count)],
        problems=[""] * count,
        rows=[0] * count,
        recipe_of=[0] * count,
        sizes=[(64, 64)] * count,
    )
    pictures, plan = pictures_of(source)
    (indices,) = plan.needed().values()
    shards = Shards(tmp_path, source.ids, views=(1, 1))
    latents = Latents(pictures, {(64, 64): (shards, {i: row for row, i in enumerate(indices)})})
    text = CachedText()
    text.add(pictures.texts(), Shards(tmp_path, pictures.texts()))
    assert len(pickle.dumps((latents, text))) < 200 * count  # bytes a sample, for each worker


# Cached latents


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"random_flip": True},
        {"aspect_buckets": True, "random_flip": True, "crop_variants": 3},
        {"resolution": (64, 96), "aspect_buckets": True, "crop_variants": 2, "repeats": 2},
    ],
    ids=["plain", "flips", "buckets", "resolutions"],
)
def test_a_cached_row_belongs_to_its_picture_and_its_caption(
    tmp_path: Path, options: dict[str, Any], workers: int
) -> None:
    # diffusers #14430: a cache in the order of one pass, read in that of a shuffling loader.
    captions = CaptionArgs(caption_dropout=0.2, shuffle_caption=True, keep_tokens=1)
    pictures, plan = pictures_of(None, captions, **options)
    latents = filled(pictures, plan, tmp_path)
    draws = some_batches(plan, 24)
    loader = DataLoader(
        latents,
        batch_sampler=draws,
        collate_fn=collate,
        num_workers=workers,  # pyright: ignore
    )
    for batch, cached in zip(draws, loader, strict=True):
        assert_same_rows(cached, collate([pictures[draw] for draw in batch]))
        for draw, caption in zip(batch, cached["caption"], strict=True):
            assert caption == "" or str(draw.index) in caption.replace(",", "").split()


@pytest.mark.parametrize("shard_size", [4, 1000])
def test_a_cached_row_has_the_colour_of_the_picture_in_its_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    monkeypatch.setattr(disk, "SHARD_SIZE", shard_size)  # 1000: more than are read ahead
    pictures, plan = pictures_of(random_flip=True, crop_variants=2)
    latents = filled(pictures, plan, tmp_path)
    colours = torch.stack([colour_of(i) for i in range(14)]) * 1.5 - 0.75  # of the latents
    for draws in some_batches(plan, 14):
        for row in (latents[draw] for draw in draws):
            nearest = (colours - row["mean"].mean((1, 2))).norm(dim=1).argmin().item()
            assert str(nearest) in row["caption"].replace(",", "").split()


def test_all_crops_and_mirrorings_are_cached_and_used(tmp_path: Path) -> None:
    # diffusers' cache holds one random crop and one flip of each picture for ever.
    pictures, plan = pictures_of(random_flip=True, crop_variants=3)
    latents = filled(pictures, plan, tmp_path)
    rows = [latents.stored(2, (64, 64), crop=c, flip=f) for c in range(3) for f in (False, True)]
    views = [row["mean"] for row in rows]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(views, 2))
    used = [latents[Draw(2, place, (64, 64))]["mean"] for place in range(60)]
    counts = [sum(torch.equal(mean, view) for mean in used) for view in views]
    assert sum(counts) == 60
    assert min(counts) > 2


def test_random_crops_are_not_frozen_in_a_cache(tmp_path: Path) -> None:
    data = DataArgs(dataset_name="x", random_crop=True)
    with pytest.raises(UserError, match=r"--crop_variants.*--no_cache_latents"):
        CacheArgs().check(data)
    CacheArgs(no_cache_latents=True).check(data)
    CacheArgs().check(DataArgs(dataset_name="x", random_flip=True, crop_variants=4))
    # A source of a data_config may ask for them where the flags do not.
    pictures, plan = pictures_of(random_crop=True)
    with pytest.raises(UserError, match="--crop_variants"):
        filled(pictures, plan, tmp_path)
    filled(pictures.still(), plan, tmp_path)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """A real autoencoder, 8 pixels to a place, untrained."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4}
    down: Any = ("DownEncoderBlock2D",) * 4
    up: Any = ("UpDecoderBlock2D",) * 4
    vae: Any = AutoencoderKL(down_block_types=down, up_block_types=up, **blocks)
    return vae.requires_grad_(False).eval()


def few(**options: Any) -> tuple[Pictures, Plan]:
    """Four pictures for a real autoencoder, which is slow."""
    return pictures_of(
        painted(DataArgs(dataset_name="x", resolution=(64,), **options), SIZES[:4]), **options
    )


def test_a_cached_mirror_image_is_the_encoded_one(vae: AutoencoderKL, tmp_path: Path) -> None:
    pictures, plan = few(random_flip=True)
    latents = filled(pictures, plan, tmp_path, lambda pixels: sd3.posterior(vae, pixels))
    pixels = pictures.render(3, (64, 64), [((0.5, 0.5), False)])[0]["pixels"]
    mean, _ = sd3.posterior(vae, pixels.flip(-1)[None])
    cached = latents.stored(3, (64, 64), flip=True)["mean"]
    torch.testing.assert_close(cached, mean[0], rtol=0, atol=1e-5)
    # Encoding does not commute with mirroring: flipping the latents would be something else.
    assert not torch.allclose(latents.stored(3, (64, 64))["mean"].flip(-1), mean[0], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_autoencoder_of_any_dtype_encodes_with_and_without_a_cache(
    vae: AutoencoderKL, tmp_path: Path, dtype: torch.dtype
) -> None:
    # kohya #1758 and diffusers: pixels in one dtype, the autoencoder in another, and a crash.
    model: Any = copy.deepcopy(vae)
    model.to(dtype=dtype)
    pictures, plan = few()
    latents = filled(pictures, plan, tmp_path, lambda pixels: sd3.posterior(model, pixels))
    for batch in some_batches(plan, 2):
        cached, fresh = (collate([data[draw] for draw in batch]) for data in (latents, pictures))
        mean, std = sd3.posterior(model, fresh["pixels"])
        assert (mean.dtype, cached["mean"].dtype) == (dtype, torch.float32)
        off = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(cached["mean"], mean.float(), rtol=off, atol=off)
        torch.testing.assert_close(cached["std"], std.float(), rtol=off, atol=off)


def test_numbers_that_are_none_are_not_cached(tmp_path: Path) -> None:
    pictures, plan = pictures_of()

    def encode(pixels: Tensor) -> Posterior:
        mean = pixels[:, :1, ::8, ::8] / 0  # fp16 does so beyond 65504
        return mean, torch.ones_like(mean)

    with pytest.raises(UserError, match=r"latents of .*not finite.*--vae_dtype"):
        filled(pictures, plan, tmp_path, encode)
    assert not list(tmp_path.rglob("*.safetensors"))

    def embed(captions: Sequence[str]) -> dict[str, Tensor]:
        return {"embeds": torch.full((len(captions), 3, 4), torch.nan)}

    with pytest.raises(UserError, match=r"embeddings of 'a'.*not finite"):
        cache_text([["a", "b"]], lambda: embed, tmp_path, {})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nothing_of_another_making_is_used(tmp_path: Path) -> None:
    # kohya_ss #3157: cached latents of another model were mixed in.
    pictures, plan = pictures_of()
    filled(pictures, plan, tmp_path)
    assert len(list(tmp_path.glob("latents-*"))) == 1
    masked = replace(painted(DataArgs(dataset_name="x", resolution=(64,))), has_masks=True)
    changes: list[tuple[tuple[Pictures, Plan], dict[str, object]]] = [
        (pictures_of(), {"vae": "v2"}),
        (pictures_of(), {"dtype": "fp16"}),
        (pictures_of(resolution=(72,)), {}),
        (pictures_of(height=32), {}),
        (pictures_of(random_flip=True), {}),
        (pictures_of(crop_variants=2), {}),
        (pictures_of(masked), {}),
    ]
    for number, (changed, settings) in enumerate(changes, start=2):
        with pytest.raises(AssertionError, match="done again"):
            filled(*changed, tmp_path / "none", fail, settings={**SETTINGS, **settings})
        filled(*changed, tmp_path, settings={**SETTINGS, **settings})
        assert len(list(tmp_path.glob("latents-*"))) == number
    # Seeds, captions and repeats change nothing that is cached.
    tags = CaptionArgs(shuffle_caption=True, caption_dropout=0.1)
    filled(*pictures_of(None, tags, seed=3, repeats=2), tmp_path, fail)


def test_a_picture_at_a_size_that_is_not_cached_is_an_error(tmp_path: Path) -> None:
    pictures, plan = pictures_of(aspect_buckets=True)
    latents = filled(pictures, plan, tmp_path)
    ((tall, members),) = (item for item in plan.rounds[0].items() if 2 in item[1])
    assert 0 not in members
    with pytest.raises(KeyError):
        latents[Draw(0, 0, tall)]
    with pytest.raises(KeyError):
        latents[Draw(0, 0, (8, 8))]


def test_a_full_cache_encodes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, plan = pictures_of(aspect_buckets=True, random_flip=True)
    filled(pictures, plan, tmp_path)
    assert "GiB" in capsys.readouterr().out
    latents = filled(pictures, plan, tmp_path, fail)
    assert capsys.readouterr().out == ""
    for batch in some_batches(plan, 10):
        assert len(collate([latents[draw] for draw in batch])["mean"]) == 3


def test_the_evaluation_view_needs_no_cache_of_its_own(tmp_path: Path) -> None:
    pictures, plan = pictures_of(random_flip=True, crop_variants=3)
    still = filled(pictures, plan, tmp_path).still()
    for index in range(14):
        draw = Draw(index, index, (64, 64))
        assert_same_rows(collate([still[draw]]), collate([pictures.still()[draw]]))


def test_a_half_filled_cache_is_completed_with_the_same_bits(tmp_path: Path) -> None:
    pictures, plan = pictures_of(random_flip=True, aspect_buckets=True, crop_variants=2)

    def dying() -> Any:
        calls = itertools.count()

        def encode_some(pixels: Tensor) -> Posterior:
            if next(calls) == 4:
                raise KeyboardInterrupt
            return encode(pixels)

        return encode_some

    filled(pictures, plan, tmp_path / "whole")
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            filled(pictures, plan, tmp_path / "broken", dying())
    before = contents(tmp_path / "broken")
    assert 3 <= len(before) < len(contents(tmp_path / "whole"))
    filled(pictures, plan, tmp_path / "broken")
    after = contents(tmp_path / "broken")
    assert after == contents(tmp_path / "whole")
    assert all(after[name] == content for name, content in before.items())


@pytest.mark.parametrize("shard_size", [4, 1000])
def test_processes_make_together_what_one_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    monkeypatch.setattr(disk, "SHARD_SIZE", shard_size)  # 1000: one shard for each size
    pictures, plan = pictures_of(random_flip=True, aspect_buckets=True)
    filled(pictures, plan, tmp_path / "one")
    made = [0]
    for process in (2, 0, 1):
        filled(pictures, plan, tmp_path / "three", process=process, num_processes=3)
        made.append(len(contents(tmp_path / "three")))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert all(before + 1 <= after for before, after in itertools.pairwise(made))


def test_a_changed_picture_is_encoded_again_and_most_others_are_not(tmp_path: Path) -> None:
    pictures, plan = pictures_of()
    filled(pictures, plan, tmp_path)
    source = pictures.source
    ids = [*source.ids[:5], "5.png|2", *source.ids[6:]]
    rows = [*source.rows[:5], 1, *source.rows[6:]]
    changed, _ = pictures_of(replace(source, ids=ids, rows=rows))
    encoded: list[int] = []

    def counting(pixels: Tensor) -> Posterior:
        encoded.append(len(pixels))
        return encode(pixels)

    latents = filled(changed, plan, tmp_path, counting)
    assert 1 <= sum(encoded) <= 8
    draws = [Draw(i, i, (64, 64)) for i in range(14)]
    assert_same_rows(
        collate([latents[draw] for draw in draws]), collate([changed[draw] for draw in draws])
    )


def test_the_cache_says_what_it_was_made_with(tmp_path: Path) -> None:
    filled(*pictures_of(crop_variants=2), tmp_path)
    settings = json.loads(next(tmp_path.glob("latents-*/settings.json")).read_text())
    assert settings == {**SETTINGS, "size": [64, 64], "crops": 2, "flips": 1, "reader": READER}


def test_latents_are_float32_whatever_the_autoencoder_gives(tmp_path: Path) -> None:
    def half(pixels: Tensor) -> Posterior:
        mean, std = encode(pixels)
        return mean.bfloat16(), std.bfloat16()

    filled(*pictures_of(random_flip=True, crop_variants=3), tmp_path, half)
    shard = load_file(next(tmp_path.glob("latents-*/*.safetensors")))
    assert {tensor.dtype for tensor in shard.values()} == {torch.float32}
    assert shard["mean"].shape[1:] == (3, 2, 3, 8, 8)  # [sample, crop, mirrored, C, h, w]


def test_the_batches_of_the_autoencoder_are_bounded(tmp_path: Path) -> None:
    sizes: list[int] = []

    def remember(pixels: Tensor) -> Posterior:
        sizes.append(len(pixels) * pixels.shape[-1] * pixels.shape[-2])
        return encode(pixels)

    args = DataArgs(dataset_name="x", resolution=(1024,))
    source = painted(args, [(64, 64)] * 3)
    pictures, plan = pictures_of(source, resolution=(1024,), random_flip=True, crop_variants=2)
    filled(pictures, plan, tmp_path, remember)
    assert max(sizes) <= 2**21  # pixels


def test_an_encoder_on_a_cpu_has_the_cores_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, plan = pictures_of()
    render, reading = Pictures.render, list[int]()

    def slow(self: Pictures, index: int, *rest: Any) -> list[dict[str, Tensor]]:
        reading.append(index)
        time.sleep(0.02)
        found = render(self, index, *rest)
        reading.remove(index)
        return found

    seen: list[int] = []

    def watched(pixels: Tensor) -> Posterior:
        seen.append(len(reading))
        return encode(pixels)

    monkeypatch.setattr(Pictures, "render", slow)
    filled(pictures, plan, tmp_path, watched)
    assert seen[0] > 0  # of the next shards, before it is known where the encoder works
    assert seen[1:] == [0] * (len(seen) - 1)
    assert len(seen) > 2


def test_a_cache_that_the_disk_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = DataArgs(dataset_name="x", aspect_buckets=True, random_flip=True, resolution=(64,))
    pictures, plan = pictures_of(replace(painted(args), has_masks=True))
    filled(pictures, plan, tmp_path / "measured")
    needed = sum(
        tensor.nbytes
        for path in tmp_path.glob("measured/*/*.safetensors")
        for tensor in load_file(path).values()
    )

    def leave(free: int) -> None:
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    root = tmp_path / "root"
    leave(int(needed * 1.04))
    with pytest.raises(UserError, match=r"14 pictures.*--latent_cache_dir"):
        filled(pictures, plan, root)
    assert contents(root) == {}
    leave(int(needed * 1.06))
    filled(pictures, plan, root)
    leave(0)
    filled(pictures, plan, root)  # nothing is missing, nothing is needed


# Masks


@pytest.fixture
def masked(tmp_path: Path) -> Captioned:
    """The painted pictures; the even ones have a mask that is white in the upper left quarter."""
    source = painted(DataArgs(dataset_name="x", resolution=(64,), aspect_buckets=True))
    paths = []
    for i, (height, width) in enumerate(source.sizes):
        path = tmp_path / f"mask-{i}.png"
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width // 2, height // 2))
        mask.save(path)
        paths.append(str(path) if i % 2 == 0 else "")
    return replace(source, masks=paths, has_masks=True)


def test_a_mask_is_cropped_and_mirrored_with_its_picture(masked: Captioned) -> None:
    pictures, _ = pictures_of(masked)
    framings = [((0.5, 0.5), False), ((0.5, 0.5), True), ((0.0, 0.0), False), ((1.0, 1.0), False)]
    plain, mirrored, first, last = (
        row["mask"]
        for row in pictures.render(2, (64, 64), framings)  # 120 x 60
    )
    assert plain.shape == (1, 8, 8)
    assert torch.equal(plain.flip(-1), mirrored)
    assert torch.equal(plain[0, :4, :4], torch.ones(4, 4))
    assert plain.sum() == 16
    assert first.sum() > plain.sum() > last.sum()
    other = pictures[Draw(1, 0, (64, 64))]["mask"]  # no mask: all of it counts
    assert torch.equal(other, torch.ones(1, 8, 8))


def test_masks_are_cached_beside_the_latents(masked: Captioned, tmp_path: Path) -> None:
    pictures, plan = pictures_of(masked, random_flip=True, crop_variants=3)
    latents = filled(pictures, plan, tmp_path)
    for batch in some_batches(plan, 24):
        cached, fresh = (collate([data[draw] for draw in batch]) for data in (latents, pictures))
        assert_same_rows(cached, fresh)
        height, width = batch[0].size
        assert cached["mask"].shape == (3, 1, height // 8, width // 8)


# Text


def counting(encoded: list[str]) -> Any:
    """An encoder that writes down what it was asked and answers with the caption's length."""

    def encode_text(captions: Sequence[str]) -> dict[str, Tensor]:
        encoded.extend(captions)
        return {"length": torch.tensor([float(len(caption)) for caption in captions])}

    return lambda: encode_text


def test_a_repeated_caption_is_encoded_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = ["cc", "a", "cc", "bbb", "a", "", "cc", "dddd", "eeeee", "ffffff"]
    encoded: list[str] = []
    text = cache_text([captions], counting(encoded), tmp_path, {})
    assert sorted(encoded) == sorted(set(captions))
    reads: list[int] = []
    read = Shards.read

    def counted(shards: Shards, index: int, *view: int) -> dict[str, Tensor]:
        reads.append(index)
        return read(shards, index, *view)

    monkeypatch.setattr(Shards, "read", counted)
    assert text(captions)["length"].tolist() == [len(caption) for caption in captions]
    assert len(reads) == len(set(captions))


def test_another_prompt_does_not_disturb_the_data_sets_captions(tmp_path: Path) -> None:
    captions = ["a", "bb", "ccc", "dddd", "eeeee"]
    cache_text([captions, ["x"]], counting([]), tmp_path, {})
    encoded: list[str] = []
    text = cache_text([captions, ["yyyyyyy"]], counting(encoded), tmp_path, {})
    assert encoded == ["yyyyyyy"]
    assert text(["bb", "yyyyyyy"])["length"].tolist() == [2, 7]


def test_a_new_caption_does_not_disturb_all_the_others(tmp_path: Path) -> None:
    captions = [f"caption number {i:04d}" for i in range(400)]
    cache_text([captions], counting([]), tmp_path, {})
    encoded: list[str] = []
    cache_text([[*captions, "", "caption number 0200 and a half"]], counting(encoded), tmp_path, {})
    assert 2 <= len(encoded) < 40


def test_a_full_cache_does_not_load_the_encoders(tmp_path: Path) -> None:
    cache_text([["a", "bb"], []], counting([]), tmp_path, {})
    assert cache_text([["bb", "a"], []], fail, tmp_path, {})(["bb"])["length"].tolist() == [2]


def test_the_encoders_are_loaded_once_for_all_groups(tmp_path: Path) -> None:
    loaded: list[int] = []

    def load() -> Any:
        loaded.append(1)
        return counting([])()

    cache_text([["a", "bb"], ["ccc"], ["a"]], load, tmp_path, {})
    assert loaded == [1]


def test_text_of_another_making_is_not_used(tmp_path: Path) -> None:
    settings = {"encoders": "v1", "max_sequence_length": 77}
    cache_text([["a"]], counting([]), tmp_path, settings)
    for changed in ({"encoders": "v2"}, {"max_sequence_length": 256}, {"dtype": "bf16"}):
        encoded: list[str] = []
        cache_text([["a"]], counting(encoded), tmp_path, {**settings, **changed})
        assert encoded == ["a"]


def test_two_processes_encode_disjoint_captions(tmp_path: Path) -> None:
    captions = [f"caption {i}" for i in range(10)]
    encoded: list[list[str]] = [[], []]
    texts = [
        cache_text([captions], counting(encoded[p]), tmp_path, {}, process=p, num_processes=2)
        for p in (1, 0)
    ]
    assert len(encoded[0]) + len(encoded[1]) == len(set(encoded[0] + encoded[1])) == 10
    assert all(text(captions)["length"].tolist() == [9.0] * 10 for text in texts)


def test_captions_with_line_breaks_cannot_run_into_each_other(tmp_path: Path) -> None:
    first = cache_text([["a\nbb", "c"]], counting([]), tmp_path, {})
    second = cache_text([["a", "bb\nc"]], counting([]), tmp_path, {})
    assert first(["c"])["length"].tolist() == [1]
    assert second(["bb\nc"])["length"].tolist() == [4]


def test_a_caption_that_is_not_cached_is_an_error(tmp_path: Path) -> None:
    text = cache_text([["a", "c"]], counting([]), tmp_path, {})
    for unknown in ("", "b", "d"):
        with pytest.raises(KeyError, match="does not hold"):
            text(["a", unknown])


def test_all_runs_share_the_shuffled_captions(tmp_path: Path) -> None:
    tags = CaptionArgs(shuffle_caption=True, caption_variants=2)
    pictures = [pictures_of(None, tags, seed=seed)[0] for seed in (0, 1)]
    cache_text([pictures[0].texts()], counting([]), tmp_path, {})
    text = cache_text([pictures[1].texts()], fail, tmp_path, {})
    for place in range(100):
        caption = pictures[1].row(Draw(place % 14, place, (64, 64)))["caption"]
        assert text([caption])["length"].tolist() == [len(caption)]


class Rows:
    """Looks captions up where a data loader's worker runs."""

    def __init__(self, text: CachedText, captions: list[str]) -> None:
        self.text = text
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[int, float]:
        length = self.text.row(self.captions[index])["length"].item()
        return os.getpid(), length


def test_workers_can_look_text_up(tmp_path: Path) -> None:
    captions = ["a", "bb", "ccc", "dddd"] * 2
    text = cache_text([captions], counting([]), tmp_path, {})
    copied = pickle.loads(pickle.dumps(text))
    rows: Any = Rows(copied, captions)
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    found = list(loader)
    assert [length for _, length in found] == [1, 2, 3, 4] * 2
    assert os.getpid() not in {process for process, _ in found}


def test_encoders_take_turns_and_each_is_let_go_before_the_next(tmp_path: Path) -> None:
    events: list[str] = []

    def load(name: str) -> Any:
        def loader() -> Any:
            events.append(f"{name} loaded")
            return lambda captions: {
                name: torch.tensor([[len(one), len(name)] for one in captions])
            }

        return loader

    turns = Turns(
        earlier=[("a title", load("a")), ("b title", load("bb"))],
        join=lambda said: {"all": torch.cat([said["a"], said["bb"], said["ccc"]], dim=1)},
        let_go=lambda: events.append("let go"),
    )
    words = [f"{number:03}" * (1 + number % 3) for number in range(100)]
    found = cache_text([words, words[:2], [""]], load("ccc"), tmp_path, {}, turns=turns)
    assert events == ["a loaded", "let go", "bb loaded", "let go", "ccc loaded"]
    for word in [*words, ""]:
        assert found([word])["all"].tolist() == [[len(word), 1, len(word), 2, len(word), 3]]
    events.clear()
    cache_text([words], load("ccc"), tmp_path, {}, turns=turns)
    assert events == []  # nothing is missing, nobody is asked


def test_an_earlier_encoder_without_numbers_is_told_before_the_next_is_loaded(
    tmp_path: Path,
) -> None:
    turns = Turns(earlier=[("first", lambda: lambda captions: {"a": torch.tensor([math.nan])})])
    with pytest.raises(UserError, match="embeddings of 'word' are not finite"):
        cache_text([["word"]], fail, tmp_path, {}, turns=turns)


def test_text_that_the_disk_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = types.SimpleNamespace(free=2 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"3 captions needs 3\.00 GiB"):
        cache_text([["a", "b", "a"], ["c"]], fail, tmp_path, {}, sample_bytes=2**30)
    cache_text([["a", "b", "a"], ["c"]], counting([]), tmp_path, {}, sample_bytes=2**29)
    assert "3 captions: 1.50 GiB" in capsys.readouterr().out


# Checking


def check(
    source: Captioned, root: Path, how: Literal["skip", "error"] = "skip"
) -> tuple[Captioned, list[str]]:
    good, bad = checked(source, root, on_bad_sample=how, num_threads=2, progress=False)
    return good, [row.name for row in bad]


@pytest.fixture
def copied(scene_data: Path, tmp_path: Path) -> Path:
    """A copy of the scenes that may be spoilt."""
    return Path(shutil.copytree(scene_data, tmp_path / "data"))


def source_of(folder: Path) -> Captioned:
    return open_source(str(folder), DataArgs(dataset_name=str(folder)))


def test_a_checked_data_set_is_not_decoded_again(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "03.png").write_bytes(b"no picture")
    Image.new("RGB", (30, 20)).save(copied / "04.png")
    source = source_of(copied)
    good, bad = check(source, tmp_path / "cache")
    ids = identified(source, None).ids
    assert good.ids == [*ids[:3], *ids[4:]]
    assert good.captions == [*source.captions[:3], *source.captions[4:]]
    assert good.sizes == [(64, 64)] * 3 + [(20, 30)] + [(64, 64)] * 5
    assert len(bad) == 1
    assert source.sizes == []

    looked: list[str] = []

    def counted(source: Captioned, **options: Any) -> list[Seen | str]:
        looked.extend(source.names)
        return look(source, **options)

    monkeypatch.setattr(cache, "look", counted)
    again, bad_again = check(source_of(copied), tmp_path / "cache")
    fields = [field.name for field in dataclasses.fields(Captioned)]
    assert all(getattr(again, name) == getattr(good, name) for name in fields)
    assert all(isinstance(size, tuple) for size in again.sizes)
    assert bad_again == bad
    assert looked == bad  # what could not be read may have been mended
    shutil.copytree(copied, tmp_path / "moved")
    _, told = check(source_of(tmp_path / "moved"), tmp_path / "cache")
    assert told == [str(tmp_path / "moved" / "03.png")]
    assert len(looked) == 2
    for record in (tmp_path / "cache").glob("*.json"):
        record.write_text("[")
    assert check(source_of(copied), tmp_path / "cache")[0].ids == good.ids
    assert len(looked) == 2 + len(source)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"good": [99], "bad": [], "sizes": [[1, 1]]}'])
def test_a_damaged_memory_of_the_check_is_made_again_and_said(
    copied: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = check(source_of(copied), tmp_path / "cache")
    (memory,) = (tmp_path / "cache").glob("checked-*.json")
    remembered = memory.read_text()
    memory.write_text(content)
    again, bad = check(source_of(copied), tmp_path / "cache")
    assert (again.ids, again.sizes, bad) == (whole.ids, whole.sizes, [])
    assert f"{memory} is damaged" in capsys.readouterr().out
    assert memory.read_text() == remembered


def test_files_and_captions_that_changed_since_are_noticed(copied: Path, tmp_path: Path) -> None:
    def bad() -> int:
        return len(check(source_of(copied), tmp_path / "cache")[1])

    assert bad() == 0
    (copied / "03.png").write_bytes(b"no picture")
    assert bad() == 1
    (copied / "04.png").unlink()
    assert bad() == 2
    metadata = copied / "metadata.jsonl"
    whole = metadata.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    rows[5]["text"] = ""
    metadata.write_text("\n".join(json.dumps(row) for row in rows))
    assert bad() == 3
    metadata.write_text(whole)
    assert bad() == 2


def test_a_picture_of_another_size_is_noticed(copied: Path, tmp_path: Path) -> None:
    assert check(source_of(copied), tmp_path / "cache")[0].sizes[2] == (64, 64)
    Image.new("RGB", (50, 40)).save(copied / "02.png")
    assert check(source_of(copied), tmp_path / "cache")[0].sizes[2] == (40, 50)


def test_a_bad_sample_stops_every_time(copied: Path, tmp_path: Path) -> None:
    (copied / "03.png").write_bytes(b"no picture")
    check(source_of(copied), tmp_path / "cache")  # remembered under skip
    for _ in range(2):
        with pytest.raises(UserError, match=r"03\.png"):
            check(source_of(copied), tmp_path / "cache", "error")
