"""Claims about every training script, by its row in `tests.scripts.runs`.

A script's own file holds what it alone claims.
"""

import json
import random
import runpy
import signal
import sys
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from diffusers import DiffusionPipeline

from dojo import cli
from dojo.cli import UserError
from dojo.finetune import lora
from dojo.rewards import loading
from tests.conftest import ROOT, load_adapter, reset_accelerate
from tests.processes import Death, spawn
from tests.scripts import runs
from tests.scripts.runs import SCRIPTS, Script, agree, draw, ended_with, in_process

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = runs.one_thread

# Two epochs for those that have some. Adam would blow the rounding of gradients near zero up to
# whole steps.
SHORT = ("--max_train_steps", "4", "--checkpointing_steps", "2", "--adam_epsilon", "1e-3")


@dataclass(frozen=True)
class Small:
    """A script, what its small run reads, and where its runs lie."""

    script: Script
    inputs: Path
    place: Path

    def flags(self, name: str, *more: str) -> list[str]:
        """The command line of a run below `place / name`."""
        return [*self.script.flags(self.inputs, self.place / name), *SHORT, *more]

    def run(self, name: str, *more: str) -> Path:
        """Runs it in this process; its output folder."""
        in_process(self.script.load(), self.flags(name, *more))
        return self.place / name / "run"

    def spawn(
        self, name: str, *more: str, death: Death | None = None, processes: int = 1
    ) -> tuple[int, str]:
        """Runs it in processes of their own; exit code and words."""
        flags = self.flags(name, *more)
        return spawn(self.script.file, flags, self.place / name, death, processes)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all commands read."""
    folder = tmp_path_factory.mktemp("runs") / "inputs"
    runs.make_inputs(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(script, marks=[pytest.mark.slow] if script.slow else [], id=script.name)
        for script in SCRIPTS.values()
    ],
)
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, inputs: Path
) -> Small:
    return Small(request.param, inputs, tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(scope="module")
def whole(small: Small, one_thread: None) -> Path:
    """The output folder of a run of four steps that nobody disturbed."""
    folder = small.run("whole")
    reset_accelerate()
    return folder


def test_the_table_names_every_training_script() -> None:
    assert {script.file for script in SCRIPTS.values()} == {
        path.name for path in ROOT.glob("train_*.py")
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_compiles_its_blocks_where_it_is_told_to(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    script = SCRIPTS[name]
    flags = [*script.flags(inputs, tmp_path), "--torch_compile"]
    assert cli.parse(script.load().Args, None, flags).model.torch_compile


def test_a_run_leaves_everything_that_was_promised(small: Small, whole: Path) -> None:
    record = json.loads((whole / "args.json").read_text())
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert (record["seed"], record["num_processes"]) == (0, 1)
    rows = [row for row in runs.metrics(whole) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for key in ("epoch", "lr", "grad_norm", "images_per_s", "seconds_train", "memory_gib"):
        assert all(row[key] >= 0 for row in rows), key
    watched = [row for row in runs.metrics(whole) if {"eval_loss", "eval_reward"} & {*row}]
    assert {row["step"] for row in watched} >= ({0, 4} if watched else set())
    for step in (0, 4):
        assert list((whole / "validation" / f"step-{step}").glob("*.png"))
    for name in ("README.md", "report.html", "contact_sheet.png", "finished.json"):
        assert (whole / name).is_file(), name
    card = (whole / "README.md").read_text()
    assert str(ROOT) not in card
    assert "args.json" in card
    kept = sorted(path.name for path in whole.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    assert not list(whole.glob(".*.partial")), "leftovers"


def test_result_and_checkpoint_load_in_plain_diffusers(small: Small, whole: Path) -> None:
    base = small.inputs / f"tiny-{small.script.family}"
    options: dict[str, Any] = {"safety_checker": None} if small.script.family == "sd15" else {}
    pipeline: Any = DiffusionPipeline.from_pretrained(base, **options)
    plain, end = draw(pipeline), whole / "checkpoint-4"
    averaged = json.loads((whole / "args.json").read_text())["args"]["ema"]["use_ema"]
    if (whole / "embeddings").exists():
        found = [place / "embeddings" / "thing.safetensors" for place in (whole, end)]
        found[1] = end / "ema" / "embeddings" / "thing.safetensors" if averaged else found[1]
        assert found[0].read_bytes() == found[1].read_bytes()
        return  # what is drawn with it: tests/scripts/test_textual_inversion.py
    if (whole / lora.WEIGHTS).exists():
        pictures = []
        for place in (whole, end / "ema" if averaged else end):
            load_adapter(pipeline, base, place)
            pictures.append(draw(pipeline))
    else:
        pictures = [draw(DiffusionPipeline.from_pretrained(whole, **options))]
        part = "transformer" if hasattr(pipeline, "transformer") else "unet"
        network = getattr(pipeline, part)
        saved = end / (f"{part}_ema" if averaged else part)
        network.load_state_dict(type(network).from_pretrained(saved).state_dict())
        pictures.append(draw(pipeline))
    assert not torch.equal(pictures[0], plain)
    assert torch.equal(*pictures)


def test_a_finished_run_is_left_alone(
    small: Small, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = runs.files(whole)
    small.run("whole")
    assert "finished (4 steps): nothing to do" in capsys.readouterr().out
    # Written while the data are looked at, before the folder is.
    changed = {path.name for path, time in runs.files(whole).items() if before.get(path) != time}
    assert changed <= {"data_report.json"}
    assert set(runs.files(whole)) == set(before)


def test_a_run_that_is_made_longer_and_killed_ends_with_the_same_bytes(
    small: Small, whole: Path
) -> None:
    small.run("broken", "--max_train_steps", "2")
    with pytest.raises(UserError, match="--adam_beta2 was "):
        small.run("broken", "--adam_beta2", "0.9")
    in_it = sum(1 for path in (whole / "checkpoint-4").rglob("*") if path.is_file())
    deaths = [
        Death(place="step", count=random.randint(1, 2)),
        Death(place="checkpoint", count=random.randint(1, in_it)),  # of its files
    ]
    if not first_of_its_kind(small.script):  # their checkpoints are written by the same lines
        deaths = [random.choice(deaths)]
    for death in deaths:
        code, said = small.spawn("broken", death=death)
        assert code == -signal.SIGKILL, (death, said)
        assert not (small.place / "broken" / "run" / "finished.json").exists()
    small.run("broken")
    found, expected = ended_with(small.place / "broken"), ended_with(small.place / "whole")
    # Where the short run ended, it was evaluated and drew.
    assert _trained(found) == _trained(expected), deaths
    assert not list((small.place / "broken" / "run").glob(".checkpoint-*")), "leftovers of the kill"


def first_of_its_kind(script: Script) -> bool:
    """Whether it is the script by which a claim about the shared library is made in full."""
    return script is next(one for one in SCRIPTS.values() if one.kind is script.kind)


def is_sharded_elsewhere(script: Script) -> bool:
    """Whether scripts before it are of its kind and of its family: the library shards both."""
    earlier = list(SCRIPTS.values())[: list(SCRIPTS).index(script.name)]
    family = script.name.rpartition("_")[2]
    return any(one.kind is script.kind for one in earlier) and any(
        one.name.endswith(f"_{family}") for one in earlier
    )


def test_some_script_of_every_kind_and_family_is_sharded() -> None:
    tried = [script for script in SCRIPTS.values() if not is_sharded_elsewhere(script)]
    assert {script.kind for script in tried} == {script.kind for script in SCRIPTS.values()}
    families = {name.rpartition("_")[2] for name in SCRIPTS}
    assert {script.name.rpartition("_")[2] for script in tried} == families


def _trained(found: dict[str, Any]) -> dict[str, Any]:
    """What a run ended with, without its evaluations half-way."""
    rows = [row for row in found["rows"] if row["step"] != 2 or "loss" in row]
    files = {name: value for name, value in found["files"].items() if "/step-2/" not in name}
    return {"finished": found["finished"], "rows": rows, "files": files}


@pytest.mark.parametrize(
    "spread",
    ["two processes", "two micro-batches", pytest.param("two shards", marks=pytest.mark.slow)],
)
def test_the_same_batch_in_two_parts_teaches_the_same(
    small: Small, whole: Path, spread: str
) -> None:
    if spread == "two micro-batches":
        if small.script.kind in (runs.policy, runs.finished):
            pytest.skip("its micro-batches are dealt anew from the pictures of an epoch")
        if not first_of_its_kind(small.script):
            pytest.skip("the learner adds them up, as it does for the first of this kind")
    flags = whole_flags(small)
    half = ("--train_batch_size", str(int(flags["--train_batch_size"]) // 2))
    if spread == "two shards" and (
        "train_text_encoder" in small.script.own or small.script.kind is runs.word
    ):
        pytest.skip("text encoders are not sharded")
    if spread == "two shards" and is_sharded_elsewhere(small.script):
        pytest.skip("its kind and its family are sharded by other scripts")
    if spread == "two shards" and small.script.kind is runs.finished:
        pytest.skip("an old policy is not sharded")
    if spread != "two micro-batches":
        half += ("--shard",) if spread == "two shards" else ()
        code, said = small.spawn(spread, *half, processes=2)
        assert code == 0, said
        record = json.loads((small.place / spread / "run" / "args.json").read_text())
        assert record["num_processes"] == 2
    else:
        small.run(spread, *half, "--gradient_accumulation_steps", "2")
    agree(small.script, whole, small.place / spread / "run")


def whole_flags(small: Small) -> dict[str, str]:
    """The values of its command line; the last one counts."""
    words = small.flags("whole")
    return dict(pairwise(words))


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*small.script.flags(small.inputs, tmp_path / "none"), *SHORT]
    in_process(small.script.load(), [*flags, "--dry_run"])
    said = capsys.readouterr().out
    assert f"effective batch size: {whole_flags(small)['--train_batch_size']}\n" in said
    assert "optimizer steps: 4\n" in said
    assert "operations per process and step: " in said
    trainable = int(said.split("trainable parameters: ")[1].split("\n")[0].replace(",", ""))
    assert trainable > 0
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_flag_is_refused_by_its_name(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(small.script.load().Args, None, small.flags("none", "--learnin_rate", "1"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--learnin_rate" in said
    assert "--learning_rate" in said


def test_a_script_that_is_scored_lists_the_rewards_whatever_else_is_missing(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = get_type_hints(small.script.load().Args).values()
    if not any(field.name == "list_rewards" for group in groups for field in fields(group)):
        pytest.skip("it asks no reward")
    monkeypatch.setattr(sys, "argv", [small.script.file, "--list_rewards"])
    runpy.run_path(str(ROOT / small.script.file), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(loading.SCORERS)
