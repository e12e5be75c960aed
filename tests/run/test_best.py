"""--keep_best and --early_stopping_patience: the best weights, and the end of a run that learns no
more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dojo.cli import UserError
from dojo.finetune import lora
from dojo.run import RunArgs, best
from tests.scripts import runs

one_thread = runs.one_thread
MakeArgs = Callable[..., Any]


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("eval_loss", best.Wish("eval_loss", False)),
        ("eval_gap", best.Wish("eval_gap", False)),
        ("eval_reward/hps", best.Wish("eval_reward/hps", True)),
        ("clip_score", best.Wish("clip_score", True)),
        ("eval_accuracy", best.Wish("eval_accuracy", True)),
        ("eval_loss:max", best.Wish("eval_loss", True)),
        ("mine:min", best.Wish("mine", False)),
    ],
)
def test_a_name_tells_what_is_better_or_the_word_behind_it(text: str, wish: best.Wish) -> None:
    assert best.read_wish(text) == wish


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_best": "mine"}, "mine:max or mine:min"),
        ({"early_stopping_patience": 2}, "needs --keep_best"),
        ({"keep_best": "eval_loss", "early_stopping_patience": 0}, "--early_stopping_patience"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunArgs(output_dir=Path("out"), **options)


def test_the_standing_is_read_from_the_rows_up_to_a_step() -> None:
    losses = {0: 3.0, 2: 1.0, 4: 2.0, 6: 1.0, 8: 0.5}
    rows: list[dict[str, Any]] = [{"step": s, "eval_loss": x} for s, x in losses.items()]
    rows += [{"step": 5, "loss": 0.1}, {"step": 7, "eval_loss": float("nan")}]
    wish = best.Wish("eval_loss", False)
    # Of two equal ones the first is the best.
    assert best.standing(rows, wish, 2, 6) == best.Standing(2, 1.0, 2, 2)
    assert best.standing(rows, wish, None, 8) == best.Standing(8, 0.5, 0, None)
    assert best.standing(rows, best.Wish("eval_loss", True), None, 8) == best.Standing(
        0, 3.0, 4, None
    )
    assert best.standing(rows, best.Wish("other", True), None, 8) is None


def test_weights_of_a_branch_that_was_left_are_not_taken_for_those_of_this_one(
    tmp_path: Path,
) -> None:
    wish = best.Wish("eval_loss", False)
    rows = [{"step": 4, "eval_loss": 1.80}, {"step": 8, "eval_loss": 1.7588}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / best.FOLDER).mkdir()
    for value, kept in ((1.7588, 8), (1.7383, None)):
        now = best.Standing(8, value, 0, None)
        best.write_record(tmp_path / best.FOLDER, wish, now)
        assert best.read(tmp_path, wish, 8) == best.Standing(8, 1.7588, 0, kept)


FLAGS = ("--max_train_steps", "8", "--validation_steps", "2", "--eval_fraction", "0.25")
FLAGS += (
    "--seed",
    "3",
    "--learning_rate",
    "0.5",
    "--lr_scheduler",
    "constant",
    "--checkpointing_steps",
    "100",
)
BEST = ("--keep_best", "eval_loss", "--early_stopping_patience", "2")


def told(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "best" / "best.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """What the evaluations of the runs below say, by their turn; the third is the best."""
    return [5.0, 4.0, 3.0, 3.5, 3.6]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """The eval loss hangs on the step alone."""
    from dojo.evaluate import validator

    def eval_losses(run: Any, *more: Any) -> dict[str, float]:
        return {"eval_loss": losses[run.step // 2]}

    monkeypatch.setattr(validator, "eval_losses", eval_losses)


@pytest.mark.slow
@pytest.mark.usefixtures("scripted")
def test_the_best_weights_are_kept_and_the_run_ends_when_its_patience_does(
    tmp_path: Path, lora_args: MakeArgs, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_lora_sd3 as script

    plain, run = tmp_path / "plain" / "run", tmp_path / "best" / "run"
    script.main(lora_args(tmp_path / "plain", *FLAGS, "--max_train_steps", "4"))
    args = lora_args(tmp_path / "best", *FLAGS, *BEST, "--resume_from_checkpoint", "latest")
    script.main(args)
    assert record(run) == {"metric": "eval_loss", "larger": False, "step": 4, "value": 3.0}
    assert weights(run / "best") == weights(plain)  # those of step 4, as a result has them
    assert list(told(run)) == [0, 2, 4, 6, 8]
    assert (run / "checkpoint-4").is_dir()
    assert weights(run) != weights(run / "best")

    # A kill at any moment after step 2: the run that goes on decides and writes the same.
    last = weights(run)
    rows = (run / "metrics.jsonl").read_text().count("\n")
    for name in ("finished.json", "pytorch_lora_weights.safetensors"):
        (run / name).unlink()
    for name in ("checkpoint-4", "checkpoint-8", "best"):
        shutil.rmtree(run / name)
    script.main(args)
    assert record(run)["step"] == 4
    assert weights(run / "best") == weights(plain)
    assert weights(run) == last
    assert (run / "metrics.jsonl").read_text().count("\n") == rows

    capsys.readouterr()
    script.main(args)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("scripted")
def test_a_run_that_ended_early_is_finished_and_goes_on_with_more_patience(
    tmp_path: Path, lora_args: MakeArgs, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_lora_sd3 as script

    resume = ("--resume_from_checkpoint", "latest")
    more = ("--early_stopping_patience", "1")
    script.main(lora_args(tmp_path, *FLAGS, *BEST, *more, *resume))
    run = tmp_path / "run"
    assert "step 6 is the last one: eval_loss was best at step 4" in capsys.readouterr().out
    assert json.loads((run / "finished.json").read_text())["step"] == 6
    assert (run / "pytorch_lora_weights.safetensors").is_file()

    script.main(lora_args(tmp_path, *FLAGS, *BEST, *more, *resume))
    assert "nothing to do" in capsys.readouterr().out

    # Killed between the last checkpoint and the result: it ends where it had ended.
    (run / "finished.json").unlink()
    script.main(lora_args(tmp_path, *FLAGS, *BEST, *more, *resume))
    assert json.loads((run / "finished.json").read_text())["step"] == 6

    script.main(lora_args(tmp_path, *FLAGS, *BEST, *resume))
    assert json.loads((run / "finished.json").read_text())["step"] == 8
    assert record(run)["step"] == 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of the scripts below read."""
    folder = tmp_path_factory.mktemp("runs") / "inputs"
    runs.make_inputs(folder)
    return folder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "metric", "flags"),
    [
        ("full_sd3", "eval_loss", ()),
        ("dpo_sd15", "eval_accuracy", ("--eval_fraction", "0.4", "--finetune", "full")),
        ("ddpo_sd3", "eval_reward", ()),
        ("refl_sd3", "eval_reward", ()),
    ],
)
def test_every_method_keeps_the_best_as_it_keeps_a_result(
    name: str,
    metric: str,
    flags: tuple[str, ...],
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, standing = {0: 1.0, 2: 3.0, 4: 2.0}, best.standing

    def scripted(rows: Iterable[Mapping[str, Any]], *more: Any) -> best.Standing | None:
        told = [{**row, metric: values[row["step"]]} for row in rows if metric in row]
        return standing(told, *more)

    monkeypatch.setattr(best, "standing", scripted)
    script = runs.SCRIPTS[name]
    every = ("--validation_steps", "2")
    if script.kind is runs.policy:
        every = ("--eval_every", "1")  # epochs, of two steps
    short = ("--max_train_steps", "4", "--checkpointing_steps", "2", *every)
    more = ("--learning_rate", "1e-2", "--keep_best", f"{metric}:max")
    words = [*script.flags(inputs, tmp_path), *short, *flags, *more]
    runs.in_process(script.load(), words)
    run = tmp_path / "run"
    wish = {"metric": metric, "larger": True, "step": 2, "value": 3.0}
    assert json.loads((run / "best" / best.RECORD).read_text()) == wish

    def learned(folder: Path, *names: str) -> dict[str, Any]:
        files = ("diffusion_pytorch_model.safetensors", lora.WEIGHTS)
        paths = [folder / name / file for name in names for file in files]
        (path,) = filter(Path.is_file, paths)
        return load_file(path)

    # What a result is: with averages the averaged weights, whole or as an adapter.
    averaged = json.loads((run / "args.json").read_text())["args"]["ema"]["use_ema"]
    ends = ["transformer", "unet"] if (run / "best" / "model_index.json").is_file() else ["."]
    kept = learned(run / "best", *ends)
    then = [f"{end}_ema" if end != "." else "ema" for end in ends] if averaged else ends
    checkpoint = learned(run / "checkpoint-2", *then)
    assert kept.keys() == checkpoint.keys()
    assert all(torch.equal(value, checkpoint[name]) for name, value in kept.items())
    last = learned(run, *ends)
    assert any(not torch.equal(value, last[name]) for name, value in kept.items())


def test_a_metric_that_nobody_writes_is_refused_before_the_first_step(
    tmp_path: Path, lora_args: MakeArgs
) -> None:
    import train_lora_sd3 as script

    words = r"--keep_best eval_reward: no evaluation .* eval_gap, eval_loss, eval_loss_sigma_1"
    with pytest.raises(UserError, match=words):
        script.main(lora_args(tmp_path, *FLAGS, "--keep_best", "eval_reward"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_without_an_evaluation_there_is_no_best(tmp_path: Path, lora_args: MakeArgs) -> None:
    import train_lora_sd3 as script

    flags = (*FLAGS, "--eval_fraction", "0", "--keep_best", "eval_loss")
    with pytest.raises(UserError, match="there is none: nothing is held out"):
        script.main(lora_args(tmp_path, *flags))
