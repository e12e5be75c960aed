"""Measures what scripts/prove_supervised.sh trained: `python -m dojo.pocket.proof`.

Full fine-tuning and LoRA taught pocket models a new style, DreamBooth a dog; one training also
taught a model that predicts the noise to predict the velocity. The same prompts and seeds are drawn
before and after. What is left in the folder: a JSON file per training, pictures of each base
(style.png, dreambooth.png, style-sd15.png, ...), and the tables supervised.md. Trainings that are
not finished are left out, and pictures that were drawn from the same weights before are not drawn
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dojo import bars, cli
from dojo.cli import UserError, ranges
from dojo.files import pictures
from dojo.finetune import lora
from dojo.models import loaded
from dojo.pocket import build, chinese, judge, scenes, score, style, verifier

DOG_PROMPT = "a photo of sks dog"
CLASS_PROMPT = "a red circle"
GUIDANCE = 4.0  # for scenes
DOG_GUIDANCE = 1.0
SEED = 0  # of captions and pictures; `dojo.pocket.datasets` draws from another

Row = tuple[str, str, str, str]
HEAD: Row = ("method", "measured", "before", "after")
SCRIPT = "prove_supervised.sh"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the trainings lie and how much is drawn."""

    models_dir: Path = Path("models")
    """folder of the bases pocket-sd3, pocket-sd15, pocket-sdxl and pocket-kolors"""
    output_dir: Path = Path("outputs/proof")
    """folder that holds the trainings, those that there are, and receives the report"""
    dog_dir: Path = Path("datas/dog")
    """photographs that DreamBooth learned"""
    num_captions: int = 240
    """captions of all six tasks, a picture of each"""
    num_pictures: int = 64
    """pictures of the dog's prompt, and as many of the class's"""
    num_inference_steps: int = 20
    """sampling steps of every picture"""

    def __post_init__(self) -> None:
        ranges.check(self, "num_inference_steps", least=1)
        ranges.check(self, "num_captions num_pictures", least=len(scenes.TASKS))  # one of each


@dataclass(frozen=True, kw_only=True)
class Part:
    """A training of the script."""

    folder: str
    """within output_dir"""
    title: str
    base: str
    """the pocket model that it began from, without the `pocket-`"""
    with_average: bool = False
    """it saved an average of its weights, and is measured without it too"""


STYLE = (
    Part(folder="full", title="Full fine-tuning with EMA", base="sd3", with_average=True),
    Part(folder="lora", title="LoRA", base="sd3"),
    Part(folder="full-sd15", title="Full fine-tuning with EMA", base="sd15", with_average=True),
    Part(folder="lora-sd15", title="LoRA", base="sd15"),
    Part(folder="velocity-sd15", title="From noise to velocity, zero SNR", base="sd15"),
    Part(folder="lora-sdxl", title="LoRA", base="sdxl"),
    Part(folder="lora-kolors", title="LoRA, Chinese captions", base="kolors"),
)
SUBJECT = (
    Part(folder="dreambooth", title="DreamBooth", base="sd3"),
    Part(folder="dreambooth-prior", title="DreamBooth, prior preservation", base="sd3"),
    Part(folder="dreambooth-sdxl", title="DreamBooth", base="sdxl"),
    Part(folder="dreambooth-prior-sdxl", title="DreamBooth, prior preservation", base="sdxl"),
)
BASES = ("sd3", "sd15", "sdxl", "kolors")
CHINESE = ("kolors",)  # bases that are asked in Chinese


# ---- Drawing ----


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline with something trained in it.

    Attributes:
        pipeline: folder of the whole pipeline.
        network: folder of another transformer or UNet for it.
        adapter: LoRA file for it.
    """

    pipeline: Path
    network: Path | None = None
    adapter: Path | None = None

    @property
    def part(self) -> str:
        """What the pipeline calls its network: transformer or unet."""
        return "unet" if (self.pipeline / "unet").is_dir() else "transformer"

    @property
    def weights(self) -> Path:
        """The safetensors file that was trained.

        Raises:
            UserError: it is missing.
        """
        name = "diffusion_pytorch_model.safetensors"
        path = self.adapter or (self.network or self.pipeline / self.part) / name
        if not path.is_file():
            raise UserError(f"there is no {path}: bash scripts/{SCRIPT} makes it")
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
        if self.network is not None:
            kind = type(getattr(pipeline, self.part))
            network = loaded.network(kind, self.network, flag=flag)
            pipeline.register_modules(**{self.part: network})
        if self.adapter is not None:
            lora.load(pipeline, self.adapter, "trained")
        return pipeline


def base_of(args: Args, base: str) -> Model:
    """A pocket model as the repository ships it."""
    return Model(pipeline=args.models_dir / f"pocket-{base}")


def trained(args: Args, part: Part) -> Model:
    """What a training left: an adapter for its base, or a whole pipeline."""
    folder = args.output_dir / part.folder
    if (folder / lora.WEIGHTS).is_file():
        return Model(pipeline=base_of(args, part.base).pipeline, adapter=folder / lora.WEIGHTS)
    return Model(pipeline=folder)


def without_average(args: Args, part: Part) -> Model:
    """What a training would have left without the average: its last checkpoint's network."""
    folder = args.output_dir / part.folder
    checkpoint = folder / f"checkpoint-{training(folder)['steps']}"
    return Model(pipeline=folder, network=checkpoint / Model(pipeline=folder).part)


def drawn(
    model: Model, prompts: Sequence[str], guidance: float, path: Path, *, steps: int = 20
) -> np.ndarray:
    """A picture per prompt, number k from seed `SEED` + k: uint8 [B, 64, 64, 3].

    The .npz file `path` keeps them for as long as weights, prompts, guidance and steps are the
    same.
    """
    key = json.dumps([model.fingerprint, guidance, SEED, steps, *prompts])
    if path.is_file():
        with np.load(path) as kept:
            if str(kept["key"]) == key:
                return kept["pictures"]
    images = score.generate(
        model.load(),
        prompts,
        guidance_scale=guidance,
        num_inference_steps=steps,
        max_sequence_length=24 if model.part == "transformer" else None,  # SD3's T5
        seed=SEED,
    )
    found = verifier.pictures(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, pictures=found, key=key)
    partial.replace(path)
    return found


def asked(base: str, captions: Sequence[str]) -> list[str]:
    """Captions in the language that a base is asked in; it is judged by the English ones."""
    return [chinese.translated(one) if base in CHINESE else one for one in captions]


def drawn_scenes(model: Model, base: str, name: str, args: Args) -> np.ndarray:
    """A picture of each of the captions that all models are compared on."""
    captions = asked(base, style.captions(args.num_captions, SEED))
    path = args.output_dir / "drawn" / f"scenes, {name}.npz"
    return drawn(model, captions, GUIDANCE, path, steps=args.num_inference_steps)


# ---- The methods ----


def prove_style(args: Args, base: str, parts: Sequence[Part]) -> list[Row]:
    """Trainings of one base on the pictures in the style."""
    folder = args.output_dir
    models, columns = {f"pocket-{base}": base_of(args, base)}, ["base"]
    for part in parts:
        models[part.folder] = trained(args, part)
        columns.append(part.title)
        if part.with_average:
            models[f"{part.folder}, no EMA"] = without_average(args, part)
            columns.append("without EMA")
    captions = style.captions(args.num_captions, SEED)
    found = {name: drawn_scenes(model, base, name, args) for name, model in models.items()}
    judged = {name: judge.framed(images, captions) for name, images in found.items()}

    one_of_each = range(len(scenes.TASKS))
    save_grid(
        folder / f"style{suffix(base)}.png",
        [np.stack([images[i] for images in found.values()]) for i in one_of_each],
        asked(base, [captions[i] for i in one_of_each]),
        columns,
    )

    rows: list[Row] = []
    before = judged[f"pocket-{base}"]
    for part in parts:
        run, size = training(folder / part.folder), models[part.folder].weights.stat().st_size
        after, losses = judged[part.folder], run["eval_loss"]
        names = (f"pocket-{base}", part.folder, f"{part.folder}, no EMA")
        own = {name: judged[name] for name in names if name in judged}
        judge.save_json(folder / f"{part.folder}.json", {**run, "bytes": size, "judged": own})
        rows += [
            (describe(part.title, run, size), "eval loss", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"),
            ("", "in the new style", before["style"].percent, after["style"].percent),
            ("", "all of the caption right", before["strict"].percent, after["strict"].percent),
        ]
        if part.with_average:
            bare = judged[f"{part.folder}, no EMA"]
            rows += [
                ("", "in the new style, without EMA", "", bare["style"].percent),
                ("", "all of the caption right, without EMA", "", bare["strict"].percent),
            ]
    return rows


def prove_dreambooth(args: Args, base: str, parts: Sequence[Part]) -> tuple[list[Row], str]:
    """One dog, and what becomes of the class, with and without prior preservation.

    Returns:
        The rows, and what the photographs themselves would score.
    """
    folder, own_name = args.output_dir, f"pocket-{base}"
    models = {own_name: base_of(args, base)}
    models |= {part.folder: trained(args, part) for part in parts}
    photographs = build.squares(args.dog_dir)
    alone = judge.photographs_alone(photographs)
    decoded = judge.subject(through_autoencoder(models[own_name], photographs), photographs)

    captions = style.captions(args.num_captions, SEED)
    dogs, circles, judged = {}, {}, {}
    for name, model in models.items():
        for prompt, guidance, found in (
            (DOG_PROMPT, DOG_GUIDANCE, dogs),
            (CLASS_PROMPT, GUIDANCE, circles),
        ):
            prompts, path = [prompt] * args.num_pictures, folder / "drawn" / f"{prompt}, {name}.npz"
            found[name] = drawn(model, prompts, guidance, path, steps=args.num_inference_steps)
        judged[name] = {
            **judge.subject(dogs[name], photographs),
            **judge.content(circles[name], [CLASS_PROMPT] * args.num_pictures),
            "drift": judge.drift(circles[name], circles[own_name]),
            "scenes": judge.framed(drawn_scenes(model, base, name, args), captions)["strict"],
        }

    width = len(photographs)
    labels = ["base", *(part.title for part in parts)]
    grid = [images[:width] for images in (photographs, *dogs.values(), *circles.values())]
    names = [f"{prompt}: {label}" for prompt in (DOG_PROMPT, CLASS_PROMPT) for label in labels]
    numbers = [f"seed {SEED + k}" for k in range(width)]
    save_grid(folder / f"dreambooth{suffix(base)}.png", grid, ["photographs", *names], numbers)

    rows: list[Row] = []
    references = {"photographs": alone, "photographs through the autoencoder": decoded}
    shifted = judge.drift(circles[own_name], np.roll(circles[own_name], 1, axis=0))
    before = judged[own_name]
    for part in parts:
        run, size = training(folder / part.folder), models[part.folder].weights.stat().st_size
        after = judged[part.folder]
        own = {
            **references,
            own_name: {**before, "drift between seeds": shifted},
            part.folder: after,
        }
        judge.save_json(folder / f"{part.folder}.json", {**run, "bytes": size, "judged": own})
        likeness = (before["likeness"].number, after["likeness"].number)
        rows += [
            (describe(part.title, run, size), "likeness to the photographs", *likeness),
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
    rows = judge.metrics(folder, SCRIPT)
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith("seconds_"))
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return {"steps": rows[-1]["step"], "seconds": round(seconds), "eval_loss": losses}


# ---- The report ----


def suffix(base: str) -> str:
    """What the names of a base's pictures end with: nothing for the first of them."""
    return "" if base == BASES[0] else f"-{base}"


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


def prove(args: Args, base: str, there: Sequence[Part]) -> tuple[list[Row], str]:
    """All trainings of one base: the rows of its table, and what to know of them."""
    learned = [part for part in STYLE if part in there and part.base == base]
    subjects = [part for part in SUBJECT if part in there and part.base == base]
    rows = prove_style(args, base, learned) if learned else []
    kept, bounds = prove_dreambooth(args, base, subjects) if subjects else ([], "")
    return [*rows, *kept], bounds


def main(args: Args) -> None:
    """Draws, judges, and writes what the methods did."""
    bars.leave_out_others()
    finished = [
        part
        for part in (*STYLE, *SUBJECT)
        if (args.output_dir / part.folder / "finished.json").is_file()
    ]
    if not finished:
        raise UserError(
            f"{args.output_dir} holds no finished training: bash scripts/{SCRIPT} makes them"
        )
    found = {
        base: prove(args, base, finished)
        for base in BASES
        if any(part.base == base for part in finished)
    }
    notes = (
        "± is one standard error; prompts and seeds are the same before and after. Scenes: "
        f"{args.num_captions} captions of the six tasks, {args.num_inference_steps} steps, "
        f"guidance {GUIDANCE:.0f}, read by the verifier, which is not shown the place of the frame."
        " pocket-kolors learns from Chinese captions and is asked in Chinese."
        f" Dog and class: {args.num_pictures} pictures each, guidance {DOG_GUIDANCE:.0f} and "
        f"{GUIDANCE:.0f}. Likeness: mean cosine of EfficientNet-Lite0's features with those of the "
        "photographs at 64 px. Change: mean absolute difference to the base's picture of the same "
        "seed, in levels of 0 to 255. The eval loss is that of what the training predicts: an "
        "error of the velocity where it learned the velocity. Seconds are those of the training on "
        f"{build.machine('cpu')}; MB those of the trained weights' file."
    )
    sections: list[str] = []
    for base, (rows, bounds) in found.items():
        sections += [f"pocket-{base}:\n", table(rows)]
        sections += [f"{bounds}\n"] if bounds else []
    report = "\n".join([*sections, f"{notes}\n"])
    print(report)
    (args.output_dir / "supervised.md").write_text(report, encoding="utf-8")
    named = {
        base: [dict(zip(HEAD, row, strict=True)) for row in rows]
        for base, (rows, _) in found.items()
    }
    judge.save_json(args.output_dir / "supervised.json", {"rows": named, "notes": notes})


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
