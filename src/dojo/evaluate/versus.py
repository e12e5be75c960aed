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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dojo import tables
from dojo.bars import Bar
from dojo.cli import UserError
from dojo.evaluate import picture, pipelines
from dojo.files import outputs
from dojo.files.pictures import labelled_grid, slug
from dojo.inputs.prompts import Prompt
from dojo.lazy import TF, no_grad, torch
from dojo.report.statistics import CONFIDENCE, RESAMPLES, Comparison, Estimate, compare
from dojo.rewards import Reward, RewardArgs, check_prompts

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[[str, list[int]], Sequence[Image.Image]]
"""A picture of a prompt for each seed."""
Load = Callable[[str, Sequence[str]], tuple[Any, Any, Any]]
"""Of a model and its LoRAs: a pipeline, its scheduler, and the one to draw with the LoRAs by."""

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
        for seed, one in zip(seeds, drawn(prompt.text, seeds), strict=True):
            one.save(outputs.own(folder / file_name(i, prompt.text, seed)))
    del drawn
    gc.collect()  # the hooks of --offload make circles
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


@dataclass(frozen=True)
class Match:
    """Two models that draw the same, of which the second is a pipeline or a LoRA on the first."""

    base: str
    tuned: str
    device: torch.device
    """of the rewards"""

    def run(
        self,
        folder: Path,
        prompts: Sequence[Prompt],
        seeds: list[int],
        load: Load,
        drawing: picture.DrawArgs,
        rewards_of: RewardArgs,
        options: Mapping[str, Any],
    ) -> None:
        """Draws with both, one in memory at a time, compares, and prints what is found.

        Args:
            load: of a model and its LoRAs.
            options: how the pictures were drawn, for versus.json.
        Raises:
            UserError: one cannot be loaded, or lacks what a reward needs, before hours of drawing.
        """
        flag = "--pretrained_model_name_or_path"
        if pipelines.is_lora(self.base, flag):
            raise UserError(f"{flag}: {self.base} is a LoRA; --versus takes it")
        is_lora = pipelines.is_lora(self.tuned, "--versus")
        # Loaded and let go: what a reward lacks is said before hours of drawing, not after.
        (reward,) = replace(rewards_of, reward_device="cpu").load(torch.device("cpu"))
        check_prompts(print, reward, prompts)
        del reward

        def opened(model: str, loras: Sequence[str]) -> Draw:
            pipeline, _, tuned_scheduler = load(model, loras)
            pipeline.scheduler = tuned_scheduler
            drawing.tell_cut(pipeline, prompts)
            return partial(picture.draw, pipeline, drawing)

        # The tuned model first: a LoRA that does not fit is known at once.
        def open_tuned() -> Draw:
            try:
                return opened(self.base, (self.tuned,)) if is_lora else opened(self.tuned, ())
            except UserError as error:
                own = "--lora_weights_path" if is_lora else flag
                raise UserError(str(error).replace(own, "--versus")) from error

        draw(folder / "tuned", open_tuned, prompts, seeds)
        draw(folder / "base", partial(opened, self.base, ()), prompts, seeds)
        (reward,) = rewards_of.load(self.device)
        print(table(judge(folder, prompts, seeds, reward, options)))
        print(f"{len(prompts) * len(seeds)} pairs in {folder}")


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
    with Image.open(path) as opened:
        return opened.convert("RGB")


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
