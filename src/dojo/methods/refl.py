"""Learning by gradient from pairs (DPO) and from rewards (ReFL): what both share round the loop.

Both train a UNet that predicts the noise, whole or by adapters, and are watched on held-out
prompts: averaged weights, the model's own scheduler, guidance, as a user would draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dojo import data, rewards, rng
from dojo.evaluate import drawing
from dojo.evaluate import held_out as evaluation
from dojo.evaluate.held_out import Evaluator
from dojo.finetune import lora
from dojo.finetune import whole as full
from dojo.finetune.weights import Trained
from dojo.inputs import pictures as frozen
from dojo.inputs import steering
from dojo.inputs.prompts import Prompt, read_file
from dojo.inputs.texts import Texts
from dojo.maths import ddpm
from dojo.models import folder as pipelines
from dojo.models import sd15
from dojo.rewards import Reward, RewardOutput
from dojo.run import phases
from dojo.run.cost import Cost
from dojo.run.optim import OptimArgs
from dojo.run.run import Key, Run


@dataclass(frozen=True, kw_only=True)
class FinetuneArgs:
    """What of the model is trained."""

    use_lora: bool = False
    """train adapters (--rank and the like) instead of every weight"""


@dataclass(frozen=True, kw_only=True)
class ReflArgs:
    """How pictures are made for the reward, and how much it counts."""

    resolution: int = 512
    """height and width in pixels"""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm draws fresh noise at every step, ddim none"""
    sample_steps: int = 40
    """denoising steps of a whole way to the picture"""
    first_step: int | None = None
    """earliest step whose prediction is scored, from 0; unset is three quarters of the way, 30 of
    40"""
    last_step: int | None = None
    """latest one; unset is the last, 39 of 40"""
    grad_steps: int = 1
    """last network calls that are learned through; the ones before have no gradient"""
    guidance_scale: float = 1.0
    """classifier-free guidance while sampling; 1 is none, as in the paper"""
    negative_prompt: str = ""
    """what guidance leads away from"""
    margin: float | None = None
    """score from which on a picture is left alone; unset is 2 for imagereward (times its weight),
    the paper's, and none for rewards of other scales: then the score itself is maximised"""
    grad_scale: float = 1e-3
    """weight of the reward; it matters against the pre-training loss and the clipped gradient"""

    def __post_init__(self) -> None:
        for name in ("resolution", "sample_steps", "grad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")
        if self.guidance_scale < 1:
            raise ValueError("--guidance_scale must be at least 1, which is no guidance")
        if self.grad_scale <= 0:
            raise ValueError("--grad_scale must be positive")
        first, last = self.steps
        if not 0 <= first <= last < self.sample_steps:
            raise ValueError(
                f"--first_step {first} and --last_step {last} have to lie in 0 .. "
                f"{self.sample_steps - 1} (--sample_steps), in this order"
            )
        if self.grad_steps > first + 1:
            raise ValueError(
                f"--grad_steps {self.grad_steps}: there are {first + 1} calls at least"
            )

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last step whose prediction may be scored."""
        first = 3 * self.sample_steps // 4 if self.first_step is None else self.first_step
        return first, self.sample_steps - 1 if self.last_step is None else self.last_step

    def draw(self, seed: int, batch: int) -> int:
        """The step of a batch, the same in all processes."""
        first, last = self.steps
        return first + rng.seed_for(seed, "scored step", batch) % (last - first + 1)


@dataclass(frozen=True, kw_only=True)
class EvalArgs(evaluation.StepEvalArgs):
    """Held-out prompts, drawn as a user would: averaged weights, own scheduler, guidance."""

    eval_sample_steps: int = 30
    """denoising steps"""
    eval_guidance_scale: float | None = 7.5
    """classifier-free guidance; 1 switches it off"""
    eval_negative_prompt: str = ""
    """what guidance leads away from"""


@dataclass(frozen=True, kw_only=True)
class PromptEvalArgs(EvalArgs):
    """The same, with prompts of its own."""

    validation_prompt: tuple[str, ...] = ()
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


def timesteps(keys: Sequence[Key], schedule: ddpm.Schedule) -> Tensor:
    """A timestep for each key, all equally likely: int64 [B]."""
    uniform = rng.uniform([(*key, "timestep") for key in keys])  # in (0, 1]
    return ((1 - uniform) * schedule.num_timesteps).long()


def pull_only(images: Tensor, valid: Tensor) -> None:
    """Keeps the gradient of a reward out of the pictures that it has no score for.

    Theirs may be NaN, which stays NaN when the loss counts it with 0.

    Args:
        images: [B, ...], on their way to a loss.
        valid: bool [B].
    """

    def cut(gradient: Tensor) -> Tensor:
        return gradient.where(valid.view(-1, *[1] * (gradient.dim() - 1)), 0)

    images.register_hook(cut)  # pyright: ignore[reportUnknownMemberType]


def record(run: Run, output: RewardOutput, missing: Tensor, margin: float | None) -> None:
    """What metrics.jsonl says of the scores that a network learned from: a collective."""
    columns = {"reward": output.scores}
    columns |= {f"reward/{name}": values for name, values in output.components.items()}
    if margin is not None:  # a picture that has reached it teaches nothing
        columns["at_margin_share"] = (missing == 0).float()
    table = torch.stack([output.valid.float(), *columns.values()], dim=1).detach()
    # Of all processes: one without a valid score would have other numbers to log than the rest.
    everywhere: Any = run.accelerator.gather(table)
    there = everywhere[:, 0] > 0
    run.average(invalid_share=~there)
    if bool(there.any()):
        run.average(**dict(zip(columns, everywhere[there, 1:].T, strict=True)))


def pretraining_errors(
    run: Run,
    config: sd15.Config,
    vae: AutoencoderKL,
    unet: nn.Module,
    texts: Texts,
    rows: data.Batch,
) -> Tensor:
    """The loss that the model was trained with before, of captioned pictures: [B]."""
    keys = run.keys("pretraining", rows["place"])
    mean, std = frozen.posterior_of(rows, vae, run.device)
    latents = config.scaled(mean, std, _normal(mean, keys, "posterior", run))
    noise = _normal(mean, keys, "noise", run)
    timestep = timesteps(keys, config.schedule).to(run.device)
    noisy = ddpm.add_noise(latents, noise, timestep, config.schedule)
    epsilon = steering.predictor(unet, texts, rows["caption"], run.dtype)
    return ddpm.squared_error(epsilon(noisy, timestep), noise)


def _normal(like: Tensor, keys: Sequence[Key], stream: str, run: Run) -> Tensor:
    """Standard normal noise of one stream for each key, [B, ...] as `like`."""
    return rng.normal(like.shape[1:], [(*key, stream) for key in keys], run.device)


def cost_of(
    run: Run,
    config: sd15.Config,
    args: CostOptions,
    rows: int,
    shape: tuple[int, int, int],
    *,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The UNet as it will be trained, and the cost of a forward and backward pass of some rows."""

    def adapt(model: nn.Module) -> object:
        return lora.add(model, args.lora) if args.finetune.use_lora else full.thaw(model, args.full)

    unet: Any
    step: Cost
    unet, step = sd15.training_cost(
        *(config, args.model, run.dtype, adapt, rows, shape), checkpointing=checkpointing
    )
    if not args.finetune.use_lora:
        unet.to(args.full.dtype)  # the frozen weights too
    return unet, step


def reward_cost(
    run: Run,
    config: sd15.Config,
    args: CostOptions,
    batch_size: int,
    shape: tuple[int, int, int],
    *,
    grad_steps: int,
    other_steps: float,
    guided: bool,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The cost of a batch of pictures that a reward is back-propagated into.

    The autoencoder, the reward and the pre-training loss are not counted.
    """
    rows = batch_size * (2 if guided else 1)
    unet, step = cost_of(run, config, args, rows, shape, checkpointing=checkpointing)
    flops = grad_steps * step.flops + other_steps * step.forward_flops
    kept = grad_steps * step.saved_bytes
    return unet, replace(step, flops=round(flops), saved_bytes=kept)


def pair_cost(
    run: Run,
    config: sd15.Config,
    args: CostOptions,
    batch_size: int,
    shape: tuple[int, int, int],
    *,
    with_reference: bool,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The cost of a batch of pairs, both pictures through network and reference; without a
    reference, of the winners alone."""
    rows = batch_size * (2 if with_reference else 1)
    unet, step = cost_of(run, config, args, rows, shape, checkpointing=checkpointing)
    more = step.forward_flops if with_reference else 0
    return unet, replace(step, flops=step.flops + more)


def needs(
    run: Run,
    config: sd15.Config,
    model: sd15.ModelArgs,
    size: tuple[int, int],
    scorers: Sequence[Reward],
    *,
    encoded: int,
    decoded: int,
) -> phases.Needs:
    """What a run holds beside its UNet, for the dry run.

    Args:
        scorers: the rewards, loaded.
        encoded: pictures whose latents are computed at a time.
        decoded: pictures that are drawn at a time.
    Raises:
        UserError: weights are not there.
    """
    config.check_weights(("vae", "text_encoder", "unet"))
    return phases.Needs(
        config=config,
        text=("text_encoder",),
        dtype=run.dtype,
        vae_dtype=pipelines.DTYPES[model.vae_dtype],
        size=size,
        encoded=encoded,
        decoded=decoded,
        scorers=rewards.networks(scorers),
    )


class Options(Protocol):
    """The groups of a script's options that an evaluation goes by."""

    @property
    def optim(self) -> OptimArgs: ...
    @property
    def evaluation(self) -> EvalArgs: ...


class CostOptions(Protocol):
    """The groups of a script's options that say what a step costs."""

    @property
    def model(self) -> sd15.ModelArgs: ...
    @property
    def finetune(self) -> FinetuneArgs: ...
    @property
    def lora(self) -> lora.LoraArgs: ...
    @property
    def full(self) -> full.WholeArgs: ...


def evaluator(
    run: Run,
    config: sd15.Config,
    vae: AutoencoderKL,
    options: Options,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    texts: Texts,
    trained: Trained,
    size: tuple[int, int],
) -> Evaluator:
    """The evaluations of one run; made once on every process.

    Args:
        prompts: those that are held out.
        rewards: see `Evaluator`.
        texts: knows the prompts' embeddings, and the negative prompt's.
        trained: how far it has gone from its reference is measured, if it has one: the mean
            squared difference of the predicted noise along the way.
        size: height and width in pixels.
    """
    args = options.evaluation
    shape = config.latent_shape(*size)
    scheduler = config.make_scheduler()
    guidance = {
        "guidance_scale": args.eval_guidance_scale or 1.0,
        "negative_prompt": args.eval_negative_prompt,
    }

    def draw(words: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        own = steering.predictor(trained.network, texts, words, run.dtype, **guidance)
        moved: list[Tensor] = []

        def watched(latents: Tensor, timestep: Tensor) -> Tensor:
            predicted = own(latents, timestep)
            if trained.has_reference:
                with trained.reference() as before:
                    other = steering.predictor(before, texts, words, run.dtype, **guidance)
                    moved.append(ddpm.squared_error(predicted, other(latents, timestep)))
            return predicted

        latents = drawing.sample(
            watched,
            shape,
            seeds,
            scheduler,
            args.eval_sample_steps,
            dtype=run.dtype,
            device=run.device,
        )
        far = torch.stack(moved).mean(0) if moved else None
        return sd15.decode(vae, config, latents), far

    return Evaluator(run, args, prompts, rewards, draw, options.optim.train_batch_size)
