"""Claims about samples' ids: content and name decide, times and places do not, nothing is stale."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dojo.data import (
    CaptionArgs,
    Captioned,
    DataArgs,
    PairArgs,
    Pictures,
    assign,
    cache_latents,
    checked,
    contents,
    identified,
    open_pairs,
    open_source,
)


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written a moment ago are trusted like old ones."""
    monkeypatch.setattr(contents, "_TICK", 0.0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been read to be hashed."""
    seen: list[str] = []
    plain = contents._hashed

    def counted(content: contents.Content) -> tuple[str, float]:
        seen.append(content.origin.key if content.origin else "")
        return plain(content)

    monkeypatch.setattr(contents, "_hashed", counted)
    return seen


def write_pictures(folder: Path, colours: Sequence[str] = ("red", "lime", "blue")) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for number, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.bmp")
        rows.append(json.dumps({"file_name": f"{number}.bmp", "text": f"caption {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def opened(folder: Path) -> Captioned:
    return open_source(str(folder), DataArgs(dataset_name=str(folder)))


def ids(folder: Path, root: Path | None) -> list[str]:
    return identified(opened(folder), root).ids


def test_a_copied_folder_is_the_same_data_and_finds_its_latents(tmp_path: Path) -> None:
    encoded: list[int] = []

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        encoded.append(len(pixels))
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, mean.abs() + 0.1

    def cached(folder: Path) -> Captioned:
        args = DataArgs(dataset_name=str(folder), resolution=(16,), crop_variants=2)
        source, _ = checked(
            *(open_source(str(folder), args), tmp_path / "cache"),
            on_bad_sample="error",
            num_threads=1,
            progress=False,
        )
        needed = assign(source, args, 8).needed()
        pictures = Pictures(source, args, CaptionArgs(), seed=0)
        cache_latents(pictures, needed, encode, tmp_path / "cache", {"vae": 1}, latent_channels=3)
        return source

    first = cached(write_pictures(tmp_path / "here"))
    assert sum(encoded) == 6
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    assert cached(tmp_path / "there").ids == first.ids
    assert sum(encoded) == 6


def test_two_equal_pictures_are_two_samples(tmp_path: Path) -> None:
    assert len(set(ids(write_pictures(tmp_path / "set", ["red", "red"]), None))) == 2


def test_what_did_not_change_is_not_read_again(tmp_path: Path, read: list[str]) -> None:
    folder, root = write_pictures(tmp_path / "set"), tmp_path / "cache"
    first = ids(folder, root)
    assert sorted(read) == ["0.bmp", "1.bmp", "2.bmp"]
    assert ids(folder, root) == first
    assert identified(opened(folder).select([2]), root).ids == first[2:]
    assert len(read) == 3
    os.utime(folder / "1.bmp", (1, 1))
    assert ids(folder, root) == first
    assert read[3:] == ["1.bmp"]


def test_a_file_that_changed_and_kept_size_and_time_is_read_again(tmp_path: Path) -> None:
    folder, root = write_pictures(tmp_path / "set"), tmp_path / "cache"
    first = ids(folder, root)
    before = os.stat(folder / "1.bmp")
    Image.new("RGB", (16, 16), "white").save(folder / "1.bmp")
    os.utime(folder / "1.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(folder / "1.bmp")
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    changed = ids(folder, root)
    assert [one == other for one, other in zip(first, changed, strict=True)] == [True, False, True]
    assert changed == ids(folder, None)


def test_a_file_of_this_moment_is_not_trusted(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_TICK", 1e6)  # seconds
    folder, root = write_pictures(tmp_path / "set"), tmp_path / "cache"
    assert ids(folder, root) == ids(folder, root)
    assert len(read) == 6


@pytest.mark.parametrize("damage", ["[", "[]", '{"0.bmp": 1}', ""])
def test_a_damaged_record_costs_time_alone(tmp_path: Path, read: list[str], damage: str) -> None:
    folder, root = write_pictures(tmp_path / "set"), tmp_path / "cache"
    first = ids(folder, root)
    (record,) = root.glob("contents-*.json")
    record.write_text(damage)
    assert ids(folder, root) == first
    assert len(read) == 6


def test_rows_of_tables_are_known_by_what_they_hold(tmp_path: Path, read: list[str]) -> None:
    import datasets

    pictures = write_pictures(tmp_path / "pictures")
    cells = [(pictures / f"{number}.bmp").read_bytes() for number in range(3)]
    table = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b", "c"]})
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "x.parquet")
    os.utime(tmp_path / "there" / "x.parquet", (1, 1))
    table.save_to_disk(tmp_path / "saved")

    def known(name: str) -> list[str]:
        args = DataArgs(dataset_name=str(tmp_path / name), cache_dir=str(tmp_path / "downloads"))
        source = open_source(args.location, args)
        return identified(source, tmp_path / "cache").ids

    first = known("here")
    assert len(set(first)) == len(read) == 3
    assert known("here") == first
    assert len(read) == 3
    assert known("there") == known("saved") == first


def test_pictures_of_pairs_in_a_table_are_told_apart_once(tmp_path: Path, read: list[str]) -> None:
    import datasets

    pictures = write_pictures(tmp_path / "pictures")
    cells = [(pictures / f"{number}.bmp").read_bytes() for number in range(3)]
    table = {"jpg_0": cells[:2], "jpg_1": cells[1:], "label_0": [1, 0], "caption": ["a", "b"]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "set")
    args = PairArgs(dataset_name=str(tmp_path / "set"), resolution=16)
    first = open_pairs(args, tmp_path / "cache", progress=False)
    again = open_pairs(args, tmp_path / "cache", progress=False)
    assert len(first.pictures) == 3
    assert (len(read), again.fingerprint) == (4, first.fingerprint)
