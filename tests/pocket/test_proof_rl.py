"""What the proof of reinforcement learning measures: intervals, goals, the report, its script."""

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dojo import cli
from dojo.cli import UserError
from dojo.methods.rl import passes_of
from dojo.pocket import datasets, proof_arms, proof_rewards, proof_rl, scenes, verifier
from dojo.pocket.proof_rl import Evaluation
from tests.conftest import ROOT
from tests.pocket.proofs import bash, recorded, unspread

SCRIPT = ROOT / "scripts" / "prove_rl.sh"
Columns = Mapping[str, Sequence[float]]


def of_task(task: str, count: int) -> list[str]:
    draw = random.Random(task)
    return [scenes.caption(scenes.random_spec(draw, task)) for _ in range(count)]


CAPTIONS = [caption for task in scenes.TASKS for caption in of_task(task, 10)]


# ---- Intervals and the mean over tasks ----


def test_a_constant_difference_has_an_interval_without_width() -> None:
    # And so have tasks that differ from each other only: a bootstrap over all pictures would not.
    groups = {"one": np.full(40, 0.25), "other": np.full(7, -0.75)}
    low, high = proof_rl.interval(groups)
    assert low == high == -0.25
    assert (proof_rl.overall(groups).mean, proof_rl.overall(groups).error) == (-0.25, 0)


def test_the_interval_of_many_binomial_draws_is_the_normal_one_of_its_strata() -> None:
    ones = {"rare": np.repeat([1.0, 0.0], [100, 900]), "even": np.repeat([1.0, 0.0], [200, 200])}
    # The variance of the mean of two means; both are known.
    error = np.sqrt(0.1 * 0.9 / 1000 + 0.5 * 0.5 / 400) / 2
    low, high = proof_rl.interval(ones)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.1 * error)
    assert proof_rl.overall(ones).error == pytest.approx(error, rel=2e-3)
    assert proof_rl.interval(ones) == (low, high)  # the seed is fixed


def test_the_interval_holds_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_rl, "RESAMPLES", 500)
    draw = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        groups = {
            "a": draw.binomial(1, 0.3, 40).astype(float),
            "b": draw.binomial(1, 0.8, 40).astype(float),
            "c": draw.binomial(1, 0.5, 40).astype(float),
        }
        low, high = proof_rl.interval(groups)
        inside += low <= (0.3 + 0.8 + 0.5) / 3 <= high
    assert 0.91 < inside / 400 < 0.98


def test_the_mean_over_tasks_is_that_of_the_verifier() -> None:
    prompts = [*of_task("colors", 9), *of_task("counting", 2), *of_task("position", 4)]
    shown = [scenes.draw(scenes.realise(scenes.parse(p), random.Random(p))) for p in prompts]
    for i in (0, 1, 9):  # nothing is right in an empty picture
        shown[i] = np.full_like(shown[i], 128)
    images = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 255
    expected = verifier.task_scores(images, prompts)
    scores = verifier.score(images, prompts, strict=True).tolist()
    rows = [
        {"file": "", "prompt": prompt, "seed": "0", "pocket_strict": f"{score:.6g}"}
        for prompt, score in zip(prompts, scores, strict=True)
    ]
    random.Random(0).shuffle(rows)
    groups = Evaluation(step=0, minutes=0, kl=None, rows=rows).by_task("pocket_strict")
    assert proof_rl.overall(groups).mean == pytest.approx(expected.pop("overall"))
    assert {task: values.mean() for task, values in groups.items()} == pytest.approx(expected)
    assert 0 < min(expected.values()) < 1  # some were right and some were not


# ---- A run's folder ----


def write_run(
    folder: Path,
    scores: Sequence[Columns],
    *,
    prompts: Sequence[str] = CAPTIONS,
    seconds: float = 60.0,
    finished: bool = True,
    **options: Any,
) -> None:
    """A run as a script leaves it: evaluations at steps 0, 2, 4, ... with these columns of scores.

    An epoch has two steps and takes `seconds`, an evaluation 7 s.
    """
    rows: list[dict[str, Any]] = []
    for number, columns in enumerate(scores):
        step = 2 * number
        if step:
            rows.append(
                {
                    **{"step": step, "epoch": float(number), "loss": 0.0},
                    **{"reward": 0.5 + number / 10, "diversity": 0.3 - number / 20},
                    **{"seconds_sample": seconds / 4, "seconds_train": seconds * 3 / 4},
                    **{"seconds_validation": 7.0, "seconds_checkpoint": 1.0, "seconds_cache": 2.0},
                }
            )
        rows.append({"step": step, "eval_reward": 0.0, "eval_kl": 0.01 * number})
        place = folder / "validation" / f"step-{step}"
        place.mkdir(parents=True)
        with (place / "scores.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "prompt", "seed", *columns])
            for i, prompt in enumerate(prompts):
                name = f"{i:02d}.png" if i % 5 < 2 else ""
                writer.writerow([name, prompt, 0, *(values[i] for values in columns.values())])
                if name:
                    Image.new("RGB", (64, 64), (60 * number, 99, i)).save(place / name)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {
        **{"num_prompts_per_epoch": 3, "group_size": 8, "sampler": "cps", "noise_level": None},
        **{"train_timesteps": "window", "window_size": 3, "sample_steps": 8, "guidance_scale": 1.0},
    }
    record = {"args": {"sample": {**defaults, **options}}, "device": "cpu"}
    (folder / "args.json").write_text(json.dumps(record))
    if finished:
        (folder / "finished.json").write_text(json.dumps({"step": 2 * len(scores) - 2}))


def graded(strict: Sequence[float]) -> Columns:
    """Columns of an evaluation: the strict score as given, half of it as the trained reward."""
    reward = [0.25 + value / 2 for value in strict]
    return {"reward": reward, "pocket": reward, "pocket_strict": strict}


def first_of_ten(*counts: int) -> list[float]:
    """Strict scores of `CAPTIONS`: of each task so many of its ten are right."""
    return [float(i < count) for count in counts for i in range(10)]


def report(folder: Path, *, no_goals: bool = False) -> int:
    """Writes the report and returns the exit code."""
    try:
        proof_rl.main(proof_rl.Args(output_dir=folder, no_goals=no_goals))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


BEFORE = first_of_ten(5, 5, 5, 5, 5, 5)
LIFTED = first_of_ten(9, 8, 7, 7, 7, 7)  # by a quarter


def test_the_report_holds_the_runs_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = first_of_ten(6, 6, 6, 6, 6, 6)
    write_run(tmp_path / "grpo", [graded(BEFORE), graded(middle), graded(LIFTED)], seconds=90)
    assert report(tmp_path) == 0
    found = json.loads((tmp_path / "rl.json").read_text())["grpo"]
    assert found["steps"] == 4
    assert found["pictures_sampled"] == 2 * 3 * 8
    assert found["seconds"] == pytest.approx(180)  # no evaluation, checkpoint, or cache
    assert found["seconds_with_evaluations"] == pytest.approx(200)
    assert found["eval_kl"] == [0, 0.01, 0.02]
    strict = found["changes"]["pocket_strict"]
    assert strict["before"]["mean"] == pytest.approx(0.5)
    assert strict["after"]["mean"] == pytest.approx(0.75)
    assert strict["difference"]["mean"] == pytest.approx(0.25)
    # Paired: 4, 3, 2, 2, 2, 2 of ten changed, with the sample variance of such a column each.
    variances = [share * (1 - share) / 9 for share in (0.4, 0.3, 0.2, 0.2, 0.2, 0.2)]
    assert strict["difference"]["error"] == pytest.approx(np.sqrt(sum(variances)) / 6)
    assert strict["low"] < 0.25 < strict["high"]
    assert found["changes"]["single_object"]["difference"]["mean"] == pytest.approx(0.4)
    assert found["changes"]["reward"]["after"]["mean"] == pytest.approx(0.25 + 0.75 / 2)

    text = (tmp_path / "rl.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "GRPO: 4 steps, 48 pictures sampled, 3.0 min" in text
    assert "180 s of training, within the 30 min" in text
    assert "| KL from the base | 0 | 0.02 |" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[2].strip() for line in lines[3:9]] == [
        f"- {task.replace('_', ' ')}" for task in scenes.TASKS
    ]
    assert "All goals of these runs were reached." in text


def test_the_pictures_are_two_of_every_task_before_and_after(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo", [graded(BEFORE), graded(LIFTED)])
    assert report(tmp_path) == 0
    with Image.open(tmp_path / "grpo_pictures.png") as sheet:
        seen = {color for _, color in sheet.convert("RGB").getcolors(1 << 24) or []}
    # 60 times the evaluation's number, 99, and the picture's number.
    expected = [10 * task + place for task in range(6) for place in (0, 1)]
    assert all((shade, 99, i) in seen for shade in (0, 60) for i in expected)
    assert not any((shade, 99, 5) in seen for shade in (0, 60))
    assert proof_rl._note(proof_rl.PARTS[0], {"reward": "0.123", "pocket_strict": "1"}) == "0.12 ✓"
    assert proof_rl._note(proof_rl.PARTS[2], {"reward": "-1.5", "pocket_strict": "0"}) == "-1.50 kB"


def test_the_curves_are_drawn_over_minutes_of_training_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr(
        proof_rl.figures.Figure, "savefig", lambda self, path: drawn.update({path: self})
    )
    write_run(tmp_path / "grpo", [graded(BEFORE), graded(LIFTED), graded(LIFTED)])
    assert report(tmp_path) == 0
    main, kl, diversity = drawn[tmp_path / "grpo.png"].axes
    strict = main.containers[-1].lines[0]
    curves = {line.get_label(): line for line in main.lines}
    assert list(curves["sampled pictures: reward"].get_xdata()) == [1, 2]
    assert [list(values) for values in strict.get_data()] == [
        [0, 1, 2],
        pytest.approx([0.5, 0.75, 0.75]),
    ]
    assert list(kl.lines[0].get_ydata()) == [0, 0.01, 0.02]
    assert list(diversity.lines[0].get_ydata()) == pytest.approx([0.25, 0.2])
    above = main.child_axes[0]
    assert [tick.get_text() for tick in above.get_xticklabels()] == ["0", "2", "4"]
    assert diversity.get_xlabel() == "minutes of training (cpu)"


# ---- Goals ----


@pytest.mark.parametrize(
    ("after", "code"),
    [
        (first_of_ten(6, 6, 6, 7, 7, 7), 0),  # 0.15 to the bit of rounding
        (first_of_ten(6, 6, 6, 7, 7, 6), 1),
    ],
    ids=["just reached", "just missed"],
)
def test_grpo_must_lift_the_strict_score(tmp_path: Path, after: list[float], code: int) -> None:
    write_run(tmp_path / "grpo", [graded(BEFORE), graded(after)])
    assert report(tmp_path) == code
    text = (tmp_path / "rl.md").read_text()
    assert ("MISSED" in text) == bool(code)
    assert report(tmp_path, no_goals=True) == 0
    assert "Nothing is claimed" in (tmp_path / "rl.md").read_text()


def test_a_large_rise_of_few_pictures_is_not_clear_of_zero(tmp_path: Path) -> None:
    prompts = [caption for task in scenes.TASKS for caption in of_task(task, 2)]
    before = [0, 0] + [0, 1] * 5
    after = [0, 1] + [0, 1] * 3 + [1, 1, 1, 0]
    write_run(tmp_path / "grpo", [graded(before), graded(after)], prompts=prompts)
    assert report(tmp_path) == 1
    goals = json.loads((tmp_path / "rl.json").read_text())["grpo"]["goals"]
    assert [goal["reached"] for goal in goals] == [True, False]


def test_the_long_run_must_reach_nine_in_ten(tmp_path: Path) -> None:
    almost, there = first_of_ten(9, 9, 9, 9, 9, 8), first_of_ten(9, 9, 9, 9, 9, 9)
    write_run(tmp_path / "a" / "grpo-long", [graded(BEFORE), graded(almost)])
    write_run(tmp_path / "b" / "grpo-long", [graded(BEFORE), graded(there)])
    assert report(tmp_path / "a") == 1
    assert report(tmp_path / "b") == 0
    assert (tmp_path / "b" / "grpo-long.png").is_file()


def test_ddpo_must_rise_by_more_than_the_paired_standard_error(tmp_path: Path) -> None:
    # The pictures differ by far more than they change, so only pairs can tell.
    sizes = [-1.0 - (i % 10) for i in range(60)]
    rise = [size + 0.02 + 0.01 * (-1) ** i for i, size in enumerate(sizes)]
    noise = [size + 0.01 + 0.3 * (-1) ** i for i, size in enumerate(sizes)]
    write_run(tmp_path / "a" / "ddpo", [{"reward": sizes}, {"reward": rise}])
    write_run(tmp_path / "b" / "ddpo", [{"reward": sizes}, {"reward": noise}])
    assert report(tmp_path / "a") == 0
    assert report(tmp_path / "b") == 1
    assert "minus the JPEG's size in kB" in (tmp_path / "a" / "rl.md").read_text()


def test_one_missed_goal_of_several_runs_counts_and_too_slow_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo", [graded(BEFORE), graded(LIFTED)], seconds=1801)
    assert report(tmp_path) == 0
    assert "1,801 s of training, MORE than the 30 min" in (tmp_path / "rl.md").read_text()
    write_run(tmp_path / "ddpo", [graded(LIFTED), graded(BEFORE)])
    assert report(tmp_path) == 1


def test_a_run_that_is_not_over_has_reached_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo", [graded(BEFORE), graded(LIFTED)], finished=False)
    assert report(tmp_path) == 1
    assert "it stands at 2" in (tmp_path / "rl.md").read_text()
    # A finished run that is being made longer.
    (tmp_path / "grpo" / "finished.json").write_text('{"step": 1}')
    assert report(tmp_path) == 1


# ---- What cannot be compared ----


def test_what_cannot_be_compared_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scripts/prove_rl\.sh"):
        report(tmp_path)
    write_run(tmp_path / "grpo", [graded(BEFORE)])
    with pytest.raises(UserError, match="holds no run"):
        report(tmp_path)

    write_run(tmp_path / "other" / "grpo", [graded(BEFORE), graded(LIFTED)])
    path = tmp_path / "other" / "grpo" / "validation" / "step-2" / "scores.csv"
    path.write_text(path.read_text().replace(CAPTIONS[0], "a star and a ring"))
    with pytest.raises(UserError, match="steps 0 and 2 show other prompts"):
        report(tmp_path / "other")

    few = CAPTIONS[:11]
    write_run(tmp_path / "few" / "grpo", [graded(BEFORE), graded(LIFTED)], prompts=few)
    with pytest.raises(UserError, match="a single held-out picture of two_object"):
        report(tmp_path / "few")

    unscored: Columns = {"reward": [*BEFORE[:-1], float("nan")], "pocket_strict": BEFORE}
    write_run(tmp_path / "nan" / "grpo", [graded(BEFORE), unscored])
    with pytest.raises(UserError, match="color_attr has no reward"):
        report(tmp_path / "nan")


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "grpo", [graded(BEFORE), graded(LIFTED)])
    with (tmp_path / "grpo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert report(tmp_path) == 0


# ---- The comparison of settings ----


def test_settings_are_compared_by_their_rise_per_minute(tmp_path: Path) -> None:
    middle = first_of_ten(6, 6, 6, 6, 6, 6)
    both = [graded(BEFORE), graded(middle), graded(LIFTED)]
    write_run(tmp_path / "table" / "1", both, seconds=60)
    write_run(tmp_path / "table" / "2", both, seconds=240, train_timesteps="all")
    write_run(tmp_path / "table" / "3", both, seconds=30, sampler="sde", noise_level=0.7)
    write_run(tmp_path / "table" / "4", both, finished=False, guidance_scale=4.0)
    assert report(tmp_path) == 0  # nothing is claimed of them
    found = json.loads((tmp_path / "rl.json").read_text())["table"]
    assert [one["setting"] for one in found] == [
        "sde 0.7, 3 of 8 steps, no guidance",
        "cps, 3 of 8 steps, no guidance",
        "cps, all steps, no guidance",
    ]
    # The reward rises by 0.125 in all, and by 0.05 in the first epoch; the quickest takes 1 min.
    assert [one["minutes"] for one in found] == pytest.approx([1, 2, 8])
    assert [one["per_minute"]["mean"] for one in found] == pytest.approx([0.125, 0.0625, 0.015625])
    assert [one["rise_until_then"] for one in found] == pytest.approx([0.125, 0.05, 0.0125])
    text = (tmp_path / "rl.md").read_text()
    assert "rise in 1.0 min" in text
    assert "| cps, all steps, no guidance | 8.0 (4 steps) |" in text
    assert (tmp_path / "table.png").is_file()


# ---- The script ----


@pytest.fixture
def commands(tmp_path: Path) -> Callable[..., list[list[str]]]:
    """`commands(*arguments)`: what a copy of the script would have started, as lists of words."""
    return partial(recorded, SCRIPT, tmp_path)


@pytest.mark.parametrize("arguments", [("--shorter",), ("--table", "grpo"), ("--seed", "3")])
def test_the_script_refuses_what_it_does_not_know(arguments: tuple[str, ...]) -> None:
    result = bash(SCRIPT, *arguments)
    assert result.returncode == 2
    assert "--long, --table, --compare, --seeds, --rewards, --short" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "folders"),
    [
        ((), ["outputs/proof-rl/grpo", "outputs/proof-rl/ddpo"]),
        (("--long",), ["outputs/proof-rl/grpo-long"]),
        (("--table",), [f"outputs/proof-rl/table/{number}-" for number in range(1, 6)]),
        (("--short",), ["outputs/proof-rl-short/grpo", "outputs/proof-rl-short/ddpo"]),
        (("--short", "--table", "--long"), ["outputs/proof-rl-short/table/1-"]),
        (("--compare",), [f"outputs/proof-rl/compare/{name}" for name in proof_arms.TITLES]),
        (("--seeds",), [f"outputs/proof-rl/compare/{name}-seed1" for name in ("grpo", "awm")]),
        (("--rewards",), [f"outputs/proof-rl/rewards/{name}/awm" for name in proof_rewards.TITLES]),
        (("--short", "--compare"), ["outputs/proof-rl-short/compare/control"]),
    ],
    ids=[
        *("proof", "long", "table", "short", "all short", "compare", "seeds", "rewards"),
        "short compare",
    ],
)
def test_the_scripts_understand_the_flags_and_the_epochs_come_out_even(
    arguments: tuple[str, ...], folders: list[str], commands: Callable[..., list[list[str]]]
) -> None:
    import train_ddpo_sd3
    import train_full_sd3
    import train_grpo_sd3
    import train_nft_sd3

    scripts = (train_grpo_sd3, train_ddpo_sd3, train_nft_sd3)
    policies: dict[str, Any] = {f"{one.__name__}.py": one for one in scripts}
    *before, last = commands(*arguments, best="awm\\ngrpo\\n")
    started, made = [], set[str]()
    for words in before:
        if words[:2] == ["-m", "dojo.pocket.datasets"]:
            cli.parse(datasets.Args, None, words[2:])
            continue
        if words[:2] == ["-m", "dojo.pocket.proof_arms"]:
            assert cli.parse(proof_arms.Args, None, words[2:]).best == 2
            continue
        processes, (script, *flags) = unspread(words)
        if script == "train_full_sd3.py":
            args: Any = cli.parse(train_full_sd3.Args, None, flags)
            assert args.optim.train_batch_size * processes == (8 if "--short" in arguments else 64)
            made.add(str(args.run.output_dir))
        else:
            args = cli.parse(policies[script].Args, None, flags)
            args.sample.check(args.optim, processes, min_group=1)
            length = args.optim.epoch_length(args.sample.samples, processes)
            assert length == 1
            assert args.evaluation.eval_reward == proof_rl.STRICT
            # 12 held-out captions and more are at least two of each task.
            assert args.prompts.num_eval_prompts >= 12
            if script != "train_ddpo_sd3.py":
                assert args.model.pretrained_model_name_or_path in made
            else:
                assert args.model.pretrained_model_name_or_path == "models/pocket-sd3"
            started.append(str(args.run.output_dir))
        assert args.run.resume_from_checkpoint == "latest"
    assert all(any(one.startswith(folder) for one in started) for folder in folders)
    report: Any = proof_rl
    if not {"--compare", "--seeds"}.isdisjoint(arguments):
        report = proof_arms
    if "--rewards" in arguments:
        report = proof_rewards
    assert last[:2] == ["-m", report.__name__]
    assert ("--no_goals" in last) == ("--short" in arguments)
    cli.parse(report.Args, None, last[2:])


def test_the_arms_of_a_comparison_take_equally_many_forward_passes(
    commands: Callable[..., list[list[str]]],
) -> None:
    import train_grpo_sd3
    import train_nft_sd3

    def counted(words: list[str]) -> tuple[Path, float] | None:
        processes, (script, *flags) = unspread(words)
        module: Any = {"train_grpo_sd3.py": train_grpo_sd3, "train_nft_sd3.py": train_nft_sd3}
        if script not in module:
            return None
        args = cli.parse(module[script].Args, None, flags)
        record = {"args": asdict(args), "num_processes": processes}
        uses = getattr(getattr(args, "grpo", None), "num_inner_epochs", 1)
        epochs = args.optim.max_train_steps / uses
        assert args.evaluation.eval_every < epochs / 2 + 1  # in the middle too
        return args.run.output_dir, passes_of(record) * args.sample.samples * epochs

    (proof,) = [found[1] for words in commands() if (found := counted(words))]
    arms = dict(found for words in commands("--compare") if (found := counted(words)))
    assert {path.name for path in arms} == proof_arms.TITLES.keys()
    assert all(68_000 < passes < 70_000 for passes in arms.values())
    assert max(arms.values()) < 0.5 * proof
    assert arms[Path("outputs/proof-rl/compare/grpo")] == 220 * 192 * 1.625
    assert arms[Path("outputs/proof-rl/compare/grpo-clip")] == 180 * 192 * 2
    short = dict(found for words in commands("--rewards") if (found := counted(words)))
    assert len(short) == 6 * len(proof_rewards.TITLES)
    assert all(19_000 <= passes <= 21_000 for passes in short.values())


@pytest.mark.slow
def test_the_short_proof_runs_through_and_does_nothing_twice(tmp_path: Path) -> None:
    folder = tmp_path / "proof"
    result = bash(SCRIPT, "--short", OUTPUT_DIR=str(folder))
    assert result.returncode == 0, result.stderr
    assert "Nothing is claimed" in result.stdout
    found = json.loads((folder / "rl.json").read_text())
    assert {name: found[name]["steps"] for name in found} == {"grpo": 4, "ddpo": 4}
    assert all(one["finished"] and one["seconds"] > 0 for one in found.values())
    for name in ("grpo.png", "ddpo.png", "grpo_pictures.png", "ddpo_pictures.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 400
    before = (folder / "grpo" / "metrics.jsonl").read_bytes()
    again = bash(SCRIPT, "--short", OUTPUT_DIR=str(folder))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("nothing to do") == 3
    assert (folder / "grpo" / "metrics.jsonl").read_bytes() == before
