"""What the policy is worth to a user: held-out prompts, averaged weights, no noise on the way."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from dojo import policy, rng, rollout, sd3
from dojo.cli import TrainingStopped, UserError
from dojo.optim import OptimArgs
from dojo.pictures import contact_sheet, slug, to_pil
from dojo.prompts import Prompt
from dojo.rewards import Reward, RewardOutput
from dojo.rl.args import EvalArgs, SampleArgs
from dojo.rl.episodes import Steering, stop_together
from dojo.rl.trained import Trained
from dojo.texts import Texts
from dojo.training import Run
from dojo.validation import log_pictures, write_prompts

SCORES = "scores.csv"


class Options(Protocol):
    """The groups of a script's options that an evaluation goes by."""

    @property
    def sample(self) -> SampleArgs: ...
    @property
    def optim(self) -> OptimArgs: ...
    @property
    def evaluation(self) -> EvalArgs: ...


class Evaluator:
    """The evaluations of one run; made once on every process.

    Args:
        prompts: those that are held out.
        rewards: the reward that is trained on, and those that are not.
        texts: knows the prompts' embeddings.
        trained: the policy; how far it has gone from its reference is measured, if it has one.
    """

    def __init__(
        self,
        run: Run,
        config: sd3.Config,
        vae: AutoencoderKL,
        options: Options,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        texts: Texts,
        trained: Trained,
    ) -> None:
        args, sample = options.evaluation, options.sample
        self.run, self.config, self.vae, self.args = run, config, vae, args
        self.rewards, self.trained = rewards, trained
        self.steering = Steering.of(sample, texts, run.dtype, args.eval_guidance_scale)
        self.shape = config.latent_shape(*sample.size)
        self.plan = rollout.ode_plan(args.eval_sample_steps, trained.shift)
        self.batch_size = args.eval_batch_size or sample.batch_size(options.optim)
        # All prompts with the first seed, then all with the second: what is kept has many prompts.
        seeds = range(args.eval_seed, args.eval_seed + args.num_eval_images)
        self.pictures = [(prompt, seed) for seed in seeds for prompt in prompts]
        digits = max(2, len(str(args.num_saved_images)))
        self.files = [
            f"{i:0{digits}d}-{slug(prompt.text)}-seed{seed}.png"
            for i, (prompt, seed) in enumerate(self.pictures[: args.num_saved_images])
        ]
        self.folder = run.output_dir / "validation"
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

    def catch_up(self, epoch: int) -> None:
        """The evaluation before the first epoch, or the one that a run did not live to see.

        Args:
            epoch: that the run goes on with.
        """
        due = self.args.due(epoch) or self.run.step >= self.run.num_steps
        done = self.run.step > 0 and (self.folder / f"step-{self.run.step}" / SCORES).is_file()
        if due and not done:
            self()

    @torch.no_grad()
    def __call__(self) -> None:
        """Scores into metrics.jsonl, pictures into `validation/step-N/`: a collective.

        The transformer is asked past DDP: the processes need not have equally many pictures.

        Raises:
            TrainingStopped: a reward has given up.
        """
        if not self.pictures:
            return
        with self.run.phase("validation"):
            row = self._evaluate()
        self.run.write_metrics(row)

    def _evaluate(self) -> dict[str, float]:
        run = self.run
        folder = self.folder / f"step-{run.step}"
        if run.main:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.png"):  # of a branch of the run that was left
                path.unlink()
        run.accelerator.wait_for_everyone()
        process, num_processes = run.share["process"], run.share["num_processes"]
        mine = list(range(process, len(self.pictures), num_processes))
        columns = ["reward", *(name for reward in self.rewards for name in reward.weights)]
        # A row per picture, one process's each; NaN where there is no score.
        table = torch.zeros(len(self.pictures), len(columns), dtype=torch.float64)
        moved = torch.zeros(len(self.pictures), dtype=torch.float64)
        trouble = ""
        bar = tqdm(total=len(mine), desc="evaluation", disable=not run.main, leave=False)
        try:
            for start in range(0, len(mine), self.batch_size):
                some = mine[start : start + self.batch_size]
                images, moved[some] = self._draw(some)
                table[some] = self._score(images, some)
                for i, picture in zip(some, to_pil(images), strict=True):
                    if i < len(self.files):
                        picture.save(folder / self.files[i])
                bar.update(len(some))
        except (TrainingStopped, UserError) as error:
            trouble = str(error)
        bar.close()
        stop_together(run, trouble)
        if num_processes > 1:  # zero where another process has it: exact
            table, moved = self._sum(table), self._sum(moved)
        if run.main:
            self._write(folder / SCORES, columns, table)
            log_pictures(run, folder)
        row = {
            f"eval_{name}" if name == "reward" else f"eval_reward/{name}": values[values.isfinite()]
            .mean()
            .item()
            for name, values in zip(columns, table.T, strict=True)
        }
        row["eval_invalid_share"] = 1 - table[:, 0].isfinite().double().mean().item()
        if self.trained.has_reference:
            row["eval_kl"] = moved.mean().item()
        return {name: value for name, value in row.items() if math.isfinite(value)}

    def _draw(self, some: list[int]) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W], and how far the policy's velocity is from the reference's [B]."""
        texts = [self.pictures[i][0].text for i in some]
        embeds = self.steering.embeds(texts)
        own = self.steering.velocity(self.trained.transformer, embeds)
        moved: list[Tensor] = []

        def watched(latents: Tensor, sigma: Tensor) -> Tensor:
            predicted = own(latents, sigma)
            if self.trained.has_reference:
                with self.trained.reference() as before:
                    other = self.steering.velocity(before, embeds)(latents, sigma)
                moved.append(policy.velocity_kl(predicted, other))
            return predicted

        keys = [(self.pictures[i][1], "evaluation", self.pictures[i][0].text) for i in some]
        noise = rng.normal(self.shape, keys, self.run.device)
        final = rollout.sample(watched, noise, self.plan).final
        far = torch.stack(moved).mean(0) if moved else torch.zeros(len(some))
        return sd3.decode(self.vae, self.config, final), far.double().cpu()

    def _score(self, images: Tensor, some: list[int]) -> Tensor:
        """[B, columns]: the trained reward's sum, then every component of every reward."""
        texts = [self.pictures[i][0].text for i in some]
        metadata = [self.pictures[i][0].metadata for i in some]
        outputs: list[RewardOutput] = [
            reward.submit(images, texts, metadata).result() for reward in self.rewards
        ]
        total = torch.where(outputs[0].valid, outputs[0].scores, torch.nan)
        each = [values for output in outputs for values in output.components.values()]
        return torch.stack([total, *each], dim=1).double().cpu()

    def _sum(self, table: Tensor) -> Tensor:
        return self.run.accelerator.reduce(table.to(self.run.device), "sum").cpu()  # pyright: ignore

    def _write(self, path: Path, columns: Sequence[str], table: Tensor) -> None:
        """Every picture's scores, and the file of those that are kept."""
        with path.open("w", newline="", encoding="utf-8") as file:
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
                sheet.save(self.run.output_dir / "contact_sheet.png")
