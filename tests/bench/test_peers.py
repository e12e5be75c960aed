"""The comparison with a peer's scripts: what is started, what is read, what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from dojo.bench import peers
from dojo.bench.peers import CASES, Case, PeerArgs
from dojo.cli import TrainingStopped, UserError

# Writes what PyTorch's writer does, without PyTorch, which takes seconds to import.
_WRITER = """
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

def write(folder, rows):
    writer = EventFileWriter(folder)
    for tag, step, wall_time in rows:
        value = Summary.Value(tag=tag, simple_value=0.1)
        writer.add_event(Event(wall_time=wall_time, step=step, summary=Summary(value=[value])))
    writer.close()
"""
# A script that logs its steps as trainers do, each of some seconds by its clock.
_SCRIPT = (
    _WRITER
    + """
import sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
steps = range(1, int(words["--max_train_steps"]) + 1)
folder = words["--output_dir"] + "/logs/inner"
began = time.time() + 1000
write(folder, [("train_loss", step, began + step * {seconds}) for step in steps])
"""
)


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerArgs:
    """A clone and a repository whose scripts only log."""
    root, clone = tmp_path / "root", tmp_path / "clone"
    case = Case("ours.py", "examples/theirs.py", "pocket", "captions")
    (root / "models" / "pocket").mkdir(parents=True)
    (root / "models" / "pocket" / "model_index.json").write_text("{}")
    (clone / "examples").mkdir(parents=True)
    (clone / "examples" / "theirs.py").write_text(_SCRIPT.replace("{seconds}", "0.1"))
    (root / "ours.py").write_text(_SCRIPT.replace("{seconds}", "0.05"))
    monkeypatch.setattr(peers, "ROOT", root)
    monkeypatch.setitem(CASES, "lora_sd15", case)
    return PeerArgs(
        clone=clone,
        cases=("lora_sd15",),
        num_rounds=2,
        num_steps=6,
        warmup_steps=2,
        work_dir=tmp_path / "work",
        output=tmp_path / "numbers.json",
    )


def test_both_sides_are_timed_by_their_own_clocks_and_compared(
    args: PeerArgs, capfd: pytest.CaptureFixture[str]
) -> None:
    peers.main(replace(args, num_rounds=1, output=None))
    capfd.readouterr()
    peers.main(args)  # whatever an earlier comparison left
    row = [cell.strip() for cell in capfd.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    # 8 pictures in 0.05 s and in 0.1 s
    speeds = ["160.0 (160.0 to 160.0)", "80.0 (80.0 to 80.0)", "2.00"]
    assert row[:5] == ["ours.py", "theirs.py", *speeds]
    assert all(float(cell.split()[0]) > 1000 for cell in row[5:])
    assert args.output is not None
    [numbers] = json.loads(args.output.read_text())
    assert numbers["ratio"] == pytest.approx(2)
    assert len(numbers["ours_images_per_s"]) == len(numbers["theirs_images_per_s"]) == 2


def test_each_round_tells_the_wait_for_the_first_step_and_the_whole_run(args: PeerArgs) -> None:
    peers.main(args)
    assert args.output is not None
    [numbers] = json.loads(args.output.read_text())
    for side, seconds in (("ours", 0.05), ("theirs", 0.1)):  # after 1000 s by the script's clock
        waited = numbers[f"{side}_seconds_to_first_step"]
        assert len(waited) == 2
        assert all(first > 1000 + seconds for first in waited)  # and what Python took to start
    assert not list(args.work_dir.glob("start-*"))  # so that the next round pays for its own
    for kind in ("wall", "cpu"):
        ours, theirs = (numbers[f"{side}_{kind}_seconds"] for side in ("ours", "theirs"))
        assert len(ours) == len(theirs) == 2
        assert min(*ours, *theirs) > 0
        assert numbers[f"{kind}_ratio"]["median"] == pytest.approx(sum(ours) / sum(theirs))
        assert numbers[f"{kind}_ratio"]["minimum"] == pytest.approx(min(ours) / min(theirs))
    row = peers.table_row({**numbers, "ours_seconds_to_first_step": [3.0, 9.0, 4.0]})
    assert row["ours, s to first step"] == "4.0 (3.0 to 9.0)"


def test_a_run_lasts_from_its_start_to_its_end_with_what_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    script = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    spent = peers.start([sys.executable, "-c", f"{script}\ntime.sleep(0.4)"], "one", tmp_path)
    assert spent.cpu >= 0.45  # told in hundredths of a second
    assert spent.wall >= 0.9
    compiles = "import sys; assert not sys.dont_write_bytecode"
    assert peers.start([sys.executable, "-c", compiles], "next", tmp_path).cpu < 0.45


def test_whole_runs_are_told_by_median_and_minimum_beside_the_goal() -> None:
    spent = {"ours_wall_seconds": [4.0, 6.0, 5.0], "theirs_wall_seconds": [10.0, 11.0, 8.0]}
    row = peers.whole_row(
        {
            **{"ours": "ours.py", "theirs": "examples/theirs.py", "goal": 0.5, **spent},
            **{"ours_cpu_seconds": [0.0], "theirs_cpu_seconds": [0.0], "cpu_ratio": None},
            "wall_ratio": peers.shares(*spent.values()),
        }
    )
    assert row["ours, s"] == "5.0 (4.0)"
    assert row["theirs, s"] == "10.0 (8.0)"
    assert row["ratio"] == "0.50 (0.50)"
    assert (row["goal"], row["reached"], row["CPU ratio"]) == ("0.5", "yes", "")
    assert peers.shares([5.0], [0.0]) is None  # Windows does not tell the processor's time


def test_a_run_that_stops_early_is_not_compared(args: PeerArgs) -> None:
    path = args.clone / "examples" / "theirs.py"
    path.write_text(path.read_text().replace("+ 1)", ")"))
    with pytest.raises(TrainingStopped, match="lora_sd15, theirs: 5 of 6 steps"):
        peers.main(args)


def test_a_failing_case_leaves_the_numbers_of_those_before(
    args: PeerArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (args.clone / "examples" / "broken.py").write_text("raise SystemExit(3)")
    broken = replace(CASES["lora_sd15"], theirs="examples/broken.py")
    monkeypatch.setitem(CASES, "dpo_sd15", broken)
    with pytest.raises(TrainingStopped, match=r"broken\.py"):
        peers.main(replace(args, cases=("lora_sd15", "dpo_sd15"), num_rounds=1))
    assert args.output is not None
    assert [numbers["case"] for numbers in json.loads(args.output.read_text())] == ["lora_sd15"]


def test_a_script_that_fails_ends_the_comparison_by_name(args: PeerArgs) -> None:
    (args.clone / "examples" / "theirs.py").write_text("raise SystemExit(3)")
    with pytest.raises(TrainingStopped, match=r"theirs\.py ended with exit code 3"):
        peers.main(args)


@pytest.mark.parametrize("missing", ["clone/examples/theirs.py", "root/ours.py"])
def test_what_is_missing_is_named_before_anything_runs(
    args: PeerArgs, tmp_path: Path, missing: str
) -> None:
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=Path(missing).name):
        peers.main(args)
    assert not args.work_dir.exists()


def test_the_first_sight_of_a_step_counts_whatever_its_tag_is(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(_WRITER, space)
    clock = {1: 10.0, 2: 12.0, 3: 15.0}
    rows = [("loss", step, wall) for step, wall in clock.items()]
    rows += [("late", step, wall + 1) for step, wall in clock.items()]
    space["write"](str(tmp_path / "deep" / "er"), rows)
    times = peers.step_times(tmp_path)
    assert times == [10.0, 12.0, 15.0]
    assert peers.durations(times) == [2.0, 3.0]


def test_a_run_without_scalars_is_not_a_speed(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="no scalars"):
        peers.step_times(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_both_sides_get_the_same_work(name: str, tmp_path: Path) -> None:
    args, case, run = PeerArgs(clone=tmp_path), CASES[name], tmp_path / "runs" / "one"
    ours = peers.our_command(args, case, tmp_path / "data", run, tmp_path / "caches")
    theirs = peers.their_command(args, case, tmp_path / "data", run, tmp_path / "caches")
    assert ours[0] == theirs[0] == sys.executable
    both = "--pretrained_model_name_or_path --resolution --train_batch_size --rank --learning_rate "
    both += "--lr_scheduler --max_train_steps --dataloader_num_workers --mixed_precision --seed"
    for flag in both.split():
        assert ours[ours.index(flag) + 1] == theirs[theirs.index(flag) + 1]
    assert ours[ours.index("--lora_layers") + 1] == "to_k,to_q,to_v,to_out.0"
    for flag in ("--lora_layers", "--max_sequence_length"):  # where the example knows them
        if flag in theirs:
            assert theirs[theirs.index(flag) + 1] == ours[ours.index(flag) + 1]


def test_both_sides_of_sd3_get_a_model_whose_clips_read_what_the_example_sends(
    tmp_path: Path,
) -> None:
    args, case = PeerArgs(clone=tmp_path, work_dir=tmp_path / "work"), CASES["lora_sd3"]
    peers.make_model(args, case)
    made, source = peers.model_folder(args, case), peers.ROOT / "models" / "pocket-sd3"
    for number in ("", "_2"):
        part = f"text_encoder{number}"
        config = json.loads((made / part / "config.json").read_text())
        tokenizer = json.loads((made / f"tokenizer{number}" / "tokenizer_config.json").read_text())
        assert config["max_position_embeddings"] == tokenizer["model_max_length"] == 77
        long, short = (load_file(folder / part / "model.safetensors") for folder in (made, source))
        [name] = (name for name in long if name.endswith("position_embedding.weight"))
        assert len(long[name]) == 77
        assert (long[name][: len(short[name])] == short[name]).all()
    assert (made / "transformer" / "config.json").is_file()
    sd15 = CASES["lora_sd15"]
    peers.make_model(args, sd15)
    assert peers.model_folder(args, sd15) == peers.ROOT / "models" / "pocket-sd15"


def test_pairs_have_the_columns_of_the_published_set(tmp_path: Path) -> None:
    args = PeerArgs(clone=tmp_path, batch_size=2, resolution=32)
    folder = peers.make_data(args, CASES["dpo_sd15"], tmp_path)
    table = pq.read_table(folder / "train.parquet")
    assert table.column_names == ["jpg_0", "jpg_1", "label_0", "caption"]
    assert table.num_rows == 8
    assert folder == peers.make_data(args, CASES["dpo_sd15"], tmp_path)  # not made anew


@pytest.mark.parametrize("name", ["num_steps", "warmup_steps", "num_rounds", "rank"])
def test_numbers_below_one_are_refused(name: str, tmp_path: Path) -> None:
    numbers: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"--{name} 0 must be at least 1"):
        PeerArgs(clone=tmp_path, **numbers)


def test_a_run_of_warm_up_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--num_steps 5 must be above --warmup_steps 5"):
        PeerArgs(clone=tmp_path, num_steps=5)
