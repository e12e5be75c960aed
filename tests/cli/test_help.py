"""Claims about what `--help` shows: what matters first, everything or a group when asked."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from dojo import cli
from tests.conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class First:
    """A group that says
    two lines of itself.

    And more.
    """

    folder: Path
    """where; not shown"""
    rank: int = cli.option(16, common=True)
    """a number, which is told
    at length. Not shown."""
    hidden: int = cli.option(3, incidental=True)
    """seldom used"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Second(First):
    """Another group."""

    rank: int = cli.option(32, common=True)
    folder: Path = Path("out")
    """where else"""
    layers: tuple[str, ...] = cli.option(("attn", "ff"), common=True)
    """names"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Options."""

    first: First
    alone: bool = cli.option(False, common=True)
    """outside the groups"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherArgs:
    """Options."""

    second: Second


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """A small command."""

    number: int = 3
    """a number; told in full"""


def helped(capsys: pytest.CaptureFixture[str], args_type: Any, doc: str | None, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(args_type, doc, words)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def options(args_type: Any) -> dict[str, dataclasses.Field[Any]]:
    hints = get_type_hints(args_type)
    found: dict[str, dataclasses.Field[Any]] = {}
    for each in dataclasses.fields(args_type):
        hint = hints[each.name]
        found |= options(hint) if dataclasses.is_dataclass(hint) else {each.name: each}
    return found


def flags(shown: str) -> set[str]:
    """The flags that a help explains."""
    return set(re.findall(r"^(?:  |│ )--(\w+)", shown, re.MULTILINE)) - {"help"}


def test_help_shows_the_required_and_the_common_options_and_names_the_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = helped(capsys, Args, "What it does.", "--help")
    assert flags(shown) == {"folder", "rank", "alone"}
    parts = r"What it does\..*required options.*--folder.*common options.*--rank.*All 4 options"
    assert re.search(parts, shown, re.DOTALL)
    assert re.search(r"where \(required\)", shown)
    assert re.search(r"a number, which is told at length\s+\(default: 16\)", shown)
    assert "ot shown" not in shown
    assert "And more" not in shown
    assert "All 4 options: --help all." in shown
    assert re.search(r"^  first +3  A group that says two lines of itself\.$", shown, re.MULTILINE)


def test_an_override_is_shown_with_its_own_default_and_the_text_it_inherits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = helped(capsys, OtherArgs, None, "--help")
    assert flags(shown) == {"rank", "layers"}
    assert re.search(r"a number, which is told at length\s+\(default: 32\)", shown)
    assert re.search(r"names\s+\(default: attn ff\)", shown)
    assert "required" not in shown


def test_help_all_shows_everything_and_a_group_is_shown_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = helped(capsys, Args, "What it does.", "--help", "all")
    assert flags(shown) == {"folder", "rank", "hidden", "alone"}
    assert "What it does." in shown
    for words in (("--help", "first"), ("--help=first",), ("-h", "first")):
        assert flags(helped(capsys, Args, "doc", *words)) == {"folder", "rank", "hidden"}


def test_help_wins_wherever_it_stands_on_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    short = helped(capsys, Args, "doc", "--help")
    for words in (
        ["-h"],
        ["--rank", "x", "--help"],
        ["--help", "--typo", "1"],
        ["--lr", "1", "-h"],
    ):
        assert helped(capsys, Args, "doc", *words) == short
    assert flags(helped(capsys, Args, "doc", "--rank", "3", "--help", "all")) == set(options(Args))


def test_a_group_that_is_not_there_is_refused_with_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Args, "doc", ["--help", "frist"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: --help frist: there is no such group of options (known: all, first)\n"
    )


def test_a_command_without_common_options_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    shown = helped(capsys, Small, "doc", "--help")
    assert "told in full" in shown
    assert shown == helped(capsys, Small, "doc", "--help", "all")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_of_a_script_fits_on_two_screens(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    script = importlib.import_module(name)
    every = options(script.Args)
    required = {
        name
        for name, each in every.items()
        if each.default is each.default_factory is dataclasses.MISSING
    }
    common = {name for name, each in every.items() if each.metadata.get("common")}
    shown = helped(capsys, script.Args, script.__doc__, "--help")
    assert {"pretrained_model_name_or_path", "output_dir"} <= required
    assert 12 <= len(common - required) <= 20
    assert flags(shown) == required | common
    assert len(shown.splitlines()) <= 86
    for group, hint in get_type_hints(script.Args).items():
        assert re.search(rf"^  {group} +{len(options(hint))}  \S", shown, re.MULTILINE)
    everything = helped(capsys, script.Args, script.__doc__, "--help", "all")
    assert flags(everything) == set(every)


@pytest.mark.parametrize(
    "name", [name for name in SCRIPTS if not re.search("full|textual_inversion", name)]
)
def test_the_group_of_the_adapter_is_shown_alone(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module(name)
    lora = get_type_hints(script.Args)["lora"]
    assert flags(helped(capsys, script.Args, script.__doc__, "--help", "lora")) == set(
        options(lora)
    )
