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

from dojo.data import (
    BadReport,
    BadSample,
    Captioned,
    DataArgs,
    open_source,
    read_image,
    split,
    verify,
)

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


def reasons_of(source: Captioned) -> dict[str, str]:
    """Name of the file to its fault, of what verify leaves out."""
    _, bad = verify(source, on_bad_sample="skip", num_threads=1, progress=False)
    return {Path(report.name).name: report.reason for report in bad}


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": None}, "--dataset_name or --train_data_dir"),
        ({"train_data_dir": "other"}, "--dataset_name and --train_data_dir"),
        ({"dataset_split": ""}, "--dataset_split"),
        ({"resolution": 0}, "--resolution"),
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


def test_both_names_of_the_data_are_one() -> None:
    assert DataArgs(train_data_dir="a").location == "a"
    assert DataArgs(dataset_name="a", train_data_dir="a").location == "a"


def test_size_is_height_and_width() -> None:
    assert DataArgs(dataset_name="a").size == (512, 512)
    assert DataArgs(dataset_name="a", resolution=64, width=96).size == (64, 96)
    assert DataArgs(dataset_name="a", height=32, width=96).size == (32, 96)


def test_every_option_is_a_flag_with_help() -> None:
    args = tyro.cli(
        DataArgs,
        args=["--dataset_name", "a", "--random_flip", "--height", "64"],
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    assert args == DataArgs(dataset_name="a", random_flip=True, height=64)
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
    assert source.captions == ["一只红色的圆 2", "一只红色的圆 0", "一只红色的圆 1"]
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
    assert source.captions == ['a "red" circle, left of a 方块', "spaced, too", "plain"]
    assert reasons_of(source) == {}


def test_jsonl_strings_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    write_jsonl(tmp_path, [{"file_name": "0.png", "text": "one\u2028two"}])
    assert source_of(tmp_path).captions == ["one two"]


def test_the_caption_column_is_found_or_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    write_jsonl(tmp_path, [{"file_name": "0.png", "prompt": "p", "caption": "c", "title": "t"}])
    source = source_of(tmp_path)
    assert source.captions == ["c"]
    assert "'caption'" in source.description
    assert source_of(tmp_path, caption_column="title").captions == ["t"]
    assert source_of(tmp_path, image_column="image").captions == ["c"]
    with pytest.raises(ValueError, match=r"'absent'.*'file_name', 'prompt', 'caption', 'title'"):
        source_of(tmp_path, caption_column="absent")
    with pytest.raises(ValueError, match=r"'picture'.*'file_name', 'prompt'"):
        source_of(tmp_path, image_column="picture")


def test_missing_columns_are_told_with_those_there_are(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    write_jsonl(tmp_path, [{"image": "0.png", "text": "x"}])
    with pytest.raises(ValueError, match=r"metadata\.jsonl.*'file_name'.*'image', 'text'"):
        source_of(tmp_path)
    assert source_of(tmp_path, image_column="image").captions == ["x"]
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
    assert source_of(tmp_path).captions == ["train", "train"]
    assert source_of(tmp_path, dataset_split="test").captions == ["test", "test"]
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
        {"file_name": "6.png", "text": ["a", "list"]},
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
    good, bad = verify(source, on_bad_sample="skip", num_threads=2, progress=False)
    assert [source.names[index] for index in good] == [str(tmp_path / "0.png")]
    assert len(bad) == len(source) - 1
    told = [f"{report.name}: {report.reason}" for report in bad]
    expected = [
        ("1.png", "the file is empty"),
        ("2.png", "not a picture"),
        ("3.png", "truncated"),
        ("4.png", "the caption is empty"),
        ("5.png", "the caption is missing"),
        ("6.png", "the caption is of type list"),
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


@pytest.mark.parametrize(("second", "told"), [("x", "the same caption"), ("y", "different")])
def test_a_file_named_twice_is_an_error(tmp_path: Path, second: str, told: str) -> None:
    write_pictures(tmp_path, 1)
    rows = [{"file_name": "0.png", "text": "x"}, {"file_name": "./0.png", "text": second}]
    write_jsonl(tmp_path, rows)
    with pytest.raises(ValueError, match=rf"0\.png twice, in lines 1 and 2, with {told}"):
        source_of(tmp_path)


def test_two_metadata_files_are_an_error(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,x\n")
    with pytest.raises(ValueError, match=r"both metadata\.csv and metadata\.jsonl"):
        source_of(tmp_path)


# Sidecars


def test_sidecars_are_read_whole_onto_one_line(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    write_pictures(tmp_path / "more", 1)
    (tmp_path / "0.txt").write_bytes(b"\xef\xbb\xbf" + "\n  红色的圆 \r\n\n on white\n".encode())
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "more" / "0.txt").write_text("nested")
    source = source_of(tmp_path)
    assert source.captions == ["红色的圆 on white", "one", "nested"]
    assert [name.removeprefix(str(tmp_path)) for name in source.names] == [
        "/0.png",
        "/1.png",
        "/more/0.png",
    ]
    assert ".txt" in source.description


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
    assert source_of(tmp_path).captions == ["a photo"]


# What cannot be opened


def test_a_folder_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(ValueError, match=r"metadata\.csv.*\.txt.*parquet.*save_to_disk"):
        source_of(tmp_path)


def test_pictures_without_captions_are_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    with pytest.raises(ValueError, match="3 pictures but no captions"):
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
    assert source.captions == ["红", "green", "cut", "none"]
    assert source.read(0).getpixel((0, 0)) == (255, 0, 0)
    assert source.read(1).size == (8, 12)  # turned upright, by the same reader as files
    good, bad = verify(source, on_bad_sample="skip", num_threads=2, progress=False)
    assert good == [0, 1]
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
    assert source_of(tmp_path, dataset_split="test").captions == ["green"]
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
    good, bad = verify(source, on_bad_sample="skip", num_threads=2, progress=False)
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
        assert checked == (list(range(40)), [])
    assert capfd.readouterr().err == ""
    verify(source, on_bad_sample="error", num_threads=1)
    assert "Checking pictures" in capfd.readouterr().err


# Samples


def test_ids_change_with_the_file_and_with_nothing_else(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "here")
    before = source_of(root)
    assert source_of(root).ids == before.ids
    moved = Path(shutil.move(root, tmp_path / "there"))
    assert source_of(moved).ids == before.ids
    os.utime(moved / "1.png", ns=(0, 1))
    after = source_of(moved).ids
    assert [old == new for old, new in zip(before.ids, after, strict=True)] == [True, False, True]
    (moved / "0.png").write_bytes(png() + b"padding")
    assert source_of(moved).ids[0] != before.ids[0]


def test_a_selection_keeps_everything_together(tmp_path: Path) -> None:
    source = source_of(folder_of(tmp_path, 5))
    chosen = source.select([4, 1]).select([1, 0])
    assert chosen.captions == ["caption 1.png", "caption 4.png"]
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
    for name in source.names:
        os.utime(name, ns=(0, 1))
    _, touched = split(source_of(tmp_path), eval_fraction=0.2, seed=1)
    assert touched is not None
    assert touched.names == held_out.names
    assert touched.ids != held_out.ids
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
