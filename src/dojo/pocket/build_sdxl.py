"""The stage that makes pocket-sdxl: pocket-sd15's UNet, taught to hear what SDXL hears.

Text encoders are pocket-sd3's two CLIPs, the autoencoder is pocket-sd15's; only the UNet is
trained. It begins as pocket-sd15's, and what pocket-sd15 predicts for whole pictures is what it
shall predict. pocket-sd15 knows nothing of sizes and crops: pictures that were cropped, or were
files of another size, teach by the noise itself, and SDXL's time ids tell them apart.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dojo import rng
from dojo.files import tensors
from dojo.lazy import F, diffusers, no_grad, safetensors_torch, torch, transformers
from dojo.maths import ddpm
from dojo.models import loaded
from dojo.pocket import models, scenes, score
from dojo.pocket.build_sd15 import MIN_SNR, inherit_text, tokenizer_of
from dojo.pocket.fitting import SEED, Args, encode, optimise

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from torch import Tensor

BATCH = 64  # half of it whole pictures
LONGER = (16, 64)  # pixels by which the longer side of a cropped picture surpasses the canvas
# Shorter sides of files, as powers of two: 4 to 16 pixels, and 64 to 2048. The autoencoder draws
# sharp edges again where a file had 16 pixels, and cannot where it had 8.
FILE_SIDES = ((2.0, 4.0), (6.0, 11.0))
MAPPED = 4000  # captions that the map of texts is fitted on


@dataclass(frozen=True)
class View:
    """How a picture came to the canvas; sizes are (height, width) in pixels."""

    original: tuple[int, int] = (scenes.CANVAS, scenes.CANVAS)
    """of the file"""
    resized: tuple[int, int] = (scenes.CANVAS, scenes.CANVAS)
    """of the file when its shorter side was made the canvas's"""
    crop: tuple[int, int] = (0, 0)
    """top and left of what was kept of that"""

    @property
    def time_ids(self) -> tuple[int, ...]:
        """What SDXL is told: original size, crop, size of the result."""
        return (*self.original, *self.crop, scenes.CANVAS, scenes.CANVAS)

    def of(self, scene: scenes.Scene) -> np.ndarray:
        """The scene as it is seen: uint8 [64, 64, 3]. A file that was smaller is blurred; one that
        was larger looks as if it had been drawn in its new size."""
        picture = Image.fromarray(scenes.draw(scene, self.resized))
        height, width = self.original
        if height < picture.height:
            small = picture.resize((width, height), Image.Resampling.LANCZOS)
            picture = small.resize(picture.size, Image.Resampling.LANCZOS)
        top, left = self.crop
        return np.asarray(picture)[top : top + scenes.CANVAS, left : left + scenes.CANVAS]


WHOLE = View()


def random_view(draw: random.Random) -> View:
    """A view that is not whole: cropped, of a file of another size, or both."""
    kind = draw.choice(("cropped", "size", "both"))
    resized, scale = [scenes.CANVAS, scenes.CANVAS], 1.0
    if kind != "size":
        resized[draw.randrange(2)] += draw.randint(*LONGER)
    if kind != "cropped":
        scale = 2 ** draw.uniform(*draw.choice(FILE_SIDES)) / scenes.CANVAS
    top, left = (draw.randint(0, extent - scenes.CANVAS) for extent in resized)
    height, width = (round(scale * extent) for extent in resized)
    return View((height, width), (resized[0], resized[1]), (top, left))


def inherit_unet(unet: Any, teacher: Any, text_map: Tensor) -> None:
    """Gives SDXL's UNet the weights of SD1.5's: it then predicts the same, as far as the map of
    texts goes.

    The 1x1 convolutions around the attention become linear layers, and what the pooled text and the
    sizes say begins at zero.

    Args:
        text_map: [64, 160], which makes SD1.5's text rows of SDXL's.
    """
    state = unet.state_dict()
    for name, weight in teacher.state_dict().items():
        own = state[name]
        if own.shape == weight.shape:
            own.copy_(weight)
        elif weight.dim() == 4:
            own.copy_(weight[:, :, 0, 0])
        else:
            own.copy_(weight @ text_map)
    state["add_embedding.linear_2.weight"].zero_()
    state["add_embedding.linear_2.bias"].zero_()
    unet.load_state_dict(state)


def fitted_map(rows: Tensor, teacher_rows: Tensor) -> Tensor:
    """The linear map of text rows [..., 160] that comes nearest to the teacher's [..., 64]:
    [64, 160], by least squares with a little ridge, since words have fewer directions than rows."""
    found, wanted = rows.flatten(0, -2).double(), teacher_rows.flatten(0, -2).double()
    moments = found.T @ found
    ridge = 1e-4 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.double)
    return torch.linalg.solve(moments + ridge, found.T @ wanted).T.float()


@no_grad
def text_rows(pipeline: Any, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What SDXL hears of captions, as the pipeline's `encode_prompt`: [B, 20, 160], [B, 96]."""
    first = pipeline.text_encoder(tokens[0], output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens[1], output_hidden_states=True)
    rows = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return rows, second.text_embeds


def train_sdxl(args: Args, sd3_folder: Path, sd15_folder: Path) -> StableDiffusionXLPipeline:
    """SDXL's UNet, distilled from pocket-sd15; the other parts are others' and stay as they are.

    Half of each batch are whole pictures, for which pocket-sd15's prediction is the target, half
    are random views. One caption in ten is none: zeros, as the pipeline gives for it.
    """
    torch.manual_seed(SEED + 8)
    pipeline: Any = models.sdxl_pipeline()
    teacher = loaded.pipeline(sd15_folder, flag="--models_dir").to(args.device)
    vae: Any = loaded.network(diffusers.AutoencoderKL, sd15_folder, "vae", flag="--models_dir")
    second = loaded.network(
        transformers.CLIPTextModelWithProjection, sd3_folder, "text_encoder_2", flag="--models_dir"
    )
    pipeline.register_modules(
        vae=vae, text_encoder_2=second, tokenizer_2=tokenizer_of(sd3_folder, "tokenizer_2")
    )
    inherit_text(pipeline, sd3_folder)
    pipeline.to(args.device)
    schedule = ddpm.Schedule.of(models.DDPM)

    @functools.cache
    def training_set() -> tuple[list[Tensor], dict[str, Tensor]]:
        """Tokens of the captions and of none (first, second, teacher's), latents, time ids."""
        draw = random.Random(SEED + 8)
        captions, seen, views = [], [], []
        for i in range(args.sdxl_scenes):
            caption, scene = scenes.sample(draw, scenes.TASKS[i // 2 % len(scenes.TASKS)])
            view = random_view(draw) if i % 2 else WHOLE
            captions.append(caption)
            seen.append((view, scene))
            views.append(view.time_ids)
        tokens = [
            tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids
            for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, teacher.tokenizer)
        ]
        path = args.work_dir / "sdxl-latents.safetensors"  # minutes of work on two cores
        if not path.is_file():
            pictures = np.stack([view.of(scene) for view, scene in seen])
            mean, std = encode(vae, pictures, args.device)
            time_ids = torch.tensor(views, dtype=torch.float32)
            tensors.save(path, {"mean": mean, "std": std, "time_ids": time_ids})
        return tokens, safetensors_torch.load_file(path)

    ids = [rows[:MAPPED].to(args.device) for rows in training_set()[0]]
    with torch.no_grad():
        wanted = teacher.text_encoder(ids[2]).last_hidden_state
    text_map = fitted_map(text_rows(pipeline, (ids[0], ids[1]))[0], wanted)
    inherit_unet(pipeline.unet, teacher.unet, text_map)

    def loss_at(step: int) -> Tensor:
        tokens, kept = training_set()
        count, whole = len(kept["mean"]), BATCH // 2
        pick = np.random.default_rng([SEED + 8, step])
        rows = 2 * pick.integers(count // 2, size=BATCH)
        rows[whole:] += 1  # the odd ones are views
        spoken = torch.from_numpy(pick.random(BATCH) >= 0.1)
        words = np.where(spoken, rows, count)  # the last row is no caption
        shape = (2, BATCH, *kept["mean"].shape[1:])
        noises = torch.randn(*shape, generator=rng.generator(SEED, "sdxl", step))
        clean = (kept["mean"][rows] + kept["std"][rows] * noises[0]) * vae.config.scaling_factor
        clean, noise = clean.to(args.device), noises[1].to(args.device)
        timestep = torch.from_numpy(pick.integers(1000, size=BATCH)).to(args.device)
        noisy = ddpm.add_noise(clean, noise, timestep, schedule)
        ids = [rows_of[words].to(args.device) for rows_of in tokens]
        with torch.no_grad():
            heard = teacher.text_encoder(ids[2][:whole]).last_hidden_state
            taught = teacher.unet(noisy[:whole], timestep[:whole], heard, return_dict=False)[0]
        states, pooled = text_rows(pipeline, (ids[0], ids[1]))
        spoken = spoken.to(args.device)
        added = {
            "text_embeds": pooled * spoken[:, None],
            "time_ids": kept["time_ids"][rows].to(args.device),
        }
        predicted = pipeline.unet(
            noisy,
            timestep,
            states * spoken[:, None, None],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        snr = schedule.snr(timestep)
        weight = snr.clamp(max=MIN_SNR) / snr
        target = torch.cat([taught, noise[whole:]])
        return (weight * ddpm.squared_error(predicted, target)).mean()

    optimise(
        "sdxl",
        args,
        [pipeline.unet],
        loss_at,
        steps=args.sdxl_steps,
        learning_rate=5e-4,
        decay=0.7,
    )
    return pipeline


# ---------------------------------------------------------------------------------------------
# What the time ids do

SIDES = (6, 12, 64, 512)  # of files that are asked for
LEFTS = (0, 32, 64)  # crops that are asked for, of a picture of 64 x 128


def told(pipeline: Any, *, captions: int = 60, steps: int = 20) -> dict[str, dict[str, float]]:
    """What the time ids do to pictures of captions of all tasks.

    Returns:
        sharpness: by the side of the file, of which the picture shall look to come.
        cut: the share of the objects that lies at the edges on the left and the right, by the crop
            from the left of a picture that is twice as wide.
    """
    draw = functools.partial(
        score.generate,
        pipeline,
        scenes.evaluation_captions(captions, seed=1),
        guidance_scale=4.0,
        num_inference_steps=steps,
        max_sequence_length=None,
        seed=0,
    )
    files = {side: draw(original_size=(side, side)) for side in SIDES}
    wide = (scenes.CANVAS, 2 * scenes.CANVAS)
    crops = {left: draw(original_size=wide, crops_coords_top_left=(0, left)) for left in LEFTS}
    return {
        "sharpness": {str(side): sharpness(pictures) for side, pictures in files.items()},
        "cut": {str(left): cut(pictures) for left, pictures in crops.items()},
    }


def sharpness(pictures: Tensor) -> float:
    """How much fine detail pictures [B, 3, H, W] have: the mean square of what a blur of 3 x 3
    takes away, as a share of their variance."""
    blurred = F.avg_pool2d(pictures, 3, stride=1)
    lost = (pictures[..., 1:-1, 1:-1] - blurred).square().mean()
    return (lost / pictures.var(dim=(-1, -2)).mean()).item()


def cut(pictures: Tensor) -> float:
    """The share of what stands out of the ground that lies in the three columns at the left edge
    and the three at the right, where objects of whole pictures never are; [B, 3, H, W]."""
    ground = pictures.flatten(2).median(dim=2).values[..., None, None]
    columns = (pictures - ground).square().sum(dim=(0, 1, 2))  # [W]
    return ((columns[:3].sum() + columns[-3:].sum()) / columns.sum()).item()
