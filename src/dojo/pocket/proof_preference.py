"""Measures what scripts/prove_preference.sh trained: `python -m dojo.pocket.proof_preference`.

Base and trained models draw the same held-out captions with the same seeds; the verifier and
pocket-clip judge them. What is left in the folder: preference.md and preference.json, curves.png
and pictures.png. The exit code is 1 when a goal was missed. Pictures that were drawn from the same
weights before are not drawn again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dojo import bars, cli, files
from dojo.cli import UserError, ranges
from dojo.files import pictures
from dojo.finetune import lora
from dojo.lazy import late, no_grad, transformers
from dojo.models import loaded
from dojo.pocket import judge, scenes, score, verifier
from dojo.report.statistics import Comparison, Estimate, compare

if TYPE_CHECKING:
    from matplotlib import figure as figures
    from matplotlib.axes import Axes
else:
    figures = late("matplotlib.figure")

SCRIPT = "prove_preference.sh"
GRADED, STRICT, CLIP = "pocket", "pocket_strict", "clip"  # as the rewards call them
WIN_RATE = 0.70  # of DPO, under the verifier
COLORS = ("#2f6feb", "#d9730d", "#1a8f5a", "#a13bb8")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the trainings lie, and how much is drawn."""

    models_dir: Path = Path("models")
    """folder of the bases pocket-sd15 and pocket-sdxl"""
    clip: Path = Path("models/pocket-clip")
    """folder of the CLIP that ReFL was rewarded by"""
    output_dir: Path = Path("outputs/proof-preference")
    """folder that holds pairs and the trainings, those that there are, and receives the report"""
    guidance_scale: float = 1.0
    """classifier-free guidance of the pictures; 1 is none, as in training"""
    num_inference_steps: int = 20
    """their sampling steps"""
    max_captions: int | None = None
    """draw the first so many held-out captions only"""
    no_goals: bool = False
    """make no claim: the goals are not judged, and the exit code is 0"""

    def __post_init__(self) -> None:
        ranges.check(self, "num_inference_steps max_captions", least=1)
        ranges.check(self, "guidance_scale", least=0)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A training of the script, and what it is called."""

    folder: str
    title: str
    base: str = "sd15"
    """the pocket model that it began from, without the `pocket-`"""


PARTS = (
    Part(folder="sft", title="SFT on the winners"),
    Part(folder="dpo", title="DPO"),
    Part(folder="refl", title="ReFL"),
    Part(folder="refl-pretrain", title="ReFL with pre-training loss"),
    Part(folder="dpo-sdxl", title="DPO of SDXL", base="sdxl"),
)


# ---- Drawing and scoring ----


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Pictures of the held-out captions, and their scores."""

    pictures: np.ndarray
    """uint8 [N, 64, 64, 3]"""
    scores: dict[str, list[float]]
    """[N] by name"""


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Draws and scores; one for all models, so that all draw alike."""

    args: Args
    captions: tuple[str, ...]

    @cached_property
    def clip(self) -> tuple[Any, Any]:
        """The network and its preprocessing."""
        name = self.args.clip
        model = loaded.network(transformers.CLIPModel, name, flag="--clip")
        return model, loaded.tokenizer(
            transformers.CLIPProcessor, name, flag="--clip", encoder=model
        )

    def draw(self, base: str, adapter: Path | None) -> Drawn:
        """Pictures of a base, or of the base with an adapter, from the same seeds."""
        args, model = self.args, self.args.models_dir / f"pocket-{base}"
        weights = b"" if adapter is None else lora.find(adapter, "--output_dir").read_bytes()
        about = [str(model), args.guidance_scale]
        key = json.dumps([*about, args.num_inference_steps, *self.captions]).encode()
        name = hashlib.blake2b(key + weights, digest_size=8).hexdigest()
        path = args.output_dir / "drawn" / f"{name}.npy"
        if not path.is_file():
            pipeline = loaded.pipeline(model, flag="--models_dir")
            if adapter is not None:
                lora.load(pipeline, adapter, "tuned")
            images = score.generate(
                pipeline,
                self.captions,
                guidance_scale=args.guidance_scale,
                num_inference_steps=args.num_inference_steps,
                max_sequence_length=None,
                seed=0,
            )
            with files.whole(path) as file:
                np.save(file, verifier.pictures(images))
        found = np.load(path)
        return Drawn(pictures=found, scores=self._scores(found))

    @no_grad
    def _scores(self, found: np.ndarray) -> dict[str, list[float]]:
        specs = [scenes.parse(caption) for caption in self.captions]
        pairs = list(zip(found, specs, strict=True))
        network, processor = self.clip
        inputs = processor(
            text=list(self.captions),
            images=[Image.fromarray(picture) for picture in found],
            padding="max_length",
            return_tensors="pt",
        )
        output = network(**inputs)
        alike = (output.image_embeds * output.text_embeds).sum(-1)  # both have length 1
        return {
            GRADED: [verifier.graded(picture, spec) for picture, spec in pairs],
            STRICT: [float(verifier.strict(picture, spec)) for picture, spec in pairs],
            CLIP: alike.tolist(),
        }


# ---- What was found ----


@dataclass(frozen=True, kw_only=True)
class Result:
    """A trained model against its base."""

    part: Part
    rows: list[dict[str, Any]]
    """its metrics.jsonl"""
    drawn: Drawn
    found: dict[str, Comparison]
    """by score"""

    @property
    def seconds(self) -> float:
        """Of training, with caches and evaluations."""
        return sum(v for row in self.rows for k, v in row.items() if k.startswith("seconds_"))

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.rows[-1]["step"])

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number of the metrics, where it was written down."""
        there = [row for row in self.rows if key in row]
        return [row["step"] for row in there], [row[key] for row in there]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Something that a training was to show."""

    claim: str
    found: str
    reached: bool


def goals(results: Mapping[str, Result]) -> list[Goal]:
    """What the proof claims, of the trainings that there are."""
    claims: list[Goal] = []
    for name in ("dpo", "dpo-sdxl"):
        if name in results:
            rate = results[name].found[GRADED].win_rate
            claims.append(
                Goal(
                    claim=f"{results[name].part.title} wins at least {100 * WIN_RATE:.0f} % of "
                    "held-out prompts under the verifier",
                    found=percent(rate),
                    reached=rate.value >= WIN_RATE,
                )
            )
    for name in ("refl", "refl-pretrain"):
        for score_name, what in ((CLIP, "its reward"), (GRADED, "the verifier's score")):
            if name in results:
                difference = results[name].found[score_name].difference
                claims.append(
                    Goal(
                        claim=f"{results[name].part.title} raises {what}",
                        found=signed(difference),
                        reached=difference.low > 0,
                    )
                )
    return claims


def percent(one: Estimate) -> str:
    """71.2 % [65.1, 76.7]."""
    return f"{100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def signed(one: Estimate) -> str:
    """+0.021 [+0.012, +0.030]."""
    return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


HEAD = (
    *("against the base", "wins by the verifier", "partial credit", "difference"),
    *("all of the caption right", "difference", "pocket-clip", "difference", "training"),
)
NOTES = """\
{count} held-out captions, one picture each from the same seed on both sides, {steps} steps of the
pipeline's own sampler, guidance {guidance:g}. Wins: the share of captions whose picture has more of
the verifier's partial credit than the base's, a tie being half a win, with Wilson's 95 % interval;
differences with the paired bootstrap's. pocket-clip is the reward that ReFL was trained on."""


def table_of(results: Mapping[str, Result]) -> str:
    """The results as a Markdown table."""
    rows: list[tuple[str, ...]] = []
    for result in results.values():
        cells = [result.part.title, percent(result.found[GRADED].win_rate)]
        for name in (GRADED, STRICT, CLIP):
            one = result.found[name]
            cells += [f"{one.base:.3f} → {one.tuned:.3f}", signed(one.difference)]
        rows.append((*cells, f"{result.steps} steps, {result.seconds / 60:.1f} min"))
    return judge.table(HEAD, rows)


# ---- Pictures ----


def save_curves(results: Mapping[str, Result], path: Path) -> None:
    """What the pairs' held-out share says over the steps, and the rewards of ReFL."""
    figure = figures.Figure(figsize=(9, 6), dpi=120, layout="constrained")
    panels: np.ndarray = figure.subplots(2, 2)
    if "dpo" in results:
        dpo = results["dpo"]
        _plot(panels[0, 0], dpo, "accuracy", COLORS[0], "training pairs", 0.7)
        _plot(panels[0, 0], dpo, "eval_accuracy", COLORS[1], "held-out pairs")
        panels[0, 0].set_ylabel("implicit accuracy of DPO")
        _plot(panels[0, 1], dpo, "eval_winner_drift", COLORS[2], "winner")
        _plot(panels[0, 1], dpo, "eval_loser_drift", COLORS[3], "loser")
        panels[0, 1].set_ylabel("error less the reference's, DPO")
    if "dpo-sdxl" in results:
        _plot(panels[0, 0], results["dpo-sdxl"], "eval_accuracy", COLORS[2], "held-out pairs, SDXL")
    for name, color in (("refl", COLORS[1]), ("refl-pretrain", COLORS[2])):
        if name in results:
            title = results[name].part.title
            _plot(panels[1, 0], results[name], "eval_reward/clip", color, title)
            _plot(panels[1, 1], results[name], f"eval_reward/{GRADED}", color, title)
    panels[1, 0].set_ylabel("pocket-clip, held out")
    panels[1, 1].set_ylabel("partial credit, held out")
    for axes in panels.flat:
        axes.grid(color="#d9dde3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("optimizer steps")
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _plot(axes: Axes, result: Result, key: str, color: str, label: str, alpha: float = 1.0) -> None:
    steps, values = result.curve(key)
    marker = "o" if key.startswith("eval_") else ""
    axes.plot(
        steps, values, color=color, alpha=alpha, linewidth=1.5, marker=marker, markersize=3,
        label=label,
    )  # fmt: skip


def save_pictures(
    studio: Studio,
    bases: Mapping[str, Drawn],
    results: Mapping[str, Result],
    path: Path,
    count: int = 12,
) -> None:
    """The first captions of the list, the six tasks in turn, in every model's pictures."""
    columns: list[tuple[str, Drawn]] = []
    for base, drawn in bases.items():
        own = [result for result in results.values() if result.part.base == base]
        columns += [(f"pocket-{base}", drawn), *((r.part.title, r.drawn) for r in own)]
    some = range(min(count, len(studio.captions)))

    def note(drawn: Drawn, i: int) -> str:
        right = " ✓" if drawn.scores[STRICT][i] else ""
        return f"{drawn.scores[GRADED][i]:.2f}{right}"

    pictures.labelled_grid(
        [[Image.fromarray(drawn.pictures[i]) for _, drawn in columns] for i in some],
        row_labels=[studio.captions[i] for i in some],
        column_labels=[title for title, _ in columns],
        notes=[[note(drawn, i) for _, drawn in columns] for i in some],
        cell=112,
    ).save(path)


# ---- The report ----


def main(args: Args) -> None:
    """Draws what is new, compares, writes the report, and judges the goals."""
    bars.leave_out_others()
    folder = args.output_dir
    listed = folder / "pairs" / "held_out.txt"
    if not listed.is_file():
        raise UserError(f"there is no {listed}: bash scripts/{SCRIPT} makes it")
    captions = tuple(listed.read_text(encoding="utf-8").splitlines()[: args.max_captions])
    studio = Studio(args=args, captions=captions)
    there = [part for part in PARTS if (folder / part.folder / "finished.json").is_file()]
    if not there:
        raise UserError(f"{folder} holds no finished training: bash scripts/{SCRIPT} makes them")
    bases = {base: studio.draw(base, None) for base in dict.fromkeys(one.base for one in there)}
    results = {part.folder: _result(studio, bases[part.base], part) for part in there}
    save_curves(results, folder / "curves.png")
    save_pictures(studio, bases, results, folder / "pictures.png")

    claims: Sequence[Goal] = [] if args.no_goals else goals(results)
    notes = NOTES.format(
        count=len(captions), steps=args.num_inference_steps, guidance=args.guidance_scale
    )
    text = f"{table_of(results)}\n{notes}\n\n"
    for goal in claims:
        text += f"- {'reached' if goal.reached else 'MISSED'}: {goal.claim} ({goal.found}).\n"
    if args.no_goals:
        text += "Nothing is claimed of these runs.\n"
    print(text)
    (folder / "preference.md").write_text(text, encoding="utf-8")
    content = {
        name: {"steps": one.steps, "seconds": one.seconds, "against_the_base": one.found}
        for name, one in results.items()
    }
    judge.save_json(folder / "preference.json", {**content, "goals": list(claims)})
    if any(not goal.reached for goal in claims):
        sys.exit(1)


def _result(studio: Studio, base: Drawn, part: Part) -> Result:
    run = studio.args.output_dir / part.folder
    drawn = studio.draw(part.base, run)
    return Result(
        part=part,
        rows=judge.metrics(run, SCRIPT),
        drawn=drawn,
        found={
            name: compare(base.scores[name], drawn.scores[name], studio.captions)
            for name in base.scores
        },
    )


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
