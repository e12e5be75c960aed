"""Watching a run: pictures from fixed prompts and seeds, and an eval loss that does not jump about.

The eval loss uses held-out pictures, the same noise per picture every time and sigmas spread evenly
over the training density, so that its changes come from the weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import nn
from tqdm import tqdm

from dojo import flow, rng, sd3
from dojo.data.cache import collate
from dojo.data.order import Draw
from dojo.frozen import Frozen
from dojo.pictures import slug, to_pil
from dojo.training import Run


@dataclass(frozen=True, kw_only=True)
class ValidationArgs:
    """Pictures and the eval loss during training: at step 0, every so often, and at the end."""

    validation_prompt: tuple[str, ...] = ()
    """prompts of the validation pictures"""
    validation_negative_prompt: str = ""
    """negative prompt of the validation pictures"""
    num_validation_images: int = 1
    """pictures per prompt, with seeds validation_seed, validation_seed + 1, ..."""
    validation_steps: int = 200
    """optimizer steps between two validations"""
    validation_seed: int = 0
    """seed of the pictures and of the eval loss's noise"""
    validation_guidance_scale: float = 5.0
    """classifier-free guidance of the pictures; 1 switches it off"""
    validation_inference_steps: int = 28
    """sampling steps of the pictures"""
    eval_sigmas: int = 4
    """noise levels per held-out picture"""

    def __post_init__(self) -> None:
        for name in (
            "num_validation_images",
            "validation_steps",
            "validation_inference_steps",
            "eval_sigmas",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")

    @property
    def texts(self) -> list[str]:
        """Every text that the pictures need embedded."""
        negative = [self.validation_negative_prompt] if self.validation_prompt else []
        return [*self.validation_prompt, *negative]

    def due(self, step: int, num_steps: int) -> bool:
        """Whether a validation belongs after this step."""
        return step % self.validation_steps == 0 or step == num_steps


def validate(
    run: Run,
    transformer: nn.Module,
    frozen: Frozen,
    config: sd3.Config,
    noise_args: sd3.NoiseArgs,
    args: ValidationArgs,
    shift: float,
    size: tuple[int, int],
) -> None:
    """The eval loss, if pictures are held out, and the pictures, if there are prompts."""
    # Past DDP: the processes need not have equally many held-out pictures.
    transformer = run.accelerator.unwrap_model(transformer)
    with run.phase("validation"):
        if frozen.held_out is not None:
            run.write_metrics(eval_loss(run, transformer, frozen, config, noise_args, args, shift))
        if args.validation_prompt:
            pictures(run, transformer, frozen, config, args, shift, size)


@torch.no_grad()
def eval_loss(
    run: Run,
    transformer: nn.Module,
    frozen: Frozen,
    config: sd3.Config,
    noise_args: sd3.NoiseArgs,
    args: ValidationArgs,
    shift: float,
) -> dict[str, float]:
    """Mean squared velocity error on held-out pictures: {"eval_loss": ...}, equal on all processes.

    Picture i meets `eval_sigmas` levels: the strata of the density, each at its own offset.
    """
    held_out = frozen.held_out
    assert held_out is not None
    transformer.eval()
    shares = run.share
    total = torch.zeros(2, dtype=torch.float64)
    for index in range(shares["process"], len(held_out), shares["num_processes"]):
        batch = collate([held_out[Draw(index, index)]])
        mean, std = frozen.latents(batch)
        clean = config.scaled(mean, std, torch.zeros_like(mean))
        clean = clean.expand(args.eval_sigmas, -1, -1, -1)
        seed = args.validation_seed
        keys = [(seed, "eval noise", index, k) for k in range(args.eval_sigmas)]
        noise = rng.normal(clean.shape[1:], keys, run.device)
        offset = rng.uniform([(seed, "eval sigma", index, k) for k in range(args.eval_sigmas)])
        strata = (torch.arange(args.eval_sigmas) + offset) / args.eval_sigmas
        sigma = noise_args.draw(strata, shift).to(run.device)
        embeds = {
            name: value.expand(args.eval_sigmas, *value.shape[1:])
            for name, value in frozen.text(batch["caption"]).items()
        }
        noisy = flow.interpolate(clean, noise, sigma)
        predicted = sd3.velocity(transformer, noisy, sigma, **embeds, dtype=run.dtype)
        errors = flow.squared_error(predicted, flow.velocity(clean, noise))
        total += torch.tensor([errors.cpu().double().sum().item(), len(errors)])
    transformer.train()
    if shares["num_processes"] > 1:
        total = run.accelerator.reduce(total.float().to(run.device), "sum")  # pyright: ignore
    return {"eval_loss": (total[0] / total[1]).item()}


@torch.no_grad()
def pictures(
    run: Run,
    transformer: nn.Module,
    frozen: Frozen,
    config: sd3.Config,
    args: ValidationArgs,
    shift: float,
    size: tuple[int, int],
) -> None:
    """Draws the validation pictures into `validation/step-N/` and sends them to the trackers.

    The prompts were embedded before training, so no text encoder is loaded; the processes share
    the work, and equal seeds give equal pictures whatever their number.
    """
    folder = run.output_dir / "validation" / f"step-{run.step}"
    if run.main:
        folder.mkdir(parents=True, exist_ok=True)
    run.accelerator.wait_for_everyone()
    transformer.eval()
    model: Any = transformer
    absent: Any = None
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=model,
        scheduler=config.make_scheduler(shift),
        vae=frozen.vae,
        text_encoder=absent,
        tokenizer=absent,
        text_encoder_2=absent,
        tokenizer_2=absent,
        text_encoder_3=absent,
        tokenizer_3=absent,
    )
    pipeline.set_progress_bar_config(disable=True)
    wanted = [
        (i, prompt, args.validation_seed + k)
        for i, prompt in enumerate(args.validation_prompt)
        for k in range(args.num_validation_images)
    ]
    mine = wanted[run.share["process"] :: run.share["num_processes"]]
    negative = {
        f"negative_{name}": value.to(run.dtype)
        for name, value in frozen.text([args.validation_negative_prompt]).items()
    }
    for i, prompt, seed in tqdm(mine, desc="validation", disable=not run.main, leave=False):
        embeds = {name: value.to(run.dtype) for name, value in frozen.text([prompt]).items()}
        with run.accelerator.autocast():
            latents = pipeline(
                **embeds,
                **negative,
                height=size[0],
                width=size[1],
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                generator=rng.generator(seed),
                output_type="latent",
            ).images
        decoded = sd3.decode(frozen.vae, config, latents)
        to_pil(decoded)[0].save(folder / f"{i:02d}-{slug(prompt)}-seed{seed}.png")
    transformer.train()
    run.accelerator.wait_for_everyone()
    if run.main:
        _track(run, folder)


def _track(run: Run, folder: Path) -> None:
    files = sorted(folder.glob("*.png"))
    stack = np.stack([np.asarray(Image.open(path)) for path in files])
    for tracker in run.accelerator.trackers:
        extra = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"validation": stack}, step=run.step, **extra)
