"""Claims about finding, checking and splitting captioned pictures."""

import dataclasses
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data
import tyro
from PIL import Image

from dojo.cli import UserError
from dojo.data import (
    BadReport,
    BadSample,
    Captioned,
    DataArgs,
    Recipe,
    checked,
    formats,
    identified,
    join,
    open_evaluation,
    open_source,
    open_training,
    read_image,
    seen,
    split,
    told_notes,
    verify,
)
from dojo.data.colour import BAD_PROFILE
from dojo.data.sources.folders import caption_of_name

COLOURS = ("red", "lime", "blue", "white", "black")


def png(colour: str = "red", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(file, "PNG", **options)
    return file.getvalue()


def write_pictures(folder: Path, count: int = 3) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index}.png" for index in range(count)]
    for name, colour in zip(names, COLOURS * count, strict=False):
        (folder / name).write_bytes(png(colour))
    return names


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "metadata.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def folder_of(root: Path, count: int = 3) -> Path:
    names = write_pictures(root, count)
    write_jsonl(root, [{"file_name": name, "text": f"caption {name}"} for name in names])
    return root


def source_of(root: Path, **options: Any) -> Captioned:
    return open_source(str(root), DataArgs(dataset_name=str(root), **options))


def ids_of(source: Captioned) -> list[str]:
    """Ids from names and contents, nothing remembered."""
    return identified(source, None).ids


def reasons_of(source: Captioned) -> dict[str, str]:
    """Name of the file to its fault, of what verify leaves out."""
    _, bad, _ = verify(source, on_bad_sample="skip", num_threads=1, progress=False)
    return {Path(report.name).name: report.reason for report in bad}


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": None}, "--dataset_name, --train_data_dir, --instance_data_dir or"),
        ({"train_data_dir": "other"}, "--dataset_name and --train_data_dir"),
        ({"instance_data_dir": "other"}, "--dataset_name and --instance_data_dir"),
        ({"data_config": Path("a.yaml")}, "--data_config.*--dataset_name"),
        ({"dataset_split": ""}, "--dataset_split"),
        ({"caption_strategy": "guess"}, "--caption_strategy must be one of auto, column"),
        ({"caption_strategy": "instance"}, "--caption_strategy instance needs --instance_prompt"),
        ({"instance_prompt": " \n"}, "--instance_prompt must not be empty"),
        (
            {"caption_strategy": "sidecar", "instance_prompt": "a"},
            "--caption_strategy sidecar contradicts --instance_prompt",
        ),
        (
            {"caption_column": "a", "instance_prompt": "b"},
            "--caption_column contradicts --instance_prompt",
        ),
        (
            {"caption_strategy": "filename", "caption_column": "a"},
            "--caption_strategy filename contradicts --caption_column",
        ),
        ({"resolution": ()}, "--resolution"),
        ({"resolution": (0,)}, "--resolution"),
        ({"resolution": (512, 0)}, "--resolution"),
        ({"resolution": (512, 512)}, "--resolution names the same number twice"),
        ({"resolution": (512, 768), "height": 64}, "--height contradicts several resolutions"),
        ({"resolution": (512, 768), "width": 64}, "--width contradicts several resolutions"),
        ({"aspect_buckets": True, "width": 64}, "--width contradicts --aspect_buckets"),
        ({"bucket_step": 64}, "--bucket_step needs --aspect_buckets"),
        ({"bucket_min": 64}, "--bucket_min needs --aspect_buckets"),
        ({"bucket_max": 64}, "--bucket_max needs --aspect_buckets"),
        ({"aspect_buckets": True, "bucket_step": 0}, "--bucket_step must be at least 1"),
        ({"aspect_buckets": True, "bucket_min": 96, "bucket_max": 64}, "--bucket_min 96 exceeds"),
        ({"crop_variants": 0}, "--crop_variants must be at least 1"),
        ({"crop_variants": 2, "center_crop": True}, "--center_crop contradicts --crop_variants 2"),
        ({"max_upscale": 0.5}, "--max_upscale must be at least 1"),
        ({"max_upscale": float("nan")}, "--max_upscale must be at least 1"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"mask_dir": "a", "mask_from_alpha": True}, "--mask_dir contradicts --mask_from_alpha"),
        ({"mask_dir": "a", "masked_loss_weight": 1.1}, "--masked_loss_weight must lie in"),
        ({"mask_dir": "a", "masked_loss_weight": float("nan")}, "--masked_loss_weight must lie"),
        ({"masked_loss_weight": 0.5}, "--masked_loss_weight needs --mask_dir"),
        ({"height": -8}, "--height"),
        ({"width": 0}, "--width"),
        ({"max_train_samples": 0}, "--max_train_samples"),
        ({"center_crop": True, "random_crop": True}, "--center_crop.*--random_crop"),
        ({"random_flip": True, "no_hflip": True}, "--random_flip.*--no_hflip"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers"),
        ({"on_bad_sample": "ignore"}, "--on_bad_sample"),
        ({"eval_fraction": 1.0}, "--eval_fraction"),
        ({"eval_fraction": -0.1}, "--eval_fraction"),
        ({"eval_fraction": float("nan")}, "--eval_fraction"),
        ({"eval_fraction": 0.1, "eval_data_dir": "held_out"}, "--eval_fraction.*--eval_data_dir"),
    ],
)
def test_wrong_options_are_refused_by_their_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataArgs(**{"dataset_name": "data", **options})


def test_all_names_of_the_data_are_one() -> None:
    assert DataArgs(train_data_dir="a").location == "a"
    assert DataArgs(instance_data_dir="a").location == "a"
    assert DataArgs(dataset_name="a", train_data_dir="a", instance_data_dir="a").location == "a"
    assert DataArgs(data_config=Path("a.yaml")).location == "a.yaml"


def test_size_is_height_and_width() -> None:
    assert DataArgs(dataset_name="a").size == (512, 512)
    assert DataArgs(dataset_name="a", resolution=(64,), width=96).size == (64, 96)
    assert DataArgs(dataset_name="a", height=32, width=96).size == (32, 96)
    assert DataArgs(dataset_name="a", resolution=(768, 512)).size == (768, 768)


def test_the_recipe_is_what_the_flags_say() -> None:
    args = DataArgs(dataset_name="a", resolution=(64,), width=96, random_flip=True, repeats=3)
    assert Recipe.of(args) == Recipe(
        resolution=(64,),
        height=None,
        width=96,
        random_crop=False,
        random_flip=True,
        aspect_buckets=False,
        repeats=3,
    )


def test_every_option_is_a_flag_with_help() -> None:
    args = tyro.cli(
        DataArgs,
        args=["--dataset_name", "a", "--random_flip", "--resolution", "512", "768"],
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    assert args == DataArgs(dataset_name="a", random_flip=True, resolution=(512, 768))
    help_text = tyro.extras.get_parser(DataArgs, use_underscores=True).format_help()
    assert all(f"--{field.name}" in help_text for field in dataclasses.fields(DataArgs))
    assert "Fraction of the samples held out" in help_text


# Folders with metadata


def test_jsonl_gives_captions_in_its_own_order(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    rows = [{"file_name": f"{index}.png", "text": f" 一只红色的圆 {index} "} for index in (2, 0, 1)]
    write_jsonl(tmp_path, rows)
    source = source_of(tmp_path)
    assert len(source) == 3
    assert source.captions == [("一只红色的圆 2",), ("一只红色的圆 0",), ("一只红色的圆 1",)]
    assert source.names[0] == str(tmp_path / "2.png")
    assert source.read(0).getpixel((0, 0)) == (0, 0, 255)
    assert "'text'" in source.description
    assert "metadata.jsonl" in source.description


def test_csv_may_have_a_byte_order_mark_quotes_and_windows_line_ends(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    content = (
        "file_name,text\r\n"
        '0.png,"a ""red"" circle, left\r\nof a 方块"\r\n'
        '1.png, "spaced, too"\r\n'
        "\r\n"
        "2.png,plain\r\n"
    )
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    source = source_of(tmp_path)
    assert source.captions == [('a "red" circle, left of a 方块',), ("spaced, too",), ("plain",)]
    assert reasons_of(source) == {}


def test_jsonl_strings_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    write_jsonl(tmp_path, [{"file_name": "0.png", "text": "one\u2028two"}])
    assert source_of(tmp_path).captions == [("one two",)]


def test_the_caption_column_is_found_or_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    write_jsonl(tmp_path, [{"file_name": "0.png", "prompt": "p", "caption": "c", "title": "t"}])
    source = source_of(tmp_path)
    assert source.captions == [("c",)]
    assert "'caption'" in source.description
    assert source_of(tmp_path, caption_column="title").captions == [("t",)]
    assert source_of(tmp_path, image_column="image").captions == [("c",)]
    with pytest.raises(ValueError, match=r"'absent'.*'file_name', 'prompt', 'caption', 'title'"):
        source_of(tmp_path, caption_column="absent")
    with pytest.raises(ValueError, match=r"'picture'.*'file_name', 'prompt'"):
        source_of(tmp_path, image_column="picture")


def test_missing_columns_are_told_with_those_there_are(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    write_jsonl(tmp_path, [{"image": "0.png", "text": "x"}])
    with pytest.raises(ValueError, match=r"metadata\.jsonl.*'file_name'.*'image', 'text'"):
        source_of(tmp_path)
    assert source_of(tmp_path, image_column="image").captions == [("x",)]
    write_jsonl(tmp_path, [{"file_name": "0.png", "words": "x"}])
    with pytest.raises(ValueError, match=r"'text' or 'caption' or 'prompt'.*'file_name', 'words'"):
        source_of(tmp_path)


def test_a_split_may_be_a_folder_with_its_own_metadata(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", 3)
    folder_of(tmp_path / "test", 2)
    assert len(source_of(tmp_path)) == 3
    assert len(source_of(tmp_path, dataset_split="test")) == 2
    with pytest.raises(ValueError, match="--dataset_split names no folder 'validation'"):
        source_of(tmp_path, dataset_split="validation")


def test_metadata_at_the_root_may_name_pictures_of_several_splits(tmp_path: Path) -> None:
    rows = [
        {"file_name": f"{part}/{name}", "text": part}
        for part in ("train", "test")
        for name in write_pictures(tmp_path / part, 2)
    ]
    write_jsonl(tmp_path, rows)
    assert source_of(tmp_path).captions == [("train",), ("train",)]
    assert source_of(tmp_path, dataset_split="test").captions == [("test",), ("test",)]
    assert reasons_of(source_of(tmp_path)) == {}


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    (tmp_path / "._0.png").write_bytes(b"left by a Mac")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "9.png").write_bytes(png())
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "notes.pdf").write_text("nothing")
    source = source_of(tmp_path)
    assert len(source) == 3
    assert reasons_of(source) == {}


def test_what_is_wrong_with_a_row_is_reported_by_file(tmp_path: Path) -> None:
    write_pictures(tmp_path, 8)
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    outside.write_bytes(png())
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_text("a text")
    (tmp_path / "3.png").write_bytes(png()[:50])
    rows: list[dict[str, Any]] = [
        {"file_name": "0.png", "text": "good"},
        {"file_name": "1.png", "text": "zero bytes"},
        {"file_name": "2.png", "text": "text"},
        {"file_name": "3.png", "text": "cut"},
        {"file_name": "4.png", "text": "  \n "},
        {"file_name": "5.png"},
        {"file_name": "6.png", "text": ["a", {"b": "c"}]},
        {"file_name": "absent.png", "text": "x"},
        {"file_name": str(outside), "text": "x"},
        {"file_name": f"../{outside.name}", "text": "x"},
        {"file_name": "C:\\pictures\\a.png", "text": "x"},
        {"file_name": "..\\a.png", "text": "x"},
        {"file_name": None, "text": "x"},
        {"file_name": "nul\0.png", "text": "x"},
    ]
    write_jsonl(tmp_path, rows)
    source = source_of(tmp_path)
    good, bad, sizes = verify(source, on_bad_sample="skip", num_threads=2, progress=False)
    assert [source.names[index] for index in good] == [str(tmp_path / "0.png")]
    assert sizes == [(8, 12)]
    assert [bool(captions) for captions in source.captions] == [
        not problem for problem in source.problems
    ]
    assert len(bad) == len(source) - 1
    told = [f"{report.name}: {report.reason}" for report in bad]
    expected = [
        ("1.png", "the file is empty"),
        ("2.png", "not a picture"),
        ("3.png", "truncated"),
        ("4.png", "the caption is empty"),
        ("5.png", "the caption is missing"),
        ("6.png", "the caption is of type dict"),
        ("absent.png", "no such file"),
        ("metadata.jsonl line 9", f"{str(outside)!r} is an absolute path"),
        ("metadata.jsonl line 10", f"'../{outside.name}' climbs out"),
        ("metadata.jsonl line 11", "is an absolute path"),
        ("metadata.jsonl line 12", "climbs out"),
        ("metadata.jsonl line 13", "the file name is missing"),
        ("nul\0.png", "null"),
        ("7.png", "metadata.jsonl has no row for it"),
    ]
    for line, (name, reason) in zip(told, expected, strict=True):
        assert name in line
        assert reason in line
    assert len(set(source.ids)) == len(source)


def test_dots_and_symbolic_links_within_the_folder_are_fine(tmp_path: Path) -> None:
    blobs, root = tmp_path / "blobs", tmp_path / "snapshot"
    write_pictures(blobs, 2)
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "0.png").symlink_to(blobs / "0.png")
    (root / "linked").symlink_to(blobs, target_is_directory=True)
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    rows = [
        {"file_name": "./a/b/../0.png", "text": "one"},
        {"file_name": "linked/1.png", "text": "two"},
        {"file_name": "linked/0.png", "text": "three"},
    ]
    write_jsonl(root, rows)
    source = source_of(root)
    assert source.read(1).getpixel((0, 0)) == (0, 255, 0)
    assert reasons_of(source) == {}


def test_a_csv_row_with_an_unquoted_comma_is_reported(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    rows = "file_name,text\n0.png,good\n1.png,a circle, red\n2.png\n"
    (tmp_path / "metadata.csv").write_text(rows)
    reasons = reasons_of(source_of(tmp_path))
    assert "quote captions with commas" in reasons["1.png"]
    assert reasons["2.png"] == "the caption is missing"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_metadata_that_is_not_utf8_names_line_and_byte(tmp_path: Path, mark: bytes) -> None:
    write_pictures(tmp_path, 1)
    head = mark + b"file_name,text\n"
    (tmp_path / "metadata.csv").write_bytes(head + "0.png,方块\n".encode("gbk"))
    place = rf"metadata\.csv is not UTF-8: line 2, byte {len(head) + len('0.png,')}"
    with pytest.raises(ValueError, match=place):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "0.png", "text": "x"}\n{"file', "line 2: not JSON"),
        ("metadata.jsonl", '["0.png", "x"]\n', "line 1: not a JSON object"),
        ("metadata.csv", 'file_name,text\n0.png,"never closed\n', "line 2: unexpected end"),
        ("metadata.csv", "file_name,text\n", "has no rows"),
        ("metadata.csv", "", "has no rows"),
    ],
)
def test_broken_metadata_names_the_file(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        source_of(tmp_path)


def test_several_rows_of_one_picture_are_its_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    rows = [("0.png", "a"), ("1.png", "b"), ("./0.png", "c"), ("0.png", "a"), ("1.png", " ")]
    write_jsonl(tmp_path, [{"file_name": name, "text": text} for name, text in rows])
    source = source_of(tmp_path)
    assert [Path(name).name for name in source.names] == ["0.png", "1.png"]
    assert source.captions == [("a", "c"), ()]
    assert reasons_of(source) == {"1.png": "the caption is empty"}


def test_paths_of_windows_are_read(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a" / "b", 1)
    rows = b"file_name,text\r\na\\b\\0.png,x\r\n..\\0.png,y\r\n\\0.png,z\r\n"
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + rows)
    source = source_of(tmp_path)
    assert source.captions[0] == ("x",)
    assert source.read(0).size == (12, 8)
    assert "climbs out" in source.problems[1]
    assert "absolute path" in source.problems[2]


def test_metadata_in_sub_folders_is_read(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        folder_of(tmp_path / name, 2)
    write_pictures(tmp_path, 1)
    source = source_of(tmp_path)
    assert source.captions[:4] == [("caption 0.png",), ("caption 1.png",)] * 2
    assert [Path(name).parent.name for name in source.names[:4]] == ["cats"] * 2 + ["dogs"] * 2
    assert reasons_of(source) == {"0.png": "the metadata of other folders has no row for it"}
    assert "cats/metadata.jsonl, dogs/metadata.jsonl" in source.description


@pytest.mark.parametrize(
    "content",
    [
        [{"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": "b"}],
        {"0.png": "a", "1.png": "b"},
        {"0.png": {"caption": "a", "tags": "x"}, "1.png": {"caption": "b"}},
    ],
)
def test_metadata_may_be_json(tmp_path: Path, content: Any) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    assert source_of(tmp_path).captions == [("a",), ("b",)]


def test_json_that_names_no_picture_is_counted_and_left_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "0.txt").write_text("a")
    (tmp_path / "metadata.json").write_text(json.dumps({"name": "a set", "version": 1}))
    source = source_of(tmp_path)
    assert source.captions == [("a",)]
    assert "not read: 1 .json files (captions of other trainers" in source.description


def test_what_is_not_read_is_counted_by_kind_with_what_would_read_it(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", 2)
    for index in range(2):
        (tmp_path / "train" / f"{index}.txt").write_text("a star")
    others = {
        **dict.fromkeys(("IMG_1.CR2", "IMG_2.cr2", "IMG_3.CR2"), "export them as PNG or JPEG"),
        "IMG_1.txt": "",
        "00000.tar": "FOLDER/*.tar",
        "notes": "",
    }
    for name in others:
        (tmp_path / "train" / name).write_bytes(b"x")
    write_pictures(tmp_path / "test", 2)
    source = source_of(tmp_path)
    assert len(source) == 2
    counted = {unread.kind: (unread.count, unread.remedy) for unread in source.unread}
    assert counted == {
        ".cr2 files": (3, "export them as PNG or JPEG"),
        "files outside train/ (--dataset_split)": (2, ""),
        ".txt files without a picture that is read": (1, ""),
        ".tar files": (1, counted[".tar files"][1]),
        "files without an ending": (1, ""),
    }
    assert "FOLDER/*.tar" in counted[".tar files"][1]
    assert "not read: 3 .cr2 files (export them as PNG or JPEG), 2 files" in source.description
    assert join([source, source]).unread == source.unread * 2
    assert source.select([0]).unread == source.unread


def test_a_folder_without_readable_files_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "00000.zip").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no data found; .*; not read: 1 \.zip files \(unpack"):
        source_of(tmp_path)


def test_photographs_of_a_telephone_are_read_with_the_plugin(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    assert ".heic" in formats.picture_suffixes()
    Image.new("RGB", (64, 48), "red").save(tmp_path / "IMG_1.heic")
    (tmp_path / "IMG_1.heic").rename(tmp_path / "IMG_1.HEIC")
    (tmp_path / "IMG_1.txt").write_text("a wall")
    source = source_of(tmp_path)
    assert source.captions == [("a wall",)]
    assert source.read(0).size == (64, 48)
    assert source.unread == ()


def test_what_was_done_to_pictures_is_counted_and_remembered(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", 3)
    for index in (0, 2):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png", icc_profile=b"no profile")
    source = source_of(folder)

    def look() -> Captioned:
        root = tmp_path / "cache"
        return checked(source, root, on_bad_sample="error", num_threads=2, progress=False)[0]

    good = look()
    assert good.notes == {BAD_PROFILE: 2}
    assert look().notes == good.notes  # remembered, not decoded again
    assert told_notes(good, good) == [f"  4 pictures {BAD_PROFILE}"]
    assert seen(good, good) == {"not_read": [], "pictures_read": {BAD_PROFILE: 4}}


def test_two_metadata_files_are_an_error(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,x\n")
    with pytest.raises(ValueError, match=r"both metadata\.csv and metadata\.jsonl"):
        source_of(tmp_path)


# Sidecars


def test_each_line_of_a_sidecar_is_a_caption(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    write_pictures(tmp_path / "more", 1)
    content = "\n  红色的圆 \r\n\n on\u2028white\n"
    (tmp_path / "0.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "more" / "0.txt").write_text("nested")
    source = source_of(tmp_path)
    assert source.captions == [("红色的圆", "on white"), ("one",), ("nested",)]
    assert [name.removeprefix(str(tmp_path)) for name in source.names] == [
        "/0.png",
        "/1.png",
        "/more/0.png",
    ]
    assert ".txt" in source.description
    assert "several captions for 1 of them" in source.description


def test_caption_files_may_end_in_caption(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    (tmp_path / "0.caption").write_text("a\nb\n")
    (tmp_path / "1.txt").write_text("c")
    (tmp_path / "2.caption").write_text("d")
    (tmp_path / "2.txt").write_text("e")
    source = source_of(tmp_path)
    assert source.captions[:2] == [("a", "b"), ("c",)]
    assert reasons_of(source) == {"2.png": "both 2.txt and 2.caption are there; keep one of them"}
    assert "lines of .txt and .caption files" in source.description


def kohya_folder(root: Path) -> Path:
    for name, count in (("10_sks heart", 1), ("1_a_blue-heart", 2)):
        for picture in write_pictures(root / name, count):
            (root / name / picture).with_suffix(".txt").write_text(f"of {name}")
    return root


def test_repeats_of_folder_names_count_when_asked_for(tmp_path: Path) -> None:
    root = kohya_folder(tmp_path)
    source = source_of(root, repeats=2)
    assert source.recipe(0).repeats == 2
    assert "10_sks heart, 1_a_blue-heart count once; --repeats_from_fold" in source.description
    source = source_of(root, repeats=2, repeats_from_folder_names=True)
    repeats = {source.captions[k][0]: source.recipe(k).repeats for k in range(3)}
    assert repeats == {"of 10_sks heart": 20, "of 1_a_blue-heart": 2}
    write_pictures(root / "0_none", 1)
    with pytest.raises(UserError, match=r"0_none/0\.png would be used 0 times"):
        source_of(root, repeats_from_folder_names=True)
    with pytest.raises(UserError, match="no sub-folder with pictures has a name like 10_sks"):
        source_of(folder_of(tmp_path / "plain"), repeats_from_folder_names=True)


def test_folder_names_may_be_captions(tmp_path: Path) -> None:
    root = kohya_folder(tmp_path)
    write_pictures(root / "red_star" / "deep red", 1)
    write_pictures(root, 1)
    source = source_of(root, caption_strategy="folder")
    folders = [Path(name).parent.name for name in source.names]
    captions = dict(zip(folders, source.captions, strict=True))
    assert captions["10_sks heart"] == ("sks heart",)
    assert captions["1_a_blue-heart"] == ("a blue heart",)
    assert captions["deep red"] == ("deep red",)
    assert reasons_of(source) == {
        "0.png": "it lies in no sub-folder whose name could be its caption"
    }


def test_missing_empty_and_foreign_sidecars_are_reported(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    (tmp_path / "0.txt").write_text("good")
    (tmp_path / "1.txt").write_text(" \n")
    (tmp_path / "2.txt").write_bytes("方块".encode("gbk"))
    assert reasons_of(source_of(tmp_path)) == {
        "1.png": "the caption is empty (1.txt)",
        "2.png": "caption file 2.txt is not UTF-8 (byte 1)",
        "3.png": "there is no caption file 3.txt",
    }


def test_sidecars_under_train_are_found_and_suffixes_may_be_capitals(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "IMG.1.PNG").write_bytes(png())
    (tmp_path / "train" / "IMG.1.txt").write_text("a photo")
    assert source_of(tmp_path).captions == [("a photo",)]


# Which captions are taken


def with_everything(root: Path) -> Path:
    """A folder where every strategy finds captions."""
    root.mkdir()
    for name in ("a_red-car_003", "a_blue-car_004"):
        (root / f"{name}.png").write_bytes(png())
        (root / f"{name}.txt").write_text(f"sidecar {name}")
    rows = [
        {"file_name": f"{path.name}", "text": path.stem, "prompt": "p"} for path in root.iterdir()
    ]
    write_jsonl(root, sorted((row for row in rows if row["file_name"].endswith("png")), key=str))
    return root


@pytest.mark.parametrize(
    ("options", "caption", "told", "unused"),
    [
        ({}, "a_blue-car_004", "column 'text' of metadata.jsonl", ["column 'prompt'", "2 .txt"]),
        (
            {"caption_strategy": "column"},
            "a_blue-car_004",
            "--caption_strategy column",
            ["column 'prompt'", "2 .txt"],
        ),
        ({"caption_column": "prompt"}, "p", "column 'prompt'", ["column 'text'", "2 .txt"]),
        (
            {"caption_strategy": "sidecar"},
            "sidecar a_blue-car_004",
            "lines of .txt",
            ["metadata.jsonl"],
        ),
        (
            {"caption_strategy": "filename"},
            "a blue car",
            "file names",
            ["metadata.jsonl", "2 .txt"],
        ),
        (
            {"instance_prompt": " a photo of \n sks 狗 "},
            "a photo of sks 狗",
            "all: 'a photo of sks 狗' (--instance_prompt)",
            ["metadata.jsonl", "2 .txt"],
        ),
        (
            {"caption_strategy": "instance", "instance_prompt": "x"},
            "x",
            "--caption_strategy instance",
            ["metadata.jsonl", "2 .txt"],
        ),
    ],
)
def test_the_strategy_decides_and_the_description_says_what_was_and_was_not_taken(
    tmp_path: Path, options: dict[str, Any], caption: str, told: str, unused: list[str]
) -> None:
    source = source_of(with_everything(tmp_path / "set"), **options)
    assert source.captions[0] == (caption,)
    assert len(source) == 2
    assert "2 pictures" in source.description
    taken, _, left = source.description.partition("; not used: ")
    assert told in taken
    assert all(one in left for one in unused)
    assert left.count(",") == len(unused) - 1
    assert reasons_of(source) == {}


def test_a_strategy_that_finds_nothing_is_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    for options, message in [
        ({"caption_strategy": "column"}, r"--caption_strategy column needs one of metadata\.csv"),
        ({"caption_column": "text"}, r"--caption_column needs one of metadata\.csv"),
        ({"caption_strategy": "sidecar"}, "--caption_strategy sidecar, but no picture has a .txt"),
    ]:
        with pytest.raises(ValueError, match=message):
            source_of(tmp_path, **options)


def test_metadata_without_captions_leaves_them_to_sidecars(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "0.txt").write_text("from the sidecar")
    write_jsonl(tmp_path, [{"file_name": "0.png", "licence": "free"}])
    source = source_of(tmp_path)
    assert source.captions == [("from the sidecar",)]
    assert "not used: metadata.jsonl" in source.description
    with pytest.raises(ValueError, match=r"no column 'words'; it has 'file_name', 'licence'"):
        source_of(tmp_path, caption_column="words")


def test_a_dreambooth_folder_needs_nothing_but_pictures_and_a_prompt(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    for name in (".DS_Store", "._0.png", "notes.txt", "Thumbs.db", "metadata.csv"):
        (tmp_path / name).write_bytes(b"\0\1 no picture, no text")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "0.png").write_bytes(png())
    args = DataArgs(instance_data_dir=str(tmp_path), instance_prompt="a photo of sks dog")
    source = open_training(args)
    assert source.captions == [("a photo of sks dog",)] * 2
    assert [Path(name).name for name in source.names] == ["0.png", "1.png"]
    assert reasons_of(source) == {}


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("a_red-car_003", "a red car"),
        ("a red car (2)", "a red car"),
        ("a_red_car_003 (2)", "a red car"),
        ("一只红色的猫_01", "一只红色的猫"),
        ("一只红色的猫（3）", "一只红色的猫"),
        ("3 cats", "3 cats"),
        ("boeing 747-001", "boeing 747"),
        ("R2D2", "R2D2"),
        ("__a__b--", "a b"),
        ("cafe\u0301_1", "caf\u00e9"),
        ("a (big) car", "a (big) car"),
    ],
)
def test_a_file_name_is_a_caption_but_for_its_counter(stem: str, caption: str) -> None:
    assert caption_of_name(stem) == ((caption,), "")


@pytest.mark.parametrize("stem", ["003", "_12", "(2)", "--", "img\udcff"])
def test_a_file_name_without_words_is_reported(stem: str) -> None:
    captions, problem = caption_of_name(stem)
    assert captions == ()
    assert problem.startswith("the file name")


def test_file_names_are_captions_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "一只 猫_1.png").write_bytes(png())
    (tmp_path / "007.png").write_bytes(png())
    source = source_of(tmp_path, caption_strategy="filename")
    assert source.captions == [(), ("一只 猫",)]
    assert reasons_of(source) == {"007.png": "the file name holds no caption but a number"}


def test_names_that_are_not_utf8_can_be_printed_and_read(tmp_path: Path) -> None:
    name = os.fsdecode("方块.png".encode("gbk"))
    (tmp_path / name).write_bytes(png("lime"))
    source = source_of(tmp_path, instance_prompt="x")
    assert source.read(0).getpixel((0, 0)) == (0, 255, 0)
    assert (source.names[0] + source.ids[0]).encode()
    assert source.names[0].endswith(r"\xb7\xbd\xbf\xe9.png")


# Several captions


def test_a_list_in_metadata_is_several_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    rows: list[dict[str, Any]] = [
        {"file_name": "0.png", "text": ["一个 圆", " two\nlines ", "", None]},
        {"file_name": "1.png", "text": "one"},
        {"file_name": "2.png", "text": []},
        {"file_name": "3.png", "text": ["", " "]},
    ]
    write_jsonl(tmp_path, rows)
    source = source_of(tmp_path)
    assert source.captions == [("一个 圆", "two lines"), ("one",), (), ()]
    assert "several captions for 1 of them" in source.description
    assert set(reasons_of(source).values()) == {"the caption is empty"}


def test_metadata_may_be_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    write_pictures(tmp_path, 3)
    table = pyarrow.table(
        {
            "file_name": ["2.png", "../0.png", "1.png"],
            "text": [["红", "blue"], ["x"], None],
            "title": ["t", "t", "t"],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "metadata.parquet")
    source = source_of(tmp_path)
    assert source.captions[0] == ("红", "blue")
    assert source.read(0).getpixel((0, 0)) == (0, 0, 255)
    reasons = reasons_of(source)
    assert reasons["metadata.parquet row 2"] == "'../0.png' climbs out of the folder"
    assert reasons["1.png"] == "the caption is missing"
    assert source_of(tmp_path, caption_column="title").captions[0] == ("t",)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"metadata\.parquet cannot be read"):
        source_of(tmp_path)


# Masks


def write_mask(path: Path, value: int = 255, size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def test_masks_have_the_name_of_their_picture_and_its_size(tmp_path: Path) -> None:
    root, masks = tmp_path / "set", tmp_path / "masks"
    write_pictures(root / "a", 2)
    write_pictures(root / "b", 2)
    half = Image.new("L", (24, 16), 0)
    half.paste(255, (0, 0, 12, 16))
    write_mask(masks / "a" / "0.jpg", 77)
    half.save(tmp_path / "masks" / "a" / "1.webp", lossless=True)
    write_mask(masks / "b" / "1.png")
    (masks / "b" / "0.txt").write_text("not a mask")
    source = source_of(root, instance_prompt="x", mask_dir=str(masks))
    assert source.has_masks
    assert f"masks for 3 of 4 in {masks}" in source.description
    read = [source.read_mask(index) for index in range(4)]
    assert read[2] is None
    assert read[0] is not None
    assert read[0].getpixel((3, 3)) == 77
    scaled = read[1]
    assert scaled is not None
    assert (scaled.mode, scaled.size) == ("L", source.read(1).size)
    assert [scaled.getpixel((column, 4)) for column in (0, 4, 7, 11)] == [255, 255, 0, 0]
    assert reasons_of(source) == {}
    kept = source.select([2])
    assert kept.has_masks  # batches of a part have the same columns as those of the whole
    assert kept.read_mask(0) is None
    assert source.select([2, 0]).read_mask(1) is not None


def test_masks_of_a_split_lie_with_or_without_its_name(tmp_path: Path) -> None:
    root, masks = tmp_path / "set", tmp_path / "masks"
    write_pictures(root / "train", 2)
    write_mask(masks / "train" / "0.png", 11)
    write_mask(masks / "1.png", 22)
    source = source_of(root, instance_prompt="x", mask_dir=str(masks))
    read = [source.read_mask(index) for index in range(2)]
    assert [mask.getpixel((0, 0)) if mask else None for mask in read] == [11, 22]


def test_masks_within_the_data_are_not_taken_for_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    write_mask(tmp_path / "masks" / "0.png")
    source = source_of(tmp_path, instance_prompt="x", mask_dir=str(tmp_path / "masks"))
    assert len(source) == 2
    assert len(source_of(tmp_path, instance_prompt="x")) == 3
    with pytest.raises(ValueError, match="is the folder of the pictures"):
        source_of(tmp_path, instance_prompt="x", mask_dir=f"{tmp_path}/.")


def test_a_mask_that_cannot_be_used_is_a_bad_sample(tmp_path: Path) -> None:
    root, masks = tmp_path / "set", tmp_path / "masks"
    write_pictures(root, 5)
    write_mask(masks / "0.png")
    (masks / "1.png").write_bytes(png()[:50])
    write_mask(masks / "2.png", 0)
    write_mask(masks / "3.png", 1)  # a label mask of 0 and 1
    write_mask(masks / "4.png", size=(8, 12))
    source = source_of(root, instance_prompt="x", mask_dir=str(masks))
    reasons = reasons_of(source)
    assert list(reasons) == ["1.png", "2.png", "3.png", "4.png"]
    assert reasons["1.png"].startswith("mask: ")
    assert "truncated" in reasons["1.png"]
    assert "black everywhere (the brightest value is 0" in reasons["2.png"]
    assert "black everywhere (the brightest value is 1" in reasons["3.png"]
    assert "lies on its side: it is 8 pixels wide and 12 high" in reasons["4.png"]
    with pytest.raises(BadSample, match="4 of 5 samples"):
        verify(source, on_bad_sample="error", num_threads=1, progress=False)


def test_a_folder_without_the_right_masks_is_an_error(tmp_path: Path) -> None:
    root, masks = tmp_path / "set", tmp_path / "masks"
    write_pictures(root, 2)
    for message in ("there is no such folder", "no picture of .* has a mask there"):
        with pytest.raises(ValueError, match=f"--mask_dir.*{message}"):
            source_of(root, instance_prompt="x", mask_dir=str(masks))
        masks.mkdir(exist_ok=True)
    write_mask(masks / "0.png")
    write_mask(masks / "0.bmp")
    with pytest.raises(ValueError, match=r"0\.bmp and 0\.png are masks of the same picture"):
        source_of(root, instance_prompt="x", mask_dir=str(masks))
    dataset().save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"--mask_dir needs pictures in files.*--mask_from_alpha"):
        source_of(tmp_path / "saved", mask_dir=str(masks))


def test_ids_change_with_the_mask(tmp_path: Path) -> None:
    root, masks = tmp_path / "set", tmp_path / "masks"
    write_pictures(root, 3)
    write_mask(masks / "0.png")
    plain = ids_of(source_of(root, instance_prompt="x"))
    masked = ids_of(source_of(root, instance_prompt="x", mask_dir=str(masks)))
    assert [one == other for one, other in zip(plain, masked, strict=True)] == [False, True, True]
    write_mask(masks / "0.png", 254)
    changed = ids_of(source_of(root, instance_prompt="x", mask_dir=str(masks)))
    assert changed[0] not in (plain[0], masked[0])
    assert len({one.rpartition("|")[0] for one in (plain[0], masked[0], changed[0])}) == 1


def transparent() -> bytes:
    """Upright 8 x 12: opaque above, transparent below; stored lying on its side."""
    image = Image.new("RGBA", (12, 8), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (6, 0, 12, 8))
    tag = Image.Exif()
    tag[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=tag)
    return file.getvalue()


def test_the_alpha_channel_may_be_the_mask(tmp_path: Path) -> None:
    import datasets

    clear = io.BytesIO()
    Image.new("RGBA", (12, 8), (0, 0, 0, 0)).save(clear, "PNG")
    pictures = {"a": png(), "b": transparent(), "c": clear.getvalue()}
    (tmp_path / "folder").mkdir()
    for name, data in pictures.items():
        (tmp_path / "folder" / f"{name}.png").write_bytes(data)
    table = datasets.Dataset.from_dict({"image": list(pictures.values()), "text": list("abc")})
    table.save_to_disk(tmp_path / "table")
    folder = source_of(tmp_path / "folder", caption_strategy="filename", mask_from_alpha=True)
    for source in (folder, source_of(tmp_path / "table", mask_from_alpha=True)):
        assert source.has_masks
        assert source.read_mask(0) is None
        mask = source.read_mask(1)
        assert mask is not None
        assert (mask.mode, mask.size) == ("L", (8, 12))
        assert [mask.getpixel((4, row)) for row in (0, 5, 6, 11)] == [255, 255, 0, 0]
        assert source.read(1).getpixel((4, 11)) == (255, 255, 255)  # still laid on white
        assert "transparent everywhere" in next(iter(reasons_of(source).values()))
    plain = source_of(tmp_path / "folder", caption_strategy="filename")
    assert not set(ids_of(plain)) & set(ids_of(folder))
    assert not plain.has_masks


def test_a_source_without_any_alpha_is_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(ValueError, match="--mask_from_alpha, but no picture has transparency"):
        source_of(tmp_path, instance_prompt="x", mask_from_alpha=True)


# What cannot be opened


def test_a_folder_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(ValueError, match=r"metadata\.csv.*pictures.*parquet.*save_to_disk"):
        source_of(tmp_path)


def test_pictures_without_captions_are_an_error_that_names_the_ways_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    ways = r"3 pictures but no captions.*column.*metadata\.csv.*sidecar.*filename.*instance_prompt"
    with pytest.raises(ValueError, match=ways):
        source_of(tmp_path)


def test_a_missing_folder_or_a_file_is_told_from_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        source_of(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a folder or a hub id is expected"):
        source_of(tmp_path / "file")


# The datasets library


def tables() -> dict[str, list[Any]]:
    tag = Image.Exif()
    tag[0x0112] = 6
    pictures = [png("red"), png("lime", exif=tag), png("blue")[:40], None]
    return {"image": pictures, "text": ["红", "green", "cut", "none"], "index": [0, 1, 2, 3]}


def dataset() -> Any:
    import datasets

    made = datasets.Dataset.from_dict(tables())
    return made.cast_column("image", datasets.Image())


def assert_reads_the_tables(source: Captioned) -> None:
    assert source.captions == [("红",), ("green",), ("cut",), ("none",)]
    assert source.read(0).getpixel((0, 0)) == (255, 0, 0)
    assert source.read(1).size == (8, 12)  # turned upright, by the same reader as files
    good, bad, sizes = verify(source, on_bad_sample="skip", num_threads=2, progress=False)
    assert good == [0, 1]
    assert sizes == [(8, 12), (12, 8)]
    assert [report.name.rpartition(" row ")[2] for report in bad] == ["2", "3"]
    assert len(set(source.ids)) == 4
    assert "'image'" in source.description
    assert "'text'" in source.description


def test_a_folder_saved_to_disk_is_read(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path)
    source = source_of(tmp_path)
    assert_reads_the_tables(source)
    assert source_of(tmp_path).ids == source.ids
    with pytest.raises(ValueError, match="'picture'; it has 'image', 'text', 'index'"):
        source_of(tmp_path, image_column="picture")
    with pytest.raises(ValueError, match="'words'; it has 'image', 'text', 'index'"):
        source_of(tmp_path, caption_column="words")
    with pytest.raises(ValueError, match="'index' holds no pictures"):
        source_of(tmp_path, image_column="index")


def test_a_saved_folder_of_several_splits_is_read_by_split(tmp_path: Path) -> None:
    import datasets

    parts: Any = {"train": dataset(), "test": dataset().select([1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    assert_reads_the_tables(source_of(tmp_path))
    assert source_of(tmp_path, dataset_split="test").captions == [("green",)]
    with pytest.raises(ValueError, match="no split 'dev'; it has 'train', 'test'"):
        source_of(tmp_path, dataset_split="dev")


def test_a_folder_of_parquet_files_is_read(tmp_path: Path) -> None:
    root, cache = tmp_path / "set", str(tmp_path / "cache")
    (root / "data").mkdir(parents=True)
    dataset().to_parquet(root / "data" / "train-00000-of-00001.parquet")
    (root / "logo.png").write_bytes(png())  # a picture of the read-me is no data
    source = source_of(root, cache_dir=cache)
    assert_reads_the_tables(source)
    assert source_of(root, cache_dir=cache).ids == source.ids
    assert list(Path(cache).iterdir())
    with pytest.raises(ValueError, match="split 'dev'"):
        source_of(root, dataset_split="dev", cache_dir=cache)


def test_parquet_written_without_datasets_and_arrow_files_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    plain = tables() | {"image": [{"bytes": data, "path": None} for data in tables()["image"]]}
    for kind, columns in [("structs", plain), ("bytes", tables())]:
        (tmp_path / kind).mkdir()
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / kind / "x.parquet")
        assert_reads_the_tables(source_of(tmp_path / kind, cache_dir=str(tmp_path / "cache")))
    saved, arrow = tmp_path / "saved", tmp_path / "arrow"
    dataset().save_to_disk(saved)
    arrow.mkdir()
    shutil.copy(next(saved.glob("*.arrow")), arrow / "x.arrow")
    assert_reads_the_tables(source_of(arrow, cache_dir=str(tmp_path / "cache")))


def test_a_broken_parquet_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="neither a local folder nor"):
        source_of(tmp_path, cache_dir=str(tmp_path / "cache"))


def test_a_hub_id_goes_to_datasets_with_config_split_and_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str, cache_dir: str | None) -> Any:
        calls.append((path, name, split, cache_dir))
        if path == "nobody/nothing":
            raise DatasetNotFoundError("doesn't exist on the Hub")
        return dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = DataArgs(
        dataset_name="someone/something",
        dataset_config_name="small",
        dataset_split="train[:4]",
        cache_dir="/cache",
    )
    source = open_source("someone/something", args)
    assert_reads_the_tables(source)
    assert source.names[1] == "someone/something row 1"
    assert calls == [("someone/something", "small", "train[:4]", "/cache")]
    with pytest.raises(ValueError, match="nobody/nothing: neither a local folder nor"):
        open_source("nobody/nothing", args)


def test_the_caption_column_of_a_table_is_the_one_asked_for(tmp_path: Path) -> None:
    import datasets

    columns = {
        "image": [png()] * 3,
        "text": ["x", "x", "x"],
        "legend": [["一", "two"], ["one"], []],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path)
    source = source_of(tmp_path, caption_column="legend")
    assert source.captions == [("一", "two"), ("one",), ()]
    assert "captions from column 'legend'; not used: column 'text'" in source.description
    assert list(reasons_of(source).values()) == ["the caption is empty"]
    prompted = source_of(tmp_path, instance_prompt="y")
    assert prompted.captions == [("y",)] * 3
    assert "all: 'y' (--instance_prompt); not used: column 'text'" in prompted.description
    with pytest.raises(ValueError, match="--caption_strategy sidecar needs pictures in files"):
        source_of(tmp_path, caption_strategy="sidecar")


def test_captions_missing_from_a_table_are_reported(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"image": [png()] * 3, "text": ["good", None, " "]})
    made.save_to_disk(tmp_path)
    assert list(reasons_of(source_of(tmp_path)).values()) == [
        "the caption is missing",
        "the caption is empty",
    ]


# Checking


def test_error_lists_the_first_bad_samples_and_their_number(tmp_path: Path) -> None:
    folder_of(tmp_path, 15)
    for index in range(3, 15):
        (tmp_path / f"{index}.png").write_bytes(b"")
    source = source_of(tmp_path)
    with pytest.raises(BadSample) as raised:
        verify(source, on_bad_sample="error", num_threads=2, progress=False)
    message = str(raised.value)
    assert "12 of 15 samples" in message
    assert "--on_bad_sample skip" in message
    assert f"{tmp_path / '3.png'}: the file is empty" in message
    assert "and 2 more" in message
    assert len(message.splitlines()) == 12
    good, bad, _ = verify(source, on_bad_sample="skip", num_threads=2, progress=False)
    assert good == [0, 1, 2]
    assert bad[0] == BadReport(str(tmp_path / "3.png"), "the file is empty")


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no usable sample(.|\n)*0\.png: the file is empty"):
        verify(source_of(tmp_path), on_bad_sample="skip", num_threads=1, progress=False)


def test_good_data_is_all_good_whatever_the_threads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = source_of(folder_of(tmp_path, 40))
    for num_threads in (1, 4):
        checked = verify(source, on_bad_sample="error", num_threads=num_threads, progress=False)
        assert checked == (list(range(40)), [], [(8, 12)] * 40)
    assert capfd.readouterr().err == ""
    verify(source, on_bad_sample="error", num_threads=1)
    assert "Checking pictures" in capfd.readouterr().err


# Samples


def test_ids_change_with_the_content_and_with_nothing_else(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "here")
    before = ids_of(source_of(root))
    moved = Path(shutil.move(root, tmp_path / "there"))
    os.utime(moved / "1.png", ns=(0, 1))
    assert ids_of(source_of(moved)) == before
    (moved / "0.png").write_bytes(png() + b"padding")
    after = ids_of(source_of(moved))
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, True]


def test_a_selection_keeps_everything_together(tmp_path: Path) -> None:
    source = source_of(folder_of(tmp_path, 5))
    chosen = source.select([4, 1]).select([1, 0])
    assert chosen.captions == [("caption 1.png",), ("caption 4.png",)]
    assert chosen.ids == [source.ids[1], source.ids[4]]
    assert chosen.names == [source.names[1], source.names[4]]
    assert [chosen.read(index).getpixel((0, 0)) for index in range(2)] == [(0, 255, 0), (0, 0, 0)]


class Corners(torch.utils.data.Dataset[torch.Tensor]):
    """The first pixel of each picture."""

    def __init__(self, source: Captioned) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(self.source.read(index).getpixel((0, 0)))


def test_sources_pickle_without_pictures_and_are_read_by_workers(tmp_path: Path) -> None:
    folder = source_of(folder_of(tmp_path / "folder", 2))
    dataset().select([0, 1]).save_to_disk(tmp_path / "saved")
    table = source_of(tmp_path / "saved")
    for source in (folder, table):
        pickled = pickle.dumps(source)
        assert len(pickled) < 10_000
        assert pickle.loads(pickled).read(1).tobytes() == source.read(1).tobytes()
        loader = torch.utils.data.DataLoader(Corners(source), batch_size=2, num_workers=1)
        assert next(iter(loader)).tolist() == [[255, 0, 0], [0, 255, 0]]


def test_bad_samples_pickle_with_their_message() -> None:
    with pytest.raises(BadSample) as raised:
        read_image(b"", "x.png")
    assert str(pickle.loads(pickle.dumps(raised.value))) == "x.png: the file is empty"


# Splitting


def test_the_split_is_a_partition_in_order(tmp_path: Path) -> None:
    source = source_of(folder_of(tmp_path, 40))
    train, held_out = split(source, eval_fraction=0.1, seed=0)
    assert held_out is not None
    assert len(held_out) == 4
    assert sorted(train.ids + held_out.ids) == sorted(source.ids)
    assert train.ids == [name for name in source.ids if name in train.ids]
    assert held_out.ids == [name for name in source.ids if name in held_out.ids]


def test_the_split_depends_on_seed_and_names_alone(tmp_path: Path) -> None:
    source = source_of(folder_of(tmp_path, 40))
    _, held_out = split(source, eval_fraction=0.2, seed=1)
    assert held_out is not None
    _, reversed_held_out = split(source.select(range(39, -1, -1)), eval_fraction=0.2, seed=1)
    assert reversed_held_out is not None
    assert set(reversed_held_out.names) == set(held_out.names)
    _, whole = split(identified(source, None), eval_fraction=0.2, seed=1)
    assert whole is not None
    assert whole.names == held_out.names
    assert whole.ids != held_out.ids
    _, other = split(source, eval_fraction=0.2, seed=2)
    assert other is not None
    assert other.names != held_out.names


def test_a_new_picture_moves_at_most_one_other_across_the_split(tmp_path: Path) -> None:
    source = source_of(folder_of(tmp_path, 40))
    _, fewer = split(source.select(range(39)), eval_fraction=0.2, seed=0)
    _, more = split(source, eval_fraction=0.2, seed=0)
    assert fewer is not None
    assert more is not None
    assert len(set(fewer.names) - set(more.names)) <= 1


def test_the_split_leaves_something_on_both_sides(tmp_path: Path) -> None:
    source = source_of(folder_of(tmp_path, 3))
    for fraction, expected in [(0.01, 1), (0.99, 2)]:
        train, held_out = split(source, eval_fraction=fraction, seed=0)
        assert held_out is not None
        assert (len(train), len(held_out)) == (3 - expected, expected)
    assert split(source, eval_fraction=0.0, seed=0)[1] is None
    with pytest.raises(ValueError, match="--eval_fraction"):
        split(source.select([0]), eval_fraction=0.5, seed=0)


def test_max_train_samples_takes_the_first_of_what_is_left(tmp_path: Path) -> None:
    source = source_of(folder_of(tmp_path, 10))
    everything, held_out = split(source, eval_fraction=0.3, seed=0)
    some, still_held_out = split(source, eval_fraction=0.3, seed=0, max_train_samples=4)
    assert some.ids == everything.ids[:4]
    assert held_out is not None
    assert still_held_out is not None
    assert still_held_out.ids == held_out.ids
    assert len(split(source, eval_fraction=0.0, seed=0, max_train_samples=99)[0]) == 10


def test_regularisation_pictures_are_neither_held_out_nor_counted(tmp_path: Path) -> None:
    instance = source_of(folder_of(tmp_path / "a", 10))
    of_class = source_of(folder_of(tmp_path / "b", 10)).with_recipes(is_regularisation=True)
    both = join([of_class, instance])
    train, held_out = split(both, eval_fraction=0.5, seed=0, max_train_samples=2)
    assert held_out is not None
    assert len(held_out) == 5
    assert not any(held_out.recipe(index).is_regularisation for index in range(5))
    kinds = [train.recipe(index).is_regularisation for index in range(len(train))]
    assert kinds == [True] * 10 + [False] * 2
    with pytest.raises(ValueError, match="--eval_fraction"):
        split(of_class, eval_fraction=0.5, seed=0)


def test_the_same_picture_is_never_on_both_sides(tmp_path: Path) -> None:
    source = source_of(folder_of(tmp_path, 10))
    train, held_out = split(join([source, source]), eval_fraction=0.2, seed=0)
    assert held_out is not None
    assert len(train) + len(held_out) == 20
    assert not set(train.names) & set(held_out.names)


# Joining


def test_joined_sources_keep_their_pictures_captions_and_recipes(tmp_path: Path) -> None:
    folder = source_of(folder_of(tmp_path / "folder", 5))
    dataset().save_to_disk(tmp_path / "saved")
    table = source_of(tmp_path / "saved", repeats=4).select([1, 0])
    masked_root = folder_of(tmp_path / "masked", 2)
    write_mask(tmp_path / "masks" / "1.png", 99)
    masked = source_of(masked_root, mask_dir=str(tmp_path / "masks"), resolution=(64,))
    parts = [folder.select([4, 2]), table, masked]
    joined = join(parts)
    assert len(joined) == 6
    places = [(part, index) for part in parts for index in range(2)]
    for index, (part, place) in enumerate(places):
        assert joined.read(index).tobytes() == part.read(place).tobytes()
        assert joined.captions[index] == part.captions[place]
        assert joined.ids[index] == part.ids[place]
        assert joined.recipe(index) == part.recipe(place)
    assert joined.has_masks
    masks = [joined.read_mask(index) for index in range(6)]
    assert [mask is not None for mask in masks] == [False] * 5 + [True]
    assert joined.description.splitlines() == [part.description for part in parts]
    assert joined.select([5]).select([0]).read(0).getpixel((0, 0)) == (0, 255, 0)
    assert pickle.loads(pickle.dumps(joined)).read(2).size == (8, 12)
    assert join([folder]) == folder
    with pytest.raises(ValueError, match="nothing to join"):
        join([])


def test_ids_of_one_folder_joined_twice_do_not_collide(tmp_path: Path) -> None:
    source = identified(source_of(folder_of(tmp_path, 3)), None)
    joined = identified(join([source_of(tmp_path)] * 3), None)
    assert joined.ids[:3] == source.ids  # so the cache of the folder alone is found again
    assert len(set(joined.ids)) == 9
    keys = [one.rpartition("|")[0] for one in joined.ids]
    assert keys == ["0.png", "1.png", "2.png"] * 3


def test_sizes_come_from_verify_and_stay_with_their_samples(tmp_path: Path) -> None:
    for name, size in [("a", (12, 8)), ("b", (5, 9)), ("c", (7, 7))]:
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"")
    source = source_of(tmp_path, caption_strategy="filename")
    good, _, sizes = verify(source, on_bad_sample="skip", num_threads=2, progress=False)
    checked = dataclasses.replace(source.select(good), sizes=sizes)
    assert checked.sizes == [(8, 12), (9, 5), (7, 7)]
    assert checked.select([2, 0]).sizes == [(7, 7), (8, 12)]
    assert join([checked, checked]).sizes == checked.sizes * 2
    assert join([checked, source]).sizes == []


def test_the_evaluation_folder_has_captions_as_asked_but_no_masks(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", 2)
    write_pictures(tmp_path / "eval", 1)
    write_mask(tmp_path / "masks" / "0.png")
    args = DataArgs(
        train_data_dir=str(tmp_path / "set"),
        eval_data_dir=str(tmp_path / "eval"),
        instance_prompt="x",
        mask_dir=str(tmp_path / "masks"),
        masked_loss_weight=0.5,
    )
    assert open_training(args).has_masks
    held_out = open_evaluation(args)
    assert held_out is not None
    assert held_out.captions == [("x",)]
    assert not held_out.has_masks
    assert held_out.read_mask(0) is None
    assert open_evaluation(DataArgs(train_data_dir="a")) is None


# Tables that name their pictures


def write_named(folder: Path, kind: str, paths: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    cells = paths if kind == "text" else [{"bytes": None, "path": path} for path in paths]
    table = pyarrow.table({"image": cells, "text": [f"caption {path}" for path in paths]})
    pyarrow.parquet.write_table(table, folder / "train-0.parquet")


@pytest.mark.parametrize("kind", ["text", "struct"])
def test_a_table_names_pictures_from_its_own_folder_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cache_dir = str(tmp_path / "cache")
    write_pictures(tmp_path / "set" / "data" / "img", 2)
    other = tmp_path / "other" / "img"
    other.mkdir(parents=True)
    for name in ("0.png", "1.png", "2.png"):
        (other / name).write_bytes(png("black"))
    monkeypatch.chdir(other.parent)
    names = ["img/1.png", "./img/0.png", "img\\1.png", "img/2.png"]
    names += [str(other / "0.png"), "../img/0.png", "https://a.b/0.png"]
    write_named(tmp_path / "set" / "data", kind, names)
    source = source_of(tmp_path / "set", cache_dir=cache_dir)
    assert [source.read(row).getpixel((0, 0)) for row in range(3)] == [
        (0, 255, 0),
        (255, 0, 0),
        (0, 255, 0),
    ]
    _, bad, _ = verify(source, on_bad_sample="skip", num_threads=1, progress=False)
    assert [report.reason.partition(";")[0] for report in bad] == [
        "there is no such file",
        f"{str(other / '0.png')!r} is an absolute path",
        "'../img/0.png' climbs out of the folder",
        "'https://a.b/0.png' is an address",
    ]
    assert bad[0].name == str(tmp_path / "set" / "data" / "img" / "2.png")
    assert bad[1].name.endswith("set row 4")
    ids = ids_of(source)
    assert ids[0].rpartition("|")[2] == ids[2].rpartition("|")[2]
    (tmp_path / "set" / "data" / "img" / "1.png").write_bytes(png("white"))
    assert [one == two for one, two in zip(ids, ids_of(source), strict=True)][:3] == [
        *(False, True, False)
    ]


def test_names_in_a_table_whose_folder_is_not_known_are_refused(tmp_path: Path) -> None:
    options = {"cache_dir": str(tmp_path / "cache")}
    for part in ("a", "b"):
        write_pictures(tmp_path / "set" / part, 1)
        write_named(tmp_path / "set" / part, "text", ["0.png"])
    source = source_of(tmp_path / "set", **options)
    assert all("'0.png' is a file beside the table" in problem for problem in source.problems)


def test_what_datasets_itself_downloaded_may_lie_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    write_pictures(tmp_path / "downloads", 1)
    paths = [str(tmp_path / "downloads" / "0.png"), "0.png"]
    made = datasets.Dataset.from_dict({"image": paths, "text": ["a", "b"]})
    made = made.cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    args = DataArgs(dataset_name="some/one", cache_dir=str(tmp_path / "downloads"))
    source = open_source("some/one", args)
    assert source.problems[0] == ""
    assert source.read(0).getpixel((0, 0)) == (255, 0, 0)
    assert "where that lies is not known" in source.problems[1]


def test_backslashes_part_folders_unless_a_file_is_named_so(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 2)
    (tmp_path / "images\\1.png").write_bytes(png("white"))
    rows = [{"file_name": f"images\\{number}.png", "text": "x"} for number in range(2)]
    rows += [{"file_name": "images/1.png", "text": "x"}]
    write_jsonl(tmp_path, rows)
    source = source_of(tmp_path)
    assert [source.read(row).getpixel((0, 0)) for row in range(3)] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 255, 0),
    ]
