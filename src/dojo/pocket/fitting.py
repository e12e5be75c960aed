"""What the stages of building the pocket models share: options, pictures, the optimisation."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from dojo.bars import Bar
from dojo.cli import ranges
from dojo.lazy import nn, no_grad, torch
from dojo.pocket import scenes

if TYPE_CHECKING:
    from torch import Tensor

SEED = 0
SAVE_EVERY = 500  # steps between two states on disk

Name = Literal["sd3", "clip", "sd15", "sdxl", "kolors"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the pocket models are trained and put."""

    models: tuple[Name, ...] = get_args(Name)
    """which of them to train; clip and sd15 begin from pocket-sd3's autoencoder and text encoder,
    sdxl from pocket-sd3's text encoders and pocket-sd15, kolors from pocket-sdxl: those in
    models_dir if they are not among them"""
    models_dir: Path = Path("models")
    """folder that receives pocket-sd3, pocket-sd15, pocket-sdxl, pocket-kolors and pocket-clip"""
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
    vae4_steps: int = 2500
    """steps of 64 pictures for the inner layers of SD1.5's autoencoder, and an eighth of them
    for the whole"""
    sd15_steps: int = 4000
    """steps of 64 latents for SD1.5's UNet and its text encoder"""
    sdxl_steps: int = 1500
    """steps of 64 latents for SDXL's UNet"""
    kolors_text_steps: int = 3000
    """steps of 64 captions for Kolors' text encoder alone"""
    kolors_steps: int = 300
    """steps of 64 latents for Kolors' UNet and its text encoder"""
    clip_steps: int = 2000
    """steps of 128 pairs for pocket-clip"""
    num_scenes: int = 60_000
    """scenes in the training set of the MMDiT"""
    sd15_scenes: int = 40_000
    """scenes in the training set of SD1.5's UNet"""
    sdxl_scenes: int = 30_000
    """scenes in the training set of SDXL's UNet"""
    kolors_scenes: int = 12_000
    """scenes in the training set of Kolors"""
    report_captions: int = 500
    """captions that the report draws in each setting of each model"""
    device: str = "auto"
    """where to train; auto is a GPU where there is one"""

    def __post_init__(self) -> None:
        steps = "vae_steps sd3_steps vae4_steps sd15_steps sdxl_steps clip_steps"
        steps += " kolors_text_steps kolors_steps"
        ranges.check(self, f"{steps} num_scenes sd15_scenes report_captions", least=1)
        ranges.check(self, "sdxl_scenes kolors_scenes", least=2)  # a whole one and another view


def to_tensor(pictures: np.ndarray, device: str) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def half(device: str) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where the machine computes in it; a CPU that emulates it is ten times
    slower than in float32."""
    there = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=there)


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
    bar = Bar(range(first, steps), initial=first, total=steps, desc=name, mininterval=5)
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


@no_grad
def encode(vae: Any, pictures: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """Posterior mean and std, unscaled: two float32 [B, 16, 8, 8] on the CPU."""
    means, stds = [], []
    for start in range(0, len(pictures), 100):
        posterior = vae.encode(to_tensor(pictures[start : start + 100], device)).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    return torch.cat(means), torch.cat(stds)


@no_grad
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


@no_grad
def decode(vae: Any, latents: Tensor, device: str) -> np.ndarray:
    """Unscaled latents to pictures: uint8 [B, 64, 64, 3]."""
    rows = []
    for chunk in latents.split(100):
        pixels = (vae.decode(chunk.to(device)).sample.clamp(-1, 1) + 1) * 127.5
        rows.append(pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(rows)
