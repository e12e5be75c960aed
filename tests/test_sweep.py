"""Claims about `python -m dojo.sweep`: a run of every combination, each once, none twice."""

import json
import re
from pathlib import Path

import pytest

from dojo import cli, sweep
from dojo.cli import UserError
from dojo.report.__main__ import main as report
from dojo.report.several import compared

# A script as ours are, but for the training: it notes its starts, and fails where `broken` lies.
SCRIPT = """
import dataclasses, json, pathlib, sys
from dojo import cli

@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    output_dir: pathlib.Path
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False
    seed: int | None = None
    webhook: str | None = None

@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    run: Run
    rank: int = 4
    layers: tuple[str, ...] = ()
    rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("--rank must be at least 1")

def main(args: Args) -> None:
    folder = args.run.output_dir
    with open("starts", "a") as file:
        print(folder.name, file=file)
    folder.mkdir(parents=True, exist_ok=True)
    groups = {"run": vars(args.run), "all": {k: v for k, v in vars(args).items() if k != "run"}}
    record = {"script": "train_fake.py", "args": groups}
    (folder / "args.json").write_text(json.dumps(record, default=str))
    if pathlib.Path("broken").exists() and args.rank == 8:
        raise cli.TrainingStopped("broken")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": args.rate}) + "\\n")
    (folder / "finished.json").write_text("{}")

if __name__ == "__main__":
    cli.run(main, Args, __doc__)
"""
FILE = """
script: train_fake.py
output_dir: out
rate: 1e-3
grid:
  rank: [4, 8]
  layers: [[a, b], [c]]
"""
NAMES = [f"rank={rank},layers={layers}" for rank in (4, 8) for layers in ("a+b", "c")]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("train_fake.py").write_text(SCRIPT)
    Path("sweep.yaml").write_text(FILE)
    return Path("sweep.yaml")


def starts() -> list[str]:
    return Path("starts").read_text().split() if Path("starts").exists() else []


def swept(file: Path) -> None:
    sweep.main(sweep.SweepArgs(file=file))


def test_every_combination_is_run_once_and_what_failed_is_taken_up_again(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("broken").touch()
    with pytest.raises(cli.TrainingStopped, match=r"2 of 4 failed: rank=8,layers=a\+b, rank=8"):
        swept(file)
    assert starts() == NAMES
    Path("broken").unlink()
    swept(file)
    assert starts() == [*NAMES, *NAMES[2:]]
    swept(file)
    assert starts() == [*NAMES, *NAMES[2:]]
    assert "4 runs, 4 of them finished already" in capfd.readouterr().out
    record = json.loads((Path("out") / NAMES[3] / "args.json").read_text())["args"]
    assert record["all"] == {"rank": 8, "layers": ["c"], "rate": 0.001}
    assert record["run"]["seed"] == 0
    assert record["run"]["resume_from_checkpoint"] == "latest"


def test_a_run_whose_options_changed_is_not_taken_for_finished(file: Path) -> None:
    _, members = sweep.plan(file)
    for one in members:
        sweep.write(one)
        one.folder.mkdir()
        (one.folder / "finished.json").touch()
    assert all(one.is_finished for one in sweep.plan(file)[1])
    file.write_text(FILE.replace("1e-3", "1e-2"))
    assert not any(one.is_finished for one in sweep.plan(file)[1])


def test_options_that_a_finished_run_refuses_are_refused_again(file: Path) -> None:
    swept(file)
    file.write_text(FILE.replace("1e-3", "1e-2"))
    Path("broken").touch()  # rank 8 takes no other options, rank 4 does
    for count in (2, 4):
        with pytest.raises(cli.TrainingStopped, match="2 of 4 failed: rank=8"):
            swept(file)
        assert starts()[4:] == [*NAMES, *NAMES[2:]][: count + 2]


def test_what_a_script_takes_for_finished_is_not_started_again(file: Path) -> None:
    swept(file)
    ended = [one.folder / "finished.json" for one in sweep.plan(file)[1]]
    for one in sweep.plan(Path("./out/../sweep.yaml"))[1]:
        assert not one.is_finished
        sweep.write(one)
        assert not one.is_finished
        one.settle()  # as after a script that had nothing to do
        assert one.is_finished
    assert all(path.read_text() == "{}" for path in ended)


def test_an_interrupt_counts_whatever_the_launcher_makes_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Launcher:
        waits = 0

        def __init__(self, words: object) -> None:
            del words

        def wait(self) -> int:
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return 1

    monkeypatch.setattr("subprocess.Popen", Launcher)
    assert sweep.run(["torchrun"]) == 130


def test_a_long_name_fits_into_a_file_system(file: Path) -> None:
    file.write_text(f"{FILE.split('grid')[0]}grid:\n  layers: [[{'猫' * 120}], [b]]\n")
    name = sweep.plan(file)[1][0].name
    assert len(f"{name}.yaml".encode()) <= 255
    assert name.endswith("猫")


def test_an_interrupted_run_ends_the_sweep(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "run", lambda words: 130)
    with pytest.raises(cli.TrainingStopped, match=r"rank=4,layers=a\+b was interrupted"):
        swept(file)


def test_a_dry_run_prints_commands_and_writes_nothing(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.main(sweep.SweepArgs(file=file, dry_run=True, launcher="accelerate launch --cpu"))
    said = capsys.readouterr().out
    assert "accelerate launch --cpu train_fake.py --config out/rank=8,layers=c.yaml " in said
    assert not Path("out").exists()


def test_several_tables_are_swept_one_after_the_other(file: Path) -> None:
    grid = "grid:\n- {rank: [4]}\n- {rank: [8, 16], layers: [[c]]}\n"
    file.write_text(FILE.split("grid")[0] + grid)
    names = [one.name for one in sweep.plan(file)[1]]
    assert names == ["rank=4", "rank=8,layers=c", "rank=16,layers=c"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("rank:", "rnak:", "sweep.yaml: rnak: there is no --rnak; did you mean --rank"),
        ("[4, 8]", "4", "sweep.yaml: grid.rank needs a list of values"),
        ("[4, 8]", "[4, 4]", "two combinations are called rank=4"),
        ("rank:", "output_dir:", "grid.output_dir: a sweep sets it itself"),
        ("rank:", "output-dir:", "grid.output-dir: a sweep sets it itself"),
        ("grid", "#", "there is no grid"),
        ("script: train_fake.py", "", "script: NAME.py says what is to be run"),
        ("train_fake.py", "train_none.py", "train_none.py is not there"),
        ("output_dir: out", "", "output_dir says where"),
        ("rate: 1e-3", "overwrite_output_dir: true", "overwrite_output_dir: a sweep goes on"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(
    file: Path, old: str, new: str, told: str
) -> None:
    text = FILE.replace(old, new)
    file.write_text(text if new != "#" else text.split("#")[0])
    with pytest.raises(UserError) as refused:
        swept(file)
    assert told in str(refused.value)
    assert not starts()


def test_a_value_out_of_range_is_refused_with_its_combination(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(FILE.replace("[4, 8]", "[4, 0]"))
    with pytest.raises(SystemExit):
        swept(file)
    said = capsys.readouterr()
    assert "--rank must be at least 1" in said.out + said.err
    assert '"rank": "0"' in said.err
    assert not starts()


def test_a_file_of_somebody_else_s_is_left_alone(file: Path) -> None:
    theirs = Path("out") / f"{NAMES[0]}.yaml"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(UserError, match="was not written by a sweep"):
        swept(file)
    assert theirs.read_text() == "mine"


def test_the_report_of_several_runs_shows_what_differs(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rank, loss in (("a", 4, 0.5), ("b", 8, 0.25)):
        folder = Path(name)
        folder.mkdir()
        record = {"args": {"lora": {"rank": rank, "alpha": 1}, "run": {"output_dir": name}}}
        (folder / "args.json").write_text(json.dumps(record))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": loss}) + "\n")
    (Path("b") / "finished.json").touch()
    rows = [line.split("  ") for line in compared([Path("a"), Path("b")])]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["run", "rank", "step", "state", "loss"],
        ["a", "4", "2", "not finished", "0.5"],
        ["b", "8", "2", "finished", "0.25"],
    ]
    assert report(["a", "b"]) == 0
    assert "not finished" in capsys.readouterr().out
    assert report(["a", "nowhere"]) == 2


def test_runs_of_one_name_are_told_apart_and_a_number_that_was_lost_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Path("a/run"), Path("b/run")]
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True)
        record = {"args": {"run": {"seed": None}}, "seed": seed}
        (folder / "args.json").write_text(json.dumps(record))
        lost = json.dumps({"step": 2, "eval_loss": float("nan")})
        (folder / "metrics.jsonl").write_text(f'{{"step": 1, "eval_loss": 0.5}}\n{lost}\n')
    assert [line.split() for line in compared(folders)] == [
        ["run", "seed", "step", "state", "eval_loss"],
        ["a/run", "0", "2", "not", "finished", "nan"],
        ["b/run", "1", "2", "not", "finished", "nan"],
    ]


def test_the_command_s_mistakes_are_the_user_s(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["sweep", "nothing.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.run(sweep.main, sweep.SweepArgs, sweep.__doc__)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --config nothing.yaml: there is no such file\n"


def test_the_command_line_is_read(file: Path) -> None:
    args = cli.parse(sweep.SweepArgs, None, [str(file), "--dry_run"])
    assert (args.file, args.dry_run) == (file, True)


@pytest.mark.parametrize("place", ["top", "grid"])
def test_a_secret_has_no_place_in_a_sweep(file: Path, place: str) -> None:
    address = "https://example.org/api/webhooks/1/hush"
    text = file.read_text()
    if place == "top":
        file.write_text(f"webhook: {address}\n{text}")
    else:
        file.write_text(re.sub(r"^grid:\n", f"grid:\n  webhook: ['{address}']\n", text, flags=re.M))
    with pytest.raises(UserError, match=r"webhook is a secret.*set DOJO_WEBHOOK") as refused:
        sweep.plan(file)
    assert "hush" not in str(refused.value)
