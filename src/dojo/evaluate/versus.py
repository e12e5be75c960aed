"""Two models on the same prompts and seeds: which one's pictures do the rewards prefer?

    draw(folder / "base", open_base, prompts, seeds)        # one model in memory at a time
    draw(folder / "tuned", open_tuned, prompts, seeds)
    print(table(judge(folder, prompts, seeds, reward, options)))

`judge` reads the pictures back from the two folders, so they may also have been drawn elsewhere
under the names of `file_name`. Beside them it writes versus.csv, a row per pair; versus.json, the
numbers; and versus.png, the pairs that gained and lost most.
"""

from __future__ import annotations

import csv
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dojo import tables
from dojo.bars import Bar
from dojo.files import outputs
from dojo.files.pictures import labelled_grid, slug
from dojo.inputs.prompts import Prompt
from dojo.lazy import TF, no_grad, torch
from dojo.report.statistics import CONFIDENCE, RESAMPLES, Comparison, Estimate, compare
from dojo.rewards import Reward

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[[str, list[int]], Sequence[Image.Image]]
"""A picture of a prompt for each seed."""

SIDES = ("base", "tuned")
SUM = "weighted sum"
_ROWS = 16  # of the grid


def file_name(i: int, prompt: str, seed: int) -> str:
    """The picture of prompt number `i`, from 0."""
    return f"{i:04d}-{slug(prompt)}-seed{seed}.png"


def draw(
    folder: Path, make: Callable[[], Draw], prompts: Sequence[Prompt], seeds: list[int]
) -> None:
    """Draws every prompt with every seed into a folder; what `make` has loaded is then freed."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = make()
    for i, prompt in enumerate(Bar(prompts, desc=f"prompts ({folder.name})")):
        for seed, picture in zip(seeds, drawn(prompt.text, seeds), strict=True):
            picture.save(outputs.own(folder / file_name(i, prompt.text, seed)))
    del drawn
    gc.collect()  # the hooks of --offload make circles
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def judge(
    folder: Path,
    prompts: Sequence[Prompt],
    seeds: list[int],
    reward: Reward,
    options: Mapping[str, Any],
) -> dict[str, Comparison]:
    """Scores the pictures of `folder`/base and `folder`/tuned, compares, and writes what is found.

    Pairs are of one prompt and seed. The intervals are over prompts, whose pictures form a cluster
    (`statistics.compare`); lines of equal text are one prompt, as their pictures are the same.

    Args:
        options: how the pictures were drawn, for versus.json.

    Returns:
        By the rewards' names. The weighted sum comes first, unless it is the only component.
    """
    shown = [(prompt, seed) for prompt in prompts for seed in seeds]
    files = [file_name(i, prompt.text, s) for i, prompt in enumerate(prompts) for s in seeds]
    base, tuned = (_score(folder / side, files, [p for p, _ in shown], reward) for side in SIDES)
    texts = [prompt.text for prompt, _ in shown]
    found = {name: compare(base[name], tuned[name], texts) for name in base}

    with outputs.own(folder / "versus.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["prompt", "seed", "file", *(f"{side}/{name}" for name in base for side in SIDES)]
        )
        for i, (prompt, seed) in enumerate(shown):
            scores = (f"{side[name][i]:.9g}" for name in base for side in (base, tuned))
            writer.writerow([prompt.text, seed, files[i], *scores])
    summary = {
        "options": options,
        "seeds": seeds,
        "weights": reward.weights,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "rewards": {name: _plain(one) for name, one in found.items()},
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    outputs.own(folder / "versus.json").write_text(text + "\n", encoding="utf-8")
    labels = [f"{p.text} (seed {seed})" if len(seeds) > 1 else p.text for p, seed in shown]
    name = next(iter(base))
    _save_grid(folder, files, labels, name, base[name], tuned[name])
    return found


def _plain(one: Comparison) -> dict[str, Any]:
    """For JSON, which knows no NaN."""

    def known(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: None if value != value else value for key, value in items}

    return {**asdict(one, dict_factory=known), "verdict": one.verdict}


@no_grad
def _score(
    folder: Path, files: Sequence[str], prompts: Sequence[Prompt], reward: Reward
) -> dict[str, list[float]]:
    """The scores [N] of the pictures: the sum if it is one, and each component; NaN for none."""
    columns: dict[str, list[float]] = {}
    alone = list(reward.weights.values()) == [1.0]
    bar = Bar(total=len(files), desc=f"scoring ({folder.name})", unit="picture")
    for start in range(0, len(files), reward.batch_size):
        part = slice(start, start + reward.batch_size)
        images = torch.stack([_read(folder / file) for file in files[part]])
        output = reward(
            images, [one.text for one in prompts[part]], [one.metadata for one in prompts[part]]
        )
        total = {} if alone else {SUM: torch.where(output.valid, output.scores, torch.nan)}
        for name, scores in {**total, **output.components}.items():
            columns.setdefault(name, []).extend(scores.tolist())
        bar.update(len(images))
    bar.close()
    return columns


def _read(path: Path) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    return TF.pil_to_tensor(_picture(path)).float() / 255


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _save_grid(
    folder: Path,
    files: Sequence[str],
    labels: Sequence[str],
    name: str,
    base: Sequence[float],
    tuned: Sequence[float],
) -> None:
    """versus.png: pairs side by side, the greatest gains first and the greatest losses last.

    Of many pairs the middle is left out, and those without scores always are.

    Args:
        name: of the reward whose scores are given.
    """
    gains = [after - before for before, after in zip(base, tuned, strict=True)]
    order = sorted((i for i, gain in enumerate(gains) if gain == gain), key=lambda i: -gains[i])
    if len(order) > _ROWS:
        order = [*order[: _ROWS // 2], *order[-_ROWS // 2 :]]
    if not order:
        return
    grid = labelled_grid(
        [[_picture(folder / side / files[i]) for side in SIDES] for i in order],
        row_labels=[labels[i] for i in order],
        column_labels=[f"{side}: {name}" for side in SIDES],
        notes=[[f"{base[i]:.4g}", f"{tuned[i]:.4g} ({gains[i]:+.3g})"] for i in order],
    )
    grid.save(outputs.own(folder / "versus.png"))


def table(found: Mapping[str, Comparison]) -> str:
    """The comparisons as a table, one line each."""
    head = (
        *("reward", "prompts", "pairs", "left out", "wins", "ties", "losses"),
        *("win rate, 95 % interval", "base", "tuned", "difference, 95 % interval"),
        "the tuned model",
    )
    lines: list[tuple[str, ...]] = []
    for name, one in found.items():
        counts = (one.clusters, one.pairs, one.left_out, one.wins, one.ties, one.losses)
        lines.append(
            (
                *(name, *map(str, counts), _words(one.win_rate, 100, ".1f", " %")),
                *(f"{one.base:.4g}", f"{one.tuned:.4g}"),
                *(_words(one.difference, 1, "+.3g", ""), one.verdict),
            )
        )
    return tables.told(head, lines)


def _words(one: Estimate, factor: float, form: str, unit: str) -> str:
    """61.5 % [52.1, 70.2], without the interval where there is none."""
    value, low, high = (format(factor * x, form) for x in (one.value, one.low, one.high))
    return f"{value}{unit} [{low}, {high}]" if one.low == one.low else f"{value}{unit}"
