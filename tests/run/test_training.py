"""Claims about a run: its seed, its stops, its records, and that it goes on exactly."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train_lora_sd3 as script
from dojo import cli
from dojo import files as files_module
from dojo.cli import TrainingStopped, UserError
from dojo.finetune import lora
from dojo.models import sd3
from dojo.models.sd3 import models
from dojo.run import checkpoint, dry_run, folders, phases, trackers
from dojo.run import run as training
from dojo.run.cost import Cost
from dojo.run.learner import Learner
from dojo.run.replicas import Replicas
from tests.conftest import MakeArgs, lora_flags, reset_accelerate


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file under a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose cache the runs of this file share."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def flags(place: Path, tiny_sd3: Path, scene_data: Path) -> list[str]:
    """A run of three steps that keeps every checkpoint; its seed is not given."""
    return [*lora_flags(place, tiny_sd3, scene_data), "--checkpointing_steps", "1"]


@pytest.fixture(scope="module")
def whole(place: Path, flags: list[str]) -> Path:
    """The output folder of that run, finished and never interrupted."""
    script.main(cli.parse(script.Args, None, flags))
    reset_accelerate()
    return place / "run"


def again(flags: list[str], *more: str) -> None:
    reset_accelerate()
    script.main(cli.parse(script.Args, None, [*flags, *more]))


# One step


class Number:
    """One number that is trained."""

    def __init__(self) -> None:
        network = nn.Linear(1, 1, bias=False)
        self.weight = network.weight = nn.Parameter(torch.ones(1, 1))
        self.modules = [network]
        self.params = self.groups = [self.weight]

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file({"weight": self.weight.detach()}, folder / "number.safetensors")

    def restore(self, folder: Path) -> None:
        self.weight.data.copy_(load_file(folder / "number.safetensors")["weight"])

    def save_result(self, folder: Path) -> Path:
        self.save(folder)
        return folder / "number.safetensors"

    def save_average(self, folder: Path) -> None:
        self.save(folder / "average")

    def restore_average(self, folder: Path) -> None:
        self.restore(folder / "average")

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass
class Toy:
    """A run that trains one number: the loss is its own factor times the number."""

    run: training.Run
    weight: nn.Parameter
    learner: Learner

    def step(self, factor: float) -> bool:
        with self.learner.accumulate():
            return self.learner.step((self.weight * factor).sum())

    @property
    def last(self) -> dict[str, float]:
        """The last row of the run's metrics."""
        return metrics(self.run.output_dir)[-1]


def started(args: script.Args) -> training.Run:
    """A run whose folder is open: 100 samples make an epoch."""
    run = training.start(args.run, args.optim)
    run.plan(args.optim, 100, "fingerprint")
    assert run.begin(args, lora.WEIGHTS)
    return run


def toy(args: script.Args, *, scaler: torch.amp.GradScaler | None = None) -> Toy:
    run = started(args)
    if scaler is not None:
        # What Accelerator(mixed_precision="fp16") sets up on a GPU.
        run.accelerator.scaler = scaler  # pyright: ignore
        run.accelerator.native_amp = True
        run.accelerator.state._mixed_precision = "fp16"  # pyright: ignore
    number = Number()
    return Toy(run, number.weight, Learner(run, number, args.optim, args.ema))


def test_the_gradient_norm_is_that_before_clipping(lora_args: MakeArgs, tmp_path: Path) -> None:
    trained = toy(lora_args(tmp_path, "--max_grad_norm", "0.1"))
    assert trained.step(5.0)
    assert trained.last["grad_norm"] == pytest.approx(5)
    assert trained.run.step == 1


@pytest.mark.parametrize("largest", [0.4, 0.7, 5.0])
def test_gradients_are_clipped_to_the_bit_as_by_torch_and_untouched_below(largest: float) -> None:
    both = [[nn.Parameter(torch.zeros(size)) for size in (3, 1, 40)] for _ in range(2)]
    for own, torchs in zip(*both, strict=True):
        own.grad = torch.linspace(-1, 1, own.numel() + 1)[1:] * largest / 4
        torchs.grad = own.grad.clone()
    ours, theirs = both
    before = [one.grad._version for one in ours if one.grad is not None]
    norm = Replicas(Accelerator()).clip(ours, 0.5)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, 0.5))
    for own, torchs in zip(ours, theirs, strict=True):
        assert own.grad is not None
        assert torchs.grad is not None
        assert torch.equal(own.grad, torchs.grad)
    written = [one.grad._version for one in ours if one.grad is not None]
    assert (written == before) is (float(norm) <= 0.5)


def test_the_logged_loss_is_the_mean_since_the_last_row(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    flags = ("--logging_steps", "3", "--learning_rate", "1e-9", "--max_train_steps", "7")
    trained = toy(lora_args(tmp_path, *flags))
    for factor in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        assert trained.step(factor)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 3, 6]
    assert [row["loss"] for row in rows] == pytest.approx([1, 2.5, 5])
    assert [row["grad_norm"] for row in rows] == pytest.approx([1, 3, 6])


def test_an_accumulated_loss_is_the_mean_of_its_micro_batches(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    args = lora_args(tmp_path, "--gradient_accumulation_steps", "2", "--learning_rate", "1e-9")
    trained = toy(args)
    assert not trained.step(2.0)
    assert trained.run.step == 0
    assert trained.step(4.0)
    assert trained.last["loss"] == pytest.approx(3)
    assert trained.last["grad_norm"] == pytest.approx(3)  # the gradient is the mean too


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_step_that_is_not_finite_stops_before_the_weights_change(
    lora_args: MakeArgs, tmp_path: Path, factor: float
) -> None:
    trained = toy(lora_args(tmp_path))
    trained.step(1.0)
    before = trained.weight.detach().clone()
    with pytest.raises(TrainingStopped, match=r"step 2 is not finite.*there is no checkpoint"):
        trained.step(factor)
    assert torch.equal(trained.weight.detach(), before)


def test_one_bad_micro_batch_stops_the_step(lora_args: MakeArgs, tmp_path: Path) -> None:
    trained = toy(lora_args(tmp_path, "--gradient_accumulation_steps", "2"))
    trained.step(math.nan)
    with pytest.raises(TrainingStopped, match="step 1 is not finite"):
        trained.step(1.0)


# Under fp16, with torch's own gradient scaler


def test_steps_that_the_scaler_skips_do_not_count(lora_args: MakeArgs, tmp_path: Path) -> None:
    trained = toy(lora_args(tmp_path), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    assert [trained.step(math.inf), trained.step(math.inf)] == [False, False]
    assert trained.run.step == 0
    assert trained.learner.schedule.last_epoch == 0
    assert trained.weight.item() == 1
    assert trained.run.accelerator.scaler.get_scale() == 2  # pyright: ignore
    assert trained.step(3.0)
    assert trained.last["grad_norm"] == pytest.approx(3)  # without the scale
    assert trained.run.step == trained.learner.schedule.last_epoch == 1
    assert trained.weight.item() < 1


def test_twenty_skipped_steps_in_a_row_stop_the_run(lora_args: MakeArgs, tmp_path: Path) -> None:
    trained = toy(lora_args(tmp_path), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**60))
    for _ in range(19):
        trained.step(math.inf)
    trained.step(1.0)  # one good step begins the count anew
    for _ in range(19):
        trained.step(math.inf)
    with pytest.raises(TrainingStopped, match=r"20 steps in a row .* fp16"):
        trained.step(math.inf)
    assert trained.run.step == 1


def test_skipped_losses_do_not_reach_the_logs(lora_args: MakeArgs, tmp_path: Path) -> None:
    trained = toy(lora_args(tmp_path), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    trained.step(math.inf)
    assert trained.step(1.0)
    assert [row["loss"] for row in metrics(tmp_path / "run")] == pytest.approx([1.0])


# Epochs that are not broken off, and what their steps leave


def by_epochs(args: script.Args, **more: Any) -> Toy:
    """A run whose epochs are two steps long."""
    trained = toy(args, **more)
    trained.run.plan(args.optim, 2 * trained.run.samples_per_step, "fingerprint", whole_epochs=True)
    return trained


def test_a_run_by_epochs_ends_with_a_checkpoint_where_the_scaler_skipped_a_step(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    args = lora_args(tmp_path, "--max_train_steps", "4", "--checkpointing_steps", "500")
    trained = by_epochs(args, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    told: list[int] = []
    trained.run.stopping.end_within_epoch = lambda began, left: told.append(left)
    losses = iter([math.inf, *[1.0] * 9])
    for _ in trained.run.epochs():
        began = trained.run.step
        for _ in range(2):
            trained.step(next(losses))
        trained.learner.keep(since=began)
    # Three epochs for four steps: of the first one was skipped, and epochs are not broken off.
    assert trained.run.step == 5
    assert told == [1, 0] * 3
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == 5


def test_epochs_are_counted_from_where_the_run_stands(lora_args: MakeArgs, tmp_path: Path) -> None:
    trained = by_epochs(lora_args(tmp_path, "--max_train_steps", "6"))

    def rest() -> list[int]:
        found = []
        for epoch in trained.run.epochs():
            found.append(epoch)
            trained.step(1.0)
            trained.step(1.0)
        return found

    assert rest() == [0, 1, 2]
    assert rest() == []
    trained.run.step, trained.run.samples = 4, 4 * trained.run.samples_per_step  # as a resume does
    assert rest() == [2]


def test_a_run_that_would_end_within_an_epoch_is_refused_where_that_matters(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    for steps, fitting in ((1, "take 2 "), (5, "take 4 or 6 ")):
        args = lora_args(tmp_path, "--max_train_steps", str(steps))
        run = training.start(args.run, args.optim)
        run.plan(args.optim, 4, "fingerprint")
        with pytest.raises(UserError, match=rf"--max_train_steps {steps}: .*{fitting}"):
            run.plan(args.optim, 4, "fingerprint", whole_epochs=True)


def test_a_row_has_means_and_peaks_since_the_last_one_and_what_was_noted(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    trained = toy(lora_args(tmp_path, "--logging_steps", "2", "--learning_rate", "1e-9"))
    run = trained.run
    numbers = ([1.0, 3.0], [4.0], [6.0, 6.0, 6.0])
    for i, values in enumerate(numbers):
        run.average(kl=torch.tensor(values))
        run.peak(deviation=torch.tensor(values))
        if i != 1:
            run.note({"reward": float(i)})
        assert trained.step(1.0 + i)
    run.log_rest()
    run.log_rest()  # nothing is left
    rows = [
        [row[name] for name in ("step", "loss", "kl", "deviation")]
        for row in metrics(tmp_path / "run")
    ]
    assert rows == [pytest.approx(row) for row in ([1, 1, 2, 3], [2, 2, 4, 4], [3, 3, 6, 6])]
    assert [row.get("reward") for row in metrics(tmp_path / "run")] == [0, None, 2]


def test_the_rest_of_an_epoch_gets_a_row_of_its_own(lora_args: MakeArgs, tmp_path: Path) -> None:
    args = lora_args(tmp_path, "--logging_steps", "10", "--learning_rate", "1e-9")
    trained = toy(args)
    trained.run.num_steps = 99
    for factor in (1.0, 2.0, 4.0):
        trained.run.average(kl=torch.tensor([factor]))
        assert trained.step(factor)
    trained.run.log_rest()
    first, rest = metrics(tmp_path / "run")
    assert (first["step"], rest["step"]) == (1, 3)
    assert [rest[name] for name in ("loss", "kl", "grad_norm")] == pytest.approx([3, 3, 4])


def test_what_was_learned_is_kept_when_something_outside_stops_the_run(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    trained = toy(lora_args(tmp_path, "--max_train_steps", "9"))
    learner = trained.learner
    trained.step(1.0)

    def kept() -> list[int]:
        return [step for step, _ in checkpoint.existing(tmp_path / "run")]

    with learner.kept_when_stopped():
        assert kept() == []
    # A mistake in the code may have left anything.
    with pytest.raises(RuntimeError, match="mistake"), learner.kept_when_stopped():
        raise RuntimeError("mistake")
    assert kept() == []
    with pytest.raises(TrainingStopped, match="server"), learner.kept_when_stopped():
        raise TrainingStopped("server")
    assert kept() == [1]


def test_a_checkpoint_is_due_when_a_step_since_the_last_one_was(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    args = lora_args(tmp_path, "--checkpointing_steps", "3", "--max_train_steps", "14")
    trained = toy(args)

    def steps() -> list[int]:
        return [step for step, _ in checkpoint.existing(tmp_path / "run")]

    def save(step: int, **options: Any) -> list[int]:
        before = steps()
        trained.run.step = step
        trained.learner.keep(**options)
        return [step for step in steps() if step not in before]

    assert save(0, now=True) == []  # nothing has been learned
    assert save(2, since=0) == []
    assert save(4, since=2) == [4]
    assert save(4, now=True) == []  # it is there already
    assert save(5, since=4) == []
    assert save(5, now=True) == [5]
    assert save(12, since=5) == [12]
    assert save(12, now=True) == []
    assert save(14, since=12) == [14]  # the last
    names = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (4, 5, 12, 14)}


# A whole run


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"args.json", "metrics.jsonl", "README.md", lora.WEIGHTS} <= names
    assert {f"checkpoint-{n}" for n in (1, 2, 3)} <= names
    assert not [name for name in names if name.startswith(".")]
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["eta_s"] >= rows[2]["eta_s"] == 0
    for row in rows:
        wanted = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "memory_gib"}
        assert wanted | {"seconds_data", "seconds_train"} <= set(row)
        assert row["epoch"] == pytest.approx(row["step"] * 2 / 10)
        assert all(math.isfinite(value) for value in row.values())
    record = json.loads((whole / "args.json").read_text())
    assert record["args"]["optim"]["max_train_steps"] == 3
    assert record["args"]["lora"]["rank"] == 2
    assert record["num_processes"] == 1
    assert {"python", "torch", "diffusers", "sd-dojo"} <= set(record["versions"])


def test_the_result_is_the_last_checkpoint(whole: Path) -> None:
    result = (whole / lora.WEIGHTS).read_bytes()
    assert (whole / "checkpoint-3" / lora.WEIGHTS).read_bytes() == result
    assert (whole / "checkpoint-2" / lora.WEIGHTS).read_bytes() != result


def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(
    whole: Path, flags: list[str], tmp_path: Path
) -> None:
    # Its seed was drawn by the first run and is found in the checkpoint.
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(whole / "checkpoint-1", run / "checkpoint-1")
    shutil.copytree(whole / "checkpoint-1", run / ".checkpoint-2.partial")
    shutil.copyfile(whole / "metrics.jsonl", run / "metrics.jsonl")  # rows that were lost
    again(flags, "--output_dir", str(run), "--resume_from_checkpoint", "latest")
    assert (run / lora.WEIGHTS).read_bytes() == (whole / lora.WEIGHTS).read_bytes()
    ends = [folder / "checkpoint-3" for folder in (run, whole)]
    assert (ends[0] / "state.json").read_text() == (ends[1] / "state.json").read_text()
    moments = [torch.load(end / "optimizer.pt", weights_only=True)["state"] for end in ends]
    assert moments[0].keys() == moments[1].keys() != set()
    for number, state in moments[0].items():
        assert all(torch.equal(state[name], moments[1][number][name]) for name in state)
    numbers = ("step", "epoch", "loss", "lr", "grad_norm")
    rows = [[{name: row[name] for name in numbers} for row in metrics(f)] for f in (run, whole)]
    assert rows[0] == rows[1]
    seeds = [json.loads((f / "args.json").read_text())["seed"] for f in (run, whole)]
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("more", [(), ("--resume_from_checkpoint", "latest")])
def test_a_finished_run_started_again_changes_nothing_and_says_so(
    whole: Path, flags: list[str], more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(whole)
    again(flags, *more)
    assert "finished (3 steps): nothing to do" in capsys.readouterr().out
    assert files(whole) == before


@pytest.mark.parametrize(
    "more", [("--learning_rate", "1e-3"), ("--seed", "5"), ("--max_train_steps", "4")]
)
def test_another_run_in_an_occupied_folder_is_refused(
    whole: Path, flags: list[str], more: tuple[str, ...]
) -> None:
    before = files(whole)
    with pytest.raises(UserError, match="--overwrite_output_dir") as refused:
        again(flags, *more)
    assert "--resume_from_checkpoint latest" in str(refused.value)
    assert files(whole) == before


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--seed", "5"), "--seed"),
        (("--train_batch_size", "3"), "samples per step"),
        (("--max_train_samples", "7"), "data"),
        (("--resolution", "32"), "data"),
    ],
)
def test_a_run_is_not_continued_as_another(
    whole: Path, flags: list[str], tmp_path: Path, more: tuple[str, ...], word: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-1", run / "checkpoint-1")
    resume = ["--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=word):
        again(flags, *resume, *more)


def test_a_finished_run_can_be_made_longer(whole: Path, flags: list[str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    resume = ["--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    again(flags, *resume, "--max_train_steps", "4")
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert (run / lora.WEIGHTS).read_bytes() != (whole / lora.WEIGHTS).read_bytes()


def test_two_micro_batches_of_two_are_one_batch_of_four(flags: list[str], tmp_path: Path) -> None:
    # A large epsilon: Adam would blow the rounding of gradients near zero up to whole steps.
    common = ["--seed", "0", "--adam_epsilon", "1e-3", "--max_train_steps", "2"]
    small = ["--train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    again(flags, *common, *small, "--output_dir", str(tmp_path / "small"))
    again(flags, *common, "--train_batch_size", "4", "--output_dir", str(tmp_path / "large"))
    first, second = (load_file(tmp_path / name / lora.WEIGHTS) for name in ("small", "large"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("small", "large")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert all(tensor.any() for name, tensor in first.items() if "lora_B" in name)


def test_a_loss_that_is_not_finite_ends_the_script_and_harms_nothing(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    real, calls = models.velocity, []
    kept: dict[str, tuple[int, bytes]] = {}

    def poisoned(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) < 3:
            return real(*args, **options)
        kept.update(files(run / "checkpoint-2"))
        return real(*args, **options) * math.inf

    monkeypatch.setattr(models, "velocity", poisoned)
    monkeypatch.setattr(sys, "argv", ["train_lora_sd3.py", *flags, "--output_dir", str(run)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(script.main, script.Args, script.__doc__)
    assert stopped.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("stopped: step 3 is not finite")
    assert str(run / "checkpoint-2") in last
    assert "--learning_rate" in last
    assert files(run / "checkpoint-2") == kept != {}
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert not (run / lora.WEIGHTS).exists()
    assert not (run / "finished.json").exists()
    assert not list(run.glob("checkpoint-3"))


# Seeds and records


def seed_of(args: script.Args) -> int:
    reset_accelerate()
    return started(args).seed


def test_a_seed_that_is_not_given_is_drawn_once(lora_args: MakeArgs, tmp_path: Path) -> None:
    first = seed_of(lora_args(tmp_path))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["seed"] == first
    # Killed before its first checkpoint: the same run goes on with the same seed.
    resumed = lora_args(tmp_path, "--resume_from_checkpoint", "latest")
    assert seed_of(resumed) == seed_of(resumed) == first
    assert seed_of(lora_args(tmp_path)) != first
    assert seed_of(lora_args(tmp_path, "--seed", "0")) == 0


def test_latest_in_an_empty_folder_starts_from_zero_and_says_so(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = lora_args(tmp_path, "--resume_from_checkpoint", "latest")
    assert training.start(args.run, args.optim).step == 0
    assert "starting from zero" in capsys.readouterr().out


def test_a_named_checkpoint_that_is_not_there_is_refused(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    args = lora_args(tmp_path, "--resume_from_checkpoint", "checkpoint-7")
    with pytest.raises(UserError, match="no checkpoint-7"):
        training.start(args.run, args.optim)
    assert not (tmp_path / "run").exists()


def test_processes_that_know_nothing_of_each_other_are_refused(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = lora_args(tmp_path)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 is set and no launcher .*: unset it"):
        training.start(args.run, args.optim)
    reset_accelerate()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **_: None)
    with pytest.raises(UserError, match="2 processes were started that know nothing of each"):
        training.start(args.run, args.optim)
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_replaced_when_asked(lora_args: MakeArgs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = toy(lora_args(tmp_path))
    trained.step(1.0)
    trained.learner.keep(now=True)
    trained.run.finish()
    own = [run / "notes.txt", run / "validation" / "mine.png", run / "logs" / "mine.txt"]
    own += [run / "checkpoint-1" / "notes.txt"]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    reset_accelerate()
    started(lora_args(tmp_path, "--overwrite_output_dir"))
    assert all(path.read_text() == "mine" for path in own)
    there = {path for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert there == {*own, run / "args.json", run / "manifest.jsonl"}


def test_what_the_trackers_wrote_is_the_runs(lora_args: MakeArgs, tmp_path: Path) -> None:
    tensorboard = ("--report_to", "tensorboard", "--tracker_project_name", "my [project]")
    trained = toy(lora_args(tmp_path, *tensorboard))
    trained.step(1.0)
    trained.run.finish()
    logs = tmp_path / "run" / "logs"
    assert list(logs.rglob("events.out.tfevents.*"))
    reset_accelerate()
    started(lora_args(tmp_path, "--overwrite_output_dir"))
    assert not logs.exists()


@dataclass(frozen=True)
class Hub:
    """A group with a secret."""

    hub_token: str = "hf_secret"
    hub_model_id: str = "someone/model"
    folders: tuple[Path, ...] = (Path("a"), Path("b"))


@dataclass(frozen=True)
class Secret:
    """Options with a secret."""

    hub: Hub
    run: training.RunArgs


def test_tokens_stay_out_of_every_record(lora_args: MakeArgs, tmp_path: Path) -> None:
    args = lora_args(tmp_path)
    secret = Secret(Hub(), args.run)
    run = training.start(args.run, args.optim)
    assert run.begin(secret, lora.WEIGHTS)
    assert folders.options(secret)["hub"] == {
        "hub_model_id": "someone/model",
        "folders": ["a", "b"],
    }
    assert "hf_secret" not in json.dumps(folders.record(secret, run.seed, run.accelerator))
    assert "hf_secret" not in json.dumps(trackers._flat(secret))
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


def test_rows_of_lost_steps_are_forgotten(lora_args: MakeArgs, tmp_path: Path) -> None:
    run = started(lora_args(tmp_path))
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [{"step": 0, "eval_loss": 1.0}, *({"step": n, "loss": 0.5} for n in range(1, 6))]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + '{"step": 6, "lo')  # killed while it wrote
    assert run.metrics.forget_after(3) == 1
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    run.metrics.forget_after(0)
    assert path.read_text() == ""


# Whose folder it is


@pytest.mark.parametrize("more", [(), ("--overwrite_output_dir",), ("--dry_run",)])
def test_a_run_does_not_write_into_a_users_folder(
    lora_args: MakeArgs, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"--output_dir .* is not empty.*README\.md, logs"):
        script.main(lora_args(tmp_path, *more))
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "README.md", "logs"}
    assert (run / "README.md").read_text() == "mine"


def test_a_second_run_in_a_folder_is_refused_before_it_looks_for_a_checkpoint(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = files_module.open_locked(run / ".lock")  # as another process would hold it
    (run / ".lock").write_text('{"by": "train.py", "pid": 7, "host": "h", "since": "today"}')
    monkeypatch.setattr(checkpoint, "choose", pytest.fail)
    before = files(run)
    for more in ((), ("--overwrite_output_dir",), ("--resume_from_checkpoint", "latest")):
        args = lora_args(tmp_path, *more)
        with pytest.raises(UserError, match=r"in use by train\.py \(process 7 on h, since today\)"):
            training.start(args.run, args.optim)
    assert files(run) == before
    monkeypatch.undo()
    args = lora_args(tmp_path, "--dry_run")
    training.start(args.run, args.optim)  # looks, and takes nothing
    assert files(run) == before
    os.close(lock)
    args = lora_args(tmp_path)
    training.start(args.run, args.optim)


def test_a_checkpoint_of_another_folder_is_not_taken_for_the_new_runs(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    started(lora_args(tmp_path)).finish()
    foreign = tmp_path / "run" / "checkpoint-9"
    foreign.mkdir()
    (foreign / "state.json").write_text("{}")
    reset_accelerate()
    with pytest.raises(UserError, match="checkpoint-9 was not written by a run in this folder"):
        started(lora_args(tmp_path, "--overwrite_output_dir"))
    assert (foreign / "state.json").is_file()


def test_a_checkpoint_over_the_limit_that_a_kill_left_goes_at_the_next_start(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    trained = toy(lora_args(tmp_path, "--max_train_steps", "9", "--checkpoints_total_limit", "1"))
    for step in (1, 2):
        trained.run.step = step
        folder = tmp_path / "run" / f"checkpoint-{step}"
        checkpoint.write_whole(folder, lambda inside: (inside / "state.json").touch())
    trained.run.resumed = tmp_path / "run" / "checkpoint-2"
    trained.learner._forget_later()
    assert [step for step, _ in checkpoint.existing(tmp_path / "run")] == [2]


def test_processes_whose_launcher_is_killed_end_too() -> None:
    child = "from dojo.launch import launcher; launcher.watch(0.05); print('on', flush=True)\n"
    child += "import time; time.sleep(300)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "some"},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.kill()
    out, err = process.communicate(timeout=200)  # the child's end closes the pipes
    assert (out, err) == ("", "stopped: the launcher of this process is gone\n")


# Dry run


def test_the_plan_says_the_numbers(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = lora_args(
        tmp_path, "--train_batch_size", "3", "--gradient_accumulation_steps", "4", "--dry_run"
    )
    run = training.start(args.run, args.optim)
    run.plan(args.optim, 10, "fingerprint")
    model = nn.Linear(1024, 1024, bias=False)
    model.requires_grad_(False)
    model.extra = nn.Parameter(torch.zeros(2**20 // 16))
    config = sd3.open_model(args.model)
    needs = phases.Needs(
        config=config,
        dtype=torch.float32,
        vae_dtype=torch.float32,
        size=(64, 64),
        text_on_cpu=True,
        vae_stays=False,
    )
    kept = 2**20 * 4 + 2**16 * 16
    held = phases.Held(network=model, kept=kept, activations=2**29)
    dry_run.print_plan(run, args, held, Cost(3 * 10**12, 2**29), 3, needs=needs)
    shown = capsys.readouterr().out
    assert "trainable parameters: 65,536\n" in shown
    assert "total parameters: 1,114,112\n" in shown
    assert "effective batch size: 12\n" in shown
    assert "optimizer steps: 3\n" in shown
    assert "steps per epoch: 0.83\n" in shown
    assert "  0.50  activations 0.50\n" in shown
    total = (kept + 2**29) / 2**30
    assert f"largest phase: training, {total:.2f} GiB" in shown
    assert "operations per process and step: 12.000 TFLOP\n" in shown
    assert '"train_batch_size": 3' in shown
    assert "fits on a card of so many GB: 8 yes, 10 yes, 12 yes" in shown
    assert "hours to finish: not known" in shown


def test_hours_are_told_from_the_speed_of_the_folders_own_run(
    lora_args: MakeArgs, tmp_path: Path
) -> None:
    args = lora_args(tmp_path, "--max_train_steps", "100", "--train_batch_size", "4", "--dry_run")
    run = training.start(args.run, args.optim)
    run.plan(args.optim, 10, "fingerprint")
    (tmp_path / "run").mkdir()
    rows = [{"step": step, "images_per_s": 0.5} for step in (1, 10)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    # 90 steps of 4 pictures at half a picture a second.
    assert dry_run.hours(run, 1e12).startswith("0.2 (at the 0.5 images/s")


def test_a_dry_run_refuses_a_tracker_that_is_not_installed(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="the package wandb is not installed") as caught:
        script.main(lora_args(tmp_path, "--dry_run", "--report_to", "wandb,tensorboard", "mlflow"))
    for package in ("tensorboard", '-e ".[wandb]"', '-e ".[mlflow]"'):  # all at once
        assert f"(pip install {package})" in str(caught.value)
    assert trackers.chosen(("none",)) == trackers.chosen(("all",)) == []


def test_several_trackers_are_taken_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: name != "swanlab")
    assert trackers.chosen(("wandb", "tensorboard", "wandb")) == ["tensorboard", "wandb"]
    assert trackers.chosen(("wandb", "all")) == ["tensorboard", "wandb", "mlflow"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--report_to", "none", "wandb"), "--report_to must be none alone"),
        (("--report_to", "wandb,none"), "--report_to must be none alone"),
        (("--run_name", " "), "--run_name must be one line"),
        (("--run_name", "a\nb"), "--run_name must be one line"),
    ],
)
def test_trackers_and_names_that_make_no_sense_are_refused(
    lora_args: MakeArgs,
    tmp_path: Path,
    flags: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        lora_args(tmp_path, *flags)
    assert words in capsys.readouterr().err


@dataclass(frozen=True)
class Trackers:
    """Stands for accelerate: keeps what the trackers are started with."""

    log_with: tuple[str, ...]
    told: dict[str, Any]
    is_main_process: bool = True

    def init_trackers(self, project: str, *, config: Any, init_kwargs: dict[str, Any]) -> None:
        assert project == "sd-dojo"
        assert "run_name" in config
        self.told.update(init_kwargs)


@pytest.mark.parametrize("flags", [(), ("--run_name", "hearts, 16")])
def test_the_trackers_are_told_the_name_of_the_run(
    lora_args: MakeArgs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    args = lora_args(tmp_path, *flags)
    name = args.run.name
    assert name == (flags[1] if flags else "run")
    fake: Any = Trackers(("wandb", "swanlab", "mlflow"), {})
    trackers.start(fake, args, tmp_path / "logs")
    assert fake.told["wandb"]["name"] == fake.told["mlflow"]["run_name"] == name
    assert fake.told["swanlab"]["experiment_name"] == name
    assert "logging_dir" not in fake.told["mlflow"]  # the server's own place
    assert (tmp_path / "logs" / "wandb").is_dir()


def test_mlflow_without_a_server_writes_into_the_folder(
    lora_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []
    mlflow: Any = ModuleType("mlflow")
    mlflow.set_tracking_uri = places.append
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake: Any = Trackers(("mlflow",), {})
    logs = tmp_path / "logs"
    trackers.start(fake, lora_args(tmp_path), logs)
    assert places == [f"sqlite:///{logs / 'mlflow.db'}"]
    assert fake.told["mlflow"]["logging_dir"] == (logs / "mlflow").as_uri()


def test_a_dry_run_looks_at_every_size_and_for_weights(
    lora_args: MakeArgs, tmp_path: Path, tiny_sd3: Path
) -> None:
    with pytest.raises(UserError, match="60 is not a multiple of"):
        script.main(lora_args(tmp_path, "--dry_run", "--resolution", "64", "60"))
    model = shutil.copytree(tiny_sd3, tmp_path / "model")
    for path in (model / "transformer").glob("*.safetensors"):
        path.unlink()
    own = ("--pretrained_model_name_or_path", str(model))
    with pytest.raises(UserError, match="transformer holds no weights"):
        script.main(lora_args(tmp_path, "--dry_run", *own))


def test_a_dry_run_writes_nothing(
    lora_args: MakeArgs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(lora_args(tmp_path, "--dry_run", "--train_batch_size", "64"))
    shown = capsys.readouterr().out
    # 18 square layers of 32: 8 + 7 of the joint attention, 4 of attn2, less the dead one.
    assert f"trainable parameters: {18 * 2 * (32 + 32):,}\n" in shown
    flops = re.search(r"operations per process and step: ([\d.]+) TFLOP", shown)
    assert flops is not None
    assert float(flops[1]) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_may_look_at_an_occupied_folder(
    whole: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(whole)
    with pytest.raises(UserError, match="holds a run already"):  # as the run would be
        again(flags, "--dry_run", "--learning_rate", "1e-3")
    assert "optimizer steps: 3" in capsys.readouterr().out
    assert files(whole) == before
