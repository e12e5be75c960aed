"""Claims about data in shards: order, reading, the disk they pass through, what is refused."""

import errno
import io
import itertools
import json
import os
import resource
import sys
import tarfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from dojo import data
from dojo.cli import UserError
from dojo.data import CaptionArgs, DataArgs, Draw, Rows
from dojo.data.streams import places
from dojo.data.streams.disk import Disk
from dojo.data.streams.packs import BadShard, parquet_rows
from dojo.data.streams.stream import Stream, write_index
from tests.processes import together

SIZE = (8, 8)


def picture(number: int, side: int = 8) -> bytes:
    """A PNG that no other number has."""
    buffer = io.BytesIO()
    colour = (number % 251, number // 251 % 251, number // 63001)
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(row: data.Batch) -> int:
    """The number of the picture in a row."""
    red, green, blue = ((row["pixels"][:, 0, 0] + 1) * 127.5).round().int().tolist()
    return red + 251 * green + 63001 * blue


def write_parquet(path: Path, numbers: Iterable[int], **options: Any) -> None:
    """A shard of the form that the hub's data sets have."""
    numbers = list(numbers)
    images = [{"bytes": picture(number), "path": None} for number in numbers]
    captions = [f"number {number}" for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"image": images, "text": captions}), path, **options)


def write_tar(path: Path, numbers: Iterable[int], *, field: str | None = None) -> None:
    """A shard of a webdataset; captions in .txt, or in a field of .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            caption = f"number {number}"
            text = json.dumps({field: caption}) if field else caption
            for ending, content in (
                ("jpg.png", picture(number)),
                ("json" if field else "txt", text.encode()),
            ):
                member = tarfile.TarInfo(f"folder/{number:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Seven parquet files of 5 rows each, numbered through."""
    for k in range(7):
        write_parquet(tmp_path / "shards" / f"train-{k}.parquet", range(5 * k, 5 * k + 5))
    return tmp_path / "shards"


def options(location: object, tmp_path: Path, **more: Any) -> DataArgs:
    more = {"data_cache_dir": tmp_path / "kept", "resolution": (8,), **more}
    return DataArgs(dataset_name=str(location), **more)


def opened(args: DataArgs) -> Stream:
    stream = data.open_shards(args)
    assert isinstance(stream, Stream)
    return stream


def rows_of(args: DataArgs, indices: Iterable[int] | None = None) -> list[data.Batch]:
    """Rows of a stream in their own order."""
    stream = opened(args)
    samples = data.Streamed(stream, args, CaptionArgs(), seed=0)
    return [samples[Draw(i, i, SIZE)] for i in (range(len(stream)) if indices is None else indices)]


# -- order --------------------------------------------------------------------------------------

ROWS = Rows(starts=(0, 5, 9, 20, 21), counts=(5, 4, 11, 1, 7), window=2)


def taken(rows: Rows, count: int, batch_size: int = 1, **share: Any) -> list[list[Draw]]:
    plan = data.Plan(rounds=({SIZE: rows},))
    return list(itertools.islice(data.Batches(plan, batch_size, seed=3, **share), count))


def indices(batches: Sequence[Sequence[Draw]]) -> list[int]:
    return [draw.index for batch in batches for draw in batch]


def test_every_row_comes_once_in_an_epoch_and_epochs_differ() -> None:
    order = indices(taken(ROWS, 3 * len(ROWS)))
    epochs = [order[i : i + len(ROWS)] for i in range(0, len(order), len(ROWS))]
    assert all(sorted(epoch) == list(range(28)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_rows_are_shuffled_among_the_shards_of_a_window_and_no_others() -> None:
    many = Rows(starts=tuple(range(0, 400, 10)), counts=(10,) * 40, window=4)
    order = indices(taken(many, 800))[400:]  # the second epoch has whole windows
    for start in range(0, 400, 40):
        some = order[start : start + 40]
        assert len({index // 10 for index in some}) == 4
        assert some != sorted(some)


def test_the_first_rows_of_a_run_are_those_of_one_shard() -> None:
    many = Rows(starts=tuple(range(0, 400, 10)), counts=(10,) * 40, window=4)
    order = indices(taken(many, 70))
    assert [len({index // 10 for index in order[:end]}) for end in (10, 30, 70)] == [1, 3, 7]


@pytest.mark.parametrize("first", [0, 3, 13, 28, 200])
def test_an_order_goes_on_anywhere_as_if_it_had_begun_there(first: int) -> None:
    whole = taken(ROWS, first + 20, batch_size=2)
    assert taken(ROWS, 20, batch_size=2, first_batch=first) == whole[first:]


def test_two_processes_share_what_one_would_read() -> None:
    alone = taken(ROWS, 40, batch_size=4)
    halves = [taken(ROWS, 40, batch_size=2, process=process, num_processes=2) for process in (0, 1)]
    together = [first + second for first, second in zip(*halves, strict=True)]
    assert together == alone


def test_an_order_of_a_million_rows_holds_a_window_of_them() -> None:
    many = Rows(starts=tuple(range(0, 10**6, 1000)), counts=(1000,) * 1000, window=2)
    order = many.shuffled(0, "order", 1)
    assert len({order[place] for place in range(0, 10**6, 9973)}) == 101
    assert sum(len(window) for window in order._kept.values()) == 4000


# -- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "pattern", "url", "braces"])
def test_parquet_is_read_row_by_row_wherever_it_lies(
    shards: Path, tmp_path: Path, kind: str
) -> None:
    location = {
        "folder": f"file://{shards}",
        "pattern": shards / "*.parquet",
        "url": f"file://{shards}/*.parquet",
        "braces": shards / "train-{0..6}.parquet",
    }[kind]
    rows = rows_of(options(location, tmp_path))
    assert [number_of(row) for row in rows] == list(range(35))
    assert [row["caption"] for row in rows] == [f"number {i}" for i in range(35)]


def test_shards_of_any_file_system_that_fsspec_knows_are_read(shards: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/bucket/prefix/{path.name}", path.read_bytes())
    try:
        rows = rows_of(options("memory://bucket/prefix", tmp_path, data_cache_limit=1.0))
        assert [number_of(row) for row in rows] == list(range(35))
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("field", [None, "caption", "mine"])
@pytest.mark.parametrize("remote", [False, True])
def test_tars_are_read_row_by_row(tmp_path: Path, field: str | None, remote: bool) -> None:
    for k in range(3):
        write_tar(tmp_path / "tars" / f"{k}.tar", range(4 * k, 4 * k + 4), field=field)
    location = f"file://{tmp_path}/tars" if remote else tmp_path / "tars"
    column = field if field == "mine" else None
    rows = rows_of(options(location, tmp_path, caption_column=column))
    assert [(number_of(row), row["caption"]) for row in rows] == [
        (i, f"number {i}") for i in range(12)
    ]


def test_a_tar_on_this_machine_is_read_in_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "0.tar", range(4))
    rows_of(options(tmp_path / "tars", tmp_path))
    assert not list((tmp_path / "kept").glob("*.shard"))


def test_an_index_beside_a_tar_spares_reading_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "0.tar", range(4))
    indexed(tmp_path / "tars")
    stream = opened(options(f"file://{tmp_path}/tars", tmp_path))
    assert stream.counts == (4,)
    assert not list((tmp_path / "kept").glob("*.shard"))
    assert [stream.part(0, [3]).captions] == [[("number 3",)]]


def indexed(folder: Path) -> Path:
    """Writes the index of the only tar of a folder."""
    return write_index(places.files_at(str(folder))[0], folder)


@pytest.mark.parametrize("remote", [False, True])
def test_an_index_of_another_tar_is_not_used(
    tmp_path: Path, remote: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tars"
    for before, after in ((3, 30), (3, 4)):  # of another size; of the same, by the padding
        write_tar(folder / "0.tar", range(before))
        size = (folder / "0.tar").stat().st_size
        indexed(folder)
        write_tar(folder / "0.tar", range(after))
        assert ((folder / "0.tar").stat().st_size == size) == (after == 4)
        args = options(f"file://{folder}" if remote else folder, tmp_path / str(after))
        assert [number_of(row) for row in rows_of(args)] == list(range(after))
        assert "0.tar.index.npy is damaged or of another tar" in capsys.readouterr().out
    indexed(folder)
    rows_of(options(folder, tmp_path / "again"))
    assert "another tar" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x93NUMPY\x01\x00"])
def test_a_damaged_index_is_not_used(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "tars" / "0.tar", range(4))
    indexed(tmp_path / "tars").write_bytes(content)
    assert len(rows_of(options(tmp_path / "tars", tmp_path))) == 4


def test_rows_that_lie_elsewhere_than_the_index_has_them_are_noticed(tmp_path: Path) -> None:
    """A tar whose size and end are those of the one that was indexed, and whose middle is not."""
    path = tmp_path / "tars" / "0.tar"
    write_tar(path, range(12))
    indexed(path.parent)
    content = bytearray(path.read_bytes())
    first, second = content[:1024], content[1024:2048]  # a picture and its caption change places
    content[:2048] = second + first
    path.write_bytes(content)
    args = options(path.parent, tmp_path)
    assert [number_of(row) for row in rows_of(args, [5])] == [5]
    with pytest.raises(UserError, match=r"0.tar row 0: no sample begins where the index has it"):
        rows_of(args, [0])


def test_opening_parquet_reads_footers_alone(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in shards.iterdir():  # the pages are gone, the end is there
        content = path.read_bytes()
        size = 8 + int.from_bytes(content[-8:-4], "little")
        path.write_bytes(b"\0" * (len(content) - size) + content[-size:])
    stream = opened(options(f"file://{shards}", tmp_path))
    assert len(stream) == 35
    assert not list((tmp_path / "kept").glob("*.shard"))


def test_a_second_start_does_not_look_at_the_shards(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(options(f"file://{shards}", tmp_path))
    monkeypatch.setattr("dojo.data.streams.stream.parquet_rows", None)
    assert opened(options(f"file://{shards}", tmp_path)).counts == first.counts


def test_the_rows_that_are_used_can_be_the_first_few(shards: Path, tmp_path: Path) -> None:
    stream = opened(options(shards / "*.parquet", tmp_path, max_train_samples=12))
    assert list(stream.rows()) == list(range(12))


def test_a_split_is_told_by_the_names(shards: Path, tmp_path: Path) -> None:
    write_parquet(shards / "test-0.parquet", range(100, 102))
    assert len(opened(options(f"file://{shards}", tmp_path))) == 35
    assert len(opened(options(f"file://{shards}", tmp_path, dataset_split="test"))) == 2


@pytest.mark.parametrize("location", ["./tars", "../own-train/tars", "tars", "{here}/tars/"])
def test_a_split_is_told_by_names_below_the_folder_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    here = tmp_path / "tars" / "own-train"  # neither a word of the way nor its name a second time
    write_tar(here / "tars" / "train-0.tar", range(3))
    write_tar(here / "tars" / "test-0.tar", range(100, 102))
    monkeypatch.chdir(here)
    location = location.format(here=here)
    assert len(opened(options(location, tmp_path))) == 3
    assert len(opened(options(location, tmp_path, dataset_split="test"))) == 2


# -- what is bad --------------------------------------------------------------------------------


def test_a_bad_row_is_named_or_gives_its_place_to_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [picture(0), b"not a picture", picture(2), None, picture(4)]
    captions = ["zero", "one", "two", "three", ""]
    (tmp_path / "bad").mkdir()
    parquet.write_table(
        pa.table({"image": images, "text": captions}), tmp_path / "bad" / "a.parquet"
    )
    args = options(tmp_path / "bad" / "*.parquet", tmp_path)
    for index, reason in (
        (1, "a.parquet row 1: not a picture in a format that can be read"),
        (3, "a.parquet row 3: there is no picture"),
        (4, "a.parquet row 4: the caption is empty"),
    ):
        with pytest.raises(data.BadSample) as caught:
            rows_of(args, [index])
        assert str(caught.value) == reason
    kept = rows_of(replace(args, on_bad_sample="skip"))
    assert [number_of(row) for row in kept] == [0, 2, 2, 0, 0]
    assert "left out: a.parquet row 3: there is no picture" in capsys.readouterr().out


def test_transparency_masks_rows_of_shards(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    image = Image.new("RGBA", (16, 8), (9, 9, 9, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 8))
    image.save(buffer, "PNG")
    (tmp_path / "masked").mkdir()
    table = pa.table({"image": [buffer.getvalue(), picture(3)], "text": ["a", "b"]})
    parquet.write_table(table, tmp_path / "masked" / "a.parquet")
    args = options(tmp_path / "masked" / "*.parquet", tmp_path, mask_from_alpha=True)
    stream = opened(args)
    rows = data.Streamed(stream, args, CaptionArgs(), seed=0)
    masks = [rows[Draw(i, i, (8, 16))]["mask"].flatten().tolist() for i in (0, 1)]
    assert masks == [[0.0, 1.0], [1.0, 1.0]]


def test_a_damaged_group_of_rows_spares_the_others(tmp_path: Path) -> None:
    path = tmp_path / "bad" / "a.parquet"
    write_parquet(path, range(9), row_group_size=3, compression="snappy")
    content = bytearray(path.read_bytes())
    column = parquet.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    args = options(tmp_path / "bad" / "*.parquet", tmp_path)
    with pytest.raises(data.BadSample, match=r"a.parquet row 4: its part of the file is damaged"):
        rows_of(args, [4])
    assert [number_of(row) for row in rows_of(args, [0, 2, 6, 8])] == [0, 2, 6, 8]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_damaged_shard_is_named_or_left_out(tmp_path: Path, kind: str) -> None:
    write = write_parquet if kind == "parquet" else write_tar
    for k in range(3):
        write(tmp_path / "bad" / f"{k}.{kind}", range(4 * k, 4 * k + 4))
    path = tmp_path / "bad" / f"1.{kind}"
    path.write_bytes(path.read_bytes()[:900])
    args = options(tmp_path / "bad" / f"*.{kind}", tmp_path)
    with pytest.raises(data.BadSample, match=rf"1 of 3 shards(.|\n)*1\.{kind}: cannot be read as"):
        opened(args)
    stream = opened(replace(args, on_bad_sample="skip"))
    assert len(stream) == 8
    assert [row.name for row in stream.left_out] == [f"1.{kind}"]


def test_a_shard_that_lacks_a_column_is_found_before_training(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    write_parquet(folder / "1.parquet", range(4))
    other = pa.table({"image": [picture(9)], "caption": ["nine"]})
    parquet.write_table(other, folder / "2.parquet")
    parquet.write_table(other.slice(0, 0), folder / "0.parquet")  # has no row that would miss it
    args = options(folder / "*.parquet", tmp_path)
    with pytest.raises(data.BadSample, match=r"1 of 3 shards(.|\n)*2\.parquet: .* column 'text'; "):
        opened(args)
    rows = rows_of(replace(args, on_bad_sample="skip"))
    assert [number_of(row) for row in rows] == [0, 1, 2, 3]


def test_a_shard_that_changed_since_it_was_counted_is_noticed(shards: Path, tmp_path: Path) -> None:
    stream = opened(options(f"file://{shards}", tmp_path))
    write_parquet(shards / "train-3.parquet", range(2))
    with pytest.raises(UserError, match=r"train-3.parquet has 2 rows, and had 5"):
        stream.part(3, [0])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"eval_fraction": 0.1}, "--eval_data_dir"),
        ({"repeats": 2}, "--num_train_epochs"),
        ({"resolution": (8, 16)}, "one --resolution"),
        ({"mask_dir": "x"}, "--mask_from_alpha works"),
        ({"aspect_buckets": True}, "python -m dojo.data cache"),
        ({"max_upscale": 2.0}, "python -m dojo.data cache --max_upscale 2"),
        ({"dataset_config_name": "x"}, "--dataset_config_name"),
        ({"caption_strategy": "filename"}, "--caption_strategy filename"),
        ({"dataset_split": "test"}, "--dataset_split test"),
        ({"caption_column": "x"}, "no column 'x'"),
        ({"image_column": "x"}, "no column 'x'"),
        ({"data_cache_limit": 1e-6}, "--data_cache_limit"),
    ],
)
def test_what_shards_cannot_do_is_refused_by_name(
    shards: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        opened(options(shards / "*.parquet", tmp_path, **more))


def test_shards_beside_other_sources_are_refused(shards: Path, tmp_path: Path) -> None:
    for location in (f"file://{shards}", f"{shards}/*.parquet"):
        with pytest.raises(UserError, match="shards stand alone"):
            data.open_source(location, options("x", tmp_path))


def test_files_that_are_not_there_are_told_in_a_sentence(tmp_path: Path) -> None:
    for location in (f"{tmp_path}/*.parquet", f"file://{tmp_path}/none", "memory://none/a.tar"):
        with pytest.raises(UserError, match=r"no (\.parquet|such file)"):
            opened(options(location, tmp_path))
    with pytest.raises(UserError, match=r"nonsense://bucket/prefix: .*Protocol not known"):
        opened(options("nonsense://bucket/prefix", tmp_path))


def test_the_package_that_a_file_system_takes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[s3\]"'):
        opened(options("s3://bucket/prefix/*.parquet", tmp_path))


def test_a_folder_of_pictures_beside_a_tar_is_still_one_of_pictures(tmp_path: Path) -> None:
    write_tar(tmp_path / "both" / "0.tar", range(2))
    assert places.is_streamed(str(tmp_path / "both"))
    (tmp_path / "both" / "a.png").write_bytes(picture(0))
    assert not places.is_streamed(str(tmp_path / "both"))
    assert not places.is_streamed("owner/name")


def test_a_network_that_fails_is_not_taken_for_a_bad_shard(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fails(path: str) -> Any:
        calls.append(path)
        raise ConnectionError("reset by peer")

    place = places.files_at(f"file://{shards}")[0]
    pauses: list[float] = []
    monkeypatch.setattr(places.time, "sleep", pauses.append)
    monkeypatch.setattr("dojo.data.streams.packs.opened", fails)
    with pytest.raises(UserError, match="reset by peer") as caught:
        parquet_rows(place)
    assert not isinstance(caught.value, BadShard)
    assert len(calls) == 3
    assert pauses == [1.0, 5.0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_taken_for_a_network_that_fails(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    stream = opened(options(f"file://{shards}", tmp_path))
    reads: list[str] = []

    class Full(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            reads.append("read")
            raise OSError(code, "as the disk says it while it is written")

    monkeypatch.setattr(places, "opened", lambda path: Full())
    monkeypatch.setattr(places.time, "sleep", lambda seconds: pytest.fail("it is tried again"))
    with pytest.raises(UserError, match=r"kept: there is no room .*--data_cache_dir"):
        stream.part(0, [0])
    assert reads == ["read"]
    monkeypatch.setattr("dojo.data.streams.stream._keep", lambda *_: Full().read())
    write_tar(tmp_path / "tars" / "0.tar", range(4))
    with pytest.raises(UserError, match="there is no room"):
        opened(options(tmp_path / "tars", tmp_path))


# -- the disk -----------------------------------------------------------------------------------


def file_of(size: int) -> Any:
    return lambda target: target.write(b"x" * size)


def names(disk: Disk) -> list[str]:
    return sorted(path.stem for path in disk.folder.glob("*.shard"))


def test_the_disk_keeps_what_was_used_last_within_its_limit(tmp_path: Path) -> None:
    disk = Disk(tmp_path, limit=1000)
    for k, name in enumerate("abc"):
        os.utime(disk.hold(name, 300, file_of(300)), ns=(k, k))
    disk.hold("a", 300, file_of(1))  # used again, not made again
    disk.hold("d", 300, file_of(300))
    assert names(disk) == ["a", "c", "d"]
    assert (tmp_path / "a.shard").stat().st_size == 300
    disk.hold("e", 900, file_of(900))
    assert names(disk) == ["e"]


def test_a_file_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    disk = Disk(tmp_path, limit=1000)

    def breaks(target: Any) -> None:
        target.write(b"x")
        raise ConnectionError

    with pytest.raises(ConnectionError):
        disk.hold("a", 300, breaks)
    assert names(disk) == []
    assert disk.hold("a", 3, file_of(3)).read_bytes() == b"xxx"
    assert [path.name for path in tmp_path.iterdir()] == ["a.shard"]


def test_a_shard_that_went_from_the_disk_comes_back(shards: Path, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in shards.iterdir())
    args = options(f"file://{shards}", tmp_path, shuffle_window=1, data_cache_limit=3 * size / 1e9)
    stream = opened(args)
    samples = data.Streamed(stream, args, CaptionArgs(), seed=0)
    order = [3, 30, 4, 12, 3, 22, 30]
    assert [number_of(samples[Draw(i, 0, SIZE)]) for i in order] == order
    assert len(list((tmp_path / "kept").glob("*.shard"))) < 7


def test_files_that_are_gone_are_closed_when_another_is_opened(
    shards: Path, tmp_path: Path
) -> None:
    stream = opened(options(f"file://{shards}", tmp_path))
    first = stream.fetch(0)
    second = stream.fetch(1)
    assert not first.is_gone
    for path in (tmp_path / "kept").glob("train-0-*.shard"):
        path.unlink()  # by another process, say, whose files have to fit in
    assert first.is_gone
    assert first.picture(0) == picture(0)
    stream.fetch(2)
    with pytest.raises(ValueError, match="closed"):
        first.picture(0)
    assert second.picture(0) == picture(5)
    assert stream.part(0, [0]).captions == [("number 0",)]  # and brought again when asked for


def test_a_process_has_two_windows_open_and_lets_go_before_it_fetches(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = opened(options(f"file://{shards}", tmp_path, shuffle_window=1))
    most: list[int] = []
    packed = type(stream)._packed

    def fetched(self: Any, place: Any) -> Any:
        assert not any(pack.is_gone for pack in self._open.values())
        found = packed(self, place)
        most.append(len(self._open))
        return found

    monkeypatch.setattr(type(stream), "_packed", fetched)
    for shard in range(len(stream.shards)):
        stream.fetch(shard)
        if shard % 2:  # another process, whose files have to fit in
            for path in (tmp_path / "kept").glob("*.shard"):
                path.unlink()
    assert len(most) == len(stream.shards) > 3
    assert max(most) == 1  # of two that are gone both are closed
    for shard in range(len(stream.shards)):
        stream.fetch(shard)
        assert len(stream._open) <= 2


def test_a_disk_that_others_fill_is_told_of(shards: Path, tmp_path: Path) -> None:
    class Emptied(Disk):
        def hold(self, name: str, size: int, write: Any) -> Path:
            path = super().hold(name, size, write)
            path.unlink()
            return path

    stream = opened(options(f"file://{shards}", tmp_path))
    stream.disk = Emptied(stream.disk.folder, stream.disk.limit)
    with pytest.raises(UserError, match="larger --data_cache_limit"):
        stream.part(0, [0])


def test_a_file_damaged_on_the_disk_is_made_again(shards: Path, tmp_path: Path) -> None:
    args = options(f"file://{shards}", tmp_path)
    rows_of(args, [0])
    (kept,) = (tmp_path / "kept").glob("*.shard")
    kept.write_bytes(kept.read_bytes()[:100])
    assert [number_of(row) for row in rows_of(args, range(5))] == list(range(5))


def test_what_is_kept_of_a_table_survives_as_it_was(shards: Path, tmp_path: Path) -> None:
    args = options(f"file://{shards}", tmp_path)
    rows_of(args, [0])
    for index in (tmp_path / "kept").glob("*.npy"):
        assert np.load(index).shape == (5, 4)
        index.write_bytes(b"")
    assert [number_of(row) for row in rows_of(args, range(5))] == list(range(5))


# -- loaders ------------------------------------------------------------------------------------


def batches_of(
    args: DataArgs, count: int, *, workers: int = 0, **share: Any
) -> list[dict[int, tuple[int, str]]]:
    """Batches as a run's loader gives them: picture and caption by the place of the use."""
    stream = opened(args)
    samples = data.Streamed(stream, args, CaptionArgs(caption_dropout=0.2), seed=3)
    plan = data.Plan(rounds=({SIZE: stream.rows()},))
    size = 4 // share.get("num_processes", 1)
    batches = data.Ahead(data.Batches(plan, size, seed=3, **share), stream)
    loader: DataLoader[data.Batch] = DataLoader(
        samples, batch_sampler=batches, collate_fn=data.collate, num_workers=workers
    )
    found: list[dict[int, tuple[int, str]]] = []
    for batch in itertools.islice(loader, count):
        numbers = [number_of({"pixels": pixels}) for pixels in batch["pixels"]]
        pairs = zip(numbers, batch["caption"], strict=True)
        found.append(dict(zip(batch["place"], pairs, strict=True)))
    return found


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("first", [0, 7, 23])
def test_batches_hang_neither_on_workers_nor_on_processes_nor_on_where_a_run_was_resumed(
    shards: Path, tmp_path: Path, workers: int, first: int
) -> None:
    args = options(f"file://{shards}", tmp_path / "one", shuffle_window=2)
    whole = batches_of(args, 26)
    other = replace(args, data_cache_dir=tmp_path / "other")
    assert batches_of(other, 26 - first, workers=workers, first_batch=first) == whole[first:]
    halves = [
        batches_of(
            other,
            26 - first,
            workers=workers,
            first_batch=first,
            process=process,
            num_processes=2,
        )
        for process in (0, 1)
    ]
    assert [one | two for one, two in zip(*halves, strict=True)] == whole[first:]


def test_shards_are_fetched_before_their_turn_and_not_far_before(
    shards: Path, tmp_path: Path
) -> None:
    stream = opened(options(f"file://{shards}", tmp_path, shuffle_window=1))
    brought: list[int] = []
    arrived = threading.Semaphore(0)

    class Shelf:
        window = 1
        where = staticmethod(stream.where)

        @staticmethod
        def bring(shard: int) -> None:
            brought.append(shard)
            arrived.release()

    plan = data.Plan(rounds=({SIZE: stream.rows()},))
    order = [batch[0].index // 5 for batch in taken(stream.rows(), 35)]
    batches = iter(data.Ahead(data.Batches(plan, 1, seed=3), Shelf()))
    for place in range(20):
        next(batches)
        if place % 5 == 0:  # into another shard: one more may come
            for _ in range(2 if place == 0 else 1):
                assert arrived.acquire(timeout=60)
        assert brought == list(dict.fromkeys(order[: 5 * (place // 5) + 10]))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_first_batch_asks_for_one_shard(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = options(f"file://{shards}", tmp_path, shuffle_window=4)
    stream = opened(args)
    samples = data.Streamed(stream, args, CaptionArgs(), seed=3)
    first = taken(stream.rows(), 1, batch_size=4)[0]
    assert len({samples[draw]["caption"] for draw in first}) == 4
    assert len(list((tmp_path / "kept").glob("*.shard"))) == 1


def measured(location: str, kept: Path) -> None:
    """Trains on nothing for 150 batches, and says how much memory that took at most, in MiB."""
    args = options(location, kept, shuffle_window=2)
    stream = opened(args)
    samples = data.Streamed(stream, args, CaptionArgs(), seed=0)
    plan = data.Plan(rounds=({SIZE: stream.rows()},))
    batches = data.Ahead(data.Batches(plan, 8, seed=0), stream)
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=data.collate)
    for _ in itertools.islice(loader, 150):
        pass
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}")


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks: list[float] = []
    padding = os.urandom(5000)  # readers stop at the picture's end
    images = [picture(number) + padding for number in range(200)]
    table = pa.table({"image": images, "text": [f"caption {i}" for i in range(200)]})
    for rows in (200, 20_000):  # 1 MB and 100 MB
        folder = tmp_path / str(rows)
        folder.mkdir()
        for start in range(0, rows, 200):
            parquet.write_table(table, folder / f"{start:06d}.parquet", compression="none")
        code, said = together(measured, (f"{folder}/*.parquet", folder / "kept"), folder)
        assert code == 0, said
        peaks.append(float(said.rpartition("peak ")[2]))
    assert peaks[1] - peaks[0] < 40
