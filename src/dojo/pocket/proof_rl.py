"""Measures what scripts/prove_rl.sh trained: `python -m dojo.pocket.proof_rl`.

It draws nothing: the runs have scored their held-out pictures themselves, the same prompts and
seeds at every evaluation, and kept some. What is left in the folder: rl.md and rl.json, curves and
a grid of pictures for every run, and, of the short runs that differ in one setting each, table.png.
The exit code is 1 when a run has missed its goal.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dojo import cli
from dojo.cli import UserError
from dojo.files import pictures
from dojo.files.records import read_table
from dojo.lazy import late
from dojo.pocket import judge, scenes
from dojo.pocket.judge import Measured
from dojo.report import statistics

if TYPE_CHECKING:
    from matplotlib import figure as figures
    from matplotlib.axes import Axes
else:
    figures = late("matplotlib.figure")

SCRIPT = "prove_rl.sh"
SEED = 0  # of the bootstrap
RESAMPLES = 10_000
ENDS = 5  # epochs at either end of a run over which training's own numbers are averaged
NOT_TRAINING = ("seconds_validation", "seconds_checkpoint", "seconds_cache")

LIFT = 0.15  # of the strict score, by GRPO
REACHED = 0.90  # the strict score that the long run is after
STRICT = "pocket_strict"  # columns of scores.csv
TRAINED = "reward"

HEAD = ("method", "measured on held-out prompts", "before", "after", "difference, 95 % interval")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the trainings lie."""

    output_dir: Path = Path("outputs/proof-rl")
    """folder that holds grpo, ddpo, grpo-long or table, those that there are, and receives the
    report"""
    no_goals: bool = False
    """make no claim: the goals are not judged, and the exit code is 0"""


# ---- A run ----


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The held-out pictures of a step."""

    step: int
    minutes: float
    """of training until then"""
    kl: float | None
    """mean squared difference of the velocity from the base's"""
    rows: list[dict[str, str]]
    """of scores.csv: file, prompt, seed, and the scores by column"""

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """Prompt and seed of each."""
        return [(row["prompt"], row["seed"]) for row in self.rows]

    def by_task(self, column: str) -> dict[str, np.ndarray]:
        """The scores [N] of each task, in the order of `scenes.TASKS`.

        Raises:
            UserError: a task has a single picture, which knows no error, or one has no score.
        """
        found: dict[str, list[float]] = {task: [] for task in scenes.TASKS}
        for row in self.rows:
            found[scenes.parse(row["prompt"]).task].append(float(row[column]))
        groups = {task: np.array(values) for task, values in found.items() if values}
        for task, values in groups.items():
            if len(values) < 2:
                raise UserError(
                    f"a single held-out picture of {task}: --num_eval_prompts 12 gives two of each"
                )
            if not np.isfinite(values).all():
                raise UserError(f"step {self.step}: a held-out picture of {task} has no {column}")
        return groups


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has written down."""

    folder: Path
    args: dict[str, Any]
    """its args.json"""
    rows: list[dict[str, Any]]
    """its metrics.jsonl"""
    finished: bool

    @cached_property
    def options(self) -> dict[str, Any]:
        """Its options without their groups."""
        groups: dict[str, dict[str, Any]] = self.args["args"]
        return {name: value for group in groups.values() for name, value in group.items()}

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.rows[-1]["step"])

    @property
    def epochs(self) -> int:
        """Rollouts that were learned from."""
        return round(max(row.get("epoch", 0) for row in self.rows))

    @property
    def sampled(self) -> int:
        """Pictures that were sampled to learn from."""
        size = self.options["num_prompts_per_epoch"] * self.options["group_size"]
        return self.epochs * size

    def seconds(self, step: int | None = None, *, whole: bool = False) -> float:
        """Seconds of training until a step, or the end.

        Args:
            whole: with evaluations, checkpoints and the embedding of the prompts; what came after
                the last step is not written down.
        """
        return sum(
            value
            for row in self.rows
            if step is None or row["step"] <= step
            for key, value in row.items()
            if key.startswith("seconds_") and (whole or key not in NOT_TRAINING)
        )

    def minutes(self, step: int | None = None) -> float:
        """`seconds` of training in minutes."""
        return self.seconds(step) / 60

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """All of them, by step."""
        found = []
        for row in self.rows:
            if "eval_reward" not in row:
                continue
            path = self.folder / "validation" / f"step-{row['step']}" / "scores.csv"
            if not path.is_file():
                raise UserError(f"there is no {path}")
            with path.open(newline="", encoding="utf-8") as file:
                found.append(
                    Evaluation(
                        step=row["step"],
                        minutes=self.minutes(row["step"]),
                        kl=row.get("eval_kl"),
                        rows=list(csv.DictReader(file)),
                    )
                )
        return found

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Minutes and values of a number of training's, where it was written down."""
        there = [row for row in self.rows if key in row]
        return [self.minutes(row["step"]) for row in there], [row[key] for row in there]

    @cached_property
    def diversity(self) -> tuple[float, float] | None:
        """Of the sampled pictures: its mean over the first and over the last epochs.

        None where every prompt is drawn once, as DDPO may.
        """
        values = self.curve("diversity")[1]
        first, last = values[:ENDS], values[-ENDS:]
        return (float(np.mean(first)), float(np.mean(last))) if values else None


def read(folder: Path) -> Run | None:
    """Reads a run's folder; None where nothing can be compared yet.

    Raises:
        UserError: its evaluations are not of the same pictures.
    """
    if not (folder / "metrics.jsonl").is_file():
        return None
    rows = judge.metrics(folder, SCRIPT)
    marker = folder / "finished.json"  # an older one where a finished run is made longer
    end = read_table(marker).get("step")
    run = Run(
        folder=folder,
        args=read_table(folder / "args.json"),
        rows=rows,
        finished=bool(rows) and rows[-1]["step"] == end,
    )
    if len(run.evaluations) < 2:
        return None
    first = run.evaluations[0]
    for other in run.evaluations:
        if other.pictures != first.pictures:
            raise UserError(f"{folder}: steps {first.step} and {other.step} show other prompts")
    return run


# ---- Before and after ----


@dataclass(frozen=True, kw_only=True)
class Change:
    """A quantity before and after; pictures of the same prompt and seed are compared."""

    before: Measured
    after: Measured
    difference: Measured
    low: float
    """the interval's ends"""
    high: float

    @property
    def words(self) -> str:
        """+0.187 [0.142, 0.233], with two digits of the standard error."""
        error = self.difference.error
        digits = max(0, 1 - math.floor(math.log10(error))) if error else 3
        ends = f"[{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        return f"{self.difference.mean:+.{digits}f} {ends}"


def overall(groups: Mapping[str, np.ndarray]) -> Measured:
    """The mean of the tasks' means, as `verifier.task_scores` has it, with its standard error.

    Every task weighs the same, and what the tasks differ in is no error: their number is fixed.
    """
    each = [judge.average(values.tolist()) for values in groups.values()]
    error = math.sqrt(sum(one.error**2 for one in each)) / len(each)
    return Measured(float(np.mean([one.mean for one in each])), error)


def interval(groups: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The percentile bootstrap's interval of `overall`: each task is drawn from itself."""
    return statistics.bootstrap(list(groups.values()), seed=SEED, resamples=RESAMPLES)


def change(run: Run, column: str, task: str | None = None) -> Change:
    """What became of a score from the first evaluation to the last, over all tasks or in one."""
    first, last = (run.evaluations[i].by_task(column) for i in (0, -1))
    if task is not None:
        first, last = {task: first[task]}, {task: last[task]}
    return paired(first, last)


def paired(first: Mapping[str, np.ndarray], last: Mapping[str, np.ndarray]) -> Change:
    """From one to the other, by task the scores [N] of the same pictures in the same order."""
    differences = {name: last[name] - first[name] for name in first}
    low, high = interval(differences)
    return Change(
        before=overall(first),
        after=overall(last),
        difference=overall(differences),
        low=low,
        high=high,
    )


# ---- What is claimed ----


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Something that a run was to show."""

    claim: str
    found: str
    reached: bool


def lifts(run: Run) -> list[Goal]:
    """GRPO's goals."""
    strict = change(run, STRICT)
    return [
        Goal(
            claim=f"the strict score rises by at least {LIFT}",
            found=f"by {strict.difference.mean:.3f}",
            reached=strict.difference.mean > LIFT - 1e-9,
        ),
        Goal(
            claim="the interval of its rise is clear of zero",
            found=strict.words,
            reached=strict.low > 0,
        ),
    ]


def reaches(run: Run) -> list[Goal]:
    """The long run's goal."""
    after = change(run, STRICT).after
    return [
        Goal(
            claim=f"the strict score reaches {REACHED}",
            found=after.number,
            reached=after.mean > REACHED - 1e-9,
        )
    ]


def rises(run: Run) -> list[Goal]:
    """DDPO's goal."""
    reward = change(run, TRAINED).difference
    return [
        Goal(
            claim="the reward rises by more than its standard error",
            found=f"by {reward.number}",
            reached=reward.mean > reward.error,
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of the script: what the report calls it, and what it is to show."""

    folder: str
    title: str
    reward: str
    """the trained reward's name"""
    unit: str
    """of its axis"""
    goals: Callable[[Run], list[Goal]]
    limit: float | None = None
    """minutes of training that the claim speaks of"""

    @property
    def graded(self) -> bool:
        """Whether the trained reward has the strict score's scale."""
        return self.unit == SCORE

    def verdict(self, run: Run) -> list[Goal]:
        """Its goals; a run that is not over has reached none."""
        if run.finished:
            return self.goals(run)
        return [Goal(claim="the run is over", found=f"it stands at {run.steps}", reached=False)]


SCORE = "score, 0 to 1"
PARTS = (
    Part(
        folder="grpo",
        title="GRPO",
        reward="partial credit, the trained reward",
        unit=SCORE,
        goals=lifts,
        limit=30,
    ),
    Part(
        folder="grpo-long",
        title="GRPO, long",
        reward="partial credit, the trained reward",
        unit=SCORE,
        goals=reaches,
    ),
    Part(
        folder="ddpo",
        title="DDPO",
        reward="minus the JPEG's size in kB, the trained reward",
        unit="reward, kB",
        goals=rises,
        limit=10,
    ),
)


def describe(part: Part, run: Run) -> str:
    """A run with what it cost."""
    return (
        f"{part.title}: {run.steps} steps, {run.sampled:,} pictures sampled, "
        f"{run.minutes():.1f} min"
    )


def spent(part: Part, run: Run) -> str:
    """The time, beside the claim's: a run's length is given in steps, and machines differ."""
    words = f"{run.seconds():,.0f} s of training"
    if part.limit is not None:
        held = "within" if run.minutes() <= part.limit else "MORE than"
        words += f", {held} the {part.limit:g} min that are meant for two idle CPU cores"
    return f"{words}; {run.seconds(whole=True):,.0f} s with evaluations and checkpoints"


# ---- Rows of the report ----


def measured(run: Run) -> dict[str, Change]:
    """The trained reward and the strict score, and this by task."""
    found = {TRAINED: change(run, TRAINED)}
    if STRICT in run.evaluations[0].rows[0]:
        found[STRICT] = change(run, STRICT)
        for task in run.evaluations[0].by_task(STRICT):
            found[task] = change(run, STRICT, task)
    return found


def rows_of(part: Part, run: Run, changes: Mapping[str, Change]) -> list[tuple[str, ...]]:
    """A part's rows of the table, under `HEAD`."""
    names = {TRAINED: part.reward, STRICT: "all of the caption right, mean of the six tasks"}
    order = [STRICT, *(task for task in scenes.TASKS if task in changes), TRAINED]
    if not part.graded:  # there the reward is the point, and the caption what it may have cost
        order = [key for key in (TRAINED, STRICT) if key in changes]
    rows: list[tuple[str, ...]] = [
        (
            names.get(key) or f"- {key.replace('_', ' ')}",
            changes[key].before.number,
            changes[key].after.number,
            changes[key].words,
        )
        for key in order
    ]
    first, last = run.evaluations[0], run.evaluations[-1]
    if first.kl is not None and last.kl is not None:
        rows.append(("KL from the base", f"{first.kl:.3g}", f"{last.kl:.3g}", ""))
    if run.diversity is not None:
        name = f"diversity of the sampled pictures, first and last {ENDS} epochs"
        rows.append((name, *(f"{value:.3f}" for value in run.diversity), ""))
    titles = [describe(part, run), *[""] * (len(rows) - 1)]
    return [(title, *row) for title, row in zip(titles, rows, strict=True)]


# ---- Curves and pictures ----

COLORS = ("#2f6feb", "#d9730d", "#1a8f5a", "#a13bb8", "#c62f3d")


def save_curves(part: Part, run: Run, path: Path) -> None:
    """Scores over minutes and steps, and below them what they cost: KL and diversity."""
    first = run.evaluations[0]
    small = [STRICT] if not part.graded and STRICT in first.rows[0] else []
    small += [] if first.kl is None else ["eval_kl"]
    small += [] if run.diversity is None else ["diversity"]
    figure = figures.Figure(figsize=(8, 4.2 + 1.3 * len(small)), dpi=120, layout="constrained")
    heights = [3.0, *[1.0] * len(small)]
    found: np.ndarray = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
    )
    main, *below = found[:, 0]
    minutes, rewards = run.curve("reward")
    main.plot(minutes, rewards, color="#8a939e", linewidth=1, label="sampled pictures: reward")
    draw_scores(main, run, TRAINED, COLORS[0], "held out: reward ± s.e.")
    if part.graded:
        draw_scores(main, run, STRICT, COLORS[1], "held out: caption right ± s.e.")
    main.set_ylabel(part.unit)
    for axes, key in zip(below, small, strict=True):
        if key == STRICT:
            draw_scores(axes, run, STRICT, COLORS[1], "held out: caption right ± s.e.")
            axes.set_ylabel("strict\nscore")
        else:
            minutes, values = run.curve(key)
            axes.plot(minutes, values, color=COLORS[2 if key == "eval_kl" else 3], linewidth=1.5)
            axes.set_ylabel("KL from\nthe base" if key == "eval_kl" else "diversity")
            axes.set_ylim(0, 1.15 * max(values) or 1)
    label_axes(figure, [main, *below], run)
    figure.savefig(path)


def draw_scores(axes: Axes, run: Run, column: str, color: str, label: str) -> None:
    """A held-out score at every evaluation, with standard errors."""
    found = [overall(one.by_task(column)) for one in run.evaluations]
    axes.errorbar(
        [one.minutes for one in run.evaluations],
        [one.mean for one in found],
        yerr=[one.error for one in found],
        **{"color": color, "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.8},
        label=label,
    )


def label_axes(figure: figures.Figure, panels: Sequence[Axes], run: Run) -> None:
    """Minutes below, steps above, a legend over all, and a grid."""
    for axes in panels:
        axes.grid(color="#d9dde3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"minutes of training ({run.args['device']})")
    every = math.ceil(len(run.evaluations) / 10)  # more numbers would run into each other
    steps = [one.step for one in run.evaluations[::every]]
    above = panels[0].secondary_xaxis("top")
    above.set_xticks([run.minutes(step) for step in steps], [str(step) for step in steps])
    above.set_xlabel("optimizer steps")
    figure.align_ylabels()
    figure.legend(loc="outside upper center", ncols=3, frameon=False)


def save_pictures(part: Part, run: Run, path: Path) -> None:
    """Held-out pictures before and after, the first two of each task, if any were kept."""
    first, last = run.evaluations[0], run.evaluations[-1]
    by_task: dict[str, list[int]] = {task: [] for task in scenes.TASKS}
    for i, row in enumerate(first.rows):
        if row["file"]:
            by_task[scenes.parse(row["prompt"]).task].append(i)
    blocks = [[kept[n] for kept in by_task.values() if len(kept) > n] for n in (0, 1)]
    grids = [
        pictures.labelled_grid(
            [[_picture(run, one, i) for one in (first, last)] for i in block],
            row_labels=[first.rows[i]["prompt"] for i in block],
            column_labels=["before", f"after {last.step} steps"],
            notes=[[_note(part, one.rows[i]) for one in (first, last)] for i in block],
            cell=128,
        )
        for block in blocks
        if block
    ]
    if not grids:
        return
    size = (sum(grid.width for grid in grids), max(grid.height for grid in grids))
    sheet = Image.new("RGB", size, "white")
    left = 0
    for grid in grids:
        sheet.paste(grid, (left, 0))
        left += grid.width
    sheet.save(path)


def _picture(run: Run, one: Evaluation, i: int) -> Image.Image:
    with Image.open(run.folder / "validation" / f"step-{one.step}" / one.rows[i]["file"]) as file:
        return file.convert("RGB")


def _note(part: Part, row: Mapping[str, str]) -> str:
    """The reward, and a tick where all of the caption is right."""
    right = float(row.get(STRICT, 0)) == 1
    reward = f"{float(row[TRAINED]):.2f}" + ("" if part.graded else " kB")
    return f"{reward} ✓" if right else reward


# ---- Runs that differ in one setting ----


def setting(run: Run) -> str:
    """What a run of the comparison was made with."""
    options = run.options
    noise = "" if options["noise_level"] is None else f" {options['noise_level']:g}"
    window = f"{options['window_size']} of {options['sample_steps']} steps"
    trained = window if options["train_timesteps"] == "window" else options["train_timesteps"]
    trained = "all steps" if trained == "all" else trained
    guidance = options["guidance_scale"]
    guided = "no guidance" if guidance == 1 else f"guidance {guidance:g}"
    return f"{options['sampler']}{noise}, {trained}, {guided}"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a run of the comparison reached for its time."""

    setting: str
    steps: int
    minutes: float
    reward: Change
    strict: Change
    per_minute: Measured
    """rise of the held-out reward"""
    shared_minutes: float
    """as long as the shortest run took"""
    rise_until_then: float
    """of the held-out reward, between two evaluations on a straight line"""


def compare(runs: Sequence[Run]) -> list[Compared]:
    """The runs by their rise per minute, the highest first."""
    shared = min(run.minutes() for run in runs)
    found: list[Compared] = []
    for run in runs:
        reward, minutes = change(run, TRAINED), run.minutes()
        times = [one.minutes for one in run.evaluations]
        means = [overall(one.by_task(TRAINED)).mean for one in run.evaluations]
        found.append(
            Compared(
                setting=setting(run),
                steps=run.steps,
                minutes=minutes,
                reward=reward,
                strict=change(run, STRICT),
                per_minute=Measured(
                    reward.difference.mean / minutes, reward.difference.error / minutes
                ),
                shared_minutes=shared,
                rise_until_then=float(np.interp(shared, times, means)) - means[0],
            )
        )
    return sorted(found, key=lambda one: -one.per_minute.mean)


def comparison(found: Sequence[Compared]) -> str:
    """The comparison as a Markdown table."""
    head = (
        *("GRPO with", "minutes of training", "partial credit before", "after"),
        *("rise per minute", f"rise in {found[0].shared_minutes:.1f} min"),
        *("all of the caption right before", "after"),
    )
    rows = [
        (
            *(one.setting, f"{one.minutes:.1f} ({one.steps} steps)"),
            *(one.reward.before.number, one.reward.after.number),
            *(one.per_minute.number, f"{one.rise_until_then:+.3f}"),
            *(one.strict.before.number, one.strict.after.number),
        )
        for one in found
    ]
    return judge.table(head, rows)


def save_comparison(runs: Sequence[Run], path: Path) -> None:
    """Held-out reward over minutes of training, a curve for each setting."""
    figure = figures.Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for run, color in zip(runs, COLORS, strict=False):
        draw_scores(axes, run, TRAINED, color, setting(run))
    axes.grid(color="#d9dde3", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"minutes of training ({runs[0].args['device']})")
    axes.set_ylabel("held-out partial credit ± s.e., 0 to 1")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)


# ---- The report ----

NOTES = f"""\
± is one standard error. Before and after are compared picture by picture, of the same held-out
prompt and seed, drawn by the ODE with averaged weights; every task weighs the same. Intervals:
percentile bootstrap of the paired differences, stratified by task, {RESAMPLES:,} resamples.
Partial credit and "right" are the verifier's. KL: mean squared difference of the velocity from the
base's along the ODE. Diversity: how far the sampled pictures of one prompt lie apart, 0 where all
are the same. Minutes are those of sampling, decoding, scoring and training; evaluations,
checkpoints and the embedding of the prompts are not among them. Under the pictures of the grids
stands the trained reward, and ✓ where all of the caption is right."""
COMPARISON = """\
Runs that differ from "{first}" in one thing each, all with the learning rate and clip range that
were chosen for it. Each is evaluated with its own guidance."""


def section(part: Part, run: Run, goals: Sequence[Goal]) -> dict[str, Any]:
    """What rl.json says of a run."""
    return {
        "steps": run.steps,
        "finished": run.finished,
        "pictures_sampled": run.sampled,
        "seconds": run.seconds(),
        "seconds_with_evaluations": run.seconds(whole=True),
        "limit_minutes": part.limit,
        "device": run.args["device"],
        "held_out_pictures": len(run.evaluations[0].rows),
        "changes": measured(run),
        "eval_kl": [one.kl for one in run.evaluations],
        "diversity": run.diversity,
        "goals": goals,
    }


def verdict(part: Part, run: Run, goals: Sequence[Goal]) -> str:
    """The goals, and whether they were reached, as a list."""
    lines = [f"{part.title}: {spent(part, run)}."]
    for goal in goals:
        word = "reached" if goal.reached else "MISSED"
        lines.append(f"{part.title}, {word}: {goal.claim} ({goal.found}).")
    return "".join(f"- {line}\n" for line in lines)


def main(args: Args) -> None:
    """Reads the runs, writes the report, and judges the goals."""
    folder = args.output_dir
    runs = [(part, run) for part in PARTS if (run := read(folder / part.folder))]
    compared = [run for path in sorted(folder.glob("table/*")) if (run := read(path))]
    compared = [run for run in compared if run.finished]
    if not runs and not compared:
        raise UserError(f"{folder} holds no run: bash scripts/{SCRIPT} makes them")

    rows: list[tuple[str, ...]] = []
    verdicts = ""
    content: dict[str, Any] = {}
    for part, run in runs:
        goals = [] if args.no_goals else part.verdict(run)
        content[part.folder] = section(part, run, goals)
        rows += rows_of(part, run, content[part.folder]["changes"])
        verdicts += verdict(part, run, goals)
        save_curves(part, run, folder / f"{part.folder}.png")
        save_pictures(part, run, folder / f"{part.folder}_pictures.png")

    missed = [goal for one in content.values() for goal in one["goals"] if not goal.reached]
    text = ""
    if rows:
        text += f"{judge.table(HEAD, rows)}\n{verdicts}\n{NOTES}\n\n"
    if compared:
        content["table"] = compare(compared)
        text += (
            f"{comparison(content['table'])}\n{COMPARISON.format(first=setting(compared[0]))}\n\n"
        )
        save_comparison(compared, folder / "table.png")
    if args.no_goals:
        text += "Nothing is claimed of these runs.\n"
    elif runs:
        text += "A goal was MISSED.\n" if missed else "All goals of these runs were reached.\n"
    print(text)
    (folder / "rl.md").write_text(text, encoding="utf-8")
    judge.save_json(folder / "rl.json", content)
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
