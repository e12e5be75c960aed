"""python -m dojo.look: what is found of training pictures, and the page that shows them."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from dojo import data
from dojo.cli import UserError
from dojo.cli.words import first_word_as
from dojo.data.images import fit, read_image
from dojo.look import page, prints, survey
from dojo.look.__main__ import Args, LookArgs, main
from dojo.models.truncation import Reader

PHOTOS = Path(__file__).resolve().parents[2] / "datas" / "photos"
EVIL = "a <script>alert('x')</script> \"><img src=x onerror=alert(1)>"


class Words:
    """A tokenizer of one token a word, and two marks."""

    def __call__(self, texts: Sequence[str], *, verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0, *(1 for _ in text.split()), 2] for text in texts]}


READERS = [Reader("CLIP", Words(), 77)]


def photographs(count: int) -> list[Image.Image]:
    paths = sorted(PHOTOS.glob("*.jpg"))
    return [Image.open(path).convert("RGB") for path in paths[:: len(paths) // count][:count]]


def print_of(picture: Image.Image) -> prints.Print:
    return prints.print_of(b"", picture)


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def thinner(picture: Image.Image, share: float) -> Image.Image:
    """Without this share at each side."""
    x, y = int(picture.width * share), int(picture.height * share)
    return picture.crop((x, y, picture.width - x, picture.height - y))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "compressed": lambda one: jpeg(one, 30),
    "a third as large": lambda one: one.resize((one.width // 3, one.height // 3)),
    "brighter": lambda one: ImageEnhance.Brightness(one).enhance(1.15),
    "flatter": lambda one: ImageEnhance.Contrast(one).enhance(0.8),
    "grey": lambda one: one.convert("L").convert("RGB"),
    "cut by one percent at each side": lambda one: thinner(one, 0.01),
}


@pytest.mark.parametrize("change", COPIES)
def test_a_changed_copy_of_a_photograph_is_near_it(change: str) -> None:
    for picture in photographs(12):
        both = [print_of(picture), print_of(COPIES[change](picture))]
        assert prints.near(both, 48) == [[0, 1]]


def test_photographs_of_different_things_are_not_near() -> None:
    found = [print_of(picture) for picture in photographs(36)]
    assert len(found) == 36
    assert prints.near(found, 48) == []


def test_one_shape_in_two_colours_is_two_pictures() -> None:
    shape = np.zeros((64, 64), bool)
    shape[16:40, 20:50] = True
    red, blue = (
        Image.fromarray(np.where(shape[..., None], colour, 255).astype(np.uint8))
        for colour in ((255, 0, 0), (0, 0, 255))
    )
    assert prints.near([print_of(red), print_of(blue)], 48) == []
    assert prints.near([print_of(red), print_of(red.resize((40, 40)))], 48) == [[0, 1]]


def test_blocks_of_comparisons_find_what_one_block_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = photographs(6)
    found = [print_of(one) for one in [*some, *(jpeg(one, 50) for one in some[::2])]]
    whole = list(prints.pairs(found, 48))
    assert whole == [(0, 6), (2, 7), (4, 8)]
    monkeypatch.setattr(prints, "_AT_ONCE", 4)
    assert sorted(prints.pairs(found, 48)) == whole


def test_pixels_of_another_shape_are_another_picture() -> None:
    wide, tall = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert print_of(wide).pixels != print_of(tall).pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five photographs with captions; then a copy, the same pixels, a smaller copy, a broken file,
    one without a caption, and a caption that is too long."""
    root = tmp_path / "photos"
    root.mkdir()
    for i, picture in enumerate(photographs(5)):
        picture.save(root / f"{i}.jpg", quality=95)
        (root / f"{i}.txt").write_text(f"caption {i}")
    shutil.copy(root / "0.jpg", root / "copy.jpg")
    (root / "copy.txt").write_text(EVIL)
    Image.open(root / "1.jpg").save(root / "pixels.png")
    (root / "pixels.txt").write_text("word " * 90)
    small = Image.open(root / "2.jpg")
    small.resize((small.width // 4, small.height // 4)).save(root / "small.jpg")
    (root / "small.txt").write_text("small")
    (root / "broken.jpg").write_bytes((root / "3.jpg").read_bytes()[:2000])
    (root / "broken.txt").write_text("broken")
    (root / "4.txt").unlink()
    return root


def args_of(location: Path | str, **more: Any) -> data.DataArgs:
    return data.DataArgs(dataset_name=str(location), resolution=(128,), **more)


def looked(args: data.DataArgs) -> survey.Survey:
    samples = survey.open_samples(args)
    return survey.survey(samples, args, READERS, step=16, near=48)


def test_everything_that_is_wrong_is_named(folder: Path) -> None:
    found = looked(args_of(folder))
    names = {
        kind: [tuple(Path(name).name for name in one.names) for one in found.of(kind)]
        for kind in survey.TITLES
    }
    assert names == {
        "broken": [("broken.jpg",)],
        "caption": [("4.jpg",)],
        "long": [("pixels.png",)],
        "same": [("0.jpg", "copy.jpg"), ("1.jpg", "pixels.png")],
        "near": [("2.jpg", "small.jpg")],
        "small": [("small.jpg",)],
        "left out": [],
    }
    same = [one.words for one in found.of("same")]
    assert same == ["equal files", "equal pixels in other files"]
    assert "92 tokens, CLIP reads 77" in found.of("long")[0].words
    assert "blown up" in found.of("small")[0].words


def test_what_max_upscale_leaves_out_is_told(folder: Path) -> None:
    found = looked(args_of(folder, max_upscale=1.1))
    assert [Path(one.names[0]).name for one in found.of("left out")] == ["small.jpg"]
    assert found.of("small") == []


def test_crops_are_those_of_training(folder: Path) -> None:
    args = args_of(folder, aspect_buckets=True, random_flip=True, random_crop=True)
    found = looked(args)
    draws = page.Draws(found, args, data.CaptionArgs(), seed=3)
    assert found.samples.whole is not None
    pictures = data.Pictures(found.samples.whole, args, data.CaptionArgs(), seed=3)
    flips: set[bool] = set()
    for place, part, index in found.samples.at(sorted(found.targets)[:5]):
        size = found.targets[place]
        (anchor, flip) = pictures.framing(data.Draw(place, place, size))
        flips.add(flip)
        picture = read_image(part.store(part.rows[index]), "")
        wanted = (fit(picture, *size, anchor=anchor, flip=flip) + 1) / 2
        shown = draws.cut(part, index, place, max(size))
        got = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
        assert got.shape == wanted.shape
        assert (got - wanted).abs().mean() < 0.01
    assert flips == {False, True}


def test_the_page_is_one_file_and_escapes_captions(folder: Path, tmp_path: Path) -> None:
    found = looked(args_of(folder))
    draws = page.Draws(found, args_of(folder), data.CaptionArgs(), seed=0)
    lines = page.write(found, draws, tmp_path / "out", "photos", most=100, side=32)
    text = (tmp_path / "out" / "look.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert" in text
    assert set(re.findall(r'src="(.{10})', text)) == {"data:image"}
    assert "http" not in text.replace("http-equiv", "")
    sheet = text[text.index("As training cuts them") :]
    assert sheet.count("<figure>") == len(found.targets) == 8
    assert (tmp_path / "out" / "look.txt").read_text().splitlines() == lines
    rows = [json.loads(line) for line in (tmp_path / "out" / "look.jsonl").open()]
    assert len(rows) == len(found.findings)
    assert "Files that cannot be read: 1" in lines


def test_of_many_pictures_some_are_shown_from_all_over_the_set(
    folder: Path, tmp_path: Path
) -> None:
    found = looked(args_of(folder))
    draws = page.Draws(found, args_of(folder), data.CaptionArgs(), seed=0)
    page.write(found, draws, tmp_path, "photos", most=2, side=32)
    sheet = (tmp_path / "look.html").read_text().partition("As training cuts them")[2]
    assert "2 of 8" in sheet
    assert sheet.count("<figure>") == 2


def test_another_file_of_that_name_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "look.html").write_text("mine")
    found = looked(args_of(folder))
    draws = page.Draws(found, args_of(folder), data.CaptionArgs(), seed=0)
    with pytest.raises(UserError, match=r"look\.html is there already"):
        page.write(found, draws, tmp_path, "photos", most=2, side=32)
    assert (tmp_path / "look.html").read_text() == "mine"


def test_a_folder_without_captions_is_shown(folder: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    found = looked(args_of(folder))
    assert "no captions" in found.samples.description
    assert found.of("caption") == []
    assert len(found.targets) == 8


def test_a_list_of_folders_is_looked_at_as_one(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "data.json"
    entry = {"path": str(folder), "caption_strategy": "filename"}
    config.write_text(json.dumps([entry, {**entry, "resolution": 64}]))
    found = looked(data.DataArgs(data_config=config, resolution=(128,)))
    assert found.samples.count == 18
    assert set(found.targets.values()) == {(128, 128), (64, 64)}
    assert len(found.of("same")) == 6  # every picture is there twice or more


def test_shards_are_looked_at_part_by_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, stems in enumerate((("0", "1", "2"), ("copy", "broken"))):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for stem in stems:
                tar.add(folder / f"{stem}.jpg", f"{stem}.jpg")
                tar.add(folder / f"{stem}.txt", f"{stem}.txt")
    monkeypatch.setattr(survey, "_AT_ONCE", 2)
    args = args_of(shards, data_cache_dir=tmp_path / "cache")
    found = looked(args)
    assert found.samples.starts == [0, 2, 3]
    assert [one.names for one in found.of("same")] == [("0.tar row 0", "1.tar row 0")]
    assert [one.names for one in found.of("broken")] == [("1.tar row 1",)]
    draws = page.Draws(found, args, data.CaptionArgs(), seed=0)
    page.write(found, draws, tmp_path / "out", "shards", most=100, side=32)
    sheet = (tmp_path / "out" / "look.html").read_text().partition("As training cuts them")[2]
    assert sheet.count("<figure>") == 4


def test_the_first_word_is_the_folder() -> None:
    assert first_word_as("--folder", ["photos", "--seed", "4"])[:2] == ["--folder", "photos"]
    assert first_word_as("--folder", ["--seed", "4"]) == ["--seed", "4"]
    assert first_word_as("--folder", []) == []


@pytest.mark.parametrize(
    "options",
    [{"near_bits": -1}, {"near_bits": 129}, {"max_shown": 0}, {"thumbnail": 8}, {"seed": -1}],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(options))}"):
        LookArgs(**options)


def test_the_command_counts_tokens_as_clip_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "one"
    root.mkdir()
    Image.new("RGB", (64, 64), "red").save(root / "a.png")
    (root / "a.txt").write_text("a photo of a dog " * 20)
    main(Args(data=args_of(root), look=LookArgs(output_dir=tmp_path / "out")))
    said = capsys.readouterr().out
    assert "102 tokens, CLIP reads 77" in said
    assert str(tmp_path / "out" / "look.html") in said


def test_the_page_may_not_lie_among_the_pictures(folder: Path) -> None:
    with pytest.raises(UserError, match="--output_dir"):
        main(Args(data=args_of(folder), look=LookArgs(output_dir=folder / "out")))
