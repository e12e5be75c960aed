"""Claims about what rows say of size and crop: it is what was cut, with and without a cache."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dojo.data import (
    Batches,
    CacheArgs,
    CaptionArgs,
    Captioned,
    DataArgs,
    Draw,
    Geometry,
    Latents,
    PairArgs,
    PairSet,
    Pictures,
    Plan,
    Posterior,
    Size,
    assign,
    cache_latents,
    check_pairs,
    checked,
    collate,
    fit,
    open_pairs,
    open_source,
    prepare_pairs,
    read_image,
)
from dojo.data.geometry import framed

SIZES: list[Size] = [(64, 64), (100, 120), (120, 50), (48, 120), (90, 91)]
"""Of the pictures: (height, width)."""


def ramp(size: Size) -> Image.Image:
    """A picture that tells every place: red is 2 x, green is 2 y."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return Image.fromarray(torch.stack([2 * x, 2 * y, 0 * x], -1).byte().numpy())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The pictures, and captions."""
    root = tmp_path / "set"
    root.mkdir()
    for number, size in enumerate(SIZES):
        ramp(size).save(root / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": f"{number}"} for number in range(len(SIZES))]
    (root / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def opened(folder: Path, **options: Any) -> tuple[Pictures, Plan]:
    """The pictures as a run has them, at 64 pixels in steps of 8."""
    args = DataArgs(**{"dataset_name": str(folder), "resolution": (64,), **options})
    source, _ = checked(
        *(open_source(str(folder), args), folder.parent / "cache"),
        on_bad_sample="error",
        num_threads=1,
        progress=False,
    )
    return Pictures(source, args, CaptionArgs(), seed=3), assign(source, args, 8)


def geometry(rows: Pictures | Latents | PairSet, draws: list[Draw]) -> Geometry:
    """That of one batch."""
    return Geometry.of(collate([rows[draw] for draw in draws]))


def encode(pixels: Tensor) -> Posterior:
    """Stands in for an autoencoder: the mean of every 8 x 8 pixels."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return mean, mean.abs() + 0.1


def assert_tells_the_crop(pixels: Tensor, row: dict[str, Any], flip: bool) -> None:
    """Every pixel of a ramp's crop [3, H, W] comes from where the row says."""
    (top, left), (high, wide) = row["crop"].tolist(), row["original"].tolist()
    height, width = pixels.shape[1:]
    scale = max(height / high, width / wide)  # of the whole picture, to cover the result
    x = (left + torch.arange(width) + 0.5) / scale - 0.5  # centres, in the file's pixels
    y = (top + torch.arange(height) + 0.5) / scale - 0.5
    red, green = ((pixels[:2] + 1) * 127.5).double()
    x = wide - 1 - x if flip else x
    inner = slice(6, -6)  # at the very edge resampling has pixels on one side alone
    # Levels are rounded to whole ones, of which one is half a pixel: all alike where scale is 1.
    for found, place in ((red.mean(0), x), (green.mean(1), y)):
        far = (found / 2 - place)[inner]
        assert far.abs().max() < 0.5
        assert far.mean().abs() < 0.26


CASES: dict[str, dict[str, Any]] = {
    "centre": {},
    "variants": {"crop_variants": 4},
    "mirrored variants": {"crop_variants": 4, "random_flip": True},
    "random": {"random_crop": True, "random_flip": True},
    "buckets": {"aspect_buckets": True, "random_flip": True, "crop_variants": 2},
    "oblong": {"height": 48, "width": 80, "crop_variants": 3, "random_flip": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_row_says_what_was_cut(folder: Path, options: dict[str, Any]) -> None:
    pictures, plan = opened(folder, **options)
    seen: set[tuple[float, ...]] = set()
    for draw in itertools.chain(*itertools.islice(Batches(plan, 1, seed=0), 60)):
        row = pictures[draw]
        assert tuple(row["original"].tolist()) == SIZES[draw.index]
        assert_tells_the_crop(row["pixels"], row, pictures.view(draw)[1])
        seen.add((draw.index, *row["crop"].tolist()))
    assert len(seen) >= (40 if "random_crop" in options else len(SIZES))


def test_the_numbers_by_hand() -> None:
    # 100 x 200 (h, w) to 50 x 50 is resized to 50 x 100: 50 columns go.
    for anchor, flip, left in (
        ((0.5, 0.5), False, 25.0),
        ((0.5, 0.5), True, 25.0),
        ((0.5, 0.2), False, 10.0),
        ((0.5, 0.2), True, 40.0),
        ((0.0, 0.0), True, 50.0),
    ):
        row = framed((100, 200), (50, 50), anchor, flip)
        assert row["original"].tolist() == [100, 200]
        assert row["crop"].tolist() == pytest.approx([0, left])
        assert row["original"].dtype == row["crop"].dtype == torch.float32
    # 30 x 10 to 20 x 20 is enlarged to 60 x 20: 40 rows go.
    assert framed((30, 10), (20, 20), (0.25, 1.0), True)["crop"].tolist() == pytest.approx([10, 0])


def test_the_first_pixel_of_an_unscaled_crop_is_that_of_the_picture() -> None:
    picture = ramp((64, 120))
    for anchor, flip in itertools.product([(0.5, 0.0), (0.5, 0.25), (0.5, 1.0)], [False, True]):
        pixels = fit(picture, 64, 64, anchor=anchor, flip=flip)
        top, left = framed((64, 120), (64, 64), anchor, flip)["crop"].int().tolist()
        whole = fit(picture, 64, 120, flip=flip)
        assert torch.equal(pixels, whole[:, top : top + 64, left : left + 64])


def test_still_rows_say_the_centre(folder: Path) -> None:
    pictures, _ = opened(folder, random_crop=True, random_flip=True)
    row = pictures.still()[Draw(1, 9, (64, 64))]
    # 100 x 120 to 64 x 64: resized to 64 x 76.8, of which 12.8 columns go.
    assert row["crop"].tolist() == pytest.approx([0, 6.4])


@pytest.mark.parametrize("name", [name for name in CASES if name != "random"])
def test_cached_rows_say_the_same(folder: Path, tmp_path: Path, name: str) -> None:
    pictures, plan = opened(folder, **CASES[name])
    latents = cache_latents(pictures, plan.needed(), encode, tmp_path / "c", {}, latent_channels=3)
    for draws in itertools.islice(Batches(plan, 2, seed=0), 20):
        for fresh, cached in ((pictures, latents), (pictures.still(), latents.still())):
            one, other = (
                Geometry.of(collate([rows[d] for d in draws])) for rows in (fresh, cached)
            )
            assert torch.equal(one.original, other.original)
            assert torch.equal(one.crop, other.crop)
            assert torch.equal(one.target, torch.tensor([d.size for d in draws]).float())


def test_a_cache_does_not_know_that_sizes_are_told(folder: Path, tmp_path: Path) -> None:
    pictures, plan = opened(folder)
    without = Pictures(
        unverified(pictures.source), DataArgs(dataset_name="x"), CaptionArgs(), seed=3
    )
    for number, rows in enumerate((without, pictures)):
        latents = cache_latents(
            *(rows, plan.needed(), encode if number == 0 else refuse, tmp_path / "c", {}),
            latent_channels=3,
        )
        assert isinstance(latents, Latents)
        assert ("crop" in latents[Draw(0, 0, (64, 64))]) == (number == 1)


def unverified(source: Captioned) -> Captioned:
    """The same samples, their sizes not known."""
    return Captioned(**{**vars(source), "sizes": []})


def refuse(*args: object) -> Any:
    raise AssertionError("encoded again")


def test_rows_of_an_unverified_source_say_nothing_and_asking_is_refused(folder: Path) -> None:
    pictures, _ = opened(folder)
    pictures.source = unverified(pictures.source)
    batch = collate([pictures[Draw(0, 0, (64, 64))]])
    assert not {"original", "crop"} & batch.keys()
    with pytest.raises(ValueError, match="verified"):
        Geometry.of(batch)


def test_the_original_is_upright(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    ramp((100, 120)).save(folder / "0.png", exif=exif)
    assert read_image(folder / "0.png", "").size == (100, 120)
    row = opened(folder)[0][Draw(0, 0, (64, 64))]
    assert row["original"].tolist() == [120, 100]
    assert row["crop"].tolist() == pytest.approx([6.4, 0])


def test_what_is_drawn_is_whole() -> None:
    geometry = Geometry.whole((48, 80), 3)
    assert geometry.original.tolist() == geometry.target.tolist() == [[48, 80]] * 3
    assert geometry.crop.tolist() == [[0, 0]] * 3


# -- pairs


def pairs_of(folder: Path, *, no_cache: bool, **options: Any) -> PairSet:
    """Pictures 1 (preferred) and 2, and 3 (preferred) and 4."""
    rows = [
        {"image_0": f"{a}.png", "image_1": f"{b}.png", "label_0": 1, "caption": f"{a}"}
        for a, b in ((1, 2), (3, 4))
    ]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    args = PairArgs(**{"dataset_name": str(folder), "resolution": 64, **options})
    root = folder.parent / "cache"
    pairs, _ = check_pairs(
        open_pairs(args, progress=False), root, on_bad_sample="error", num_threads=1, progress=False
    )
    return prepare_pairs(
        *(pairs, args, CacheArgs(latent_cache_dir=root, no_cache_latents=no_cache), encode, {}),
        seed=3,
        latent_channels=3,
        pixel_step=8,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"no_hflip": True},
        {"independent_flip": True},
        {"independent_flip": True, "random_crop": True},
    ],
)
def test_a_pair_says_what_was_cut_of_each_picture(folder: Path, options: dict[str, Any]) -> None:
    pairs = pairs_of(folder, no_cache=True, **options)
    for place in range(30):
        row = pairs[Draw(place % 2, place, (64, 64))]
        for side in (0, 1):
            own = {name: row[name][side] for name in ("original", "crop")}
            pixels = row["pixels"][side]
            assert tuple(own["original"].tolist()) == SIZES[1 + 2 * (place % 2) + side]
            flip = bool(pixels[0, 32, 0] > pixels[0, 32, -1])  # red rises to the right
            assert_tells_the_crop(pixels, own, flip)


def test_the_geometry_of_pairs_has_the_winners_first(folder: Path) -> None:
    fresh, cached = (pairs_of(folder, no_cache=no_cache) for no_cache in (True, False))
    draws = [Draw(0, 5, (64, 64)), Draw(1, 6, (64, 64))]
    one, other = (geometry(rows, draws) for rows in (fresh, cached))
    sizes = [list(map(float, SIZES[number])) for number in (1, 3, 2, 4)]
    assert one.original.tolist() == other.original.tolist() == sizes
    assert torch.equal(one.crop, other.crop)
    assert one.crop.shape == (4, 2)
    assert one.target.tolist() == other.target.tolist() == [[64, 64]] * 4
