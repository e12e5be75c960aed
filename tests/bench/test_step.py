"""Where the time of a step goes: parts by the clock, shares, and the real script."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dojo import cli
from dojo.bench import __main__ as command_line
from dojo.bench import processes, step
from dojo.bench.profiled import Meter, Over
from dojo.bench.step import StepArgs
from tests.processes import Forked


class Clock:
    """Seconds that pass when we say so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_a_part_within_another_is_not_counted_twice_and_other_threads_not_at_all(
    tmp_path: Path,
) -> None:
    clock = Clock()
    meter = Meter(tmp_path / "spent.json", 1, 2, lambda: None, clock=clock)
    data = meter.counted("data", lambda: clock.work(1))
    forward = meter.counted("forward", lambda: clock.work(4))

    def scored() -> None:
        clock.work(2)
        forward()  # of the network, asked from within

    reward = meter.counted("other networks", scored)

    def loop() -> Iterator[int]:
        for item in range(10):
            data()
            yield item

    def run() -> None:
        for item in meter.turning(loop)():
            clock.work(0.5 if item else 50)  # the first does not count
            reward()
            beside = threading.Thread(target=forward)
            beside.start()
            beside.join()

    with pytest.raises(Over):
        run()
    found = json.loads((tmp_path / "spent.json").read_text())
    # What another thread does takes the time of the part that waits for it.
    expected = {"rest": 4.5, "other networks": 2.0, "forward": 4.0, "data": 1.0}
    assert found["steps"] == [expected] * 2


def test_shares_are_of_a_whole_step_and_products_of_what_was_computed() -> None:
    steps = [
        {"forward": 30.0, "backward": 60.0, "other networks": 6.0, "optimizer": 3.0, "rest": 1.0},
        {"forward": 3.0, "backward": 6.0, "other networks": 0.6, "optimizer": 0.3, "rest": 0.1},
        {"forward": 1.0, "backward": 1.0, "data": 8.0},  # a hiccup
    ]
    operators = {
        "aten::addmm": {"calls": 2, "seconds": 3.0},
        "aten::convolution": {"calls": 1, "seconds": 1.0},
        "aten::gelu": {"calls": 1, "seconds": 1.0},
    }
    found = step.summarise("lora", {"steps": steps, "operators": operators})
    assert found["outside"] == pytest.approx(0.1)
    assert found["outside_networks"] == pytest.approx(0.04)
    assert found["products"] == pytest.approx(0.8)
    assert found["seconds_per_step"] == pytest.approx(10)
    assert found["shares"]["data"] == 0
    result = {**found, "extra": [], "device": "cpu", "case": {"model": "pocket"}}
    result["case"]["mixed_precision"] = "no"
    row = step.table_row(result)
    assert (row["not the network"], row["without other networks"]) == ("10.0%", "4.0%")
    assert row["below 6%"] == "yes"
    assert step.table_row({**result, "outside_networks": 0.06})["below 6%"] == "no"


def test_the_methods_are_those_that_the_model_has() -> None:
    assert StepArgs(model="pocket").chosen == ("lora", "full", "dpo", "grpo")
    assert StepArgs(model="pocket-sd15").chosen == ("lora", "full", "dpo", "ddpo")
    assert StepArgs(model="sd15", methods=("dpo",)).chosen == ("dpo",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_steps 0", "must be at least 1"),
        ("--warmup_steps 0", "must be at least 1"),
        ("--num_processes 2", "--num_processes: a step is profiled in one process"),
        ("--model sd15 --methods grpo", "--method grpo: there is no such script for sd15"),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = words.split() if "--model" in words else ["--model", "pocket", *words.split()]
    with pytest.raises(SystemExit):
        cli.parse(StepArgs, None, flags)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said


@pytest.mark.parametrize("method", ["lora", "grpo"])
def test_the_parts_are_those_of_the_real_script(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def started(words: list[str], *, env: dict[str, str], **_: Any) -> Iterator[Forked]:
        assert words[:2] == [sys.executable, "-m"]
        process = Forked([words[0], *words[2:]], tmp_path, env)
        try:
            yield process
        finally:
            process.end()

    monkeypatch.setattr(processes, "started", started)
    out, more = tmp_path / "numbers.json", ["--rank", "2"]
    words = f"step --model pocket --methods {method} --batch_size 2 --num_steps 2 --warmup_steps 1"
    words += f" --mixed_precision no --work_dir {tmp_path} --output {out}"
    if method == "grpo":
        more += ["--num_prompts_per_epoch", "1", "--group_size", "2", "--sample_steps", "3"]
        more += ["--window_size", "1"]
    command_line.main([*words.split(), "--", *more])
    (result,) = json.loads(out.read_text())
    assert len(result["steps"]) == (1 if method == "grpo" else 2)
    parts = {"forward", "backward", "optimizer", "rest"}
    parts |= {"other networks"} if method == "grpo" else {"data"}
    assert all(set(one) == parts for one in result["steps"])
    assert all(seconds > 0 for one in result["steps"] for seconds in one.values())
    assert 0 < result["products"] < 1
    assert any("mm" in name for name in result["operators"])
    assert not (
        tmp_path / "runs" / f"pocket-{method}" / "pytorch_lora_weights.safetensors"
    ).exists()
    head, _, row = capfd.readouterr().out.strip().splitlines()
    assert "not the network" in head
    assert f"{method} --rank 2" in row
