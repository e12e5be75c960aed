"""Claims about numbers that are none and damaged files: noticed, named, never trained on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import train_lora_sd3 as script
from dojo import cli, report
from dojo.cli import TrainingStopped, UserError
from dojo.files import records
from dojo.files.pictures import contact_sheet
from dojo.finetune import lora
from dojo.models.folders import save_network
from dojo.run import checkpoint, finite, folders
from tests.conftest import MakeArgs, lora_flags, reset_accelerate
from tests.run.test_training import toy

INSIDE = ["optimizer.pt", "schedule.pt", "state.json", lora.WEIGHTS]  # of a LoRA's checkpoint


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tiny_sd3: Path, scene_data: Path) -> list[str]:
    """A run of three steps that keeps every checkpoint."""
    place = tmp_path_factory.mktemp("damage")
    return [*lora_flags(place, tiny_sd3, scene_data), "--checkpointing_steps", "1", "--seed", "7"]


@pytest.fixture(scope="module")
def whole(flags: list[str]) -> Path:
    """The output folder of that run, finished."""
    again(flags)
    return Path(flags[flags.index("--output_dir") + 1])


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged; its last checkpoint is to be made again."""
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-3"))
    (tmp_path / "run" / "finished.json").unlink()
    return tmp_path / "run"


def again(flags: list[str], *more: str) -> None:
    reset_accelerate()
    script.main(cli.parse(script.Args, None, [*flags, *more]))
    reset_accelerate()


def resume(flags: list[str], run: Path, where: str = "latest") -> None:
    again(flags, "--output_dir", str(run), "--resume_from_checkpoint", where)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def forget_checksums(folder: Path) -> None:
    """As a checkpoint was before there were any."""
    (folder / checkpoint.CHECKSUMS).unlink()


# Numbers


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_found(dtype: torch.dtype, value: float) -> None:
    good = torch.zeros(3, 50, dtype=dtype)
    bad = good.clone()
    bad[1, 7] = value
    largest = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)
    others = [good, largest, torch.zeros(0), torch.tensor([3]), torch.tensor(True)]
    assert finite.not_finite({"a": others, "b": [good]}) == []
    assert finite.not_finite({"a": others, "b": [good, bad], "c": []}) == ["b"]
    state = {"state": {0: {"step": torch.tensor(1.0), "moments": [good, (bad,)]}}, "lr": [0.1]}
    assert finite.not_finite({"state": finite.tensors_in(state)}) == ["state"]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda weight, state, average: weight, "the weights"),
        (lambda weight, state, average: state["exp_avg_sq"], "the optimizer's state"),
        (lambda weight, state, average: average, "their moving average"),
    ],
)
def test_what_is_not_finite_is_no_checkpoint(
    lora_args: MakeArgs, tmp_path: Path, spoil: Callable[..., Tensor], named: str
) -> None:
    args = lora_args(tmp_path, "--checkpointing_steps", "1", "--use_ema")
    trained = toy(args)
    run, learner = trained.run, trained.learner
    trained.step(1.0)
    learner.keep()
    run.step = 2
    [average] = learner._averaged.shadows()
    with torch.no_grad():
        spoil(trained.weight, learner.optimizer.state[trained.weight], average)[0] = torch.inf
    with pytest.raises(TrainingStopped, match=rf"step 2 .*{named}.*checkpoint-1.*--learning_rate"):
        learner.keep()
    assert [step for step, _ in checkpoint.existing(run.output_dir)] == [1]


def test_a_run_whose_weights_overflow_ends_without_checkpoint_and_result(
    flags: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wild = ("--learning_rate", "1e38", "--adam_weight_decay", "1e6", "--max_train_steps", "1")
    with pytest.raises(TrainingStopped, match=r"step 1 is not finite.*there is no checkpoint"):
        again(flags, "--output_dir", str(folder), *wild)
    assert not list(folder.glob("*checkpoint*"))
    assert not (folder / lora.WEIGHTS).exists()
    assert not (folder / "finished.json").exists()


def test_a_result_that_its_precision_cannot_hold_is_not_written(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    network = SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer")
    network.proj_out.bias.data[0] = 7e4  # fp16 ends at 65504
    with pytest.raises(TrainingStopped, match=r"--save_dtype fp16.*--save_dtype bf16"):
        save_network(tmp_path, network, "transformer", torch.float16, "5GB")
    assert not list(tmp_path.iterdir())
    save_network(tmp_path, network, "transformer", torch.bfloat16, "5GB")
    assert (tmp_path / "transformer").is_dir()


# Checkpoints


def test_a_checkpoint_knows_the_checksums_of_all_its_files(whole: Path) -> None:
    folder = whole / "checkpoint-2"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    sums = json.loads((folder / checkpoint.CHECKSUMS).read_text())["xxh3_128"]
    assert names - {checkpoint.CHECKSUMS} == sums.keys() >= set(INSIDE)
    assert checkpoint.check_whole(folder)


@pytest.mark.parametrize("part", [*INSIDE, "scheduler/scheduler_config.json"])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_offered(
    run: Path, part: str
) -> None:
    flip_a_bit(run / "checkpoint-2" / part)
    offer = re.escape(f"--resume_from_checkpoint {run / 'checkpoint-1'}")
    with pytest.raises(UserError, match=f"checkpoint-2 .*{part} is not as it was.*{offer}"):
        checkpoint.check_whole(run / "checkpoint-2")
    (run / "checkpoint-2" / part).unlink()
    with pytest.raises(UserError, match=f"{part} is missing.*{offer}"):
        checkpoint.check_whole(run / "checkpoint-2")


def test_a_checkpoint_before_that_is_damaged_too_is_not_offered(run: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        flip_a_bit(run / name / "optimizer.pt")
    with pytest.raises(UserError, match=r"there is none before it.*--overwrite_output_dir"):
        checkpoint.check_whole(run / "checkpoint-2")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3")
    (run / "checkpoint-1" / checkpoint.CHECKSUMS).write_text("{")
    with pytest.raises(UserError, match="there is none before it"):
        checkpoint.check_whole(run / "checkpoint-3")


def test_a_run_refuses_a_damaged_checkpoint_and_goes_on_as_it_says(
    run: Path, whole: Path, flags: list[str]
) -> None:
    flip_a_bit(run / "checkpoint-2" / lora.WEIGHTS)
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="checksum differs") as refused:
        resume(flags, run)
    assert (run / "metrics.jsonl").read_text() == before
    offered = re.search(r"--resume_from_checkpoint (\S+)", str(refused.value))
    assert offered is not None
    resume(flags, run, offered[1])
    assert (run / lora.WEIGHTS).read_bytes() == (whole / lora.WEIGHTS).read_bytes()
    assert checkpoint.check_whole(run / "checkpoint-2")  # it was made again


def test_a_checkpoint_without_checksums_is_taken_and_it_is_said(
    run: Path, whole: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    forget_checksums(run / "checkpoint-2")
    resume(flags, run)
    assert "checkpoint-2 has no checksums" in capsys.readouterr().out
    assert (run / lora.WEIGHTS).read_bytes() == (whole / lora.WEIGHTS).read_bytes()


@pytest.mark.parametrize("part", INSIDE)
def test_an_older_checkpoint_that_cannot_be_read_is_named(
    run: Path, flags: list[str], part: str
) -> None:
    forget_checksums(run / "checkpoint-2")
    (run / "checkpoint-2" / part).write_bytes(b"{garbage" * 100)
    with pytest.raises(UserError, match=r"checkpoint-2 .*cannot be read.*checkpoint-1"):
        resume(flags, run)


def test_an_older_checkpoint_of_numbers_that_are_none_is_named(run: Path, flags: list[str]) -> None:
    path = run / "checkpoint-2" / "optimizer.pt"
    forget_checksums(run / "checkpoint-2")
    state = torch.load(path, weights_only=True)
    state["state"][0]["exp_avg"][0] = torch.nan
    torch.save(state, path)
    with pytest.raises(UserError, match=r"checkpoint-2 .*the optimizer's state.*checkpoint-1"):
        resume(flags, run)


def test_a_state_of_other_things_is_no_state(run: Path) -> None:
    folder = run / "checkpoint-2"
    for content in ('{"step": 3}', "[]", '{"unknown": 1}'):
        (folder / "state.json").write_text(content)
        with pytest.raises(UserError, match=r"checkpoint-2 .*cannot be read.*checkpoint-1"):
            checkpoint.read_state(folder)


# Records


def test_damaged_options_are_named(run: Path, flags: list[str]) -> None:
    (run / "args.json").write_text('{"args": ')
    with pytest.raises(UserError, match=r"args.json is damaged .*remove it to go on"):
        resume(flags, run)
    unseeded = flags[: flags.index("--seed")]
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=r"args.json is damaged"):
        resume(unseeded, run)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step": "x"}', "\x00\x00"])
def test_a_damaged_mark_of_the_end_is_said_and_the_end_is_made_again(
    whole: Path,
    lora_args: MakeArgs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    marker = tmp_path / "finished.json"
    assert folders._finished_at(marker, print) == (-1, None)
    assert not capsys.readouterr().out
    marker.write_text(content)
    assert folders._finished_at(marker, print) == (-1, None)
    assert "finished.json is damaged" in capsys.readouterr().out
    assert folders._finished_at(whole / "finished.json", print) == (3, None)


GARBAGE = ["", "\x00\x00\x00", '{"step": 2, "lo', "[1]", '{"loss": 1}', '{"step": "two"}', "null"]


def test_damaged_metrics_are_left_out_and_counted(
    run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines()
    lines = [first, *(line.encode() for line in GARBAGE), b"\xff\xfe", *rest, b'{"step": 3, "los']
    path.write_bytes(b"\n".join(lines))
    resume(flags, run)
    assert f"{len(GARBAGE) + 1} damaged lines are left out" in capsys.readouterr().out
    assert [row["step"] for row in records.read_rows(path)[0]] == [1, 2, 3]
    assert records.read_rows(path)[1] == 0


def test_a_report_is_written_of_damaged_records(run: Path) -> None:
    for name in ("args.json", "data_report.json", "validation/prompts.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{")
    (run / "metrics.jsonl").write_text("\n".join(['{"step": 1, "loss": 2.0}', *GARBAGE]))
    (run / "README.md").write_bytes(b"\xff")
    assert report.write(run).is_file()


def test_a_contact_sheet_is_drawn_of_damaged_pictures_and_scores(tmp_path: Path) -> None:
    from PIL import Image

    for step in (0, 1):
        (tmp_path / f"step-{step}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"step-{step}" / "0.png")
    whole = (tmp_path / "step-1" / "0.png").read_bytes()
    (tmp_path / "step-1" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "step-0" / "scores.csv").write_text("file,reward\n0.png,half\n1.png\n0.png,0.5\n")
    for content in (
        "",
        "[]",
        '{"pictures": 3}',
        '{"pictures": [1, {"file": 2}, {"file": "0.png"}]}',
    ):
        (tmp_path / "prompts.json").write_text(content)
        assert contact_sheet(tmp_path) is not None
