"""What a model is worth to a user: held-out prompts with fixed seeds, drawn, scored and kept.

The one evaluation of all methods that learn from rewards or preferences. How a picture is drawn is
handed in; what is here holds for every family of models.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dojo.bars import Bar
from dojo.cli import TrainingStopped, UserError, incidental, ranges
from dojo.evaluate import log_pictures, write_prompts
from dojo.evaluate.preview import DrawnArgs
from dojo.files.outputs import clear, own
from dojo.files.pictures import contact_sheet, slug, to_pil
from dojo.inputs.prompts import Prompt
from dojo.launch.interrupt import Interrupted
from dojo.lazy import no_grad, torch
from dojo.rewards import Reward, RewardOutput, check_prompts
from dojo.run.run import Run

SCORES = "scores.csv"

Draw: TypeAlias = (
    "Callable[[Sequence[str], Sequence[int]], tuple[torch.Tensor, torch.Tensor | None]]"
)
"""(B prompts, seeds of their noise) -> pictures [B, 3, H, W] in [0, 1], and how far the trained
network's predictions are from the base model's [B], or None where nothing knows"""


@incidental
@dataclass(frozen=True, kw_only=True)
class EvalArgs(DrawnArgs):
    """Held-out prompts, drawn as a user would: averaged weights, the model's own scheduler."""

    eval_sample_steps: int = 40
    """denoising steps"""
    eval_guidance_scale: float | None = None
    """guidance of the evaluation; unset is --guidance_scale"""
    eval_reward: str | None = None
    """further rewards that are not trained on, written as --reward: when they fall while the
    trained one rises, it is being exploited"""
    eval_batch_size: int | None = None
    """pictures per process at a time; unset is that of sampling or training"""
    num_eval_images: int = 1
    """pictures of each held-out prompt"""
    eval_seed: int = 0
    """seed of the first picture, the others' are those that follow; scores.csv has them, and
    demo.py draws the same picture with the same --seed"""
    num_saved_images: int = 12
    """pictures of an evaluation that are kept, with their scores"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_sample_steps", "eval_batch_size", "num_eval_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1")
        if self.eval_guidance_scale is not None and self.eval_guidance_scale < 1:
            raise ValueError("--eval_guidance_scale must be at least 1, which is no guidance")
        if self.num_saved_images < 0:
            raise ValueError("--num_saved_images must not be negative")

        ranges.check_seed(self, "eval_seed")

    @property
    def held_out_rewards(self) -> list[str]:
        """`--eval_reward`, if there is one."""
        return [self.eval_reward] if self.eval_reward else []


@dataclass(frozen=True, kw_only=True)
class StepEvalArgs(EvalArgs):
    """The same, every so many optimizer steps."""

    validation_steps: int = 100
    """optimizer steps between two evaluations; there is one before the first and one at the end"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_steps < 1:
            raise ValueError("--validation_steps must be at least 1")

    def due(self, step: int, num_steps: int) -> bool:
        """Whether an evaluation belongs after this step."""
        return step % self.validation_steps == 0 or step == num_steps


class Trouble:
    """What keeps this process from going on, until all know of it."""

    def __init__(self) -> None:
        self.error: TrainingStopped | UserError | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps what is raised inside, where the process has to come along to further collectives
        before it may stop."""
        try:
            yield
        except (TrainingStopped, UserError) as error:
            self.error = self.error or error


@contextmanager
def together(run: Run) -> Iterator[Trouble]:
    """Stops all processes when one cannot score, so that none waits for it: a collective.

    Raises:
        Interrupted: the run was asked to stop, which all know.
        UserError: what was in the way, before the first step: there is nothing yet to be kept.
        TrainingStopped: the same, later (see `Learner.kept_when_stopped`), or in another process.
    """
    trouble = Trouble()
    try:
        yield trouble
    except Interrupted:
        raise
    except (TrainingStopped, UserError) as caught:
        trouble.error = trouble.error or caught
    error = trouble.error
    failed = torch.tensor([error is not None], device=run.device)
    anywhere: Any = run.accelerator.gather(failed) if run.share["num_processes"] > 1 else failed
    if not bool(anywhere.any()):
        return
    if isinstance(error, UserError) and run.step == 0:
        raise error
    raise TrainingStopped(str(error or "another process had to stop")) from error


class Evaluator:
    """The evaluations of one run; made once on every process.

    Args:
        prompts: those that are held out.
        rewards: the one that is trained on first, if there is one, then those that are not; without
            any there are pictures only. One that can score none of the prompts is a UserError.
        draw: asks the model as it is at that moment.
        batch_size: pictures per process at a time.
        name: tells a second evaluation of the run from the first, in folders and metrics.
    """

    def __init__(
        self,
        run: Run,
        args: EvalArgs,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        draw: Draw,
        batch_size: int,
        name: str = "",
        *,
        knows_reference: bool = True,
    ) -> None:
        self.knows_reference = knows_reference
        self.run, self.args, self.rewards, self.draw = run, args, rewards, draw
        for reward in rewards:
            check_prompts(run.say, reward, prompts)
        self.batch_size = args.eval_batch_size or batch_size
        # All prompts once, then all again: what is kept has many prompts. No two pictures share
        # their noise, or the mean of the scores would hang on it.
        again = [prompt for _ in range(args.num_eval_images) for prompt in prompts]
        self.pictures = list(zip(again, itertools.count(args.eval_seed)))
        digits = max(2, len(str(args.num_saved_images)))
        self.files = [
            f"{i:0{digits}d}-{slug(prompt.text)}-seed{seed}.png"
            for i, (prompt, seed) in enumerate(self.pictures[: args.num_saved_images])
        ]
        self.folder = run.output_dir / "-".join(filter(None, ("validation", name)))
        self.prefix = "_".join(filter(None, ("eval", name)))
        if run.main and self.files:
            write_prompts(self.folder, [self._about(i) for i in range(len(self.files))])

    def _about(self, i: int) -> dict[str, object]:
        prompt, seed = self.pictures[i]
        label = f"{prompt.text} (seed {seed})" if self.args.num_eval_images > 1 else prompt.text
        steps = self.args.eval_sample_steps
        return {
            "file": self.files[i],
            "label": label,
            "prompt": prompt.text,
            "seed": seed,
            "num_inference_steps": steps,
        }

    @property
    def metrics(self) -> list[str]:
        """The numbers that it writes into metrics.jsonl."""
        if not self.pictures:
            return []
        parts = [f"reward/{name}" for reward in self.rewards for name in reward.weights]
        scores = ["reward", *parts, "invalid_share"] if self.rewards else []
        distance = ["kl"] if self.knows_reference else []
        return [f"{self.prefix}_{name}" for name in [*scores, *distance]]

    def catch_up(self, *, due: bool) -> None:
        """The evaluation before the first step, or the one that a run did not live to see.

        Args:
            due: whether one belongs where the run stands.
        """
        step = self.run.step
        done = step > 0 and (self.folder / f"step-{step}" / SCORES).is_file()
        done = done and (not self.rewards or self.run.has_logged(f"{self.prefix}_invalid_share"))
        if due and not done:
            self()

    @no_grad
    def __call__(self) -> None:
        """Scores into metrics.jsonl, pictures into `validation/step-N/`: a collective.

        The network is asked past DDP: the processes need not have equally many pictures.

        Raises:
            TrainingStopped: a reward has given up.
            Interrupted: the run was asked to stop.
        """
        if not self.pictures:
            return
        with self.run.phase("validation"):
            row = self._evaluate()
        if row:
            self.run.write_metrics(row)
        self.run.teller.validation(self.folder / f"step-{self.run.step}", row)

    def _evaluate(self) -> dict[str, float]:
        run = self.run
        folder = self.folder / f"step-{run.step}"
        if run.main:
            clear(folder)  # what a branch of the run that was left drew
            for file in self.files:
                own(folder / file)
            folder.mkdir(parents=True, exist_ok=True)
        run.accelerator.wait_for_everyone()
        process, num_processes = run.share["process"], run.share["num_processes"]
        mine = list(range(process, len(self.pictures), num_processes))
        columns = ["reward"] if self.rewards else []
        columns += [name for reward in self.rewards for name in reward.weights]
        # A row per picture, one process's each; NaN where there is no score.
        table = torch.zeros(len(self.pictures), len(columns), dtype=torch.float64)
        moved = torch.zeros(len(self.pictures), dtype=torch.float64)
        knows = torch.zeros(1, dtype=torch.float64)
        share = run.stopping.paused(mine, len(self.pictures), self.batch_size)
        total = -(-len(mine) // self.batch_size)
        with together(run) as trouble:
            for some in Bar(share, "evaluation", total, disable=not run.main, leave=False):
                if trouble.error is not None:  # comes along, as the others still go on
                    continue
                with trouble.kept():
                    texts = [self.pictures[i][0].text for i in some]
                    images, far = self.draw(texts, [self.pictures[i][1] for i in some])
                    if far is not None:
                        moved[some] = far.cpu().double()
                        knows += 1
                    if self.rewards:
                        table[some] = self._score(images, some)
                    for i, picture in zip(some, to_pil(images), strict=True):
                        if i < len(self.files):
                            picture.save(folder / self.files[i])
        if num_processes > 1:  # zero where another process has it: exact
            table, moved, knows = self._sum(table), self._sum(moved), self._sum(knows)
        if run.main:
            log_pictures(run, folder)
            self._write(folder / SCORES, columns, table)
        names = [name if name == "reward" else f"reward/{name}" for name in columns]
        row = {
            f"{self.prefix}_{name}": values[values.isfinite()].mean().item()
            for name, values in zip(names, table.T, strict=True)
        }
        if self.rewards:
            row[f"{self.prefix}_invalid_share"] = 1 - table[:, 0].isfinite().double().mean().item()
        if knows.item():
            row[f"{self.prefix}_kl"] = moved.mean().item()
        return {name: value for name, value in row.items() if math.isfinite(value)}

    def _score(self, images: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """[B, columns]: the first reward's sum, then every component of every reward."""
        texts = [self.pictures[i][0].text for i in some]
        metadata = [self.pictures[i][0].metadata for i in some]
        outputs: list[RewardOutput] = [
            reward.submit(images, texts, metadata).result() for reward in self.rewards
        ]
        total = torch.where(outputs[0].valid, outputs[0].scores, torch.nan)
        each = [values for output in outputs for values in output.components.values()]
        return torch.stack([total, *each], dim=1).cpu().double()

    def _sum(self, table: torch.Tensor) -> torch.Tensor:
        return self.run.accelerator.reduce(table.to(self.run.device), "sum").cpu()  # pyright: ignore

    def _write(self, path: Path, columns: Sequence[str], table: torch.Tensor) -> None:
        """Every picture's scores, and the file of those that are kept."""
        with own(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "prompt", "seed", *columns])
            for i, (prompt, seed) in enumerate(self.pictures):
                name = self.files[i] if i < len(self.files) else ""
                writer.writerow([name, prompt.text, seed, *(f"{x:.6g}" for x in table[i].tolist())])

    def finish(self) -> None:
        """Writes `contact_sheet.png`: a row per kept picture, a column per evaluation."""
        if self.run.main:
            sheet = contact_sheet(self.folder, last_step=self.run.step)
            if sheet is not None:
                sheet.save(own(self.run.output_dir / "contact_sheet.png"))
