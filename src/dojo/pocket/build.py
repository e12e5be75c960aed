"""Trains the pocket models from nothing: `python -m dojo.pocket.build`.

Stages, each resumable: the autoencoder on scenes and crops of photographs; the MMDiT together with
its three text encoders by rectified flow on cached latents; pocket-clip contrastively; SD1.5's
autoencoder and UNet (`build_sd15`); SDXL's UNet (`build_sdxl`); Kolors' text encoder and UNet
(`build_kolors`); the report. A stage whose result lies in `work_dir` is not trained again.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dojo import cli, files, rng
from dojo.lazy import F, diffusers, nn, torch, transformers
from dojo.maths import flow
from dojo.models import classic, loaded
from dojo.pocket import (
    build_kolors,
    build_sd15,
    build_sdxl,
    chinese,
    models,
    scenes,
    score,
    text,
    verifier,
)
from dojo.pocket.fitting import (
    SEED,
    Args,
    decode,
    encode,
    half,
    optimise,
    photo_crops,
    psnr,
    squares,
    to_tensor,
    wild_scene,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from torch import Tensor

# ---------------------------------------------------------------------------------------------
# Autoencoder


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
        with half(args.device):
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
        with half(args.device):
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


def train_clip(args: Args, vae: Any) -> transformers.CLIPModel:
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
        with half(args.device):
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


def clip_processor() -> transformers.CLIPImageProcessor:
    """CLIP's preprocessing at 64 px, with CLIP's own mean and std."""
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )


# ---------------------------------------------------------------------------------------------
# Saving and report


def save_half(model: Any, folder: Path) -> None:
    """Writes a pipeline or a CLIP in half precision; it loads in float32.

    transformers takes a model's dtype from its config.json, diffusers takes float32: the configs
    say float32, so that a plain `from_pretrained` gives one dtype throughout.
    """
    is_pipeline = isinstance(model, diffusers.DiffusionPipeline)
    parts: Iterable[Any] = model.components.values() if is_pipeline else [model]
    for part in parts:
        if isinstance(part, nn.Module):
            part.half()
    model.save_pretrained(folder)
    if not is_pipeline:
        transformers.CLIPProcessor(clip_processor(), text.clip_tokenizer()).save_pretrained(folder)
    written = folder.glob("text_encoder*/config.json") if is_pipeline else [folder / "config.json"]
    for path in written:
        config = {**json.loads(path.read_text()), "dtype": "float32"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        classic.rewrite(path.parent)


def retrieval(folder: Path, device: str) -> float:
    """Share of fresh pictures whose caption pocket-clip picks among 32 (different ones)."""
    clip = loaded.network(transformers.CLIPModel, folder, flag="--models_dir").to(device)
    processor = loaded.tokenizer(
        transformers.CLIPProcessor, folder, flag="--models_dir", encoder=clip
    )
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


def scored(
    args: Args, folder: Path, t5_lengths: Sequence[int | None], *, bilingual: bool = False
) -> dict[str, dict[str, float]]:
    """The scores of a saved pipeline, as a user would load it, by setting.

    Args:
        bilingual: the same captions in English and in Chinese.
    """
    pipeline = loaded.pipeline(folder, flag="--models_dir").to(args.device)
    captions = scenes.evaluation_captions(args.report_captions, seed=0)
    asked = {"": captions}
    if bilingual:
        chinese_captions = [chinese.translated(caption) for caption in captions]
        asked = {"English, ": captions, "Chinese, ": chinese_captions}
    columns: dict[str, dict[str, float]] = {}
    for guidance in (4.0, 1.0):
        for language, prompts in asked.items():
            for t5_length in t5_lengths:
                name = language + ("CFG 4" if guidance > 1 else "no CFG")
                name += "" if t5_length is None else f", T5 {t5_length}"
                pictures = score.generate(
                    pipeline,
                    prompts,
                    guidance_scale=guidance,
                    num_inference_steps=20,
                    max_sequence_length=t5_length,
                    seed=0,
                )
                columns[name] = verifier.task_scores(pictures, captions)
                print(folder.name, name, columns[name], flush=True)
    return columns


def reconstruction(args: Args, folder: Path) -> dict[str, float]:
    """The mean PSNR of a saved autoencoder in dB, by kind of picture."""
    vae = loaded.network(diffusers.AutoencoderKL, folder, "vae", flag="--models_dir")
    vae.to(args.device)
    draw = random.Random(SEED + 4)
    fresh = np.stack([scenes.draw(scenes.sample(draw)[1]) for _ in range(500)])
    return {
        "scenes": psnr(vae, fresh, args.device),
        "datas/dog": psnr(vae, squares(args.dog_dir), args.device),
        "datas/photos": psnr(vae, squares(args.photos_dir), args.device),
    }


FACTS = "facts.json"  # what the report knows of models that were not trained this time


def facts(args: Args, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What models/README.md says, with the facts of the models that were left as they were."""
    path = args.models_dir / FACTS
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    lengths = {"sd3": (text.T5_LENGTH, 256)}
    built = f"{time.strftime('%Y-%m-%d')}, {machine(args.device)}"
    for name in args.models:
        folder = args.models_dir / f"pocket-{name}"
        own = {stage: spent for stage, spent in seconds.items() if stage in STAGES[name]}
        found[name] = {"built": built, "minutes": {k: round(v / 60) for k, v in own.items()}}
        if name == "clip":
            found[name]["retrieval"] = retrieval(folder, args.device)
            continue
        found[name]["scores"] = scored(
            args, folder, lengths.get(name, (None,)), bilingual=name == "kolors"
        )
        if name in ("sdxl", "kolors"):
            pipeline = loaded.pipeline(folder, flag="--models_dir").to(args.device)
            found[name]["told"] = build_sdxl.told(pipeline)
        else:
            found[name]["psnr"] = reconstruction(args, folder)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


STAGES = {
    "sd3": ("vae", "sd3"),
    "sd15": ("vae4", "vae4-pixels", "sd15"),
    "sdxl": ("sdxl",),
    "kolors": ("kolors-text", "kolors"),
    "clip": ("clip",),
}


def scores_table(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Scores as Markdown: a row per task, a column per setting."""
    return [
        "| task | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
        *[
            f"| {task} | " + " | ".join(f"{column[task]:.3f}" for column in columns.values()) + " |"
            for task in (*scenes.TASKS, "overall")
        ],
    ]


_TITLE = "# The pocket models"


def report(args: Args, found: Mapping[str, Any]) -> None:
    """Writes models/README.md."""
    size = sum(path.stat().st_size for path in args.models_dir.glob("pocket-*/**/*.safetensors"))
    lines = [
        _TITLE,
        "",
        "`pocket-sd3` is a StableDiffusion3Pipeline (MMDiT with dual attention and qk-norm,",
        "16-channel autoencoder, two CLIP text encoders, T5), `pocket-sd15` a",
        "StableDiffusionPipeline (UNet that predicts the noise, 4-channel autoencoder, CLIP,",
        "SD1.5's schedule), `pocket-sdxl` a StableDiffusionXLPipeline (two CLIPs, pooled text,",
        "time ids; its autoencoder is pocket-sd15's, its text encoders are pocket-sd3's CLIPs),",
        "`pocket-kolors` a KolorsPipeline (a ChatGLM that reads English and Chinese, Kolors'",
        "schedule; its autoencoder is pocket-sd15's), `pocket-clip` a CLIPModel; all know the",
        "64-pixel scenes of `dojo.pocket.scenes` and nothing else. They are trained from nothing",
        "by `bash scripts/build_pocket_models.sh`, which also writes this page.",
        "Licence: Apache-2.0, as the rest of the repository.",
        "",
        "Built (training time by the wall clock):",
        "",
    ]
    for name, fact in found.items():
        spent = ", ".join(f"{stage} {minutes} min" for stage, minutes in fact["minutes"].items())
        lines.append(f"- pocket-{name} on {fact['built']}: {spent}")
    lines += ["", f"{size / 1e6:.1f} MB of weights in half precision.", ""]
    for name in ("sd3", "sd15", "sdxl", "kolors"):
        if name in found:
            fact = found[name]
            lines += [f"## What pocket-{name} draws", "", SCORED.format(args.report_captions), ""]
            lines += [SPOKEN, ""] if name == "kolors" else []
            lines += [*scores_table(fact["scores"]), ""]
            lines += told_lines(fact["told"], TOLD[name]) if "told" in fact else []
            lines += psnr_lines(fact["psnr"]) if "psnr" in fact else []
    if "clip" in found:
        share = 100 * found["clip"]["retrieval"]
        lines += ["## pocket-clip", ""]
        lines += ["Picks the right one of 32 captions for a fresh picture in "]
        lines[-1] += f"{share:.1f} % of 512 cases."
        lines += [""]
    (args.models_dir / "README.md").write_text("\n".join(lines))
    print("\n".join(lines))


def psnr_lines(found: Mapping[str, float]) -> list[str]:
    """What an autoencoder keeps, in Markdown."""
    shown = ", ".join(f"{kind} {value:.2f} dB" for kind, value in found.items())
    return [
        f"Its autoencoder's reconstruction of 64-pixel pictures, mean PSNR: {shown}.",
        "The photographs of `datas/photos`, the dog's among them, gave the training",
        "crops.",
        "",
    ]


def told_lines(told: Mapping[str, Mapping[str, float]], about: str) -> list[str]:
    """What a model's time ids do, in Markdown."""
    lines = [about, ""]
    for asked, values, form, measured in (
        ("side of the original", told["sharpness"], "{:.4f}", "sharpness"),
        ("crop from the left", told["cut"], "{:.1%}", "cut"),
    ):
        shown = " | ".join(form.format(value) for value in values.values())
        head = f"| {asked} | " + " | ".join(f"{key} px" for key in values) + " |"
        lines += [head, "| --- |" + " --- |" * len(values), f"| {measured} | {shown} |", ""]
    return lines


_SDXL_TOLD = """\
Half of its training pictures were cropped, or came from files of 4 to 16 or of 64 to 2048 pixels,
and SDXL's time ids said so. 60 captions of all tasks, drawn with other time ids than the pipeline's
own (original = target, no crop): a small original looks blurred, and where a crop is told, objects
are cut off. On which side they are it has not learned. Sharpness: what a blur of 3 x 3 takes away,
as a share of the variance; cut: the share of the objects that lies within 3 pixels of the left or
right edge, by the crop from the left of a picture of 64 x 128."""


TOLD = {
    "sdxl": _SDXL_TOLD,
    "kolors": """\
What its time ids do, measured as pocket-sdxl's, which it learned them from.""",
}


SPOKEN = """\
The same captions in English and in Chinese (`dojo.pocket.chinese`), the same seeds."""


SCORED = """\
Strict score (everything in the caption holds) over the captions of
`scenes.evaluation_captions({}, seed=0)`, one picture each with
seed = number of the caption, 20 steps; `overall` is the mean of the six tasks."""


def machine(device: str) -> str:
    """The machine in words: the GPU's name, or how many CPU cores."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def main(args: Args) -> None:
    """Runs the stages that are not done yet, then saves and reports."""
    if args.device == "auto":
        args = replace(args, device="cuda" if torch.cuda.is_available() else "cpu")
    files.check_output(
        args.models_dir / "README.md", "--models_dir", is_ours=lambda text: text.startswith(_TITLE)
    )
    args.work_dir.mkdir(parents=True, exist_ok=True)
    sd3_folder, sd15_folder = (args.models_dir / f"pocket-{name}" for name in ("sd3", "sd15"))
    if "sd3" in args.models:
        vae = train_vae(args)
        save_half(train_sd3(args, vae), sd3_folder)
    if "clip" in args.models:
        clip_vae = loaded.network(diffusers.AutoencoderKL, sd3_folder, "vae", flag="--models_dir")
        save_half(train_clip(args, clip_vae.to(args.device)), args.models_dir / "pocket-clip")
    if "sd15" in args.models:
        vae4 = build_sd15.train_vae4(args, sd3_folder)
        found = psnr(vae4, squares(args.dog_dir), args.device)
        print(f"4-channel autoencoder: {found:.2f} dB on {args.dog_dir}", flush=True)
        pipeline = build_sd15.train_sd15(args, vae4, sd3_folder)
        save_half(pipeline, sd15_folder)
    if "sdxl" in args.models:
        xl = build_sdxl.train_sdxl(args, sd3_folder, sd15_folder)
        save_half(xl, args.models_dir / "pocket-sdxl")
    if "kolors" in args.models:
        pipeline = build_kolors.train_kolors(args, args.models_dir / "pocket-sdxl")
        save_half(pipeline, args.models_dir / "pocket-kolors")
    log = args.work_dir / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    report(args, facts(args, {row["stage"]: row["seconds"] for row in rows}))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
