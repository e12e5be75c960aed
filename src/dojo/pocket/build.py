"""Trains the pocket models from nothing: `python -m dojo.pocket.build`.

Stages, each resumable: the autoencoder on scenes and crops of photographs; the MMDiT together with
its three text encoders by rectified flow on cached latents; pocket-clip contrastively; the report.
A stage whose result lies in `work_dir` is not trained again.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from dojo import cli, flow, rng
from dojo.pocket import models, scenes, score, text, verifier

SEED = 0
SAVE_EVERY = 500  # steps between two states on disk


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the pocket models are trained and put."""

    models_dir: Path = Path("models")
    """folder that receives pocket-sd3 and pocket-clip"""
    work_dir: Path = Path("outputs/pocket_build")
    """folder of the training states; remove it to train again from nothing"""
    photos_dir: Path = Path("datas/photos")
    """photographs whose crops train the autoencoder beside the scenes"""
    dog_dir: Path = Path("datas/dog")
    """photographs whose reconstruction is reported"""
    vae_steps: int = 4500
    """steps of 32 pictures for the autoencoder"""
    sd3_steps: int = 5500
    """steps of 64 latents for the MMDiT and its text encoders"""
    clip_steps: int = 2000
    """steps of 128 pairs for pocket-clip"""
    num_scenes: int = 60_000
    """scenes in the training set of the MMDiT"""
    report_captions: int = 500
    """captions that the report draws in each of its four settings"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where to train"""


def to_tensor(pictures: np.ndarray, device: str) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def optimise(
    name: str,
    args: Args,
    modules: Sequence[nn.Module],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    decay: float,
) -> None:
    """AdamW with a warm-up, a plateau and a cosine to zero over the last share `decay`.

    The state goes to disk every `SAVE_EVERY` steps.
    `loss_at(step)` draws its batch from the step's number alone, so a run that was stopped goes on
    exactly where it was.
    """
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(200, steps // 10 + 1)

    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, step / steps - (1 - decay)) / decay)
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + float(np.cos(np.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    path = args.work_dir / f"{name}-state.pt"
    first, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        for module, weights in zip(modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, seconds = int(state["step"]), float(state["seconds"])
    for module in modules:
        module.to(args.device).train()
    started, average = time.monotonic(), 0.0
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5)
    for step in bar:
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            spent = seconds + time.monotonic() - started
            state = {
                "modules": [module.state_dict() for module in modules],
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "seconds": spent,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            with (args.work_dir / "log.jsonl").open("a") as log:
                row = {"stage": name, "step": step + 1, "loss": average, "seconds": spent}
                log.write(json.dumps(row) + "\n")
    for module in modules:
        module.eval()


# ---------------------------------------------------------------------------------------------
# Autoencoder


def photo_crops(folder: Path, count: int, seed: int) -> np.ndarray:
    """Random square crops of photographs at 64 px: uint8 [count, 64, 64, 3]."""
    draw = random.Random(seed)
    photos = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]
    if not photos:
        raise ValueError(f"no .jpg in {folder}")
    crops = np.empty((count, scenes.CANVAS, scenes.CANVAS, 3), dtype=np.uint8)
    for i in range(count):
        photo = draw.choice(photos)
        longest = min(photo.size)
        side = draw.uniform(min(72, longest), longest)
        left, top = (draw.uniform(0, extent - side) for extent in photo.size)
        box = (left, top, left + side, top + side)
        size = (scenes.CANVAS, scenes.CANVAS)
        crops[i] = np.asarray(photo.resize(size, Image.Resampling.LANCZOS, box=box))
    return crops


def wild_scene(draw: random.Random) -> np.ndarray:
    """A scene in colours and places outside the grammar, so that the autoencoder knows more than
    the base model: uint8 [64, 64, 3]."""
    color = lambda: np.array([draw.randrange(256) for _ in range(3)], dtype=np.float32)  # noqa: E731
    picture = np.empty((scenes.CANVAS, scenes.CANVAS, 3), dtype=np.float32)
    picture[:] = color()
    for _ in range(draw.randint(1, 5)):
        shape = draw.choice(scenes.SHAPES + scenes.NOVEL_SHAPES)
        x, y, radius = draw.uniform(0, 64), draw.uniform(0, 64), draw.uniform(5, 24)
        cover = scenes.mask(shape, x, y, radius)[..., None]
        if draw.random() < 0.4:  # an outline
            cover = cover - scenes.mask(shape, x, y, radius * draw.uniform(0.6, 0.85))[..., None]
        picture += cover.clip(0, 1) * (color() - picture)
    return np.round(picture).astype(np.uint8)


def train_vae(args: Args) -> Any:
    """Trains the autoencoder and fits its shift and scaling factors."""
    torch.manual_seed(SEED)
    vae: Any = models.vae()
    draw = random.Random(SEED)
    known = np.stack([scenes.draw(scenes.sample(draw)[1]) for _ in range(12_000)])
    wild = np.stack([wild_scene(draw) for _ in range(4_000)])
    photos = photo_crops(args.photos_dir, 12_000, SEED)
    shares = ((known, 12), (wild, 4), (photos, 16))

    def loss_at(step: int) -> Tensor:
        pick = np.random.default_rng([SEED, step])
        rows = [pool[pick.integers(len(pool), size=count)] for pool, count in shares]
        pictures = np.concatenate(rows)
        mirrored = pick.random(len(pictures)) < 0.5
        pictures[mirrored] = pictures[mirrored, :, ::-1]
        pixels = to_tensor(pictures, args.device)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = rng.generator(SEED, "vae", step)
            latents = posterior.mean + posterior.std * torch.randn(
                posterior.mean.shape, generator=noise
            ).to(args.device)
            decoded = vae.decode(latents).sample
        error = decoded.float() - pixels
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.square().mean() + 0.1 * error.abs().mean() + 5e-4 * kl

    optimise("vae", args, [vae], loss_at, steps=args.vae_steps, learning_rate=2e-3, decay=1.0)
    mean, std = encode(vae, known[:2000], args.device)
    vae.register_to_config(
        shift_factor=round(mean.mean().item(), 4),
        scaling_factor=round(1 / (mean.var() + std.square().mean()).sqrt().item(), 4),
    )
    return vae


@torch.no_grad()
def encode(vae: Any, pictures: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """Posterior mean and std, unscaled: two float32 [B, 16, 8, 8] on the CPU."""
    means, stds = [], []
    for start in range(0, len(pictures), 100):
        posterior = vae.encode(to_tensor(pictures[start : start + 100], device)).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def psnr(vae: Any, pictures: np.ndarray, device: str) -> float:
    """Mean over pictures of the reconstruction's PSNR in dB (8-bit range, posterior mean)."""
    pixels = to_tensor(pictures, device)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    errors = ((decoded - pixels) / 2).square().flatten(1).mean(1)
    return (-10 * errors.log10()).mean().item()


def squares(folder: Path) -> np.ndarray:
    """Every photograph of a folder as its central square at 64 px."""
    rows = []
    for path in sorted(folder.glob("*.jpg")):
        photo = Image.open(path).convert("RGB")
        side = min(photo.size)
        left, top = ((extent - side) / 2 for extent in photo.size)
        box = (left, top, left + side, top + side)
        size = (scenes.CANVAS, scenes.CANVAS)
        rows.append(np.asarray(photo.resize(size, Image.Resampling.LANCZOS, box=box)))
    return np.stack(rows)


# ---------------------------------------------------------------------------------------------
# MMDiT and text encoders


def prompt_states(
    pipeline: StableDiffusion3Pipeline, captions: Sequence[str], t5_length: int
) -> tuple[Tensor, Tensor]:
    """The pipeline's `encode_prompt` with gradients: [B, 20 + t5_length, 192] and [B, 160]."""
    device = pipeline.transformer.device
    states, pooled = [], []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        tokens = tokenizer(
            list(captions), padding="max_length", max_length=text.CLIP_LENGTH, return_tensors="pt"
        )
        output = encoder(tokens.input_ids.to(device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    clip = torch.cat(states, dim=-1)
    clip = F.pad(clip, (0, models.T5_WIDTH - clip.shape[-1]))
    tokens = pipeline.tokenizer_3(
        list(captions), padding="max_length", max_length=t5_length, return_tensors="pt"
    )
    t5 = pipeline.text_encoder_3(tokens.input_ids.to(device)).last_hidden_state
    return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)


def t5_length_at(step: int) -> tuple[int, int]:
    """Tokens of T5 and batch size at a step: mostly short, now and then as the pipeline pads."""
    if step % 16 == 7:
        return 256, 32
    if step % 16 in (3, 11):
        return 77, 64
    return text.T5_LENGTH, 64


def train_sd3(args: Args, vae: Any) -> StableDiffusion3Pipeline:
    """Trains MMDiT and text encoders jointly on the latents of random scenes."""
    torch.manual_seed(SEED + 1)
    pipeline = models.sd3_pipeline()
    pipeline.register_modules(vae=vae)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor

    @functools.cache  # drawn at the first step; a stage that is finished needs none
    def training_set() -> tuple[list[str], Tensor, Tensor]:
        draw = random.Random(SEED + 1)
        captions, pictures = [], []
        for i in range(args.num_scenes):
            caption, scene = scenes.sample(draw, scenes.TASKS[i % len(scenes.TASKS)])
            captions.append(caption)
            pictures.append(scenes.draw(scene))
        return captions, *encode(vae, np.stack(pictures), args.device)

    modules = [
        pipeline.transformer,
        pipeline.text_encoder,
        pipeline.text_encoder_2,
        pipeline.text_encoder_3,
    ]

    def loss_at(step: int) -> Tensor:
        captions, mean, std = training_set()
        t5_length, batch = t5_length_at(step)
        pick = np.random.default_rng([SEED + 1, step])
        rows = pick.integers(len(captions), size=batch)
        words = ["" if pick.random() < 0.1 else captions[row] for row in rows]
        noises = torch.randn(3, batch, *mean.shape[1:], generator=rng.generator(SEED, "sd3", step))
        clean = (mean[rows] + std[rows] * noises[0] - shift) * scale
        uniform = torch.from_numpy(1 - pick.random(batch, dtype=np.float32))
        # Between the training densities of shift 1 and 3: places are decided at high sigma, the
        # small shapes at low.
        sigma = flow.draw_sigma(uniform, "logit_normal", shift=1.7).to(args.device)
        clean, noise = clean.to(args.device), noises[1].to(args.device)
        noisy = flow.interpolate(clean, noise, sigma)
        with torch.autocast(args.device, torch.bfloat16):
            states, pooled = prompt_states(pipeline, words, t5_length)
            predicted = pipeline.transformer(
                noisy, states, pooled, 1000 * sigma, return_dict=False
            )[0]
        return flow.squared_error(predicted, flow.velocity(clean, noise)).mean()

    optimise(
        "sd3",
        args,
        modules,
        loss_at,
        steps=args.sd3_steps,
        learning_rate=1e-3,
        decay=0.3,
    )
    return pipeline


# ---------------------------------------------------------------------------------------------
# pocket-clip


def train_clip(args: Args, vae: Any) -> CLIPModel:
    """Trains pocket-clip with the symmetric cross-entropy of CLIP (arXiv:2103.00020, Figure 3).

    Pictures of which half went through the autoencoder, because it will judge generated ones. Two
    captions of a batch may fit one picture; words that say more make that rare.
    """
    torch.manual_seed(SEED + 2)
    clip = models.clip()
    tokenizer = text.clip_tokenizer()
    draw = random.Random(SEED + 2)
    pairs = [scenes.sample(draw) for _ in range(24_000)]
    pictures = np.stack([scenes.draw(scene) for _, scene in pairs])
    mean, std = encode(vae, pictures, args.device)
    decoded = decode(vae, mean + 0.1 * std.clamp(min=0.5) * torch.randn_like(mean), args.device)
    processor = clip_processor()
    center = torch.tensor(processor.image_mean).view(-1, 1, 1)
    spread = torch.tensor(processor.image_std).view(-1, 1, 1)

    def loss_at(step: int) -> Tensor:
        pick = np.random.default_rng([SEED + 2, step])
        rows = pick.choice(len(pairs), size=128, replace=False)
        source = np.where(
            (pick.random(len(rows)) < 0.5)[:, None, None, None], pictures[rows], decoded[rows]
        )
        pixels = (torch.from_numpy(source).permute(0, 3, 1, 2) / 255 - center) / spread
        tokens = tokenizer(
            [pairs[row][0] for row in rows], padding="max_length", return_tensors="pt"
        )
        with torch.autocast(args.device, torch.bfloat16):
            logits = clip(
                input_ids=tokens.input_ids.to(args.device),
                attention_mask=tokens.attention_mask.to(args.device),
                pixel_values=pixels.to(args.device),
            ).logits_per_text.float()
        # Equal captions of a batch share their mass instead of fighting.
        words = [pairs[row][0] for row in rows]
        same = torch.tensor([[float(a == b) for b in words] for a in words], device=args.device)
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimise("clip", args, [clip], loss_at, steps=args.clip_steps, learning_rate=1e-3, decay=1.0)
    return clip


@torch.no_grad()
def decode(vae: Any, latents: Tensor, device: str) -> np.ndarray:
    """Unscaled latents to pictures: uint8 [B, 64, 64, 3]."""
    rows = []
    for chunk in latents.split(100):
        pixels = (vae.decode(chunk.to(device)).sample.clamp(-1, 1) + 1) * 127.5
        rows.append(pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(rows)


def clip_processor() -> CLIPImageProcessor:
    """CLIP's preprocessing at 64 px, with CLIP's own mean and std."""
    return CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})


# ---------------------------------------------------------------------------------------------
# Saving and report


def save_half(pipeline: StableDiffusion3Pipeline, clip: CLIPModel, models_dir: Path) -> None:
    """Writes both folders in half precision; they load in float32.

    transformers takes a model's dtype from its config.json, diffusers takes float32: the configs
    say float32, so that a plain `from_pretrained` gives one dtype throughout.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for part in [*parts, clip]:
        part.half()
    pipeline.save_pretrained(models_dir / "pocket-sd3")
    CLIPProcessor(clip_processor(), text.clip_tokenizer()).save_pretrained(
        models_dir / "pocket-clip"
    )
    clip.save_pretrained(models_dir / "pocket-clip")
    configs = [*models_dir.glob("pocket-sd3/text_encoder*/config.json")]
    for path in [*configs, models_dir / "pocket-clip" / "config.json"]:
        config = {**json.loads(path.read_text()), "dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def retrieval(folder: Path, device: str) -> float:
    """Share of fresh pictures whose caption pocket-clip picks among 32 (different ones)."""
    clip = CLIPModel.from_pretrained(folder).to(device)  # pyright: ignore
    processor = CLIPProcessor.from_pretrained(folder)
    draw = random.Random(SEED + 3)
    hits = 0
    for _ in range(16):
        pairs: dict[str, np.ndarray] = {}
        while len(pairs) < 32:
            caption, scene = scenes.sample(draw)
            pairs[caption] = scenes.draw(scene)
        inputs = processor(
            text=list(pairs), images=list(pairs.values()), padding="max_length", return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            logits = clip(**inputs).logits_per_image
        hits += int((logits.argmax(1).cpu() == torch.arange(32)).sum())
    return hits / 512


def report(args: Args, seconds: dict[str, float]) -> None:
    """Scores the saved models as a user would load them and writes models/README.md."""
    folder = args.models_dir / "pocket-sd3"
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder).to(args.device)
    captions = scenes.evaluation_captions(args.report_captions, seed=0)
    columns: dict[str, dict[str, float]] = {}
    for guidance in (4.0, 1.0):
        for t5_length in (text.T5_LENGTH, 256):
            name = f"{'CFG 4' if guidance > 1 else 'no CFG'}, T5 {t5_length}"
            pictures = score.generate(
                pipeline,
                captions,
                guidance_scale=guidance,
                num_inference_steps=20,
                max_sequence_length=t5_length,
                seed=0,
            )
            columns[name] = verifier.task_scores(pictures, captions)
            graded = verifier.score(pictures, captions, strict=False).mean().item()
            columns[name]["graded"] = graded
            print(name, columns[name], flush=True)
    draw = random.Random(SEED + 4)
    fresh = np.stack([scenes.draw(scenes.sample(draw)[1]) for _ in range(500)])
    vae = pipeline.vae
    facts = {
        "scenes": psnr(vae, fresh, args.device),
        "datas/dog": psnr(vae, squares(args.dog_dir), args.device),
        "datas/photos": psnr(vae, squares(args.photos_dir), args.device),
    }
    tasks = list(next(iter(columns.values())))
    size = sum(path.stat().st_size for path in args.models_dir.glob("pocket-*/**/*.safetensors"))
    lines = [
        "# The pocket models",
        "",
        "`pocket-sd3` is a StableDiffusion3Pipeline (MMDiT with dual attention and qk-norm,",
        "16-channel autoencoder, two CLIP text encoders, T5), `pocket-clip` a CLIPModel; both know",
        "the 64-pixel scenes of `dojo.pocket.scenes` and nothing else. They are trained from",
        "nothing by `bash scripts/build_pocket_models.sh`, which also writes this page. Licence:",
        "Apache-2.0, as the rest of the repository.",
        "",
        f"Built on {time.strftime('%Y-%m-%d')}, {machine(args.device)}. Training time (wall",
        "clock): "
        + ", ".join(f"{name} {spent / 60:.0f} min" for name, spent in seconds.items())
        + f". {size / 1e6:.1f} MB of weights in half precision.",
        "",
        "## What pocket-sd3 draws",
        "",
        "Strict score (everything in the caption holds) over the captions of",
        f"`scenes.evaluation_captions({len(captions)}, seed=0)`, one picture each with",
        "seed = number of the caption, 20 steps; `overall` is the mean of the six tasks,",
        "`graded` the verifier's partial credit.",
        "",
        "| task | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
        *[
            f"| {task} | " + " | ".join(f"{column[task]:.3f}" for column in columns.values()) + " |"
            for task in tasks
        ],
        "",
        "## Autoencoder",
        "",
        "Reconstruction of 64-pixel pictures, mean PSNR: "
        + ", ".join(f"{name} {value:.2f} dB" for name, value in facts.items())
        + ".",
        "The photographs of `datas/photos`, the dog's among them, gave the training crops.",
        "",
        "## pocket-clip",
        "",
        "Picks the right one of 32 captions for a fresh picture in "
        f"{100 * retrieval(args.models_dir / 'pocket-clip', args.device):.1f} % of 512 cases.",
        "",
    ]
    (args.models_dir / "README.md").write_text("\n".join(lines))
    print("\n".join(lines))


def machine(device: str) -> str:
    """The machine in words: the GPU's name, or how many CPU cores."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def main(args: Args) -> None:
    """Runs the stages that are not done yet, then saves and reports."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    vae = train_vae(args)
    found = psnr(vae, squares(args.dog_dir), args.device)
    print(f"autoencoder: {found:.2f} dB on the photographs of {args.dog_dir}", flush=True)
    pipeline = train_sd3(args, vae)
    clip = train_clip(args, vae)
    save_half(pipeline, clip, args.models_dir)
    rows = [json.loads(line) for line in (args.work_dir / "log.jsonl").read_text().splitlines()]
    report(args, {row["stage"]: row["seconds"] for row in rows})


if __name__ == "__main__":
    main(cli.parse(Args, __doc__))
