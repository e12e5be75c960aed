"""The comparison of two commits tells every difference that counts, and none that does not."""

import dataclasses
import importlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dojo import cli
from dojo.cli import UserError

from . import compare
from .compare import CASES, Args, Compared, choice, flags_of, table, unpack
from .scripts.runs import SCRIPTS

WEIGHTS = "run/checkpoint-3/weights.safetensors"
OPTIMIZER = "run/checkpoint-3/optimizer.pt"
ROW = {"step": 1, "loss": 0.5, "eval_loss": math.nan, "seconds_train": 1.0, "images_per_s": 2.0}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal folders as runs leave them."""
    run = tmp_path / "before" / "run"
    (run / "checkpoint-3").mkdir(parents=True)
    (run.parent / "class").mkdir()
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(math.nan)}
    save_file(tensors, run.parent / WEIGHTS, {"format": "pt"})
    torch.save({"state": {0: {"exp_avg": tensors["a"], "step": 3}}}, run.parent / OPTIMIZER)
    (run / "checkpoint-3" / "state.json").write_text('{"step": 3, "seed": 0}')
    (run / "metrics.jsonl").write_text("".join(json.dumps(ROW) + "\n" for _ in range(2)))
    (run / "picture.png").write_bytes(b"picture")
    (run.parent / "class" / "0.png").write_bytes(b"picture")
    args = {"run": {"seed": 0}, "refl": {"use_lora": True, "margin": 1.0}}
    (run / "args.json").write_text(json.dumps({"started": "today", "args": args}))
    (run / "report.html").write_text("1 s")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    return tmp_path / "before", tmp_path / "after"


def compared(runs: tuple[Path, Path]) -> Compared:
    return compare.compare("it", *runs)


def test_equal_runs_are_equal(runs: tuple[Path, Path]) -> None:
    found = compared(runs)
    assert found == Compared("it", "equal", files=6)


def test_times_and_what_tells_of_them_do_not_count(runs: tuple[Path, Path]) -> None:
    other = {**ROW, "seconds_train": 9.0, "seconds_cache": 1.0, "images_per_s": 1.0}
    (runs[1] / "run/metrics.jsonl").write_text("".join(json.dumps(other) + "\n" for _ in range(2)))
    (runs[1] / "run/report.html").write_text("2 s")
    assert compared(runs).verdict == "equal"


def test_what_torch_packs_otherwise_is_equal_by_its_values(runs: tuple[Path, Path]) -> None:
    file = runs[1] / OPTIMIZER
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert file.read_bytes() != (runs[0] / OPTIMIZER).read_bytes()
    assert compared(runs).verdict == "equal"


def _one_weight(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["a"][1, 2] += 0.25
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _sign_of_zero(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["a"][0, 0] = -0.0
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "a": tensors["a"].T.contiguous()}, folder / WEIGHTS, {"format": "pt"})


def _metadata(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "np"})


def _moment(folder: Path) -> None:
    state = torch.load(folder / OPTIMIZER)
    state["state"][0]["exp_avg"][0, 1] = 3.0
    torch.save(state, folder / OPTIMIZER)


def _metric(folder: Path) -> None:
    rows = [ROW, {**ROW, "loss": 0.5000001}]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _no_metric(folder: Path) -> None:
    rows = [ROW, {name: value for name, value in ROW.items() if name != "loss"}]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _two(folder: Path) -> None:
    rows = [{**ROW, "loss": 1.0}, {**ROW, "loss": 2.0}]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(folder: Path) -> None:
    (folder / "run/metrics.jsonl").write_text(json.dumps(ROW) + "\n")


def _state(folder: Path) -> None:
    (folder / "run/checkpoint-3/state.json").write_text('{"step": 3, "seed": 0.0}')


def _picture(folder: Path) -> None:
    (folder / "class/0.png").write_bytes(b"Picture")


def _missing(folder: Path) -> None:
    (folder / "run/picture.png").unlink()


def _new(folder: Path) -> None:
    (folder / "run/new.png").write_bytes(b"picture")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_one_weight, f"{WEIGHTS}/a by up to 2.5e-01"),
        (_sign_of_zero, f"{WEIGHTS}/a by up to 0.0e+00"),
        (_shape, f"{WEIGHTS}/a: torch.float32 (2, 3) became torch.float32 (3, 2)"),
        (_metadata, f"{WEIGHTS}/(metadata)/format: 'pt' became 'np'"),
        (_moment, f"{OPTIMIZER}/state/0/exp_avg by up to 2.0e+00"),
        (_metric, "run/metrics.jsonl/row 1/loss: 0.5 became 0.5000001"),
        (_no_metric, "run/metrics.jsonl/row 1/loss is missing after"),
        (_two, "run/metrics.jsonl/row 0/loss: 0.5 became 1.0 and 1 more in it"),
        (_row, "run/metrics.jsonl/row 1 is missing after"),
        (_state, "run/checkpoint-3/state.json/seed: 0 became 0.0"),
        (_picture, "class/0.png: other bytes"),
        (_missing, "run/picture.png is missing after"),
        (_new, "run/new.png is missing before"),
    ],
)
def test_a_change_is_told_by_its_place(
    runs: tuple[Path, Path], change: Callable[[Path], None], words: str
) -> None:
    change(runs[1])
    found = compared(runs)
    assert (found.verdict, found.differences) == ("differs", (words,))


def test_options_that_moved_are_told_and_are_no_difference(runs: tuple[Path, Path]) -> None:
    args = {"run": {"seed": 1, "margin": 1.0}, "refl": {"finetune": "lora"}}
    (runs[1] / "run/args.json").write_text(json.dumps({"started": "later", "args": args}))
    found = compared(runs)
    assert found.verdict == "equal"
    assert found.remarks == (
        "args.json: seed: 0 became 1",
        "args.json: use_lora is gone",
        "args.json: margin went from refl to run",
        "args.json: finetune is new",
    )


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("lora", ["use_lora"], ["--use_lora", "--rank", "2"]),
        ("lora", ["finetune"], ["--finetune", "lora", "--rank", "2"]),
        ("full", ["use_lora"], []),
        ("full", ["finetune", "use_lora"], ["--finetune", "full"]),
        ("", ["finetune"], []),
    ],
)
def test_what_is_trained_is_said_as_the_commit_spells_it(
    kind: compare.Kind, options: list[str], words: list[str]
) -> None:
    assert choice(kind, options) == words


def test_every_script_is_compared_and_both_ways_to_train_where_it_has_two() -> None:
    assert {case.script for case in CASES} == set(SCRIPTS)
    for script in (
        "ddpo_sd3",
        "grpo_sd3",
        "nft_sd3",
        "refl_sd3",
        "dpo_sd3",
        "dpo_sd15",
        "refl_sd15",
        "dpo_sdxl",
        "refl_sdxl",
        "ddpo_sd15",
        "ddpo_sdxl",
    ):
        assert {case.kind for case in CASES if case.script == script} == {"lora", "full"}
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_commands_fit_the_scripts(case: compare.Case) -> None:
    script = importlib.import_module(f"train_{case.script}")
    options = compare.option_names(script.Args)
    args = cli.parse(script.Args, None, flags_of(case, options))
    found = dict(compare.options_of(dataclasses.asdict(args)))
    assert found["max_train_steps"][1] == 6
    assert found.get("finetune", (0, case.kind))[1] == case.kind
    assert found.get("use_lora", (0, case.kind == "lora"))[1] == (case.kind == "lora")


def test_the_table_names_the_first_differences_and_counts_the_rest() -> None:
    found = [Compared("a", "equal", 7), Compared("b", "differs", 8, tuple("uvwxyz"))]
    assert table(found).splitlines()[2:] == [
        "| a | equal | 7 |  |",
        "| b | differs | 8 | u; v; w; x; 2 more files |",
    ]


def test_an_unknown_commit_is_a_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such_commit: "):
        unpack("no_such_commit", tmp_path / "it", tmp_path, [*SCRIPTS])


def test_an_unknown_script_is_a_user_s_mistake() -> None:
    with pytest.raises(ValueError, match="--scripts: lora_sd4"):
        Args(before="a", after="b", scripts=("lora_sd4",))
