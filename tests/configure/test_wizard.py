"""Claims about `python -m dojo.configure`: what it asks, checks and writes, and that it starts."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dojo import cli
from dojo.cli import UserError
from dojo.configure import wizard
from dojo.configure.__main__ import ConfigureArgs, main
from dojo.configure.questions import Asking, Question
from tests.conftest import ROOT
from tests.scripts.runs import write_pairs

STYLE: dict[str, Any] = {
    "goal": "style",
    "model": "models/pocket-sd3",
    "data": "datas/pocket-hearts",
    "resolution": 64,
    "card": "none",
    "steps": 3,
}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to be written; the working folder is the repository, whose models are named."""
    monkeypatch.chdir(ROOT)
    return tmp_path / "run.yaml"


def configured(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What is written for these answers."""
    file = out.with_name("answers.json")
    file.write_text(json.dumps({"output_dir": str(out.with_name("run")), **given}))
    main(ConfigureArgs(output=out, answers=file))
    return yaml.safe_load(out.read_text())


def test_style_becomes_the_launcher_s_recipe_with_the_answers(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = configured(out, STYLE)
    assert written["script"] == "train_lora_sd3.py"
    assert written["max_train_steps"] == 3
    assert written["resolution"] == [64]
    assert written["lr_scheduler"] == "constant_with_warmup"  # of scripts/train_lora_sd3.sh
    assert "heart" in written["validation_prompt"][0]
    said = capsys.readouterr().out
    assert "64 pictures; captions from column 'text'" in said
    assert f"python train_lora_sd3.py --config {out}" in said


def test_the_written_file_is_what_the_script_reads(out: Path) -> None:
    written = configured(out, STYLE)
    script: Any = sys.modules["train_lora_sd3"]
    args = cli.parse(script.Args, None, ["--config", str(out)])
    assert args.data.dataset_name == written["dataset_name"] == "datas/pocket-hearts"
    assert args.run.mixed_precision == "no"


def test_a_subject_is_kept_apart_from_its_class(out: Path) -> None:
    answers = {**STYLE, "goal": "subject", "data": "datas/dog", "caption": "a photo of sks dog"}
    written = configured(out, {**answers, "class_caption": "a photo of a dog"})
    assert written["script"] == "train_dreambooth_lora_sd3.py"
    assert written["instance_prompt"] == "a photo of sks dog"
    assert written["with_prior_preservation"] is True
    out.unlink()
    assert "with_prior_preservation" not in configured(out, answers)


def test_pictures_without_captions_are_asked_for_one(out: Path) -> None:
    folder = out.with_name("plain")
    folder.mkdir()
    Image.new("RGB", (80, 64)).save(folder / "a.png")
    answers = {**STYLE, "data": str(folder)}
    with pytest.raises(UserError, match="caption: an answer is needed"):
        configured(out, answers)
    assert configured(out, {**answers, "caption": "a wall"})["instance_prompt"] == "a wall"


def test_several_folders_become_a_data_config(out: Path) -> None:
    written = configured(out, {**STYLE, "data": ["datas/pocket-hearts", "datas/dog"]})
    data = out.with_name("run_data.yaml")
    assert written["data_config"] == str(data)
    assert "dataset_name" not in written
    assert [Path(one["path"]).name for one in yaml.safe_load(data.read_text())] == [
        "pocket-hearts",
        "dog",
    ]


def test_preferences_and_rewards_have_their_scripts(out: Path) -> None:
    pairs = write_pairs(out.with_name("pairs"), 4)
    answers = {**STYLE, "goal": "preference", "data": str(pairs), "finetune": "lora"}
    assert configured(out, answers)["script"] == "train_dpo_sd3.py"
    out.unlink()
    prompts = out.with_name("prompts.txt")
    prompts.write_text("a star\na ring\n")
    reward = {key: value for key, value in STYLE.items() if key != "data"}
    reward |= {"goal": "reward", "method": "refl", "prompts": str(prompts), "reward": "aesthetic"}
    written = configured(out, reward)
    assert (written["script"], written["prompt_file"]) == ("train_refl_sd3.py", str(prompts))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": "models/none"}, "model: .*there is no folder models/none"),
        ({"data": "./nowhere"}, "data: ./nowhere: there is no such folder"),
        ({"resolution": "70"}, "resolution: 70 is no multiple of 8"),
        ({"resolution": "many"}, "resolution: 'many' is no whole number"),
        ({"goal": "fun"}, "goal: 'fun' is none of style, subject"),
        ({"card": "big"}, "card: 'big' is no number of GB"),
        ({"steps": "0"}, "steps: '0' is no whole number of at least 1"),
        ({"reward": "x"}, "answers: reward is not asked here"),
    ],
)
def test_a_wrong_answer_is_named_and_nothing_is_written(
    out: Path, changed: dict[str, str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        configured(out, {**STYLE, **changed})
    assert not out.exists()


def test_tencents_folder_reads_chinese(tmp_path: Path) -> None:
    (tmp_path / "t2i" / "model").mkdir(parents=True)
    (tmp_path / "t2i" / "model" / "pytorch_model_ema.pt").write_bytes(b"")
    assert not wizard._check_language("chinese", {"model": str(tmp_path)})


def test_a_file_that_is_there_is_left_alone(out: Path) -> None:
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        configured(out, STYLE)
    assert out.read_text() == "mine"


# -- asking ---------------------------------------------------------------------------------------

ASKED = (
    Question(name="first", text="First", choices=lambda answers: ("a", "b")),
    Question(name="second", text="Second", default=lambda answers: answers["first"] * 2),
)


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> dict[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return Asking().all(ASKED)


def test_answers_may_come_from_a_pipe_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert piped(monkeypatch, "b\n\n") == {"first": "b", "second": "bb"}
    with pytest.raises(UserError, match="first: 'c' is none of a, b"):
        piped(monkeypatch, "c\na\n\n")
    with pytest.raises(UserError, match="the answers end before second: nothing was written"):
        piped(monkeypatch, "a\n")


def test_in_a_terminal_a_wrong_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO("c\na\nx\n")
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", stream)
    assert Asking().all(ASKED) == {"first": "a", "second": "x"}


def test_an_interrupted_wizard_writes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    monkeypatch.setattr("sys.argv", ["configure", "--output", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.run(main, ConfigureArgs, None)
    assert ended.value.code == 130
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_the_written_file_starts_the_script_and_fits_the_card(out: Path) -> None:
    written = configured(out, {**STYLE, "card": 8})
    assert "mixed_precision" in written
    words = [sys.executable, "train_lora_sd3.py", "--config", str(out), "--dry_run"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest phase" in done.stdout
