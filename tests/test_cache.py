"""Claims about the caches: whole shards, equal bits, nothing mixed up, nothing stale."""

import itertools
import json
import os
import shutil
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from dojo import sd3
from dojo.cli import UserError
from dojo.data import (
    Batches,
    CacheArgs,
    Captioned,
    DataArgs,
    Draw,
    Latents,
    Pictures,
    cache,
    cache_latents,
    cache_text,
    checked,
    collate,
    open_source,
)

CPU = torch.device("cpu")
SETTINGS: dict[str, object] = {"vae": "v1", "dtype": "no"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten samples then make shards of 4, 4 and 2."""
    monkeypatch.setattr(cache, "SHARD_SIZE", 4)


@pytest.fixture(scope="module")
def model_args(tiny_sd3: Path) -> sd3.ModelArgs:
    """The tiny model with short texts."""
    return sd3.ModelArgs(pretrained_model_name_or_path=str(tiny_sd3), max_sequence_length=24)


@pytest.fixture(scope="module")
def vae(model_args: sd3.ModelArgs) -> AutoencoderKL:
    """The tiny autoencoder."""
    return sd3.load_vae(sd3.open_model(model_args), model_args, CPU)


@pytest.fixture(scope="module")
def encoders(model_args: sd3.ModelArgs) -> sd3.TextEncoders:
    """The tiny text encoders."""
    return sd3.TextEncoders(sd3.open_model(model_args), model_args, torch.float32, CPU)


def pictures_of(folder: Path, *, dropout: float = 0.0, seed: int = 0, **options: Any) -> Pictures:
    args = DataArgs(**{"dataset_name": str(folder), "resolution": 64, **options})
    return Pictures(open_source(str(folder), args), args, seed=seed, caption_dropout=dropout)


def filled(pictures: Pictures, vae: AutoencoderKL, root: Path, **options: Any) -> Latents:
    return cache_latents(
        pictures,
        lambda pixels: sd3.posterior(vae, pixels),
        root,
        SETTINGS,
        latent_shape=(16, pictures.height // 8, pictures.width // 8),
        **options,
    )


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("*/*.safetensors"))}


def touched(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.glob("*/*.safetensors")}


# Shards


def numbered(ids: Sequence[str], root: Path) -> cache.Shards:
    return cache.Shards(root, ids)


def make(indices: Sequence[int]) -> dict[str, Tensor]:
    return {"value": torch.tensor([[float(i)] for i in indices])}


IDS = [f"{i}.png|v1" for i in range(10)]


def test_every_sample_is_read_back_from_its_place(tmp_path: Path) -> None:
    shards = numbered(IDS, tmp_path)
    assert [list(members) for members in shards.members] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shards.fill(make, title="test")
    assert [shards.read(i)["value"].item() for i in range(10)] == list(range(10))
    assert shards.missing() == []


def test_a_shard_is_whole_or_absent(tmp_path: Path) -> None:
    def stop(indices: Sequence[int]) -> dict[str, Tensor]:
        if 8 in indices:
            raise KeyboardInterrupt
        return make(indices)

    shards = numbered(IDS, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        shards.fill(stop, title="test")
    assert shards.missing() == [2]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_half_written_file_is_not_taken_for_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    shards = numbered(IDS, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", write_half)
        with pytest.raises(OSError, match="disk full"):
            shards.fill(make, title="test")
    assert shards.missing() == [0, 1, 2]
    shards.fill(make, title="test")
    assert [shards.read(i)["value"].item() for i in range(10)] == list(range(10))


def test_two_processes_fill_disjoint_shards(tmp_path: Path) -> None:
    done: list[list[int]] = [[], []]

    def remember(process: int) -> None:
        def make_and_tell(indices: Sequence[int]) -> dict[str, Tensor]:
            done[process] += indices
            return make(indices)

        numbered(IDS, tmp_path).fill(make_and_tell, title="test", process=process, num_processes=2)

    remember(1)
    assert numbered(IDS, tmp_path).missing() == [0, 2]
    remember(0)
    assert done == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]
    assert numbered(IDS, tmp_path).missing() == []


def test_another_id_remakes_its_shard_only(tmp_path: Path) -> None:
    numbered(IDS, tmp_path).fill(make, title="test")
    changed = [*IDS[:5], "5.png|v2", *IDS[6:]]
    assert numbered(changed, tmp_path).missing() == [1]


def test_ids_cannot_run_into_each_other(tmp_path: Path) -> None:
    names = {path for ids in (["ab", "c"], ["a", "bc"]) for path in numbered(ids, tmp_path).paths}
    assert len(names) == 2


def test_other_settings_lie_in_another_folder(tmp_path: Path) -> None:
    settings = [SETTINGS, {**SETTINGS, "vae": "v2"}, {**SETTINGS, "dtype": "bf16"}, {}]
    assert len({cache.cache_folder(tmp_path, "latents", each) for each in settings}) == 4
    turned = dict(reversed(SETTINGS.items()))
    assert cache.cache_folder(tmp_path, "latents", turned) == cache.cache_folder(
        tmp_path, "latents", SETTINGS
    )
    assert cache.cache_folder(tmp_path, "text", {}) != cache.cache_folder(tmp_path, "latents", {})


# Latents


def test_cached_latents_are_those_made_on_the_fly(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    pictures = pictures_of(scene_data)
    latents = filled(pictures, vae, tmp_path)
    for batch in itertools.islice(Batches(10, 3, seed=0), 7):  # crosses epochs and shards
        cached, fresh = (collate([data[draw] for draw in batch]) for data in (latents, pictures))
        mean, std = sd3.posterior(vae, fresh["pixels"])
        torch.testing.assert_close(cached["mean"], mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(cached["std"], std, rtol=0, atol=1e-5)
        assert cached["caption"] == fresh["caption"]
        assert cached["place"] == fresh["place"] == [draw.place for draw in batch]


def test_a_cached_flip_is_the_encoded_mirror_image(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    pictures = pictures_of(scene_data, random_flip=True)
    latents = filled(pictures, vae, tmp_path)
    plain = pictures.pixels(6, flip=False)
    mean, _ = sd3.posterior(vae, plain.flip(-1)[None])
    torch.testing.assert_close(latents.posterior(6, flip=True)[0], mean[0], rtol=0, atol=1e-5)
    # Encoding does not commute with mirroring: flipping the latents would be something else.
    assert not torch.allclose(latents.posterior(6)[0].flip(-1), mean[0], atol=1e-3)


def test_flips_are_drawn_by_place_with_and_without_a_cache(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    pictures = pictures_of(scene_data, random_flip=True)
    latents = filled(pictures, vae, tmp_path)
    turned = [pictures.mirrored(Draw(0, place)) for place in range(400)]
    assert 150 < sum(turned) < 250
    for place in range(6):
        fresh = sd3.posterior(vae, pictures[Draw(2, place)]["pixels"][None])[0][0]
        torch.testing.assert_close(latents[Draw(2, place)]["mean"], fresh, rtol=0, atol=1e-5)
    assert not any(pictures_of(scene_data).mirrored(Draw(0, place)) for place in range(50))


def test_a_half_filled_cache_is_completed_with_the_same_bits(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    pictures = pictures_of(scene_data, random_flip=True)
    filled(pictures, vae, tmp_path)
    before, times = contents(tmp_path), touched(tmp_path)
    assert len(before) == 3
    lost = next(tmp_path.glob(f"*/{list(before)[1]}"))
    lost.unlink()
    filled(pictures, vae, tmp_path)
    assert contents(tmp_path) == before
    kept = {name for name, time in touched(tmp_path).items() if time == times[name]}
    assert kept == set(before) - {lost.name}


def test_a_full_cache_encodes_nothing(scene_data: Path, vae: AutoencoderKL, tmp_path: Path) -> None:
    pictures = pictures_of(scene_data)
    filled(pictures, vae, tmp_path)

    def fail(pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("encoded again")

    latents = cache_latents(pictures, fail, tmp_path, SETTINGS, latent_shape=(16, 8, 8))
    assert latents[Draw(9, 0)]["mean"].shape == (16, 8, 8)


def test_two_processes_make_together_what_one_makes(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    pictures = pictures_of(scene_data)
    filled(pictures, vae, tmp_path / "one")
    for process in (1, 0):
        filled(pictures, vae, tmp_path / "two", process=process, num_processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_changed_picture_is_encoded_again(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(scene_data, data)
    before = filled(pictures_of(data), vae, tmp_path / "cache")
    shutil.copyfile(data / "00.png", data / "05.png")
    after = filled(pictures_of(data), vae, tmp_path / "cache")
    assert len(contents(tmp_path / "cache")) == 4  # one shard was made anew, the old one stays
    torch.testing.assert_close(after[Draw(5, 0)]["mean"], before[Draw(0, 0)]["mean"])
    assert torch.equal(after[Draw(4, 0)]["mean"], before[Draw(4, 0)]["mean"])


def test_other_sizes_and_flips_do_not_share_a_folder(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    for options in ({}, {"random_flip": True}, {"height": 32}, {"width": 32}):
        filled(pictures_of(scene_data, **options), vae, tmp_path)
    assert len(list(tmp_path.glob("latents-*"))) == 4


def test_the_cache_says_what_it_was_made_with(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path
) -> None:
    filled(pictures_of(scene_data), vae, tmp_path)
    settings = json.loads(next(tmp_path.glob("latents-*/settings.json")).read_text())
    assert settings["vae"] == "v1"
    assert settings["size"] == [64, 64]


def test_latents_are_float32_whatever_the_autoencoder_gives(
    scene_data: Path, tmp_path: Path
) -> None:
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        small = torch.nn.functional.avg_pool2d(pixels, 8).bfloat16()
        return small, small.abs()

    cache_latents(pictures_of(scene_data), encode, tmp_path, SETTINGS, latent_shape=(3, 8, 8))
    shard = load_file(next(tmp_path.glob("latents-*/*.safetensors")))
    assert {tensor.dtype for tensor in shard.values()} == {torch.float32}
    assert shard["mean"].shape[1:] == (1, 3, 8, 8)  # [sample, flip, C, h, w]


def test_random_crops_are_not_frozen_in_a_cache() -> None:
    data = DataArgs(dataset_name="x", random_crop=True)
    with pytest.raises(UserError, match="--no_cache_latents"):
        CacheArgs().check(data)
    CacheArgs(no_cache_latents=True).check(data)
    CacheArgs().check(DataArgs(dataset_name="x", random_flip=True))


def test_random_crops_differ_from_use_to_use(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a strip")
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).resize((256, 64))
    ramp.convert("RGB").save(tmp_path / "data" / "a.png")
    pictures = pictures_of(tmp_path / "data", random_crop=True)
    first, second = (pictures[Draw(0, place)]["pixels"] for place in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(pictures[Draw(0, 0)]["pixels"], first)


def test_a_cache_that_the_disk_cannot_hold_is_refused(
    scene_data: Path, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 10 * 2 * 16 * 8 * 8 * 4  # ten pictures, mean and std, float32

    def leave(free: int) -> None:
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    leave(needed)  # no margin
    with pytest.raises(UserError, match="--latent_cache_dir"):
        filled(pictures_of(scene_data), vae, tmp_path)
    assert contents(tmp_path) == {}
    leave(int(needed * 1.06))
    filled(pictures_of(scene_data), vae, tmp_path)
    leave(0)
    filled(pictures_of(scene_data), vae, tmp_path)  # nothing is missing, nothing is needed


# Text


def test_cached_text_is_that_of_its_own_caption_in_shuffled_order(
    scene_data: Path, vae: AutoencoderKL, encoders: sd3.TextEncoders, tmp_path: Path
) -> None:
    # diffusers #14430: a cache in the order of the files, read in that of a shuffling loader.
    pictures = pictures_of(scene_data)
    text = cache_text([pictures.source.captions], lambda: encoders, tmp_path, {})
    latents = filled(pictures, vae, tmp_path)
    for batch in itertools.islice(Batches(10, 4, seed=5), 5):
        rows = collate([latents[draw] for draw in batch])
        found = text(rows["caption"])
        for i, draw in enumerate(batch):
            fresh = encoders([pictures.source.captions[draw.index]])
            for name, value in fresh.items():
                torch.testing.assert_close(found[name][i], value[0], rtol=0, atol=1e-5)
            mean, _ = sd3.posterior(vae, pictures.pixels(draw.index, flip=False)[None])
            torch.testing.assert_close(rows["mean"][i], mean[0], rtol=0, atol=1e-5)


def counting(encoded: list[str]) -> Any:
    """An encoder that writes down what it was asked and answers with the caption's length."""

    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        encoded.extend(captions)
        return {"length": torch.tensor([float(len(caption)) for caption in captions])}

    return lambda: encode


def test_a_repeated_caption_is_encoded_once(tmp_path: Path) -> None:
    captions = ["cc", "a", "cc", "bbb", "a", "", "cc", "dddd", "eeeee", "ffffff"]
    encoded: list[str] = []
    text = cache_text([captions], counting(encoded), tmp_path, {})
    assert sorted(encoded) == sorted(set(captions))
    assert text(captions)["length"].tolist() == [len(caption) for caption in captions]


def test_another_prompt_does_not_disturb_the_data_sets_captions(tmp_path: Path) -> None:
    captions = ["a", "bb", "ccc", "dddd", "eeeee"]
    cache_text([captions, ["x"]], counting([]), tmp_path, {})
    encoded: list[str] = []
    text = cache_text([captions, ["yyyyyyy"]], counting(encoded), tmp_path, {})
    assert encoded == ["yyyyyyy"]
    assert text(["bb", "yyyyyyy"])["length"].tolist() == [2, 7]


def test_a_full_cache_does_not_load_the_encoders(tmp_path: Path) -> None:
    cache_text([["a", "bb"], []], counting([]), tmp_path, {})

    def fail() -> Any:
        raise AssertionError("loaded")

    assert cache_text([["bb", "a"], []], fail, tmp_path, {})(["bb"])["length"].tolist() == [2]


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


# Captions


def test_captions_are_dropped_at_the_asked_rate(scene_data: Path) -> None:
    def dropped(rate: float) -> list[bool]:
        pictures = pictures_of(scene_data, dropout=rate)
        return [pictures.caption(Draw(place % 10, place)) == "" for place in range(2000)]

    assert sum(dropped(0.0)) == 0
    assert sum(dropped(1.0)) == 2000
    assert 0.07 < sum(dropped(0.1)) / 2000 < 0.13
    assert dropped(0.1) == dropped(0.1)


def test_dropout_leaves_flips_and_order_alone(scene_data: Path) -> None:
    plain = pictures_of(scene_data, random_flip=True)
    dropping = pictures_of(scene_data, random_flip=True, dropout=0.5)
    draws = [Draw(place % 10, place) for place in range(100)]
    assert [plain.mirrored(d) for d in draws] == [dropping.mirrored(d) for d in draws]
    kept = [d for d in draws if dropping.caption(d)]
    assert all(dropping.caption(d) == plain.caption(d) for d in kept)


def test_other_seeds_drop_other_captions(scene_data: Path) -> None:
    draws = [Draw(0, place) for place in range(100)]
    first, second = (pictures_of(scene_data, dropout=0.5, seed=seed) for seed in (0, 1))
    assert [first.caption(d) for d in draws] != [second.caption(d) for d in draws]


# Checking


def check(
    source: Captioned, root: Path, how: Literal["skip", "error"] = "skip"
) -> tuple[list[int], int]:
    good, bad = checked(source, root, on_bad_sample=how, num_threads=2, progress=False)
    return good, len(bad)


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
    first = check(source_of(copied), tmp_path / "cache")
    assert first == ([0, 1, 2, 4, 5, 6, 7, 8, 9], 1)

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "verify", fail)
    assert check(source_of(copied), tmp_path / "cache") == first


def test_a_file_that_changed_since_is_noticed(copied: Path, tmp_path: Path) -> None:
    assert check(source_of(copied), tmp_path / "cache") == (list(range(10)), 0)
    (copied / "03.png").write_bytes(b"no picture")
    assert check(source_of(copied), tmp_path / "cache")[1] == 1
    (copied / "04.png").unlink()
    assert check(source_of(copied), tmp_path / "cache")[1] == 2


def test_a_caption_that_was_lost_since_is_noticed(copied: Path, tmp_path: Path) -> None:
    assert check(source_of(copied), tmp_path / "cache") == (list(range(10)), 0)
    metadata = copied / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[3]["text"] = ""
    metadata.write_text("\n".join(json.dumps(row) for row in rows))
    assert check(source_of(copied), tmp_path / "cache") == ([0, 1, 2, 4, 5, 6, 7, 8, 9], 1)


def test_a_caption_that_was_mended_since_is_noticed(copied: Path, tmp_path: Path) -> None:
    metadata = copied / "metadata.jsonl"
    whole = metadata.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    rows[3]["text"] = ""
    metadata.write_text("\n".join(json.dumps(row) for row in rows))
    assert check(source_of(copied), tmp_path / "cache")[1] == 1
    metadata.write_text(whole)
    assert check(source_of(copied), tmp_path / "cache") == (list(range(10)), 0)


def test_a_bad_sample_stops_every_time(copied: Path, tmp_path: Path) -> None:
    (copied / "03.png").write_bytes(b"no picture")
    check(source_of(copied), tmp_path / "cache")  # remembered under skip
    for _ in range(2):
        with pytest.raises(UserError, match=r"03\.png"):
            check(source_of(copied), tmp_path / "cache", "error")


def test_a_selection_keeps_ids_and_captions_together(copied: Path) -> None:
    source = source_of(copied)
    chosen = source.select([7, 2])
    assert chosen.ids == [source.ids[7], source.ids[2]]
    assert chosen.captions == [source.captions[7], source.captions[2]]
    assert chosen.read(0).tobytes() == source.read(7).tobytes()


def test_leftovers_of_a_killed_process_are_harmless(tmp_path: Path) -> None:
    shards = numbered(IDS, tmp_path)
    tmp_path.mkdir(exist_ok=True)
    for path in shards.paths:
        path.with_name(f".{path.name}.{os.getpid()}").write_bytes(b"half")
    assert shards.missing() == [0, 1, 2]
    shards.fill(make, title="test")
    assert shards.read(9)["value"].item() == 9


def test_pictures_and_captions_are_drawn_from_the_arguments(scene_data: Path) -> None:
    args = DataArgs(dataset_name=str(scene_data), resolution=32)
    source = open_source(str(scene_data), args)
    wide = Pictures(source, replace(args, width=48), seed=0, caption_dropout=0.0)
    row = wide[Draw(4, 17)]
    assert row["pixels"].shape == (3, 32, 48)
    assert row["caption"] == source.captions[4]
    assert row["place"] == 17
