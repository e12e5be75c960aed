"""Compares methods on several rewards: `python -m dojo.pocket.proof_rewards`.

The short runs that `scripts/prove_rl.sh --rewards` made began at one base and took equally many
forward passes. What is left in the folder: rewards.md and rewards.json, for every reward and method
what a thousand forward passes brought, in training and on held-out captions, and what they cost;
and rewards.png, the held-out gain over forward passes. Nothing is claimed of so short runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dojo import cli
from dojo.cli import UserError
from dojo.lazy import late
from dojo.pocket import judge, proof_arms, proof_rl
from dojo.pocket.judge import Measured
from dojo.pocket.proof_arms import Arm
from dojo.pocket.proof_rl import TRAINED

if TYPE_CHECKING:
    from matplotlib import figure as figures
else:
    figures = late("matplotlib.figure")

FOLDER = "rewards"
TITLES = {
    "pocket": "the verifier's partial credit",
    "jpeg": "minus the JPEG's size in kB",
    "clip": "pocket-clip's cosine",
}

HEAD = (
    *("reward", "method", "forward passes", "minutes", "sampled pictures: gain"),
    *("held out: gain", "gain, 95 % interval", "distance from the base", "diversity"),
    "all of the caption right, in all",
)
NOTES = """\
All but the first two numbers and the last are for a thousand forward passes, counted as in the
comparison at equal work. Gains are in standard deviations of the base's held-out scores, so that
rewards can be compared. Sampled pictures: the last fifth of the epochs less the first, which has
learned already. Held out: other captions, the same seeds before and after, without guidance and
with averaged weights. Distance: mean squared difference of the velocity from the base's along the
ODE. Diversity: its change between the same epochs as a share of the first; GRPO's pictures share
the way to the trained step. The last column is the change of the strict score over the whole run:
what a reward that does not ask for it cost the caption."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the trainings lie."""

    output_dir: Path = Path("outputs/proof-rl")
    """folder that holds rewards/, and receives the report"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method on a reward."""

    reward: str
    arm: Arm

    @cached_property
    def unit(self) -> float:
        """The standard deviation of the base's held-out scores, of the trained reward's unit."""
        rows = self.arm.run.evaluations[0].rows
        return float(np.std([float(row[TRAINED]) for row in rows], ddof=1))

    @cached_property
    def held_out(self) -> proof_rl.Change:
        """What became of the trained reward on held-out captions, in its own unit."""
        return proof_rl.change(self.arm.run, TRAINED)

    @property
    def thousands(self) -> float:
        """Of forward passes."""
        return self.arm.passes / 1000

    def per_thousand(self, value: float) -> float:
        """A gain of the trained reward as standard deviations a thousand forward passes.

        NaN where all of the base's pictures score the same.
        """
        return value / self.unit / self.thousands if self.unit else math.nan

    def ends(self, key: str) -> tuple[float, float] | None:
        """A number of training's over the first and the last fifth of the epochs."""
        values = self.arm.run.curve(key)[1]
        part = max(1, len(values) // 5)
        if not values:
            return None
        return float(np.mean(values[:part])), float(np.mean(values[-part:]))

    @property
    def content(self) -> dict[str, float | None]:
        """What rewards.json says of it, the row's numbers under their names."""
        sampled, varied = self.ends("reward"), self.ends("diversity")
        distance = self.arm.run.evaluations[-1].kl
        held_out = self.held_out
        return {
            "forward_passes": self.arm.passes,
            "minutes": self.arm.run.minutes(),
            "sampled": None if sampled is None else self.per_thousand(sampled[1] - sampled[0]),
            "held_out": self.per_thousand(held_out.difference.mean),
            "held_out_error": self.per_thousand(held_out.difference.error),
            "held_out_low": self.per_thousand(held_out.low),
            "held_out_high": self.per_thousand(held_out.high),
            "distance": None if distance is None else distance / self.thousands,
            "diversity": None if varied is None else (varied[1] / varied[0] - 1) / self.thousands,
            "strict": self.arm.strict.difference.mean,
            "strict_low": self.arm.strict.low,
            "strict_high": self.arm.strict.high,
        }

    @property
    def row(self) -> tuple[str, ...]:
        """Its row of the table, under `HEAD`."""
        found = self.content
        before, after = self.held_out.before.number, self.held_out.after.number

        def number(name: str, form: str = "+.3f") -> str:
            value = found[name]
            return "" if value is None else f"{value:{form}}"

        title = self.arm.title if self.arm.run.finished else f"{self.arm.title} (not over)"
        return (
            *(f"{TITLES.get(self.reward, self.reward)} ({before} to {after})", title),
            *(f"{self.arm.passes:,.0f}", f"{self.arm.run.minutes():.1f}", number("sampled")),
            number("held_out"),
            f"[{number('held_out_low')}, {number('held_out_high')}]",
            *(number("distance", ".5f"), number("diversity", "+.1%")),
            self.arm.strict.words,
        )


def read(folder: Path) -> list[Cell]:
    """The runs below a folder's rewards/, by reward and method."""
    rewards = {path.name for path in (folder / FOLDER).glob("*")}
    return [
        Cell(reward=reward, arm=arm)
        for reward in [*(name for name in TITLES if name in rewards), *sorted(rewards - {*TITLES})]
        for arm in proof_arms.read(folder / FOLDER / reward).values()
    ]


def save_curves(cells: Sequence[Cell], path: Path) -> None:
    """The held-out gain over forward passes, a panel for each reward."""
    rewards = list(dict.fromkeys(cell.reward for cell in cells))
    size = (3.4 * len(rewards) + 0.6, 4)
    figure = figures.Figure(figsize=size, dpi=120, layout="constrained")
    panels: np.ndarray = figure.subplots(1, len(rewards), squeeze=False)
    colors = dict(zip(proof_arms.TITLES, proof_arms.COLORS, strict=False))
    shown: dict[str, Any] = {}
    for axes, reward in zip(panels[0], rewards, strict=True):
        for cell in (one for one in cells if one.reward == reward):
            points = [_gain(cell, i) for i in range(len(cell.arm.run.evaluations))]
            steps = [one.step for one in cell.arm.run.evaluations]
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.6}
            shown[cell.arm.title] = axes.errorbar(
                [cell.arm.passes_at(step) / 1000 for step in steps],
                [point.mean for point in points],
                yerr=[point.error for point in points],
                color=colors.get(cell.arm.run.folder.name, "#8a939e"),
                **style,
            )
        axes.set_title(TITLES.get(reward, reward), fontsize=10)
        axes.set_xlabel("thousand forward passes")
        proof_arms.tidy(axes)
    panels[0, 0].set_ylabel("held-out gain ± s.e., standard deviations")
    figure.legend(
        list(shown.values()), list(shown), loc="outside upper center", ncols=3, frameon=False
    )
    figure.savefig(path)


def _gain(cell: Cell, i: int) -> Measured:
    """The gain of the trained reward until an evaluation, in standard deviations."""
    first, later = (cell.arm.run.evaluations[n].by_task(TRAINED) for n in (0, i))
    found = proof_rl.paired(first, later).difference
    unit = cell.unit or math.nan
    return Measured(found.mean / unit, found.error / unit)


def table(cells: Sequence[Cell]) -> str:
    """All of them as a Markdown table."""
    return judge.table(HEAD, [cell.row for cell in cells])


def main(args: Args) -> None:
    """Reads the runs and writes the report."""
    folder = args.output_dir
    cells = read(folder)
    if not cells:
        raise UserError(
            f"{folder} holds no runs on several rewards: "
            f"bash scripts/{proof_rl.SCRIPT} --rewards makes them"
        )
    save_curves(cells, folder / "rewards.png")
    text = f"{table(cells)}\n{NOTES}\n"
    print(text)
    (folder / "rewards.md").write_text(text, encoding="utf-8")
    content: dict[str, dict[str, Any]] = {cell.reward: {} for cell in cells}
    for cell in cells:
        run = cell.arm.run
        content[cell.reward][run.folder.name] = {**cell.content, "finished": run.finished}
    judge.save_json(folder / "rewards.json", content)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
