"""Compares methods at equal work: `python -m dojo.pocket.proof_arms`.

The runs that `scripts/prove_rl.sh --compare` made began at one base and took, as counted, equally
many forward passes, with the sampling, the training and what frozen policies were asked. What is
left in the folder: arms.md and arms.json, a table of what each reached and what it cost, and
arms.png, the same over forward passes and over minutes. The exit code is 1 when a goal was missed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dojo import cli
from dojo.cli import UserError, ranges
from dojo.lazy import late
from dojo.methods.rl import passes_of
from dojo.pocket import judge, proof_rl
from dojo.pocket.proof_rl import STRICT, Change, Goal, Run

if TYPE_CHECKING:
    from matplotlib import figure as figures
    from matplotlib.axes import Axes
else:
    figures = late("matplotlib.figure")

WHOLE = "grpo"  # the proof's own run, twice as long: what the target is taken from
TITLES = {
    "grpo": "GRPO",
    "grpo-clip": "GRPO, pictures used twice, clip",
    "grpo-divergence": "GRPO, pictures used twice, bound on the divergence",
    "nft": "NFT",
    "ram": "RAM",
    "awm": "AWM",
    "control": "control: NFT, scores shuffled",
}
_SEED = ", seed "  # in the title of a further seed
CONTROL = "control"
METHODS = [name for name in TITLES if name != CONTROL]
SHARE = 0.5  # of the proof's GRPO, in forward passes and in minutes
COLORS = ("#2f6feb", "#d9730d", "#1a8f5a", "#a13bb8", "#8a939e", "#c62f3d", "#5c4a3d", "#0b7a75")

HEAD = (
    *("method", "forward passes", "pictures", "minutes", "all of the caption right before"),
    *("after", "difference, 95 % interval", "distance from the base", "norm ratio"),
    "diversity, first and last",
)
NOTES = f"""\
Forward passes are counted: one for every picture and step of the sampling, three for one that is
trained, one for one that a frozen policy is asked; evaluations are not among them. Minutes are
those of sampling, decoding, scoring and training, on this machine as busy as it was. Distance:
mean squared difference of the velocity from the base's along the ODE, held-out captions. Norm
ratio: the velocity's norm over the base's at the levels that are learned from, mean of the last
{proof_rl.ENDS} epochs; GRPO does not log it. Diversity is that of the sampled pictures; GRPO's
share the way to the trained step. ± is one standard error; before and after are compared picture
by picture."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the trainings lie."""

    output_dir: Path = Path("outputs/proof-rl")
    """folder that holds compare/, and receives the report"""
    no_goals: bool = False
    """make no claim: the goals are not judged, and the exit code is 0"""
    best: int | None = None
    """only print the names of so many arms, those that gained most, for other seeds of them"""

    def __post_init__(self) -> None:
        ranges.check(self, "best", least=1)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A run of the comparison."""

    title: str
    run: Run

    @cached_property
    def per_epoch(self) -> float:
        """Forward passes of an epoch."""
        options = self.run.options
        return passes_of(self.run.args) * options["num_prompts_per_epoch"] * options["group_size"]

    @property
    def passes(self) -> float:
        """Forward passes of the whole run."""
        return self.per_epoch * self.run.epochs

    @cached_property
    def strict(self) -> Change:
        """What became of the held-out strict score."""
        return proof_rl.change(self.run, STRICT)

    def last(self, key: str) -> float | None:
        """Mean of a number of training's over the last epochs; None where it is not logged."""
        values = self.run.curve(key)[1][-proof_rl.ENDS :]
        return float(np.mean(values)) if values else None

    def passes_at(self, step: int) -> float:
        """Forward passes until a step."""
        return self.passes * step / self.run.steps

    @property
    def row(self) -> tuple[str, ...]:
        """Its row of the table, under `HEAD`."""
        run, strict = self.run, self.strict
        far, ratio, varied = run.evaluations[-1].kl, self.last("norm_ratio"), run.diversity
        return (
            self.title if run.finished else f"{self.title} (not over)",
            f"{self.passes:,.0f}",
            f"{run.sampled:,}",
            f"{run.minutes():.1f}",
            *(strict.before.number, strict.after.number, strict.words),
            "" if far is None else f"{far:.3g}",
            "" if ratio is None else f"{ratio:.3f}",
            "" if varied is None else f"{varied[0]:.3f}, {varied[1]:.3f}",
        )

    @property
    def content(self) -> dict[str, Any]:
        """What arms.json says of it."""
        run = self.run
        return {
            "forward_passes": self.passes,
            "forward_passes_per_picture": passes_of(run.args),
            "pictures_sampled": run.sampled,
            "steps": run.steps,
            "finished": run.finished,
            "seconds": run.seconds(),
            "strict": self.strict,
            "norm_ratio": self.last("norm_ratio"),
            "diversity": run.diversity,
            "evaluations": [
                {
                    "step": one.step,
                    "forward_passes": self.passes_at(one.step),
                    "minutes": one.minutes,
                    "strict": proof_rl.overall(one.by_task(STRICT)),
                    "distance": one.kl,
                }
                for one in run.evaluations
            ],
        }


def read(folder: Path) -> dict[str, Arm]:
    """The arms that lie in a folder, in the table's order, and after them further seeds."""
    found: dict[str, Arm] = {}
    names = {path.name for path in folder.glob("*")}
    for name in [*TITLES, *sorted(names - TITLES.keys())]:
        run = proof_rl.read(folder / name)
        if run is not None:
            base, _, seed = name.partition("-seed")
            title = TITLES.get(name) or f"{TITLES.get(base, base)}{_SEED}{seed}"
            found[name] = Arm(title=title, run=run)
    return found


def best(arms: Mapping[str, Arm], number: int) -> list[str]:
    """The names of the arms that gained most in the strict score, the highest first.

    The control is none of them, nor are runs that are not over and further seeds.

    Raises:
        UserError: there are fewer.
    """
    over = [name for name in METHODS if name in arms and arms[name].run.finished]
    if len(over) < number:
        raise UserError(
            f"{len(over)} of the arms are over, and {number} are wanted: "
            f"bash scripts/{proof_rl.SCRIPT} --compare makes them"
        )
    return sorted(over, key=lambda name: -arms[name].strict.difference.mean)[:number]


def judged(arms: Mapping[str, Arm], whole: Arm | None) -> list[Goal]:
    """What the comparison claims, of the arms that are there."""
    goals: list[Goal] = []
    nft, control = arms.get("nft"), arms.get(CONTROL)
    if control is not None:
        goals.append(
            Goal(
                claim="the control gains nothing: its interval is not clear above zero",
                found=control.strict.words,
                reached=control.run.finished and control.strict.low <= 0,
            )
        )
    if nft is not None:
        goals.append(
            Goal(
                claim="NFT's interval is clear above zero",
                found=nft.strict.words,
                reached=nft.run.finished and nft.strict.low > 0,
            )
        )
    over = any(name in arms and arms[name].run.finished for name in METHODS)
    if over and whole is not None and whole.run.finished:
        goals.append(target(arms[best(arms, 1)[0]], whole))
    return goals


def target(arm: Arm, whole: Arm) -> Goal:
    """Whether an arm ends where the proof's own run does, for half of its work.

    The two are compared picture by picture.

    Raises:
        UserError: they were judged by other pictures.
    """
    mine, there = arm.run.evaluations[-1], whole.run.evaluations[-1]
    if mine.pictures != there.pictures:
        raise UserError(f"{arm.run.folder} and {whole.run.folder} show other prompts")
    between = proof_rl.paired(there.by_task(STRICT), mine.by_task(STRICT))
    work = arm.passes / whole.passes
    time = arm.run.seconds() / whole.run.seconds()
    return Goal(
        claim=f"the best arm, {arm.title}, reaches the strict score that the proof's GRPO ends at, "
        "in half of its forward passes and minutes",
        found=f"{between.after.mean:.3f} against {between.before.mean:.3f}, {between.words}, with "
        f"{work:.0%} of the forward passes and {time:.0%} of the minutes",
        reached=between.difference.mean > -1e-9 and max(work, time) <= SHARE,
    )


def save_curves(arms: Sequence[Arm], path: Path) -> None:
    """The strict score over forward passes and minutes; below, distance and diversity.

    A further seed of an arm has its colour, dashed.
    """
    figure = figures.Figure(figsize=(10, 8.5), dpi=120, layout="constrained")
    panels: np.ndarray = figure.subplots(2, 2, sharex="col")
    colors: dict[str, str] = {}
    for arm in arms:
        method, seed, _ = arm.title.partition(_SEED)
        color = colors.setdefault(method, COLORS[len(colors) % len(COLORS)])
        ends = arm.run.evaluations
        passes = [arm.passes_at(one.step) / 1000 for one in ends]
        minutes = [one.minutes for one in ends]
        scores = [proof_rl.overall(one.by_task(STRICT)) for one in ends]
        line = "--" if seed else "-"
        style: dict[str, Any] = {"color": color, "linewidth": 1.6, "linestyle": line}
        dots: dict[str, Any] = {**style, "marker": "o", "markersize": 4}
        for axes, xs in zip(panels[0], (passes, minutes), strict=True):
            means, errors = [one.mean for one in scores], [one.error for one in scores]
            axes.errorbar(xs, means, yerr=errors, capsize=3, label=arm.title, **dots)
        far = [one.kl for one in ends]
        if None not in far:
            panels[1, 0].plot(passes, far, **dots)
        times, varied = (_means(values) for values in arm.run.curve("diversity"))
        panels[1, 1].plot(times, [value / varied[0] for value in varied], **style)
    panels[0, 0].set_ylabel("held out: all of the caption right ± s.e.")
    panels[1, 0].set_ylabel("mean squared distance from the base")
    panels[1, 1].set_ylabel("diversity over that of the first epochs")
    panels[1, 0].set_xlabel("thousand forward passes")
    panels[1, 1].set_xlabel("minutes of training, as busy as the machine was")
    for axes in panels.flat:
        tidy(axes)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)


def _means(values: Sequence[float]) -> list[float]:
    """About thirty of a curve, each of as many neighbours: single epochs are of few prompts."""
    size = math.ceil(len(values) / 30)
    return [float(np.mean(values[i : i + size])) for i in range(0, len(values), size)]


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame above and to the right."""
    axes.grid(color="#d9dde3", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main(args: Args) -> None:
    """Reads the runs, writes the report, and judges the goals."""
    folder = args.output_dir
    arms = read(folder / "compare")
    if not arms:
        raise UserError(
            f"{folder} holds no comparison: bash scripts/{proof_rl.SCRIPT} --compare makes it"
        )
    if args.best is not None:
        print(*best(arms, args.best), sep="\n")
        return
    run = proof_rl.read(folder / WHOLE)
    whole = None if run is None else Arm(title="GRPO, all of the proof", run=run)
    shown = [*([] if whole is None else [whole]), *arms.values()]
    goals = [] if args.no_goals else judged(arms, whole)
    save_curves(shown, folder / "arms.png")
    text = f"{judge.table(HEAD, [arm.row for arm in shown])}\n{NOTES}\n\n"
    for goal in goals:
        word = "reached" if goal.reached else "MISSED"
        text += f"- {word}: {goal.claim} ({goal.found}).\n"
    text += "" if goals else "Nothing is claimed of these runs.\n"
    print(text)
    (folder / "arms.md").write_text(text, encoding="utf-8")
    content = {name: arm.content for name, arm in arms.items()}
    content |= {} if whole is None else {"whole": whole.content}
    judge.save_json(folder / "arms.json", {**content, "goals": goals})
    if not all(goal.reached for goal in goals):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
