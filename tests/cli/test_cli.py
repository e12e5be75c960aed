"""Claims about the command line: flat flags, lists, refusals and how a script ends."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from dojo import cli
from dojo.cli import foreign
from tests.conftest import ROOT

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
    precision: Literal["none", "bf16"] | None = None
    """a choice"""

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
    scales: tuple[float, ...] = ()
    """a list of numbers"""
    trackers: tuple[Literal["board", "cloud", "none"], ...] = ("board",)
    """a list of choices"""


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
        ("--lora_layers", "c", "d", "e", "--random_flip", "--lora_layers", "a", "b"),
        ("--random_flip", "--lora-layers", "c", "--lora_layers", "a", "b"),
        ("--random-flip", "--lora-layers=c", "--lora_layers", "a", "b"),
    ],
)
def test_a_list_is_one_flag_with_several_values_and_the_last_one_counts(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(*words).group == Group(lora_layers=("a", "b"), random_flip=True)
    assert ("--lora_layers is given twice: a b counts" in capsys.readouterr().err) == (
        len(words) > 4 or "--lora-layers=c" in words
    )


@pytest.mark.parametrize(
    "words", [("board", "cloud"), ("board,cloud",), ("Board,", "CLOUD"), ("board,,cloud",)]
)
def test_choices_of_a_list_stand_apart_or_with_commas(words: tuple[str, ...]) -> None:
    assert parse("--trackers", *words).trackers == ("board", "cloud")
    assert parse("--prompts", "a,b").prompts == ("a,b",)  # text keeps its commas


def test_a_wrong_choice_of_a_list_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "trackers" in refusal(capsys, "--trackers", "board,clod")


def test_a_list_with_an_equal_sign_is_one_value() -> None:
    assert parse("--prompts=a cat, a = b").prompts == ("a cat, a = b",)
    assert parse("--prompts=a cat", "--prompts=a dog").prompts == ("a dog",)


def test_an_optional_list_given_twice_is_the_last_too() -> None:
    assert parse("--skip_layers", "7", "8", "--skip_layers", "9").group.skip_layers == (9,)


def test_of_a_repeated_number_the_last_wins() -> None:
    # Launchers append "$@" to their own flags.
    args = parse("--learning_rate", "1e-3", "--shift", "auto", "--learning_rate", "1e-5")
    assert args.group.learning_rate == 1e-5
    assert args.shift == "auto"


def test_negative_numbers_and_prompts_with_dashes_are_values() -> None:
    args = parse("--shift", "-1.5", "--prompts", "a - b", "- c")
    assert args.shift == -1.5
    assert args.prompts == ("a - b", "- c")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), False),
        (("--random_flip",), True),
        (("--random_flip", "True"), True),
        (("--random_flip", "false"), False),
        (("--random_flip=False",), False),
        (("--random_flip", "--random_flip", "False"), False),  # behind a launcher's own flag
        (("--random_flip", "False", "--random_flip"), True),
        (("--random_flip", "False", "--learning_rate", "1e-3"), False),
    ],
)
def test_a_switch_is_bare_or_takes_true_or_false(words: tuple[str, ...], expected: bool) -> None:
    assert parse(*words).group.random_flip is expected


def test_a_switch_has_no_twin(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no_random_flip" in refusal(capsys, "--no_random_flip")


def test_a_choice_is_found_in_any_case() -> None:
    assert parse("--shift", "AUTO").shift == "auto"
    assert parse("--precision", "BF16").group.precision == "bf16"
    assert parse("--precision", "none").group.precision == "none"  # a word of its own
    assert parse("--lora_layers", "Attn").group.lora_layers == ("Attn",)  # no choice


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "NaN"])
@pytest.mark.parametrize("flag", ["--learning_rate", "--shift", "--scales"])
def test_a_number_that_is_none_is_refused_everywhere(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, flag, *(["1"] if flag == "--scales" else []), value)
    assert flag in message


def test_an_integer_is_a_number_too() -> None:
    args = parse("--learning_rate", "1", "--shift", "3", "--scales", "1", "0.5")
    assert (args.group.learning_rate, args.shift, args.scales) == (1.0, 3.0, (1.0, 0.5))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--lr_scheduler_power", "2"), "here it is --lr_power (which this script does not have)"),
        (("--unet_lr", "1e-4"), "error: --unet_lr: here it is --learning_rate\n"),
        (("--unet-lr=1e-4",), "error: --unet-lr: here it is --learning_rate\n"),
        (("--flip_aug",), "error: --flip_aug: here it is --random_flip\n"),
        (("--xformers",), "scaled_dot_product_attention"),
        (("--config.train.learning_rate=1e-4",), "here it is --learning_rate"),
        (("--config.learning_rate", "1e-4"), "here it is --learning_rate"),
    ],
)
def test_another_trainers_flag_is_answered_with_ours(
    words: tuple[str, ...], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer in refusal(capsys, *words)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("train_dpo_sd15", "error: --use_lora: this is now --finetune lora\n"),
        ("train_refl_sd15", "error: --use_lora: this is now --finetune lora\n"),
        ("train_lora_sd3", "use_lora"),  # it has no choice
    ],
)
def test_our_own_flag_of_before_is_answered_with_that_of_now(
    name: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stopped:
        cli.parse(script.Args, script.__doc__, ["--use_lora", "--output_dir", "out"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert answer in said
    assert ("--finetune" in said) == (name != "train_lora_sd3")


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


def test_an_error_does_not_stick_to_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    def main(args: Args) -> None:
        for _ in tqdm(range(3), desc="reading"):
            raise cli.UserError("00.png cannot be read")

    monkeypatch.setattr(sys, "argv", ["script", "--output_dir", "out"])
    with pytest.raises(SystemExit):
        cli.run(main, Args, "doc")
    assert "error: 00.png cannot be read" in capsys.readouterr().err.replace("\r", "\n").split("\n")


def test_a_good_run_just_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, None)


# The scripts


def fields(args_type: Any) -> set[str]:
    from typing import get_type_hints

    hints = get_type_hints(args_type)
    names: set[str] = set()
    for name in (option.name for option in dataclasses.fields(args_type)):
        names |= fields(hints[name]) if dataclasses.is_dataclass(hints[name]) else {name}
    return names


def test_a_flag_that_names_a_family_leads_to_its_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(ROOT / "train_dpo_sd15.py")])
    with pytest.raises(SystemExit):
        cli.parse(Args, None, ["--sdxl"])
    said = capsys.readouterr().err
    assert "--sdxl: a script's name says which model it is for: train_dpo_sdxl.py" in said
    for name, script in (("sd7", "train_dpo_sd15.py"), ("a/b", "x.py"), ("sdxl", "")):
        assert foreign.script_of(name, ROOT / script if script else Path()) is None


def test_the_table_of_other_trainers_names_leads_to_flags_that_exist() -> None:
    ours: set[str] = set()
    for name in SCRIPTS:
        ours |= fields(importlib.import_module(name).Args)
    assert not set(foreign.RENAMED.values()) - ours
    assert not (foreign.RENAMED.keys() | foreign.ANSWERS.keys()) & ours
    assert not foreign.RENAMED.keys() & foreign.ANSWERS.keys()
    assert foreign.ELSEWHERE.keys() <= ours
    assert {text.split()[0] for text in foreign.FORMER.values()} <= ours
    assert not foreign.FORMER.keys() & (ours | foreign.RENAMED.keys() | foreign.ANSWERS.keys())
    named = {
        flag for text in foreign.ANSWERS.values() for flag in re.findall(r"--([a-z_0-9]+)", text)
    }
    assert named - ours == {"config", "config_file", "num_processes"}  # dojo.cli's, accelerate's


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_all_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as stopped:
        cli.parse(script.Args, script.__doc__, ["--help", "all"])
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


@dataclass(frozen=True, kw_only=True)
class Marked:
    """Options with marks."""

    folder: Path = field(metadata=cli.marks(incidental=True))
    """without a default"""
    rank: int = cli.option(16, common=True)
    """a number"""
    layers: tuple[str, ...] = cli.option(("attn",), common=True, incidental=True)
    """a list"""
    cache: Path | None = cli.option(None)
    """nothing
    in two lines"""
    precision: Literal["no", "bf16"] = cli.option("no", incidental=True)
    """a choice"""
    flip: bool = cli.option(False)
    """a switch"""


@dataclass(frozen=True, kw_only=True)
class Overridden(Marked):
    """Options that another class has too."""

    rank: int = cli.option(32, incidental=True)
    """another number"""
    flip: bool = True
    """another switch"""


@dataclass(frozen=True, kw_only=True)
class MarkedArgs:
    """A script's options."""

    marked: Overridden


def test_marks_change_nothing_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parse(Marked, None, ["--folder", "a"]) == Marked(folder=Path("a"))
    plain = cli.parse(MarkedArgs, None, ["--folder", "a"]).marked
    assert (plain.rank, plain.layers, plain.cache, plain.flip) == (32, ("attn",), None, True)
    words = ["--folder", "b", "--layers", "x", "y", "--cache", "c", "--precision", "BF16"]
    given = cli.parse(Marked, None, [*words, "--flip", "--rank", "4"])
    assert given == Marked(
        folder=Path("b"), rank=4, layers=("x", "y"), cache=Path("c"), precision="bf16", flip=True
    )
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Marked, None, [])
    assert stopped.value.code == 2
    capsys.readouterr()
    for args_type, texts in {
        Marked: ("without a default (required)", "a number (default: 16)", "nothing", "in two"),
        MarkedArgs: ("another number (default: 32)", "a list (default: attn)", "another switch"),
    }.items():
        with pytest.raises(SystemExit) as stopped:
            cli.parse(args_type, None, ["--help", "all"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in texts), shown


def test_a_mark_is_read_at_the_field_and_an_override_states_its_own() -> None:
    def marked(args_type: Any, name: str) -> set[str]:
        return {
            option.name for option in dataclasses.fields(args_type) if option.metadata.get(name)
        }

    assert marked(Marked, "common") == {"rank", "layers"}
    assert marked(Marked, "incidental") == {"folder", "layers", "precision"}
    assert marked(Overridden, "common") == {"layers"}
    assert marked(Overridden, "incidental") == {"folder", "layers", "precision", "rank"}


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["command", "--output_dir", "out"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, Args, None)
    assert stopped.value.code == cli.ended(main) == 130
    assert cli.ended(lambda: 2) == 2
    assert cli.ended(lambda: None) == 0
    assert capsys.readouterr().err == "\ninterrupted\n" * 2


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


@pytest.mark.parametrize("words", [["--list"], ["--help"]])
def test_a_text_that_nobody_reads_to_its_end_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` leaves it
    monkeypatch.setattr(sys, "argv", ["script", *words])
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda args: None, Args, None, {"--list": lambda: "a long table"})
    assert ended.value.code == 141
    sys.stdout.close()  # what was left has gone somewhere


def test_another_broken_pipe_is_told() -> None:
    def main() -> int:
        raise BrokenPipeError(32, "a worker has gone")

    with pytest.raises(BrokenPipeError, match="a worker"):
        cli.ended(main)
