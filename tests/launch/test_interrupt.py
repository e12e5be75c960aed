"""Claims about signals and the files of control: what they leave, and that nothing is lost."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train_grpo_sd3
import train_lora_sd3
from dojo import cli, launch
from dojo.evaluate import loss as eval_loss
from dojo.finetune import lora
from dojo.launch import interrupt
from dojo.run import run as training
from dojo.run.learner import Learner
from tests.conftest import ROOT, lora_flags, reset_accelerate, rl_flags
from tests.run.test_training import metrics

TIMES = ("images_per_s", "eta_s", "memory_gib")


def rows(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what hangs on the machine."""
    return [
        {k: v for k, v in row.items() if k not in TIMES and not k.startswith("seconds_")}
        for row in metrics(folder)
    ]


# What a process makes of signals

CHILD = """
import sys, time
from dojo.launch import interrupt
interrupt.watch()
with interrupt.patience(sys.argv[1]):
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.05)
        asked = interrupt._watch.signal
        if asked and "stay" not in sys.argv[1]:
            sys.exit(7)
"""


def child(promise: str, *signals: int, pause: float = 0.0) -> tuple[int, str]:
    """Exit code and words of a process that watches, and is sent signals with pauses between."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, promise],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for i, number in enumerate(signals):
        if i:
            time.sleep(pause)
        process.send_signal(number)
    _, words = process.communicate(timeout=60)
    return process.returncode, words


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_where_nothing_can_be_kept_the_first_signal_ends_the_process(
    number: int, code: int
) -> None:
    ended, words = child("", number)
    assert ended == code
    assert "Traceback" not in words
    assert "--resume_from_checkpoint latest" in words.strip().splitlines()[-1]


def test_in_training_the_first_signal_is_left_to_the_run() -> None:
    ended, words = child("the step is finished", signal.SIGTERM)
    assert ended == 7
    assert words.strip() == ("SIGTERM: the step is finished; a second signal ends the run at once")


def watching(promise: str) -> tuple[interrupt.Watch, list[int]]:
    watch, ends = interrupt.Watch(), []
    watch.promise, watch.end = promise, ends.append
    return watch, ends


def test_a_second_signal_ends_it_and_the_same_one_twice_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock.now)
    watch, ends = watching("the step is finished")
    watch.take(signal.SIGCHLD)  # none of ours
    assert watch.signal is None
    watch.take(signal.SIGINT)
    clock.now += interrupt.SAME / 2  # the launcher's
    watch.take(signal.SIGTERM)
    assert (watch.signal, ends) == (signal.SIGINT, [])
    clock.now += interrupt.SAME
    watch.take(signal.SIGTERM)
    assert ends == [130]  # the code of what the user did first
    assert "SIGTERM again: ended at once" in capfd.readouterr().err


def test_the_death_of_the_launcher_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock.now)
    watch, ends = watching("the step is finished")
    watch.take(signal.SIGINT)
    clock.now += 60
    monkeypatch.setattr(os, "getppid", lambda: 1)
    watch.take(signal.SIGTERM)  # the kernel's
    assert ends == []
    clock.now += 60
    watch.take(signal.SIGTERM)
    assert ends == [130]


def test_other_ranks_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    watch, ends = watching("")
    watch.take(signal.SIGTERM)
    assert ends == [143]
    assert capfd.readouterr().err == ""


# The command that goes on


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("python train.py --rank 2", "python train.py --rank 2"),
        ("python train.py --resume-from-checkpoint checkpoint-3 --rank 2",) * 1
        + ("python train.py --rank 2",),
        ("python train.py --resume_from_checkpoint=latest", "python train.py"),
        # It wins over resuming.
        (
            "accelerate launch t.py --overwrite_output_dir --seed 1",
            "accelerate launch t.py --seed 1",
        ),
        ("python -m dojo.launch t.py --prompt 'a b' \"it's\"",) * 2,
    ],
)
def test_the_command_that_goes_on_resumes_and_overwrites_nothing(
    typed: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.COMMAND, typed)
    words = shlex.split(launch.command())
    assert words == [*shlex.split(expected), "--resume_from_checkpoint", "latest"]


def test_the_command_that_goes_on_overwrites_nothing_that_a_file_would(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    words = ["python", "train.py", "--config", str(file)]
    file.write_text("run: {overwrite_output_dir: true}")
    added = "--overwrite_output_dir False --resume_from_checkpoint latest"
    assert launch.resumed(words).endswith(f"run.yaml {added}")
    file.write_text("rank: 4")
    assert launch.resumed(words).endswith("run.yaml --resume_from_checkpoint latest")


def test_a_launcher_is_found_by_its_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = [sys.executable, "/somewhere/torchrun", "--nproc_per_node", "2", "train.py"]
    monkeypatch.delenv(launch.COMMAND, raising=False)
    monkeypatch.setattr(launch, "parent", lambda: torchrun)
    expected = "/somewhere/torchrun --nproc_per_node 2 train.py --resume_from_checkpoint latest"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # or its processes would not meet
    assert launch.command() == f"ACCELERATE_USE_CPU=true {expected}"
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert launch.command() == expected
    assert launch.asked_processes() == 2
    monkeypatch.setattr(launch, "parent", lambda: ["python", "accelerate", "launch", "t.py"])
    assert launch.asked_processes() is None
    config = str(ROOT / "scripts" / "accelerate" / "multi_gpu.yaml")
    words = ["accelerate", "launch", "--config_file", config, "t.py"]
    monkeypatch.setattr(launch, "parent", lambda: words)
    assert launch.asked_processes() == 2
    monkeypatch.setattr(launch, "parent", lambda: [*words[:-1], "--num_processes=3", "t.py"])
    assert launch.asked_processes() == 3


# Files of control


def requests(folder: Path, minutes: float | None = None) -> interrupt.Requests:
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text("{}")
    asked = interrupt.Requests(folder, main=True, minutes=minutes)
    asked.begin()
    return asked


def touch(path: Path, seconds: float) -> None:
    path.touch()
    now = time.time_ns() + int(seconds * 1e9)
    os.utime(path, ns=(now, now))


def test_a_file_is_obeyed_and_removed(tmp_path: Path) -> None:
    asked = requests(tmp_path)
    asked.agree(asked.local())
    assert (asked.stop, asked.save, asked.sample) == ("", False, False)
    touch(tmp_path / "save", 1)
    touch(tmp_path / "sample", 1)
    asked.agree(asked.local())
    assert (asked.stop, asked.save, asked.sample) == ("", True, True)
    touch(tmp_path / "stop", 1)
    asked.agree(asked.local())
    assert (asked.stop, asked.exit_code) == (str(tmp_path / "stop"), 130)
    assert {path.name for path in tmp_path.iterdir()} == {"args.json"}


def test_a_file_from_before_the_run_is_not_obeyed_until_it_is_touched_again(
    tmp_path: Path,
) -> None:
    touch(tmp_path / "stop", -60)
    (tmp_path / "sample").mkdir()  # a user's own folder
    asked = requests(tmp_path)
    assert asked.begin() == [
        f"{tmp_path / 'stop'} is older than this run and not obeyed: touch it again"
    ]
    asked.agree(asked.local())
    assert (asked.stop, asked.sample) == ("", False)
    assert (tmp_path / "stop").exists()
    touch(tmp_path / "stop", 1)
    asked.agree(asked.local())
    assert asked.stop
    assert (tmp_path / "sample").is_dir()


def test_another_process_looks_for_no_file_and_obeys_what_was_agreed(tmp_path: Path) -> None:
    main = requests(tmp_path)
    other = interrupt.Requests(tmp_path, main=False, minutes=0.001)
    other.begin()
    touch(tmp_path / "stop", 1)
    assert sum(other.local()) == 0
    mean = [(a + b) / 2 for a, b in zip(main.local(), other.local(), strict=True)]
    for one in (other, main):
        one.agree(mean)
        assert one.exit_code == 130
    assert not (tmp_path / "stop").exists()


def test_a_checkpoint_is_due_after_minutes_since_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock.now)
    asked = requests(tmp_path, minutes=2)

    def due() -> bool:
        asked.agree(asked.local())
        return asked.save

    clock.now += 119
    assert not due()
    clock.now += 1
    assert due()
    asked.saved()
    clock.now += 119
    assert not due()
    clock.now += 1
    assert due()


@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "nan"])
def test_minutes_have_to_be_a_time(minutes: str) -> None:
    with pytest.raises(ValueError, match="--checkpointing_minutes"):
        training.RunArgs(output_dir=Path("x"), checkpointing_minutes=float(minutes))


# Whole runs


def at_step(
    monkeypatch: pytest.MonkeyPatch, call: int, act: Callable[[training.Run], None]
) -> None:
    """Does something in the call-th backward pass of the next run."""
    real, calls = Learner.step, []

    def step(learner: Learner, loss: Any) -> bool:
        calls.append(1)
        if len(calls) == call:
            act(learner.run)
        return real(learner, loss)

    monkeypatch.setattr(Learner, "step", step)


def by_signal(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[training.Run], None]:
    monkeypatch.setattr(interrupt, "_watch", interrupt.Watch())
    return lambda _: interrupt._watch.take(number)  # pyright: ignore


def touched(*names: str) -> Callable[[training.Run], None]:
    def act(run: training.Run) -> None:
        for name in names:
            touch(run.output_dir / name, 1)

    return act


def start(script: Any, *flags: str) -> None:
    reset_accelerate()
    script.main(cli.parse(script.Args, None, flags))


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tiny_sd3: Path, scene_data: Path) -> list[str]:
    """A run of five steps with a validation after every second."""
    more = ["--seed", "0", "--max_train_steps", "5", "--eval_fraction", "0.2", "--eval_sigmas", "2"]
    more += ["--validation_prompt", "a red star", "--validation_inference_steps", "2"]
    more += [
        "--validation_steps",
        "2",
        "--logging_steps",
        "2",
        "--resume_from_checkpoint",
        "latest",
    ]
    place = tmp_path_factory.mktemp("interrupted")
    return [*lora_flags(place, tiny_sd3, scene_data), *more]


@pytest.fixture(scope="module")
def whole(flags: list[str]) -> Path:
    """The output folder of that run, never interrupted."""
    start(train_lora_sd3, *flags)
    return Path(flags[flags.index("--output_dir") + 1])


@pytest.mark.parametrize("call", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_a_run_stopped_by_a_signal_ends_as_the_whole_one(
    whole: Path,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: int,
) -> None:
    mine = [*flags, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patched:
        at_step(patched, call, by_signal(patched, signal.SIGTERM))
        patched.setattr(sys, "argv", ["train_lora_sd3.py", *mine])
        reset_accelerate()
        with pytest.raises(SystemExit) as ended:
            cli.run(train_lora_sd3.main, train_lora_sd3.Args, None)
    assert ended.value.code == 143
    said = capsys.readouterr()
    assert f"stopped: SIGTERM at step {call}: {tmp_path / f'checkpoint-{call}'} is kept" in said.err
    assert "--resume_from_checkpoint latest" in said.err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{call}"]
    assert not (tmp_path / lora.WEIGHTS).exists()
    # The validation whose turn it was did not keep the user waiting; it is made up for.
    assert not (tmp_path / "validation" / "step-2").exists() or call > 2
    start(train_lora_sd3, *mine)
    assert (tmp_path / lora.WEIGHTS).read_bytes() == (whole / lora.WEIGHTS).read_bytes()
    assert rows(tmp_path) == rows(whole)
    pictures = [sorted((f / "validation").rglob("*.png")) for f in (tmp_path, whole)]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]] != []


@pytest.mark.slow
def test_a_validation_is_broken_off_and_made_up_for(
    whole: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = [*flags, "--output_dir", str(tmp_path)]
    real, calls = eval_loss._errors, []

    def errors(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # after step 2, which has no checkpoint yet
            touch(tmp_path / "stop", 1)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(eval_loss, "_errors", errors)
        with pytest.raises(interrupt.Interrupted, match=r"at step 2: .*checkpoint-2 is kept"):
            start(train_lora_sd3, *mine)
    assert len(calls) == 3
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    start(train_lora_sd3, *mine)
    assert (tmp_path / lora.WEIGHTS).read_bytes() == (whole / lora.WEIGHTS).read_bytes()
    assert rows(tmp_path) == rows(whole)


def test_saving_and_sampling_when_asked_change_no_weight(
    whole: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 3, touched("save", "sample"))
    start(train_lora_sd3, *flags, "--output_dir", str(tmp_path))
    assert (tmp_path / "checkpoint-3" / "state.json").is_file()
    assert list((tmp_path / "validation" / "step-3").glob("*.png"))
    assert not (tmp_path / "save").exists()
    assert not (tmp_path / "sample").exists()
    assert (tmp_path / lora.WEIGHTS).read_bytes() == (whole / lora.WEIGHTS).read_bytes()
    # One validation more, and nothing else.
    assert [row for row in rows(tmp_path) if row["step"] != 3] == rows(whole)


# Epochs that are not kept in part


@pytest.fixture(scope="module")
def epochs(tmp_path_factory: pytest.TempPathFactory, tiny_sd3: Path) -> list[str]:
    """GRPO for three epochs of two optimizer steps of two backward passes each."""
    flags = rl_flags(tmp_path_factory.mktemp("epochs"), tiny_sd3)
    return [*flags, "--max_train_steps", "6", "--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def whole_epochs(epochs: list[str]) -> Path:
    """The output folder of that run, never interrupted."""
    start(train_grpo_sd3, *epochs)
    return Path(epochs[epochs.index("--output_dir") + 1])


@pytest.mark.parametrize(
    ("call", "every", "kept", "step"),
    [
        # nothing was learned before the first epoch
        pytest.param(1, 500, [], 1, marks=pytest.mark.slow),
        # the epoch's beginning is on the disk
        pytest.param(5, 2, [2], 3, marks=pytest.mark.slow),
        (5, 500, [4], 4),  # it is not: the epoch is finished
    ],
)
def test_an_epoch_is_finished_only_where_its_beginning_would_be_lost(
    whole_epochs: Path,
    epochs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: int,
    every: int,
    kept: list[int],
    step: int,
) -> None:
    mine = [*epochs, "--output_dir", str(tmp_path), "--checkpointing_steps", str(every)]
    with monkeypatch.context() as patched:
        at_step(patched, call, by_signal(patched, signal.SIGINT))
        with pytest.raises(interrupt.Interrupted) as ended:
            start(train_grpo_sd3, *mine)
    assert ended.value.exit_code == 130
    assert f"SIGINT at step {step}: " in str(ended.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [
        f"checkpoint-{number}" for number in kept
    ]
    assert ("its last 1 optimizer steps are done first" in capsys.readouterr().out) == (kept == [4])
    start(train_grpo_sd3, *mine)
    assert (tmp_path / lora.WEIGHTS).read_bytes() == (whole_epochs / lora.WEIGHTS).read_bytes()
    assert rows(tmp_path) == rows(whole_epochs)


@pytest.mark.slow
def test_sampling_stops_and_keeps_the_state_from_which_the_epoch_began(
    whole_epochs: Path, epochs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = train_grpo_sd3.rl.Scoring.submit, []

    def submit(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # in the second epoch
            touch(tmp_path / "stop", 1)
        real(self, *args)

    mine = [*epochs, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(train_grpo_sd3.rl.Scoring, "submit", submit)
        with pytest.raises(interrupt.Interrupted, match=r"checkpoint-2 is kept\."):
            start(train_grpo_sd3, *mine)
    assert len(calls) == 3
    start(train_grpo_sd3, *mine)
    assert (tmp_path / lora.WEIGHTS).read_bytes() == (whole_epochs / lora.WEIGHTS).read_bytes()
    assert rows(tmp_path) == rows(whole_epochs)


# Through a launcher


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_launcher_hands_a_signal_to_every_process_and_its_code_to_the_shell(
    flags: list[str], tmp_path: Path, processes: int, number: int, code: int
) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "dojo.launch", "--quiet", "--cpu"]
    words += ["--num_processes", str(processes), str(ROOT / "train_lora_sd3.py"), *flags]
    words += ["--output_dir", str(run), "--max_train_steps", "5000", "--logging_steps", "1"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None and not (run / "validation" / "step-2").exists():
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=300) == code
    said = log.read_text()
    assert "Traceback" not in said
    [kept] = run.glob("checkpoint-*")
    assert kept.name == f"checkpoint-{metrics(run)[-1]['step']}"
    command = said[said.index("To go on:") :].splitlines()[1]
    assert command.startswith("python -m dojo.launch --quiet --cpu --num_processes")
    assert command.endswith(" --resume_from_checkpoint latest")
