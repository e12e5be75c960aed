"""Held-out prompts drawn by the model that is in training, as a user of the result would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dojo.cli import option, ranges
from dojo.evaluate import drawing, held_out, preview
from dojo.evaluate.held_out import Evaluator
from dojo.finetune import Trained
from dojo.inputs.prompts import Prompt, read_file
from dojo.inputs.steering import Steering
from dojo.lazy import torch
from dojo.maths.flow import squared_error
from dojo.models import attention
from dojo.rewards import Reward
from dojo.run import Run

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EvalArgs(held_out.StepEvalArgs):
    """Held-out prompts, drawn as a user would: averaged weights, own scheduler, guidance."""

    eval_sample_steps: int = 30
    """denoising steps"""
    eval_guidance_scale: float | None = 7.5
    """classifier-free guidance; 1 switches it off"""
    eval_negative_prompt: str = ""
    """what guidance leads away from"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.eval_guidance_scale or 1) == 1:
            why = "without --eval_guidance_scale above 1"
            ranges.check_unread(self, "eval_negative_prompt", why)

    def steered(self, steering: Steering) -> Steering:
        """The same with the evaluation's guidance."""
        return replace(
            steering,
            guidance_scale=self.eval_guidance_scale or 1.0,
            negative_prompt=self.eval_negative_prompt,
        )


@dataclass(frozen=True, kw_only=True)
class PromptEvalArgs(EvalArgs):
    """The same, with prompts of its own."""

    validation_prompt: tuple[str, ...] = option((), common=True)
    """prompts to draw"""
    validation_prompts_file: Path | None = None
    """more prompts: .txt with one per line, .jsonl or .csv with a column prompt (or text, or
    caption), or .json, a list of such rows or of prompts"""

    def prompts(self) -> list[Prompt]:
        """All of them.

        Raises:
            UserError: the file cannot be read.
        """
        path, flag = self.validation_prompts_file, "--validation_prompts_file"
        given = [Prompt(text=text) for text in self.validation_prompt]
        return given + (read_file(path, flag) if path else [])


@dataclass(frozen=True, kw_only=True)
class FlowEvalArgs(EvalArgs):
    """The same with the guidance that Stable Diffusion 3.5 is usually drawn with."""

    eval_guidance_scale: float | None = 4.5
    """classifier-free guidance; 1 switches it off"""


@dataclass(frozen=True, kw_only=True)
class FlowPromptEvalArgs(FlowEvalArgs, PromptEvalArgs):
    """Both."""


def evaluator(
    run: Run,
    args: held_out.EvalArgs,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    steering: Steering,
    trained: Trained,
    vae: AutoencoderKL,
    batch_size: int,
    name: str = "",
) -> Evaluator:
    """The evaluations of one run; made once on every process.

    How far the network has gone from its reference, if it has one, is the mean squared difference
    of what both predict along the way.

    Args:
        prompts: those that are held out.
        rewards: see `Evaluator`.
        steering: with the guidance of the evaluation; knows the prompts' embeddings.
        batch_size: pictures per process at a time.
        name: see `Evaluator`.
    """
    model, objective = steering.model, trained.objective
    shape = model.latent_shape(*steering.size)
    # diffusers imports every schedule that could take its place, which takes half a second.
    scheduler = model.make_scheduler(objective) if prompts else None
    shown = preview.of_run(args, run.output_dir, model, vae, main=run.main and bool(prompts))

    def draw(words: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        embeds = steering.embeds(words)
        own = steering.predictor(trained.network, embeds)
        moved: list[Tensor] = []

        def watched(latents: Tensor, timestep: Tensor) -> Tensor:
            level = objective.of_timestep(timestep)
            predicted = own(latents, level)
            if trained.has_reference:
                with trained.reference() as before:
                    other = steering.predictor(before, embeds)(latents, level)
                moved.append(squared_error(predicted, other))
            return predicted

        with attention.while_drawing(trained.network, args.validation_attention_backend):
            latents = drawing.sample(
                watched,
                shape,
                seeds,
                scheduler,
                args.eval_sample_steps,
                dtype=run.dtype,
                device=run.device,
                look=shown,
            )
        far = torch.stack(moved).mean(0) if moved else None
        return model.decode(vae, latents), far

    knows = trained.has_reference
    return Evaluator(run, args, prompts, rewards, draw, batch_size, name, knows_reference=knows)
