"""Training from shards and from folders that `python -m dojo.data cache` wrote, end to end."""

import io
import json
import re
import shutil
import tarfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pyarrow import parquet

import train_dreambooth_lora_sd3
import train_lora_sd3
import train_lora_sdxl
import train_textual_inversion_sd3
from dojo import cli, data
from dojo.cli import UserError
from dojo.data import Draw
from dojo.data.streams.made import TEXTS, Opened
from dojo.inputs import caching
from dojo.models import sd3
from dojo.models.opening import open_model
from dojo.run import phases
from tests.conftest import MakeArgs, lora_flags, reset_accelerate, run_flags
from tests.processes import Death, spawn
from tests.scripts import runs
from tests.scripts.runs import adapter_bytes, in_process, metrics

# What one thread computes is compared with what processes of one thread have computed.
pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = runs.one_thread

SCRIPT = "train_lora_sd3.py"


def samples(scenes: Path) -> list[tuple[bytes, str]]:
    rows = [json.loads(row) for row in (scenes / "metadata.jsonl").read_text().splitlines()]
    return [((scenes / row["file_name"]).read_bytes(), row["text"]) for row in rows]


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory: pytest.TempPathFactory, scene_data: Path) -> Path:
    """The ten scenes in parquet files of three, at most."""
    folder = tmp_path_factory.mktemp("shards")
    rows = samples(scene_data)
    for start in range(0, len(rows), 3):
        images, texts = zip(*rows[start : start + 3], strict=True)
        table = pa.table({"image": [{"bytes": one, "path": None} for one in images], "text": texts})
        parquet.write_table(table, folder / f"train-{start}.parquet")
    return folder


@pytest.fixture(scope="session")
def scene_tars(tmp_path_factory: pytest.TempPathFactory, scene_data: Path) -> Path:
    """The ten scenes in two tars."""
    folder = tmp_path_factory.mktemp("tars")
    rows = samples(scene_data)
    for start in (0, 5):
        with tarfile.open(folder / f"{start}.tar", "w") as tar:
            for number, (image, text) in enumerate(rows[start : start + 5]):
                for ending, content in (("png", image), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{start + number:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def run(args: train_lora_sd3.Args) -> Path:
    train_lora_sd3.main(args)
    reset_accelerate()
    return args.run.output_dir


def streamed(folder: Path, location: object, **more: object) -> list[str]:
    flags = {"dataset_name": location, "data_cache_dir": folder / "kept", **more}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


# -- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(
    scene_shards: Path, tmp_path: Path, tiny_sd3: Path, processes: int
) -> None:
    common = ["--random_flip", "--random_crop", "--caption_dropout", "0.3", "--seed", "4"]
    common += ["--max_train_steps", "7", "--checkpointing_steps", "2", "--shuffle_window", "2"]
    common += ["--train_batch_size", str(2 // processes), "--resume_from_checkpoint", "latest"]

    def flags(folder: Path, workers: int) -> list[str]:
        own = streamed(folder, f"file://{scene_shards}", dataloader_num_workers=workers)
        return [*lora_flags(folder, tiny_sd3, scene_shards), *common, *own]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = spawn(SCRIPT, flags(whole, 2), whole, processes=processes)
    assert code == 0, said
    death = Death(place="step", count=5)
    code, said = spawn(SCRIPT, flags(broken, 0), broken, death, processes)
    assert code != 0, said
    assert (broken / "run" / "checkpoint-4").is_dir()
    shutil.rmtree(broken / "kept")  # another machine has none of it
    code, said = spawn(SCRIPT, flags(broken, 3), broken, processes=processes)
    assert code == 0, said
    assert adapter_bytes(broken / "run") == adapter_bytes(whole / "run")


def test_tars_are_trained_on_by_their_folder(
    lora_args: MakeArgs, tmp_path: Path, scene_tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(lora_args(tmp_path, *streamed(tmp_path, scene_tars)))
    assert [row["step"] for row in metrics(folder) if "loss" in row] == [1, 2, 3]
    assert json.loads((folder / "data_report.json").read_text())["train"] == 10
    said = capsys.readouterr().out
    assert "10 rows in 2 tar files" in said
    assert "python -m dojo.data cache" in said


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_bad_row_stops_the_run_in_one_sentence_or_is_replaced(
    lora_args: MakeArgs, tmp_path: Path, scene_data: Path, workers: str
) -> None:
    images = [samples(scene_data)[0][0], b"nothing"]
    (tmp_path / "bad").mkdir()
    parquet.write_table(pa.table({"image": images, "text": ["a", "b"]}), tmp_path / "bad/x.parquet")
    flags = streamed(tmp_path, f"{tmp_path}/bad/*.parquet", dataloader_num_workers=workers)
    with pytest.raises(data.BadSample) as caught:
        run(lora_args(tmp_path, *flags))
    sentence = "x.parquet row 1: not a picture in a format that can be read"
    assert str(caught.value) == sentence
    reset_accelerate()
    run(lora_args(tmp_path / "skip", *flags, "--on_bad_sample", "skip"))


def test_an_eval_folder_goes_with_shards(
    lora_args: MakeArgs, tmp_path: Path, scene_shards: Path, scene_data: Path
) -> None:
    flags = streamed(tmp_path, f"{scene_shards}/*.parquet", eval_data_dir=scene_data)
    folder = run(lora_args(tmp_path, *flags, "--validation_steps", "3"))
    assert [row["step"] for row in metrics(folder) if "eval_loss" in row] == [0, 3]


def test_a_model_that_is_told_sizes_is_told_those_of_shards(
    tmp_path: Path, scene_shards: Path, tiny_sdxl: Path
) -> None:
    flags = lora_flags(tmp_path, tiny_sdxl, scene_shards)
    place = flags.index("--max_sequence_length")
    flags = [*flags[:place], *flags[place + 2 :], *streamed(tmp_path, f"{scene_shards}/*.parquet")]
    train_lora_sdxl.main(cli.parse(train_lora_sdxl.Args, None, flags))
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_other_shards_or_another_window_are_no_continuation(
    lora_args: MakeArgs, tmp_path: Path, scene_shards: Path
) -> None:
    flags = [*streamed(tmp_path, f"{scene_shards}/*.parquet"), "--checkpointing_steps", "1"]
    run(lora_args(tmp_path, *flags))
    again = [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "4"]
    with pytest.raises(UserError, match="shuffle_window"):
        run(lora_args(tmp_path, *again, "--shuffle_window", "1"))
    reset_accelerate()
    copied = tmp_path / "copied"  # elsewhere, and one shard less
    shutil.copytree(scene_shards, copied)
    run(lora_args(tmp_path, *again, "--dataset_name", f"{copied}/*.parquet"))
    (copied / "train-9.parquet").unlink()
    more = ("--dataset_name", f"{copied}/*.parquet", "--max_train_steps", "5")
    with pytest.raises(UserError, match="data"):
        run(lora_args(tmp_path, *again, *more))


def test_prior_preservation_is_refused_with_shards(
    tmp_path: Path, scene_shards: Path, tiny_sd3: Path
) -> None:
    own = ("--with_prior_preservation", "--class_prompt", "x", "--class_data_dir", "nowhere")
    words = [*lora_flags(tmp_path, tiny_sd3, scene_shards), *own, "--instance_prompt", "a"]
    words += streamed(tmp_path, f"{scene_shards}/*.parquet")
    with pytest.raises(UserError, match="--with_prior_preservation"):
        train_dreambooth_lora_sd3.main(cli.parse(train_dreambooth_lora_sd3.Args, None, words))


# -- folders that were made ---------------------------------------------------------------------


def make_flags(folder: Path, model: Path, location: object, *more: str) -> list[str]:
    """The command line of `python -m dojo.data cache`, for parts of four rows."""
    flags = {
        "pretrained_model_name_or_path": model,
        "max_sequence_length": 24,
        "dataset_name": location,
        "resolution": 64,
        "output_dir": folder / "made",
        "data_cache_dir": folder / "kept",
        "rows_per_file": 4,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*words, *more]


def make(folder: Path, model: Path, location: object, *more: str) -> Path:
    """The command in this process."""
    words = make_flags(folder, model, location, *more)
    caching.main(cli.parse(caching.args_type(words), None, words))
    return folder / "made"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, scene_data: Path, tiny_sd3: Path) -> Path:
    """The ten scenes, with two crops each, mirrored and not."""
    folder = tmp_path_factory.mktemp("made")
    flags = ("--random_flip", "--crop_variants", "2", "--prompts", "a star")
    return make(folder, tiny_sd3, scene_data, *flags)


def test_a_made_folder_holds_what_the_caches_of_a_run_hold(
    made: Path, lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes and crops that SDXL is told. Other batches round latents otherwise."""
    from dojo.inputs import pictures

    kept: list[Any] = []
    original = pictures.prepare
    monkeypatch.setattr(
        pictures, "prepare", lambda *a, **k: kept.append(original(*a, **k)) or kept[-1]
    )
    common = ("--random_flip", "--crop_variants", "2", "--max_train_steps", "1", "--seed", "2")
    run(lora_args(tmp_path, *common))
    run(lora_args(tmp_path / "b", *common, "--train_data_dir", str(made), "--dataset_name", ""))
    plain, other = kept
    for index in range(10):
        one = plain.train[Draw(index, 7 + index, (64, 64))]
        two = other.train[Draw(index, 7 + index, (64, 64))]
        assert one["caption"] == two["caption"]
        for name in ("mean", "std"):
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)
        for name in ("original", "crop", "weight"):
            assert torch.equal(one[name], two[name]), name
        for name, value in plain.text.lookup([one["caption"]]).items():
            assert torch.equal(value[0], two[name]), name


def test_a_made_folder_is_trained_from_without_pictures_and_encoders(
    made: Path, lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path
) -> None:
    elsewhere, bare = tmp_path / "elsewhere", tmp_path / "bare"
    shutil.copytree(made, elsewhere)
    shutil.copytree(tiny_sd3, bare)
    for part in sd3.TEXT_ENCODERS:
        (bare / part / "model.safetensors").unlink()
    flags = ("--random_flip", "--crop_variants", "2", "--caption_dropout", "0.5", "--seed", "1")
    flags += ("--validation_prompt", "a star", "--validation_inference_steps", "2")
    one = run(lora_args(tmp_path / "1", *flags, "--dataset_name", str(elsewhere)))
    name = ("--pretrained_model_name_or_path", str(bare))
    url = f"file://{elsewhere}"  # through the bounded disk
    kept = ("--data_cache_dir", str(tmp_path / "kept"), "--dataloader_num_workers", "2")
    two = run(lora_args(tmp_path / "2", *flags, *name, *kept, "--dataset_name", url))
    assert adapter_bytes(one) == adapter_bytes(two)
    assert len(list((tmp_path / "kept").glob("*.shard"))) >= 3


def test_the_disk_has_to_hold_the_windows_of_every_size(tmp_path: Path, made: Path) -> None:
    """Those of one size are read beside those of another."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    index = json.loads((folder / "index.json").read_text())
    wide = [{**one, "name": f"w-{one['name']}", "size": [32, 128]} for one in index["files"]]
    for one, other in zip(index["files"], wide, strict=True):
        shutil.copy(folder / one["name"], folder / other["name"])
    (folder / "index.json").write_text(json.dumps({**index, "files": [*index["files"], *wide]}))
    largest = max(one["num_bytes"] for one in wide)
    args = data.DataArgs(
        dataset_name=f"file://{folder}",
        data_cache_dir=tmp_path / "kept",
        data_cache_limit=3.5 * largest / 1e9,
        shuffle_window=1,
    )
    with pytest.raises(UserError, match="the largest 4 shards"):
        data.open_shards(args)
    one_size = replace(args, dataset_name=f"file://{made}")
    assert len(folder_of(one_size)) == 10


def test_files_of_a_made_folder_that_are_gone_are_closed(made: Path, tmp_path: Path) -> None:
    args = data.DataArgs(dataset_name=f"file://{made}", data_cache_dir=tmp_path, resolution=(64,))
    folder = folder_of(args)
    first = folder.fetch(0)
    assert not first.is_gone
    first.path.unlink()
    assert first.is_gone
    folder.fetch(1)
    assert list(folder._open) == [1]
    assert folder.fetch(0).rows == first.rows


def test_a_made_folder_is_resumed_to_the_bit(made: Path, tmp_path: Path, tiny_sd3: Path) -> None:
    common = ["--random_flip", "--crop_variants", "2", "--max_train_steps", "6", "--seed", "4"]
    common += ["--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def flags(folder: Path) -> list[str]:
        return [*lora_flags(folder, tiny_sd3, made), *common]

    code, said = spawn(SCRIPT, flags(whole), whole)
    assert code == 0, said
    code, said = spawn(SCRIPT, flags(broken), broken, Death(place="step", count=4))
    assert code != 0, said
    code, said = spawn(SCRIPT, [*flags(broken), "--dataloader_num_workers", "2"], broken)
    assert code == 0, said
    assert adapter_bytes(broken / "run") == adapter_bytes(whole / "run")


@pytest.mark.parametrize(
    ("source", "files"),  # killed while latents are made, while an encoder speaks, at the end
    [("scene_data", 3), ("scene_shards", 8), ("scene_tars", 16)],
)
def test_several_makers_end_what_a_killed_one_began_with_the_same_bytes(
    tmp_path: Path, tiny_sd3: Path, source: str, files: int, request: pytest.FixtureRequest
) -> None:
    location = request.getfixturevalue(source)
    location = f"{location}/*.parquet" if source == "scene_shards" else location
    alone = contents(make(tmp_path / "alone", tiny_sd3, location))
    flags = ["cache", *make_flags(tmp_path / "many", tiny_sd3, location)]
    code, said = spawn("dojo.data", flags, tmp_path / "many", Death(place="cache", count=files))
    assert code != 0, said
    assert not (tmp_path / "many" / "made" / "index.json").exists()
    code, said = spawn("dojo.data", flags, tmp_path / "many", processes=3)
    assert code == 0, said
    assert contents(tmp_path / "many" / "made") == alone
    assert not (tmp_path / "many" / "made" / "making").exists()
    rows = json.loads(alone["index.json"])["files"]
    assert sum(row["rows"] for row in rows) == 10
    assert max(row["rows"] for row in rows) <= 4


def test_an_unfinished_folder_is_refused_and_gone_on_with(
    made: Path, lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path, scene_data: Path
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    for name in ("index.json", "00001.json", "00001-64x64.safetensors"):
        (folder / name).unlink()
    kept = (folder / "00000-64x64.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"index.json is missing"):
        run(lora_args(tmp_path, "--dataset_name", str(folder)))
    flags = ("--random_flip", "--crop_variants", "2", "--prompts", "a star")
    make(tmp_path, tiny_sd3, scene_data, *flags)
    assert contents(folder) == contents(made)
    assert (folder / "00000-64x64.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(UserError, match=r"begun otherwise: random_flip was True, now False"):
        make(tmp_path, tiny_sd3, scene_data)


def test_a_folder_takes_no_other_pictures_captions_or_parts(
    tmp_path: Path, tiny_sd3: Path, scene_data: Path, scene_shards: Path
) -> None:
    """Two data sets whose files have the same names would otherwise share a folder."""
    source = tmp_path / "source"
    shutil.copytree(scene_data, source)
    before = contents(make(tmp_path, tiny_sd3, source))
    elsewhere = tmp_path / "elsewhere"  # with other times, and the same in all else
    shutil.copytree(source, elsewhere, copy_function=shutil.copy)
    assert contents(make(tmp_path, tiny_sd3, elsewhere)).keys() == before.keys()
    said = "begun otherwise: of other pictures or captions"
    with pytest.raises(UserError, match=said):
        make(tmp_path, tiny_sd3, f"{scene_shards}/*.parquet")
    with pytest.raises(UserError, match=said):
        make(tmp_path, tiny_sd3, elsewhere, "--max_train_samples", "9")
    table = elsewhere / "metadata.jsonl"
    kept = table.read_text()
    table.write_text(kept.replace('"text": "', '"text": "once '))
    assert table.read_text() != kept
    with pytest.raises(UserError, match=said):
        make(tmp_path, tiny_sd3, elsewhere)
    table.write_text(kept)
    first = sorted(elsewhere.rglob("*.png"))[0]
    Image.open(first).transpose(Image.Transpose.ROTATE_90).save(first, compress_level=0)
    with pytest.raises(UserError, match=said):
        make(tmp_path, tiny_sd3, elsewhere)
    for more, words in (
        (("--rows_per_file", "3"), "rows_per_file was 4, now 3"),
        (("--enable_vae_tiling",), "enable_vae_tiling was False, now True"),
        (("--text_encoder_precision", "int8"), "text_encoder_precision was 'auto', now 'int8'"),
        (("--mixed_precision", "bf16"), "mixed_precision was 'no', now 'bf16'"),
    ):
        with pytest.raises(UserError, match=f"begun otherwise: {words}"):
            make(tmp_path, tiny_sd3, source, *more)
    assert json.loads((tmp_path / "made" / "index.json").read_text())["source"].startswith(
        str(elsewhere)
    )


def test_data_made_from_other_pictures_are_no_continuation(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made, other)
    record = json.loads((other / "made.json").read_text())
    (other / "made.json").write_text(json.dumps({**record, "samples": "others"}))
    words = [
        folder_of(
            data.DataArgs(dataset_name=str(one), data_cache_dir=tmp_path, resolution=(64,))
        ).words
        for one in (made, other)
    ]
    assert words[0] != words[1]


@pytest.mark.parametrize("name", ["made.json", "00001.json", "00001-64x64.safetensors", TEXTS])
@pytest.mark.parametrize("how", ["gone", "cut", "empty", "a byte of"])
def test_what_is_damaged_in_a_made_folder_is_made_again(
    made: Path, tmp_path: Path, tiny_sd3: Path, scene_data: Path, name: str, how: str
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        flipped = bytes([*content[:-1], content[-1] ^ 1])
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(how, flipped))
    flags = ("--random_flip", "--crop_variants", "2", "--prompts", "a star")
    if name == "made.json":  # nobody knows then what the rest is
        with pytest.raises(UserError, match=r"is not empty|begun otherwise: its format"):
            make(tmp_path, tiny_sd3, scene_data, *flags)
        return
    make(tmp_path, tiny_sd3, scene_data, *flags)
    assert contents(folder) == contents(made)


def test_texts_that_are_added_later_are_seen_behind_an_address(
    made: Path, tmp_path: Path, tiny_sd3: Path, scene_data: Path
) -> None:
    shutil.copytree(made, tmp_path / "made")
    args = data.DataArgs(
        dataset_name=f"file://{tmp_path}/made", data_cache_dir=tmp_path / "disk", resolution=(64,)
    )
    rows = data.MadeRows(folder_of(args), args, data.CaptionArgs(), seed=0)
    rows[Draw(0, 0, (64, 64))]
    assert "a star" in data.MadeTexts(folder_of(args))
    kept = {path.name for path in (tmp_path / "disk").glob("0*.shard")}
    flags = ("--random_flip", "--crop_variants", "2", "--prompts", "a moon")
    make(tmp_path, tiny_sd3, scene_data, *flags)
    known = data.MadeTexts(folder_of(args))
    assert all(one in known for one in ("", "a star", "a moon"))
    assert folder_of(args).prompts.texts == ["", "a moon", "a star"]
    rows = data.MadeRows(folder_of(args), args, data.CaptionArgs(), seed=0)
    rows[Draw(0, 0, (64, 64))]  # the rows are those that were fetched
    assert {path.name for path in (tmp_path / "disk").glob("0*.shard")} == kept


def begin(folder: Path, samples: str) -> None:
    """Begins a folder, in one of several processes."""
    record = {"settings": {"resolution": 64}, "how": {"rows_per_file": 4}}
    caching._begin(folder, record, samples)


@pytest.mark.parametrize("samples", [("same",) * 4, ("one", "other", "third", "fourth")])
def test_several_that_begin_a_folder_at_once_agree_or_are_refused(
    tmp_path: Path, samples: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them stand between the look and the writing at once, where they are let."""
    folder = tmp_path / "made"
    original = caching.write_json

    def slow(path: Path, content: object) -> None:
        (path.parent / f".{path.name}.99999").touch()  # as `files.whole` has it meanwhile
        time.sleep(0.05)
        (path.parent / f".{path.name}.99999").unlink(missing_ok=True)
        original(path, content)

    monkeypatch.setattr(caching, "write_json", slow)
    with ThreadPoolExecutor(len(samples)) as pool:
        errors = [one.exception() for one in [pool.submit(begin, folder, s) for s in samples]]
    refused = [str(error) for error in errors if error is not None]
    assert len(refused) == len(set(samples)) - 1
    assert all("was begun otherwise: of other pictures" in one for one in refused)
    assert [path.name for path in folder.iterdir()] == ["made.json"]


def test_a_folder_that_somebody_else_filled_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for name in (".notes.1", "thesis.txt"):
        (tmp_path / "made" / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        begin(tmp_path / "made", "any")
    assert contents(tmp_path / "made") == {".notes.1": b"mine", "thesis.txt": b"mine"}
    with pytest.raises(UserError, match=r"thesis.txt is a file: name a folder"):
        begin(tmp_path / "made" / "thesis.txt", "any")


def test_the_command_heeds_where_and_how_the_models_work(
    tmp_path: Path, tiny_sd3: Path, scene_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = make_flags(tmp_path, tiny_sd3, scene_data, "--text_encoder_device", "cpu")
    flags += ["--text_encoder_precision", "int8", "--enable_vae_tiling", "--enable_vae_slicing"]
    args = cli.parse(caching.args_type(flags), None, flags)
    model = open_model(args.model, args.text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[list[str]] = []

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        asked.append(captions)
        return {"rows": torch.zeros(len(captions), 3)}

    fake = SimpleNamespace(said=encode)
    monkeypatch.setattr(sd3.Model, "load_text", lambda *args, **options: fake)
    maker = caching._Maker(args, model, tmp_path)
    assert (maker.device.type, maker.text_device.type) == ("cuda", "cpu")
    maker._embed("text_encoder", ["a", "b", "c"])
    assert asked == [["a"], ["b"], ["c"]]
    flags = make_flags(tmp_path, tiny_sd3, scene_data)
    args = cli.parse(caching.args_type(flags), None, flags)
    maker = caching._Maker(args, open_model(args.model, args.text), tmp_path)
    assert maker.text_device.type == "cuda"
    asked.clear()
    maker._embed("text_encoder", ["a", "b", "c"])
    assert asked == [["a", "b", "c"]]  # in one batch on a GPU
    monkeypatch.undo()
    vae = model.load_vae(torch.device("cpu"))
    assert vae.use_tiling
    assert vae.use_slicing


class Tracked:
    """Text encoders of which it is known whether anybody holds them, through a real one's words."""

    def __init__(self, encoders: Any) -> None:
        self._encoders = encoders

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoders, name)


def test_one_model_at_a_time_is_held_and_a_folder_has_the_same_numbers(
    made: Path, tmp_path: Path, tiny_sd3: Path, scene_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    loaded: list[str] = []

    def track(name: str) -> None:
        load = getattr(sd3.Model, name)

        def tracked(*args: Any, **options: Any) -> Any:
            assert [one() for one in held if one() is not None] == []
            found = load(*args, **options)
            found = Tracked(found) if name == "load_text" else found
            held.append(weakref.ref(found))
            loaded.append(options.get("only", "vae"))
            return found

        monkeypatch.setattr(sd3.Model, name, tracked)

    track("load_vae")
    track("load_text")
    flags = ("--random_flip", "--crop_variants", "2", "--prompts", "a star")
    folder = make(tmp_path, tiny_sd3, scene_data, *flags)
    assert loaded == ["vae", *sd3.TEXT_ENCODERS]
    assert contents(folder) == contents(made)
    monkeypatch.undo()
    words = make_flags(tmp_path, tiny_sd3, scene_data)
    args = cli.parse(caching.args_type(words), None, words)
    model = open_model(args.model, args.text)
    together = model.load_text(torch.float32, torch.device("cpu"))(["a star"])
    known = Opened(folder / TEXTS).embeds("a star")
    assert known.keys() == together.keys()
    assert all(torch.equal(known[name], together[name][0]) for name in known)


# -- what a dry run says of them ----------------------------------------------------------------


def planned(args: train_lora_sd3.Args, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What each phase holds, in words, as the dry run prints it."""
    capsys.readouterr()
    run(args)
    lines = capsys.readouterr().out.partition("of it\n")[2].partition("largest phase")[0]
    found: dict[str, str] = {}
    for line in lines.splitlines():
        name, _, parts = line.strip().partition("  ")
        found[name] = re.sub(r"[0-9. ]+", " ", parts).strip()
    return found


def test_a_dry_run_counts_what_a_made_folder_takes_and_no_more(
    made: Path,
    scene_shards: Path,
    lora_args: MakeArgs,
    tmp_path: Path,
    tiny_sd3: Path,
    scene_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(phases, "_GIB", 2**10)  # tiny networks are told, too
    common = ("--random_flip", "--crop_variants", "2", "--dry_run")
    of_made = (*common, "--dataset_name", str(made))
    plain = planned(lora_args(tmp_path, *common), capsys)
    assert plain.keys() == {"text cache", "latent cache", "training"}
    alone = planned(lora_args(tmp_path, *of_made), capsys)
    assert alone == {"training": plain["training"]}
    drawn = ("--validation_prompt", "a star")
    alone = planned(lora_args(tmp_path, *of_made, *drawn), capsys)
    assert alone.keys() == {"training", "validation"}
    drawn = ("--validation_prompt", "none that the folder holds")
    alone = planned(lora_args(tmp_path, *of_made, *drawn), capsys)
    assert alone.keys() == {"text cache", "training", "validation"}
    held_out = ("--eval_data_dir", str(scene_data))
    assert planned(lora_args(tmp_path, *of_made, *held_out), capsys).keys() == plain.keys()
    stream = ("--dry_run", *streamed(tmp_path, f"{scene_shards}/*.parquet"))
    both = planned(lora_args(tmp_path, *stream), capsys)
    assert both.keys() == {"latent cache", "training"}
    assert "autoencoder" in both["training"]
    assert "text_encoder" in both["training"]
    assert "autoencoder" not in alone["training"]
    bare = tmp_path / "bare"  # nobody asks for the encoders
    shutil.copytree(tiny_sd3, bare)
    for part in sd3.TEXT_ENCODERS:
        (bare / part / "model.safetensors").unlink()
    name = ("--pretrained_model_name_or_path", str(bare))
    assert planned(lora_args(tmp_path, *of_made, *name), capsys) == {"training": plain["training"]}
    with pytest.raises(UserError, match="crop_variants was 2, now 1"):
        run(lora_args(tmp_path, *of_made, "--crop_variants", "1"))


def test_the_autoencoder_waits_beside_a_run_that_needs_it_to_draw_alone(
    made: Path, lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    original = AutoencoderKL.to

    def to(vae: AutoencoderKL, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            moved.append(str(kwargs["device"]))
        return original(vae, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "to", to)
    common = ("--random_flip", "--crop_variants", "2", "--dataset_name", str(made))
    run(lora_args(tmp_path, *common))
    assert moved == ["cpu"]


def test_options_that_change_nothing_of_a_made_folder_are_told(
    made: Path, lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--random_flip", "--crop_variants", "2", "--dataset_name", str(made), "--dry_run")
    for name in ("latents", "text_embeddings"):
        run(lora_args(tmp_path, *common, f"--no_cache_{name}"))
        said = f"--no_cache_{name}: the folder holds those of its rows, and they are used"
        assert said in capsys.readouterr().out


def test_shapes_of_buckets_are_kept_in_a_made_folder(
    lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path, scene_shards: Path
) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    images: list[bytes] = []
    for number in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (128, 64) if number % 2 else (64, 64), (9 * number,) * 3).save(
            buffer, "PNG"
        )
        images.append(buffer.getvalue())
    parquet.write_table(pa.table({"image": images, "text": ["x"] * 6}), wide / "a.parquet")
    flags = ("--aspect_buckets", "--bucket_step", "16")
    folder = make(tmp_path, tiny_sd3, f"{wide}/*.parquet", *flags)
    sizes = {tuple(one["size"]) for one in json.loads((folder / "index.json").read_text())["files"]}
    assert len(sizes) == 2
    result = run(lora_args(tmp_path, *flags, "--dataset_name", str(folder)))
    shapes = json.loads((result / "data_report.json").read_text())["buckets"]
    assert [row["pictures"] for row in shapes] == [3, 3]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--resolution", "32"), r"resolution was \[64\], now \[32\]"),
        (("--crop_variants", "1"), "crop_variants was 2, now 1"),
        (("--max_sequence_length", "16"), "max_sequence_length was 24, now 16"),
        (("--shuffle_caption",), "shuffle_caption was False, now True"),
        (("--caption_column", "text"), "--caption_column"),
        (("--caption_strategy", "sidecar"), "--caption_strategy"),
        (("--dataset_split", "test"), "--dataset_split test"),
        (("--max_upscale", "2"), "--max_upscale"),
        (("--eval_fraction", "0.2"), "--eval_fraction"),
        (("--random_crop", "--crop_variants", "1"), "--random_crop"),
    ],
)
def test_a_made_folder_refuses_other_options_by_name(
    made: Path, lora_args: MakeArgs, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    common = ("--random_flip", "--crop_variants", "2", "--dataset_name", str(made))
    with pytest.raises(UserError, match=words):
        run(lora_args(tmp_path, *common, *more))


def test_new_words_want_captions_that_have_them(
    made: Path, scene_tars: Path, tiny_sd3: Path, tmp_path: Path
) -> None:
    for location, more, message in (
        (made, ("--random_flip", "--crop_variants", "2"), "--new_tokens does not go with a folder"),
        (scene_tars, ("--instance_prompt", "a star"), "no caption has <thing>"),
    ):
        flags = run_flags(tmp_path, tiny_sd3, location)
        words = [*flags, *more, "--new_tokens", "<thing>", "--initializer_token", "star"]
        words += ["--data_cache_dir", str(tmp_path / "kept")]
        with pytest.raises(UserError, match=message):
            in_process(train_textual_inversion_sd3, words)


def test_a_made_folder_refuses_another_autoencoder(
    made: Path, lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_sd3, other)
    path = other / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    common = ("--random_flip", "--crop_variants", "2", "--dataset_name", str(made))
    with pytest.raises(UserError, match="vae was"):
        run(lora_args(tmp_path, *common, "--pretrained_model_name_or_path", str(other)))


def test_a_fetched_file_that_is_damaged_is_fetched_again(made: Path, tmp_path: Path) -> None:
    args = data.DataArgs(
        dataset_name=f"file://{made}", data_cache_dir=tmp_path, resolution=(64,), random_flip=True
    )
    rows = data.MadeRows(folder_of(args), args, data.CaptionArgs(), seed=0)
    before = rows[Draw(0, 0, (64, 64))]["mean"]
    (kept,) = tmp_path.glob("00000-*.shard")
    content = kept.read_bytes()
    for damaged in (content[:300], bytes([*content[:-1], content[-1] ^ 1])):
        kept.unlink()  # mapped into memory: cut off in place, its reader would die of it
        kept.write_bytes(damaged)
        rows = data.MadeRows(folder_of(args), args, data.CaptionArgs(), seed=0)
        assert torch.equal(rows[Draw(0, 0, (64, 64))]["mean"], before)
        assert kept.read_bytes() == content


def folder_of(args: data.DataArgs) -> data.Made:
    found = data.open_shards(args)
    assert isinstance(found, data.Made)
    return found


def test_a_damaged_file_of_a_made_folder_is_named(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "00000-64x64.safetensors"
    path.write_bytes((made / path.name).read_bytes()[:500])
    with pytest.raises(UserError, match=r"00000-64x64.safetensors, a file of a folder"):
        Opened(path)


@pytest.mark.parametrize("name", ["00000-64x64.safetensors", TEXTS])
def test_a_byte_that_changed_in_a_made_folder_is_noticed(
    made: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    args = data.DataArgs(dataset_name=str(folder), data_cache_dir=tmp_path / "kept")

    def read() -> None:
        found = folder_of(args)
        _ = found.texts() if name == TEXTS else found.fetch(0)

    read()
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{name}.*not what was written.*makes it anew"):
        read()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--repeats", "2"), "--repeats"),
        (("--random_crop",), "--random_crop"),
        (("--eval_fraction", "0.1"), "--eval_fraction"),
        (("--resolution", "64", "32"), "--resolution"),
        (("--mask_dir", "x"), "--mask_dir"),
    ],
)
def test_what_a_made_folder_cannot_hold_is_refused(
    tmp_path: Path, tiny_sd3: Path, scene_data: Path, more: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        make(tmp_path, tiny_sd3, scene_data, *more)
    assert not (tmp_path / "made").exists()


def test_bad_samples_are_left_out_of_a_made_folder(
    tmp_path: Path, tiny_sd3: Path, scene_data: Path
) -> None:
    images = [samples(scene_data)[0][0], b"nothing", None]
    (tmp_path / "bad").mkdir()
    parquet.write_table(
        pa.table({"image": images, "text": ["a", "b", "c"]}), tmp_path / "bad" / "x.parquet"
    )
    location = f"{tmp_path}/bad/*.parquet"
    with pytest.raises(data.BadSample, match=r"x\.parquet row 1"):
        make(tmp_path, tiny_sd3, location)
    folder = make(tmp_path, tiny_sd3, location, "--on_bad_sample", "skip")
    index = json.loads((folder / "index.json").read_text())
    assert [one["name"] for one in index["left_out"]] == ["x.parquet row 1", "x.parquet row 2"]


def test_the_command_has_the_options_of_its_models_family(tiny_sd3: Path, tiny_sdxl: Path) -> None:
    found: dict[str, set[str]] = {}
    for model in (tiny_sd3, tiny_sdxl):
        kind = caching.args_type([f"--pretrained_model_name_or_path={model}"])
        groups: list[Any] = [group.type for group in fields(kind)]
        found[model.name] = {field.name for group in groups for field in fields(group)}
    assert "max_sequence_length" in found["tiny-sd3"]
    assert "max_sequence_length" not in found["tiny-sdxl"]
    assert "uncond" in found["tiny-sdxl"]
