"""Measures what scripts/prove_supervised.sh trained: `python -m dojo.pocket.proof`.

Full fine-tuning and LoRA taught the pocket SD3 a new style, DreamBooth a dog. The same prompts and
seeds are drawn before and after. What is left in the folder: a JSON file per method, style.png and
dreambooth.png, and the table supervised.md. Pictures that were drawn from the same weights before
are not drawn again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import transformers
from diffusers import SD3Transformer2DModel
from PIL import Image

from dojo import cli
from dojo.cli import UserError, ranges
from dojo.files import pictures
from dojo.finetune import lora
from dojo.models import loaded
from dojo.pocket import build, judge, scenes, score, style, verifier

DOG_PROMPT = "a photo of sks dog"
CLASS_PROMPT = "a red circle"
GUIDANCE = 4.0  # for scenes
DOG_GUIDANCE = 1.0
SEED = 0  # of captions and pictures; `dojo.pocket.datasets` draws from another

Row = tuple[str, str, str, str]
HEAD: Row = ("method", "measured", "before", "after")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the trainings lie and how much is drawn."""

    pretrained_model_name_or_path: Path = Path("models/pocket-sd3")
    """folder of the base"""
    output_dir: Path = Path("outputs/proof")
    """folder that holds full, lora, dreambooth and dreambooth-prior and receives the report"""
    dog_dir: Path = Path("datas/dog")
    """photographs that DreamBooth learned"""
    num_captions: int = 240
    """captions of all six tasks, a picture of each"""
    num_pictures: int = 64
    """pictures of the dog's prompt, and as many of the class's"""

    def __post_init__(self) -> None:
        ranges.check(self, "num_captions num_pictures", least=1)


# ---- Drawing ----


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline with something trained in it.

    Attributes:
        pipeline: folder of the whole pipeline.
        transformer: folder of another transformer for it.
        adapter: LoRA file for it.
    """

    pipeline: Path
    transformer: Path | None = None
    adapter: Path | None = None

    @property
    def weights(self) -> Path:
        """The safetensors file that was trained.

        Raises:
            UserError: it is missing.
        """
        name = "diffusion_pytorch_model.safetensors"
        path = self.adapter or (self.transformer or self.pipeline / "transformer") / name
        if not path.is_file():
            raise UserError(f"there is no {path}: bash scripts/prove_supervised.sh makes it")
        return path

    @property
    def fingerprint(self) -> str:
        """Changes with the weights."""
        base = Model(pipeline=self.pipeline)
        return hashlib.sha256(base.weights.read_bytes() + self.weights.read_bytes()).hexdigest()

    def load(self) -> Any:
        """The pipeline, ready to draw."""
        flag = "--output_dir"
        pipeline = loaded.pipeline(self.pipeline, flag=flag)
        if self.transformer is not None:
            pipeline.transformer = loaded.network(
                SD3Transformer2DModel, self.transformer, flag=flag
            )
        if self.adapter is not None:
            lora.load(pipeline, self.adapter, "trained")
        return pipeline


def drawn(model: Model, prompts: Sequence[str], guidance: float, path: Path) -> np.ndarray:
    """A picture per prompt, number k from seed `SEED` + k: uint8 [B, 64, 64, 3].

    The .npz file `path` keeps them for as long as weights, prompts and guidance are the same.
    """
    key = json.dumps([model.fingerprint, guidance, SEED, *prompts])
    if path.is_file():
        with np.load(path) as kept:
            if str(kept["key"]) == key:
                return kept["pictures"]
    images = score.generate(
        model.load(),
        prompts,
        guidance_scale=guidance,
        num_inference_steps=20,
        max_sequence_length=24,
        seed=SEED,
    )
    found = verifier.pictures(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, pictures=found, key=key)
    partial.replace(path)
    return found


def drawn_scenes(model: Model, name: str, args: Args) -> np.ndarray:
    """A picture of each of the captions that all models are compared on."""
    captions = style.captions(args.num_captions, SEED)
    return drawn(model, captions, GUIDANCE, args.output_dir / "drawn" / f"scenes, {name}.npz")


# ---- The methods ----


def prove_style(args: Args) -> list[Row]:
    """Full fine-tuning, with and without the average of its weights, and LoRA on the same data."""
    base, folder = args.pretrained_model_name_or_path, args.output_dir
    runs = {name: training(folder / name) for name in ("full", "lora")}
    last = folder / "full" / f"checkpoint-{runs['full']['steps']}" / "transformer"
    models = {
        "base": Model(pipeline=base),
        "full": Model(pipeline=folder / "full"),
        "full, no EMA": Model(pipeline=folder / "full", transformer=last),
        "lora": Model(pipeline=base, adapter=folder / "lora" / lora.WEIGHTS),
    }
    captions = style.captions(args.num_captions, SEED)
    found = {name: drawn_scenes(model, name, args) for name, model in models.items()}
    judged = {name: judge.framed(images, captions) for name, images in found.items()}

    one_of_each = range(len(scenes.TASKS))
    save_grid(
        folder / "style.png",
        [np.stack([images[i] for images in found.values()]) for i in one_of_each],
        [captions[i] for i in one_of_each],
        ["base", "full fine-tuning", "without EMA", "LoRA"],
    )

    rows: list[Row] = []
    for name, title in (("full", "Full fine-tuning with EMA"), ("lora", "LoRA")):
        run, size = runs[name], models[name].weights.stat().st_size
        own = {key: value for key, value in judged.items() if key.startswith((name, "base"))}
        judge.save_json(folder / f"{name}.json", {**run, "bytes": size, "judged": own})
        before, after, losses = judged["base"], judged[name], run["eval_loss"]
        rows += [
            (describe(title, run, size), "eval loss", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"),
            ("", "in the new style", before["style"].percent, after["style"].percent),
            ("", "all of the caption right", before["strict"].percent, after["strict"].percent),
        ]
    without = judged["full, no EMA"]
    rows[3:3] = [
        ("", "in the new style, without EMA", "", without["style"].percent),
        ("", "all of the caption right, without EMA", "", without["strict"].percent),
    ]
    return rows


def prove_dreambooth(args: Args) -> tuple[list[Row], str]:
    """One dog, and what becomes of the class, with and without prior preservation.

    Returns:
        The rows, and what the photographs themselves would score.
    """
    base, folder = args.pretrained_model_name_or_path, args.output_dir
    titles = {"dreambooth": "DreamBooth", "dreambooth-prior": "DreamBooth, prior preservation"}
    models = {"base": Model(pipeline=base)}
    models |= {name: Model(pipeline=base, adapter=folder / name / lora.WEIGHTS) for name in titles}
    photographs = build.squares(args.dog_dir)
    alone = judge.photographs_alone(photographs)
    decoded = judge.subject(through_autoencoder(models["base"], photographs), photographs)

    captions = style.captions(args.num_captions, SEED)
    dogs, circles, judged = {}, {}, {}
    for name, model in models.items():
        for prompt, guidance, found in (
            (DOG_PROMPT, DOG_GUIDANCE, dogs),
            (CLASS_PROMPT, GUIDANCE, circles),
        ):
            path = folder / "drawn" / f"{prompt}, {name}.npz"
            found[name] = drawn(model, [prompt] * args.num_pictures, guidance, path)
        judged[name] = {
            **judge.subject(dogs[name], photographs),
            **judge.content(circles[name], [CLASS_PROMPT] * args.num_pictures),
            "drift": judge.drift(circles[name], circles["base"]),
            "scenes": judge.framed(drawn_scenes(model, name, args), captions)["strict"],
        }

    width = len(photographs)
    labels = ["base", *titles.values()]
    grid = [images[:width] for images in (photographs, *dogs.values(), *circles.values())]
    names = [f"{prompt}: {label}" for prompt in (DOG_PROMPT, CLASS_PROMPT) for label in labels]
    numbers = [f"seed {SEED + k}" for k in range(width)]
    save_grid(folder / "dreambooth.png", grid, ["photographs", *names], numbers)

    rows: list[Row] = []
    references = {"photographs": alone, "photographs through the autoencoder": decoded}
    shifted = judge.drift(circles["base"], np.roll(circles["base"], 1, axis=0))
    for name, title in titles.items():
        run, size = training(folder / name), models[name].weights.stat().st_size
        before, after = judged["base"], judged[name]
        own = {**references, "base": {**before, "drift between seeds": shifted}, name: after}
        judge.save_json(folder / f"{name}.json", {**run, "bytes": size, "judged": own})
        likeness = (before["likeness"].number, after["likeness"].number)
        rows += [
            (describe(title, run, size), "likeness to the photographs", *likeness),
            ("", "probability of a dog", before["dog"].percent, after["dog"].percent),
            ("", f'"{CLASS_PROMPT}" right', before["strict"].percent, after["strict"].percent),
            ("", "its partial credit", before["graded"].number, after["graded"].number),
            ("", "change of its pixels", before["drift"].number, after["drift"].number),
            ("", "scenes of all tasks right", before["scenes"].percent, after["scenes"].percent),
        ]
    bounds = (
        f"Among themselves the photographs reach {alone['likeness'].mean:.2f}; decoded by the "
        f"autoencoder, which draws every picture, {decoded['likeness'].mean:.2f}, with a dog's "
        f"probability of {alone['dog'].mean:.0%} and {decoded['dog'].mean:.0%}. The base's "
        f"pictures of two seeds differ by {shifted.mean:.0f} levels."
    )
    return rows, bounds


def through_autoencoder(model: Model, images: np.ndarray) -> np.ndarray:
    """Pictures as well as the model could draw them at all."""
    vae = model.load().vae
    return build.decode(vae, build.encode(vae, images, "cpu")[0], "cpu")


def training(folder: Path) -> dict[str, Any]:
    """Steps, seconds and eval losses of a run, from its metrics.jsonl.

    Raises:
        UserError: there is no run.
    """
    rows = judge.metrics(folder, "prove_supervised.sh")
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith("seconds_"))
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return {"steps": rows[-1]["step"], "seconds": round(seconds), "eval_loss": losses}


# ---- The report ----


def describe(title: str, run: dict[str, Any], size: int) -> str:
    """A method with what it cost."""
    return f"{title}: {run['steps']} steps, {run['seconds']} s, {size / 1e6:.1f} MB"


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    return judge.table(HEAD, rows)


def save_grid(
    path: Path, rows: Sequence[np.ndarray], row_labels: list[str], column_labels: list[str]
) -> None:
    """A labelled grid of pictures, each row uint8 [N, 64, 64, 3]."""
    images = [[Image.fromarray(picture) for picture in row] for row in rows]
    pictures.labelled_grid(
        images, row_labels=row_labels, column_labels=column_labels, cell=128
    ).save(path)


def main(args: Args) -> None:
    """Draws, judges, and writes what the methods did."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    learned, (kept, bounds) = prove_style(args), prove_dreambooth(args)
    rows = learned + kept
    notes = (
        "± is one standard error; prompts and seeds are the same before and after. Scenes: "
        f"{args.num_captions} captions of the six tasks, 20 steps, guidance {GUIDANCE:.0f}, read "
        "by the verifier, which is not shown the place of the frame. Dog and class: "
        f"{args.num_pictures} pictures each, guidance {DOG_GUIDANCE:.0f} and {GUIDANCE:.0f}. "
        "Likeness: mean cosine of EfficientNet-Lite0's features with those of the photographs at "
        "64 px. Change: mean absolute difference to the base's picture of the same seed, in levels "
        f"of 0 to 255. {bounds} Seconds are those of the training on "
        f"{build.machine('cpu')}; MB those of the trained weights' file."
    )
    report = f"{table(rows)}\n{notes}\n"
    print(report)
    (args.output_dir / "supervised.md").write_text(report, encoding="utf-8")
    named = [dict(zip(HEAD, row, strict=True)) for row in rows]
    judge.save_json(args.output_dir / "supervised.json", {"rows": named, "notes": notes})


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
