"""Claims about the command line: flat flags, lists, refusals and how a script ends."""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from dojo import cli

from .conftest import ROOT

SCRIPTS = sorted(path.stem for path in [*ROOT.glob("train_*.py"), *ROOT.glob("demo.py")])


@dataclass(frozen=True, kw_only=True)
class Group:
    """A nested group."""

    learning_rate: float = 1e-4
    """a number"""
    random_flip: bool = False
    """a switch"""
    lora_layers: tuple[str, ...] = ("attn",)
    """a list"""
    skip_layers: tuple[int, ...] | None = None
    """a list that may be absent"""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError("--learning_rate must be positive")


@dataclass(frozen=True, kw_only=True)
class Args:
    """All options."""

    group: Group
    output_dir: Path
    """a path"""
    prompts: tuple[str, ...] = ()
    """a list outside the group"""
    shift: float | Literal["auto"] | None = None
    """a number or a word"""


def parse(*words: str) -> Args:
    return cli.parse(Args, "doc", ["--output_dir", "out", *words])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is printed when these flags are refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize(
    "words",
    [
        ("--lora_layers", "a", "b", "--random_flip"),
        ("--lora_layers", "a", "--random_flip", "--lora_layers", "b"),
        ("--random_flip", "--lora_layers", "a", "--lora_layers", "b"),
        ("--lora-layers", "a", "--lora_layers", "b", "--random-flip"),
    ],
)
def test_a_list_is_given_at_once_or_by_repeating_the_flag(words: tuple[str, ...]) -> None:
    assert parse(*words).group == Group(lora_layers=("a", "b"), random_flip=True)


def test_a_list_repeated_with_equal_signs_keeps_every_value() -> None:
    assert parse("--prompts=a cat", "--prompts=a dog").prompts == ("a cat", "a dog")


def test_lists_of_other_types_are_gathered_too() -> None:
    args = parse("--skip_layers", "7", "8", "--skip_layers", "9", "--prompts", "a cat, a dog")
    assert args.group.skip_layers == (7, 8, 9)
    assert args.prompts == ("a cat, a dog",)


def test_of_a_repeated_number_the_last_wins() -> None:
    # Launchers append "$@" to their own flags.
    args = parse("--learning_rate", "1e-3", "--shift", "auto", "--learning_rate", "1e-5")
    assert args.group.learning_rate == 1e-5
    assert args.shift == "auto"


def test_negative_numbers_and_prompts_with_dashes_are_values() -> None:
    args = parse("--shift", "-1.5", "--prompts", "a - b", "- c")
    assert args.shift == -1.5
    assert args.prompts == ("a - b", "- c")


def test_a_switch_takes_no_value_and_has_no_twin(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--random_flip").group.random_flip
    assert not parse().group.random_flip
    assert "no_random_flip" in refusal(capsys, "--no_random_flip")


def test_a_wrong_flag_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--learning_rat", "1e-3")
    assert "--learning_rat" in message
    assert "--learning_rate" in message.replace("--learning_rat ", "")


def test_a_flag_is_not_completed_from_its_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learn" in refusal(capsys, "--learn", "1.0")


def test_a_wrong_value_is_refused_and_its_flag_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learning_rate must be positive" in refusal(capsys, "--learning_rate", "-1")
    assert "learning_rate" in refusal(capsys, "--learning_rate", "fast")


def test_a_missing_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Args, "doc", [])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "--output_dir" in captured.out + captured.err


# How a script ends


def run(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def main(args: Args) -> None:
        assert args.output_dir == Path("out")
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["script", "--output_dir", "out"])
    cli.run(main, Args, "doc")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (cli.UserError("--output_dir holds a run"), 2, "error: --output_dir holds a run\n"),
        (cli.TrainingStopped("step 3 is not finite"), 1, "stopped: step 3 is not finite\n"),
    ],
)
def test_a_foreseen_end_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    line: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, error)
    assert stopped.value.code == code
    captured = capsys.readouterr()
    assert captured.err == line
    assert captured.out == ""


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        run(monkeypatch, KeyError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        run(monkeypatch, ValueError("a bug"))  # only UserError means the user


def test_a_good_run_just_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, None)


# The scripts


def fields(args_type: Any) -> set[str]:
    from dataclasses import fields as own
    from dataclasses import is_dataclass
    from typing import get_type_hints

    hints = get_type_hints(args_type)
    names: set[str] = set()
    for field in own(args_type):
        names |= fields(hints[field.name]) if is_dataclass(hints[field.name]) else {field.name}
    return names


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_all_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stopped:
        cli.parse(script.Args, script.__doc__, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    missing = {field for field in fields(script.Args) if f"--{field}" not in shown}
    assert not missing


def test_help_works_from_the_shell_in_any_folder(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_lora_sd3.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "--pretrained_model_name_or_path" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()

    def main(_: object) -> None:
        (file / "deeper").write_text("x")

    monkeypatch.setattr(cli, "parse", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.run(main, object, None)
    assert ended.value.code == 2
    assert f"error: {file}/deeper cannot be written or read: Not a dir" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def main(_: object) -> None:
        (tmp_path / "no").read_text()

    monkeypatch.setattr(cli, "parse", lambda *_: None)
    with pytest.raises(FileNotFoundError):
        cli.run(main, object, None)
