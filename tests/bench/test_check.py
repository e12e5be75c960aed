"""dojo.bench check: steps that fail, die or hang leave the others; JSON, rows, exit status."""

import importlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import train_full_sd3
from dojo import cli
from dojo.bench import check, memory, parts, report, rl, scripted, supervised, watched
from dojo.bench.check import CheckArgs, Result, Step
from dojo.bench.report import Claim, Place, Report
from dojo.cli import TrainingStopped, UserError
from tests.conftest import ROOT

HERE = "tests.bench.steps_for_tests"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def step(name: str, limit: int = 60, anywhere: bool = False) -> Step:
    return Step(name, f"it {name.replace('_', ' ')}", f"{HERE}:{name}", limit, anywhere)


def run(names: Sequence[str], folder: Path, limit: float = 600) -> dict[str, Result]:
    folder.mkdir(exist_ok=True)
    place = Place(folder, pocket=True)
    steps = [step(name) for name in names]
    return {result.name: result for result in check.run_steps(steps, place, folder, limit)}


# -- the runner -------------------------------------------------------------------------------


def test_a_step_that_fails_or_dies_does_not_stop_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(["dies", "does_not_hold", "refuses", "is_skipped", "holds"], tmp_path)
    states = {name: result.state for name, result in results.items()}
    assert states == {
        "dies": "failed",
        "does_not_hold": "failed",
        "refuses": "failed",
        "is_skipped": "skipped",
        "holds": "passed",
    }
    # What was found before it died is kept, and what it died of is said.
    assert results["dies"].found.claims == [Claim("this was found before", "1", True)]
    assert results["dies"].trouble == "ZeroDivisionError: of all things"
    assert results["refuses"].trouble == "stopped: --model: there is none"
    said = capsys.readouterr().out
    assert "[1/5] dies: it dies" in said
    assert "NOT  an error is small (below 1): nan" in said
    assert "skipped: the weather is bad" in said
    assert "px 64, images/s 10.0" in said

    check.write(tmp_path, list(results.values()))
    record = json.loads((tmp_path / "check.json").read_text())
    assert [one["state"] for one in record["steps"]] == list(states.values())
    assert record["steps"][-1]["found"]["numbers"] == {"answer": 42}
    assert record["environment"]["torch"]["version"] == torch.__version__
    rows = (tmp_path / "rows.md").read_text()
    assert rows.startswith("## A table\n\n| px | images/s | command |")
    table = check.summary(list(results.values())).splitlines()
    assert len(table) == 2 + 5
    assert "an error is small (below 1)" in table[3]


def test_a_step_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = check.follow

    def follow(words: Sequence[str], output: Any, limit: float) -> int | None:
        return real(words, output, 0.01 if "never_ends" in words[3] else limit)

    class Patient(check.subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            # However long imports take: the limit comes when the child is there.
            while timeout == 0.01 and not report.read(file).numbers:
                time.sleep(0.01)
            return super().wait(timeout)

    file = tmp_path / "never_ends.json"
    monkeypatch.setattr(check, "follow", follow)
    monkeypatch.setattr(check.processes.subprocess, "Popen", Patient)
    results = run(["never_ends", "is_skipped"], tmp_path)
    assert results["never_ends"].state == "timed out"
    child = results["never_ends"].found.numbers["child"]
    gone = not psutil.pid_exists(child)
    assert gone or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert results["is_skipped"].state == "skipped"


def test_a_step_gets_the_rest_of_the_time_and_none_is_begun_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def follow(words: Sequence[str], output: Any, limit: float) -> int:
        limits.append(limit)
        return 0

    monkeypatch.setattr(check, "follow", follow)
    monkeypatch.setattr(check, "POCKET_PATIENCE", 1)
    clock = iter([0.0, 0.0, 0.0, 30.0, 30.0, 30.0, 95.0, 95.0, 95.0, 95.0])
    monkeypatch.setattr(check.time, "monotonic", lambda: next(clock))
    results = run(["holds", "dies", "refuses"], tmp_path, limit=100)
    assert limits == [60, 60]  # their own
    assert results["refuses"].state == "not begun"
    limits.clear()
    clock = iter([0.0, 75.0, 75.0, 80.0])
    run(["holds"], tmp_path, limit=100)
    assert limits == [25.0]


@pytest.mark.parametrize(
    ("states", "error"),
    [
        (["passed", "skipped"], None),
        (["passed", "failed"], "not as it should be: 1"),
        (["timed out", "not begun"], r"not as it should be: 0; not begun, .*--minutes\): 1$"),
        (["passed", "not begun"], "^not begun, for want of time"),
    ],
)
def test_the_exit_status_says_what_it_comes_to(states: list[str], error: str | None) -> None:
    results = [Result(str(number), state) for number, state in enumerate(states)]
    place = Place(Path(), pocket=True)
    if error is None:
        check.conclude(results, place)
        return
    with pytest.raises(TrainingStopped, match=error):
        check.conclude(results, place)


@no_gpu
def test_without_a_gpu_every_step_says_in_a_line_what_it_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = CheckArgs(steps=("precision", "lora-sdxl", "memory"), output_dir=tmp_path / "new")
    with pytest.raises(UserError, match=r"nothing was checked .*dojo.doctor"):
        check.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "[1/3] precision: products and networks in bf16, fp16, tf32",
        "    skipped: no GPU: products and networks in bf16, fp16, tf32",
    ]
    assert lines[5].startswith("    skipped: no GPU")
    assert (tmp_path / "new" / "check.json").is_file()
    check.take(tmp_path / "new")  # an earlier check's folder is taken again


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        check.take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_steps_are_chosen_by_name() -> None:
    args = cli.parse(CheckArgs, None, ["--steps", "attention", "precision"])
    assert [one.name for one in args.chosen] == ["attention", "precision"]
    assert CheckArgs().chosen == list(check.STEPS)
    with pytest.raises(SystemExit):
        cli.parse(CheckArgs, None, ["--steps", "everything"])


def test_every_step_has_its_function_and_the_time_is_less_than_ten_minutes() -> None:
    for one in check.STEPS:
        module, _, name = one.act.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    assert len({one.name for one in check.STEPS}) == len(check.STEPS)
    assert CheckArgs().minutes <= 9


def test_the_launcher_passes_its_words_on() -> None:
    text = (ROOT / "scripts" / "check_gpu.sh").read_text()
    assert text.rstrip().endswith('exec python -m dojo.bench check "$@"')


# -- the steps, on the pocket models ----------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, pocket=True)


def failed(found: Report) -> list[Claim]:
    return [claim for claim in found.claims if not claim.holds]


def test_numbers_hold_on_the_pocket_models(place: Place) -> None:
    found = Report()
    parts.precision(found, place)
    parts.attention(found, place)
    assert not failed(found)
    texts = [claim.text for claim in found.claims]
    assert "a product in bf16 is right (below 0.01)" in texts
    assert "pocket-sdxl predicts in bf16 as in fp32 (below 0.05)" in texts
    assert any("a fused backend works" in text for text in texts)


def test_a_network_that_predicts_otherwise_is_noticed(place: Place) -> None:
    def spoil(network: torch.nn.Module) -> None:
        with torch.no_grad():
            for param in network.parameters():
                param.mul_(1.1)

    exact = parts.prediction(place, "pocket", torch.float32)
    spoilt = parts.prediction(place, "pocket", torch.float32, spoil)
    assert parts.distance(spoilt, exact) > max(parts.NETWORKS.values())


def test_what_other_parts_bring_is_checked_where_it_is_there(place: Place) -> None:
    found = Report()
    parts.quantised(found, place)
    parts.offload(found, place)
    assert not failed(found)
    assert found.claims or all("not there" in why for why in found.skipped)


def test_equal_runs_leave_equal_bytes(place: Place) -> None:
    found = Report()
    scripted._equal_runs(found, place, "pocket")
    assert len(found.claims) == 3
    assert not failed(found)


def test_the_ratio_is_read_from_the_real_script(place: Place) -> None:
    found = Report()
    scripted.ratio(found, place)
    (claim,) = found.claims
    assert (claim.holds, claim.value) == (True, "off by 0")


@no_gpu
def test_deepspeed_says_why_it_is_skipped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(report.Skip, match="needs a GPU"):
        scripted.deepspeed(Report(), place)
    monkeypatch.setattr(Place, "on_gpu", True)
    monkeypatch.setattr(scripted, "find_spec", lambda name: None)
    with pytest.raises(report.Skip, match="pip install deepspeed"):
        scripted.deepspeed(Report(), place)


def test_every_stage_is_started_as_a_user_does_and_compared(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's command with a stand-in for the processes, of which ZeRO-2's lose a step and
    ZeRO-3's learn something else."""
    started: list[list[str]] = []

    def run(words: list[str], **_: object) -> Any:
        started.append(words)
        output = Path(words[words.index("--output_dir") + 1])
        output.mkdir(parents=True)
        losses = [1.0, 0.9, 0.8, 0.7 if "zero3" not in words[5] else 0.71]
        rows = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
        text = "".join(json.dumps(row) + "\n" for row in rows[: 3 if "zero2" in words[5] else 4])
        (output / "metrics.jsonl").write_text(text)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(Place, "on_gpu", True)
    monkeypatch.setattr(scripted, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(scripted.subprocess, "run", run)
    found = Report()
    scripted.deepspeed(found, place)
    assert [claim.holds for claim in found.claims] == [True, False, False]
    names = ["one_gpu", *(f"deepspeed_zero{stage}" for stage in (1, 2, 3))]
    for name, words in zip(names, started, strict=True):
        config = ROOT / "scripts" / "accelerate" / f"{name}.yaml"
        assert words[2:6] == ["accelerate.commands.launch", "--quiet", "--config_file", str(config)]
        assert config.is_file()
        place_of_script = words.index(str(ROOT / "train_full_sd3.py"))
        args = cli.parse(train_full_sd3.Args, None, words[place_of_script + 1 :])
        assert (args.run.mixed_precision, args.optim.max_train_steps) == ("no", 4)


def test_a_stage_that_fails_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    done = type("Done", (), {"returncode": 3})
    monkeypatch.setattr(scripted.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(TrainingStopped, match=r"deepspeed_zero1\.yaml: exit status 3"):
        scripted.launched(place, "deepspeed_zero1", 1)


# -- rows of docs/benchmarks.md ---------------------------------------------------------------


def heads() -> set[tuple[str, ...]]:
    """The heads of all tables in docs/benchmarks.md."""
    lines = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    return {
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line, below in itertools.pairwise(lines)
        if below.startswith("| ---")
    }


@pytest.mark.parametrize(
    ("model", "method", "table"),
    [("sd35-medium", "lora", "SD3.5-Medium"), ("sdxl", "full", "SD1.5 and SDXL")],
)
def test_a_measurement_is_a_row_of_the_page(model: Any, method: Any, table: str) -> None:
    args = supervised.SupervisedArgs(
        model=model, method=method, batch_size=8, gradient_checkpointing=True
    )
    result = {"device": "NVIDIA H100", "pixels": 1024, "tflop_per_image": 26.79, "mfu": 0.41}
    result |= {"images_per_s": 12.34, "memory_gib": 20.06}
    name, row = supervised.documented(args, result)
    assert name == f"{table} on NVIDIA H100"
    assert tuple(row) in heads()
    assert row["limit, images/s"] == "29.5"
    assert (row["images/s"], row["peak GiB"], row["MFU"]) == ("12.3", "20.1", "41.0%")
    words = row["command"].strip("`").split()
    assert words[:4] == ["python", "-m", "dojo.bench", "supervised"]
    assert cli.parse(supervised.SupervisedArgs, None, words[4:]) == args


def test_a_measurement_of_learning_from_rewards_is_a_row_of_the_page() -> None:
    args = rl.RlArgs(model="sd35-medium", guidance_scale=4.5)
    result = {
        "sample_steps": 10,
        "forward_passes_by_rule": {"sample": 20, "train": 18.0, "reference": 0},
        "seconds_per_image": dict.fromkeys(rl.PHASES, 0.1),
        "trained_steps": 3,
        "images_per_s": 2.5,
        "memory_gib": 30.0,
        "device": "NVIDIA H100",
        "pixels": [512, 512],
    }
    name, row = rl.documented(args, result)
    assert name == "SD3.5-Medium on NVIDIA H100, 512 px, 10 steps, grpo"
    assert tuple(row) in heads()
    assert (row["case"], row["forward passes by rule"]) == ("window of 3, guidance", "20 + 18")
    words = row["command"].strip("`").split()
    assert cli.parse(rl.RlArgs, None, words[4:]) == args


# -- memory -----------------------------------------------------------------------------------


def test_a_phase_is_compared_with_its_measured_peak() -> None:
    computed = {"text cache": 9.5, "training": 10.0, "validation": 0.05}
    measured = {"text cache": 9.6, "training": 12.0, "validation": 0.01, "latent cache": 3.0}
    compared = memory.compare(computed, measured)
    assert [one.phase for one in compared] == [*computed, "latent cache"]
    assert [one.fits(0.1) for one in compared] == [True, False, True, False]
    assert compared[1].off == pytest.approx(-1 / 6)
    with pytest.raises(TrainingStopped) as stopped:
        memory.refuse(compared, 0.1)
    assert str(stopped.value) == (
        "further off than 10%: training 10.00 computed, 12.00 measured (-17%); "
        "latent cache 0.00 computed, 3.00 measured (-100%)"
    )
    memory.refuse(compared[:1], 0.1)
    row = memory.row(compared[1], 0.1)
    assert (row["off"], row["within 10%"]) == ("-16.7%", "no")


def test_too_much_computed_is_as_wrong_as_too_little() -> None:
    (one,) = memory.compare({"training": 12.0}, {"training": 10.0})
    assert not one.fits(0.1)
    assert one.fits(0.25)


@no_gpu
def test_memory_is_refused_without_a_gpu() -> None:
    with pytest.raises(UserError, match=r"dojo.bench memory needs a GPU"):
        memory.main(memory.MemoryArgs(model="pocket"))


def test_the_peak_of_a_phase_is_its_own(tmp_path: Path) -> None:
    in_use = {"peak": 0}

    def reset() -> None:
        in_use["peak"] = 1  # what stays

    made = watched.Watch(tmp_path / "peaks.json", lambda: in_use["peak"], reset)

    def use(size: int) -> None:
        in_use["peak"] = max(in_use["peak"], size)

    cache = made.wrapped("text cache", use, ends=True)
    training = made.wrapped("training", use, ends=False)
    validation = made.wrapped("validation", use, ends=True)
    use(3)
    cache(50)
    training(20)
    use(25)  # backward pass and step, after what began the phase
    validation(90)
    training(21)
    assert json.loads(made.file.read_text()) == {
        "loading": 3,
        "text cache": 50,
        "training": 25,
        "validation": 90,
    }
    assert made.current == "training"


def test_every_beginning_of_a_phase_is_there() -> None:
    for beginnings in watched.BEGINNINGS.values():
        for path, _ in beginnings:
            module, _, name = path.partition(":")
            owner: Any = importlib.import_module(module)
            for part in name.split("."):
                owner = getattr(owner, part)
            assert callable(owner), path


@pytest.mark.slow
def test_phases_are_computed_and_measured_of_the_real_script(place: Place) -> None:
    args = memory.MemoryArgs(
        model="pocket", batch_size=2, mixed_precision="no", work_dir=place.folder
    )
    computed, measured = memory.measure(args)
    named = {"text cache", "latent cache", "training", "validation"}
    assert computed.keys() == measured.keys() == named
    assert all(size > 0 for size in (*computed.values(), *measured.values()))
    assert not list(place.folder.glob("memory-*"))  # caches and runs of gigabytes do not stay
