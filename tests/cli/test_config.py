"""Claims about `--config`: a file says what flags would say, and is refused as they are."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from dojo import cli
from dojo.run.folders import options
from tests.scripts.runs import SCRIPTS


@dataclass(frozen=True, kw_only=True)
class Group:
    """A nested group."""

    learning_rate: float = 1e-4
    """a number"""
    random_flip: bool = False
    """a switch"""
    lora_layers: tuple[str, ...] = ("attn",)
    """a list"""
    precision: Literal["no", "bf16"] | None = None
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
    name: str | None = "someone"
    """a text that may be absent"""
    sizes: tuple[int, ...] = (512,)
    """numbers"""


OWN = Path(__file__).name
YAML = """
# 1e-4 is a text to YAML, no is false, 010 is 8: here they mean what flags mean
group:
  learning_rate: 1e-3
  precision: no
  lora_layers: [to_k, "to_q - x"]
output-dir: out
random_flip: yes
sizes: 010
name: null
"""
MEANT = Args(
    group=Group(
        learning_rate=1e-3, precision="no", lora_layers=("to_k", "to_q - x"), random_flip=True
    ),
    output_dir=Path("out"),
    sizes=(10,),
    name=None,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, so that messages name files without one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(content: str, name: str = "run.yaml") -> str:
    Path(name).write_text(content)
    return name


def parse(*words: str) -> Args:
    return cli.parse(Args, "doc", words)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is printed when these words are refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.usefixtures("folder")
def test_yaml_json_and_toml_say_the_same() -> None:
    table: dict[str, Any] = {
        "group": {"learning_rate": 0.001, "precision": "no", "lora_layers": ["to_k", "to_q - x"]},
        "output_dir": "out",
        "random_flip": True,
        "sizes": 10,
        "name": None,
    }
    toml = 'output_dir = "out"\nrandom_flip = true\nsizes = [10]\nname = "None"\n[group]\n'
    toml += 'learning_rate = 1e-3\nprecision = "no"\nlora_layers = ["to_k", "to_q - x"]\n'
    assert parse("--config", write(YAML)) == MEANT
    assert parse("--config", write(json.dumps(table), "run.json")) == MEANT
    assert parse(f"--config={write(toml, 'run.toml')}") == MEANT


@pytest.mark.usefixtures("folder")
def test_flags_win_wherever_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    file = write(YAML)
    words = ("--learning-rate", "5", "--config", file, "--lora_layers", "a", "--name=me")
    args = parse(*words)
    assert args.group.learning_rate == 5
    assert args.group.lora_layers == ("a",)
    assert args.name == "me"
    assert args.sizes == (10,)  # of the file
    said = capsys.readouterr().err
    assert "--learning_rate, --lora_layers, --name: the command line counts, not run.yaml" in said
    assert {"random_flip", "sizes", "learning_rate"} <= cli.typed(words)


@pytest.mark.usefixtures("folder")
def test_of_two_files_the_last_counts() -> None:
    write("output_dir: a\nname: b\n", "first.yaml")
    write("output_dir: c\n", "last.yaml")
    args = parse("--config", "first.yaml", "--config", "last.yaml")
    assert (args.output_dir, args.name) == (Path("c"), "someone")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("lerning_rate: 1", "run.yaml: lerning_rate: there is no --lerning_rate; did you mean "),
        ("group: {lerning_rate: 1}", "run.yaml: group.lerning_rate: there is no"),
        ("grup: {rank: 1}", "run.yaml: grup: there is no such group of options; did you mean gr"),
        ("network_dim: 8", "run.yaml: network_dim: here it is --rank"),
        ("learning_rate: -1", "(--learning_rate stands in run.yaml: learning_rate)"),
        ("learning_rate: much", "(--learning_rate stands in run.yaml: learning_rate)"),
        ("learning_rate: .nan", "(--learning_rate stands in run.yaml: learning_rate)"),
        ("precision: fp8", "(--precision stands in run.yaml: precision)"),
        ("random_flip: maybe", "run.yaml: random_flip must be true or false, not 'maybe'"),
        ("name: [a, b]", "run.yaml: name takes one value, not a list of 2"),
        ("sizes: [[1], 2]", "run.yaml: sizes holds ['1'], which is no single value"),
        ("name: --rank", "run.yaml: name: a value cannot begin with two dashes"),
        ("name: a\nname: b", "run.yaml cannot be read: name stands there twice"),
        ("name: a\ngroup: {name: b}", "run.yaml: group.name is given twice, as run.yaml: name"),
        ("name: http://***@host", "run.yaml: name: its password or key was left out"),
        ("grid: {seed: [1]}", "run.yaml: grid is for a sweep: python -m dojo.sweep run.yaml"),
        ("- a", "run.yaml: options by name are expected"),
        ("a: [", "run.yaml cannot be read: while parsing"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(
    content: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refusal(capsys, "--output_dir", "out", "--config", write(content))


@pytest.mark.usefixtures("folder")
def test_a_flag_s_own_mistake_is_not_laid_to_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "--config", write("output_dir: out\nname: a"), "--learning_rate", "-1")
    assert "--learning_rate must be positive" in said
    assert "stands in" not in said


@pytest.mark.usefixtures("folder")
def test_a_file_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "run.yaml: there is no such file" in refusal(capsys, "--config", "run.yaml")
    assert "grpo.py:fn: a file .yaml" in refusal(capsys, "--config", "grpo.py:fn")
    assert "--config needs a file" in refusal(capsys, "--config", "--output_dir", "out")
    broken = write("{", "a.json")
    assert "--config a.json cannot be read" in refusal(capsys, "--config", broken)


@pytest.mark.usefixtures("folder")
def test_a_file_of_another_script_is_refused_by_what_differs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = "script: train_x.py\noutput_dir: out\n"
    said = refusal(capsys, "--config", write(f"{theirs}rank: 4\n"))
    assert f"run.yaml is of train_x.py and not of {OWN}, which does not have --rank" in said
    assert f"has all of its options: say script: {OWN}" in refusal(
        capsys, "--config", write(theirs)
    )
    assert parse("--config", write(f"script: {OWN}\noutput_dir: out\n"))


@pytest.mark.usefixtures("folder")
def test_a_mistake_that_the_work_finds_names_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(args: Args) -> None:
        raise cli.UserError(f"--output_dir {args.output_dir} holds a run already")

    monkeypatch.setattr("sys.argv", ["x.py", "--config", write("output_dir: out")])
    with pytest.raises(SystemExit):
        cli.run(main, Args, None)
    said = capsys.readouterr().err
    assert said.endswith("already\n(--output_dir stands in run.yaml: output_dir)\n")


@pytest.mark.usefixtures("folder")
def test_help_says_that_there_are_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--config run.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=lambda script: script.name)
def test_the_record_of_a_run_gives_its_options_again(script: Any, tmp_path: Path) -> None:
    module = script.load()
    args = cli.parse(module.Args, None, script.flags(tmp_path / "inputs", tmp_path / "run"))
    args = dataclasses.replace(args, run=dataclasses.replace(args.run, seed=None))
    record = {
        "script": script.file,
        "started": "2026-11-28",
        "args": options(args),
        "seed": 7,
        "mixed_precision": "no",
    }
    file = tmp_path / "args.json"
    file.write_text(json.dumps(record))
    again = cli.parse(module.Args, None, ["--config", str(file)])
    drawn = dataclasses.replace(args.run, seed=7, mixed_precision="no")
    assert again == dataclasses.replace(args, run=drawn)
    assert "adam_beta1" not in cli.typed(["--config", str(file)])  # nobody chose it
