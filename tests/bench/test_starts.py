"""Two checkouts side by side: who is started when, with which caches, and what is compared."""

import json
import sys
from pathlib import Path

import pytest

from dojo.bench import __main__ as command_line
from dojo.bench import starts
from dojo.bench.starts import StartArgs
from dojo.cli import TrainingStopped, UserError

# Writes rows as a run does, and what it found into a list of all starts.
SCRIPT = """
import json, os, pathlib, sys
log = pathlib.Path("../starts.txt").open("a")
name = pathlib.Path.cwd().name
assert not sys.dont_write_bytecode  # else its modules are compiled at every start
assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(pathlib.Path.cwd() / "src")
if "--help" in sys.argv:
    print(name, "help", file=log)
    sys.exit()
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
output, cache = (pathlib.Path(flags[f"--{one}"]) for one in ("output_dir", "latent_cache_dir"))
print(name, "full" if cache.is_dir() else "empty", file=log)
cache.mkdir(exist_ok=True, parents=True)
output.mkdir(parents=True)
with (output / "metrics.jsonl").open("w") as metrics:
    for step in range(1, int(flags["--max_train_steps"]) + 1):
        print(json.dumps({"step": step, "loss": 1.0}), file=metrics, flush=True)
"""


@pytest.fixture
def checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags that name two of them."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for name in ("before", "after"):
        for part in (starts.MODEL, starts.DATA, "src/dojo"):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / starts.SCRIPT).write_text(SCRIPT)
    flags = [word for name in ("before", "after") for word in (f"--{name}", str(tmp_path / name))]
    return [*flags, "--work_dir", str(tmp_path / "work")]


def test_both_are_started_by_turns_with_empty_and_with_full_caches(
    checkouts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers.json"
    command_line.main(["starts", *checkouts, "--num_rounds", "2", "--output", str(out)])
    kinds = ["empty", "full", "help"]
    expected = ["before empty", "after empty"]  # not timed
    for names in (("before", "after"), ("after", "before")):
        expected += [f"{name} {kind}" for name in names for kind in kinds]
    assert (tmp_path / "starts.txt").read_text().splitlines() == expected
    found = json.loads(out.read_text())
    for side in found["rounds"].values():
        assert set(side) == set(starts.GOALS)
        assert all(len(times) == 2 for times in side.values())
        assert all(min(side[what]) > 0 for what in ("cold", "warm", "help"))
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert "ratio" in head
    assert len(rows) == len(starts.GOALS)


def test_ratios_are_of_medians_and_of_minima() -> None:
    before = {what: [4.0, 2.0, 10.0] for what in starts.GOALS}
    after = {what: [2.0, 1.9, 1.0] for what in starts.GOALS}
    found = {"before": before, "after": after}
    assert starts.ratios(found)["warm"] == {"median": 1.9 / 4, "minimum": 0.5}
    rows = starts.table(found).splitlines()[2:]
    assert rows[0].endswith("| 4.00 (2.00) | 1.90 (1.00) | 0.47 (0.50) | 0.5 | yes |")
    assert rows[3].endswith("| 0.2 | no |")


def test_a_run_that_fails_is_no_number(checkouts: list[str], tmp_path: Path) -> None:
    script = tmp_path / "after" / starts.SCRIPT
    words = [sys.executable, str(script)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 1.0}\n')
    script.write_text("raise SystemExit(3)")
    with pytest.raises(TrainingStopped, match=r"exit code 3 after . of 2 steps"):
        starts.follow(words, tmp_path / "after", metrics, 2)
    script.write_text("")  # ends well, without its last step
    with pytest.raises(TrainingStopped, match=r"exit code 0 after . of 2 steps"):
        starts.follow(words, tmp_path / "after", metrics, 2)


def test_a_folder_that_is_no_checkout_is_refused(checkouts: list[str], tmp_path: Path) -> None:
    (tmp_path / "before" / starts.SCRIPT).unlink()
    args = StartArgs(before=tmp_path / "before", after=tmp_path / "after")
    with pytest.raises(UserError, match=f"--before: .* has no {starts.SCRIPT}"):
        starts.main(args)
