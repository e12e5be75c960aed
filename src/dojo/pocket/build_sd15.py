"""The stages that make pocket-sd15: its autoencoder, then UNet and text encoder.

Both begin from pocket-sd3. The autoencoder keeps its outer layers and learns new inner ones, which
go through 4 channels instead of 16: first so that the decoder's features agree, at 8 x 8, which is
cheap, and then so that the pictures do.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dojo import rng
from dojo.files import tensors
from dojo.lazy import diffusers, nn, safetensors_torch, torch, transformers
from dojo.maths import ddpm
from dojo.models import loaded
from dojo.pocket import models, scenes
from dojo.pocket.fitting import SEED, Args, encode, optimise, photo_crops, to_tensor, wild_scene

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor

MIN_SNR = 5.0  # Hang et al. 2023, arXiv:2303.09556


def train_vae4(args: Args, folder: Path) -> Any:
    """The 4-channel autoencoder, from the 16-channel one of pocket-sd3 in `folder`."""
    torch.manual_seed(SEED + 5)
    teacher = loaded.network(diffusers.AutoencoderKL, folder, "vae", flag="--models_dir")
    teacher.requires_grad_(False).to(args.device).eval()
    vae: Any = models.sd15_vae()
    inherit(vae, teacher)
    inner = nn.ModuleList(
        [
            *(vae.encoder.mid_block, vae.encoder.conv_norm_out, vae.encoder.conv_out),
            *(vae.quant_conv, vae.post_quant_conv, vae.decoder.conv_in, vae.decoder.mid_block),
        ]
    )
    vae.requires_grad_(False)
    inner.requires_grad_(True)

    @functools.cache
    def pictures() -> np.ndarray:
        draw = random.Random(SEED + 5)
        known = [scenes.draw(scenes.sample(draw)[1]) for _ in range(10_000)]
        wild = [wild_scene(draw) for _ in range(1500)]
        return np.concatenate([known, wild, photo_crops(args.photos_dir, 1500, SEED + 5)])

    @functools.cache
    def features() -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's features before its inner layers, the decoder's after, and their std."""
        before, after = [], []
        for start in range(0, len(pictures()), 100):
            pixels = to_tensor(pictures()[start : start + 100], args.device)
            with torch.no_grad():
                hidden = outer_encoder(teacher, pixels)
                mean = teacher.encode(pixels).latent_dist.mean
                before.append(hidden)
                after.append(teacher.decoder.mid_block(teacher.decoder.conv_in(mean)))
        targets = torch.cat(after)
        return torch.cat(before), targets, targets.std(dim=(0, 2, 3), keepdim=True)

    def through(hidden: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """The decoder's features of a posterior's draw, and the posterior's divergence."""
        posterior = inner_posterior(vae, hidden)
        drawn = torch.randn(posterior.mean.shape, generator=noise).to(args.device)
        latents = vae.post_quant_conv(posterior.mean + posterior.std * drawn)
        kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
        return vae.decoder.mid_block(vae.decoder.conv_in(latents)), kl

    def feature_loss(step: int) -> Tensor:
        before, after, spread = features()
        rows = np.random.default_rng([SEED + 5, step]).integers(len(before), size=64)
        found, kl = through(before[rows], rng.generator(SEED, "vae4", step))
        return ((found - after[rows]) / spread).square().mean() + 1e-4 * kl

    optimise(
        "vae4", args, [inner], feature_loss, steps=args.vae4_steps, learning_rate=2e-3, decay=1.0
    )
    vae.decoder.requires_grad_(True)

    def picture_loss(step: int) -> Tensor:
        rows = np.random.default_rng([SEED + 6, step]).integers(len(pictures()), size=24)
        pixels = to_tensor(pictures()[rows], args.device)
        found, kl = through(features()[0][rows], rng.generator(SEED, "vae4 pixels", step))
        error = outer_decoder(vae, found) - pixels
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-5 * kl

    optimise(
        "vae4-pixels",
        args,
        [vae],
        picture_loss,
        steps=args.vae4_steps // 8,
        learning_rate=5e-4,
        decay=1.0,
    )
    mean, std = encode(vae, pictures()[:2000], args.device)
    scale = 1 / (mean.var() + std.square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=round(scale, 4))
    return vae


def inherit(vae: nn.Module, teacher: nn.Module) -> None:
    """Takes over every weight of the same name and shape."""
    own = vae.state_dict()
    same = {k: v for k, v in teacher.state_dict().items() if k in own and own[k].shape == v.shape}
    vae.load_state_dict({**own, **same})


def inherit_text(pipeline: Any, folder: Path) -> None:
    """Gives a pipeline's text encoder the weights of pocket-sd3's first, in `folder`, which has a
    projection beside, and the pipeline that one's tokenizer."""
    pipeline.register_modules(tokenizer=tokenizer_of(folder, "tokenizer"))
    before = loaded.network(
        transformers.CLIPTextModelWithProjection, folder, "text_encoder", flag="--models_dir"
    )
    weights = {k: v for k, v in before.state_dict().items() if not k.startswith("text_projection")}
    own = pipeline.text_encoder.state_dict()
    if set(own) != set(weights):  # transformers nests the same tower differently
        weights = {k.removeprefix("text_model."): v for k, v in weights.items()}
    pipeline.text_encoder.load_state_dict(weights)


def tokenizer_of(folder: Path, part: str) -> Any:
    """The tokenizer that an encoder in a folder was trained with: it knows no other's numbers."""
    return loaded.tokenizer(transformers.CLIPTokenizer, folder, part, flag="--models_dir")


def outer_encoder(vae: Any, pixels: Tensor) -> Tensor:
    """The encoder as far as its middle: [B, 3, 64, 64] -> [B, C, 8, 8]."""
    hidden = vae.encoder.conv_in(pixels)
    for block in vae.encoder.down_blocks:
        hidden = block(hidden)
    return hidden


def inner_posterior(vae: Any, hidden: Tensor) -> Any:
    """The encoder from its middle on, which `AutoencoderKL.encode` ends with."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    encoder = vae.encoder
    moments = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(hidden))))
    return DiagonalGaussianDistribution(vae.quant_conv(moments))


def outer_decoder(vae: Any, hidden: Tensor) -> Tensor:
    """The decoder from after its middle on: [B, C, 8, 8] -> [B, 3, 64, 64]."""
    for block in vae.decoder.up_blocks:
        hidden = block(hidden)
    return vae.decoder.conv_out(vae.decoder.conv_act(vae.decoder.conv_norm_out(hidden)))


def train_sd15(args: Args, vae: Any, folder: Path) -> StableDiffusionPipeline:
    """UNet and text encoder jointly, to predict the noise on latents of random scenes.

    The text encoder begins as pocket-sd3's first. The loss is weighed by min-SNR, or the steps
    with little noise would have all of a short training.
    """
    torch.manual_seed(SEED + 7)
    pipeline: Any = models.sd15_pipeline()
    pipeline.register_modules(vae=vae)
    inherit_text(pipeline, folder)
    schedule = ddpm.Schedule.of(models.DDPM)

    @functools.cache
    def training_set() -> tuple[Tensor, list[str], Tensor, Tensor]:
        draw = random.Random(SEED + 7)
        captions, pictures = [], []
        for i in range(args.sd15_scenes):
            caption, scene = scenes.sample(draw, scenes.TASKS[i % len(scenes.TASKS)])
            captions.append(caption)
            pictures.append(scenes.draw(scene))
        tokens = pipeline.tokenizer(
            [*captions, ""], padding="max_length", return_tensors="pt"
        ).input_ids
        path = args.work_dir / "sd15-latents.safetensors"  # minutes of work on two cores
        if not path.is_file():
            mean, std = encode(vae, np.stack(pictures), args.device)
            tensors.save(path, {"mean": mean, "std": std})
        kept = safetensors_torch.load_file(path)
        return tokens, captions, kept["mean"], kept["std"]

    modules = [pipeline.unet, pipeline.text_encoder]

    def loss_at(step: int) -> Tensor:
        tokens, captions, mean, std = training_set()
        pick = np.random.default_rng([SEED + 7, step])
        rows = pick.integers(len(captions), size=64)
        words = np.where(pick.random(64) < 0.1, len(captions), rows)  # the last row is no caption
        noises = torch.randn(2, 64, *mean.shape[1:], generator=rng.generator(SEED, "sd15", step))
        clean = (mean[rows] + std[rows] * noises[0]) * vae.config.scaling_factor
        clean, noise = clean.to(args.device), noises[1].to(args.device)
        timestep = torch.from_numpy(pick.integers(1000, size=64)).to(args.device)
        noisy = ddpm.add_noise(clean, noise, timestep, schedule)
        states = pipeline.text_encoder(tokens[words].to(args.device)).last_hidden_state
        epsilon = pipeline.unet(noisy, timestep, states, return_dict=False)[0]
        snr = schedule.snr(timestep)
        weight = snr.clamp(max=MIN_SNR) / snr
        return (weight * ddpm.squared_error(epsilon, noise)).mean()

    optimise("sd15", args, modules, loss_at, steps=args.sd15_steps, learning_rate=1e-3, decay=0.3)
    return pipeline
