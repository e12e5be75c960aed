"""Preference pairs of the pocket world: `python -m dojo.pocket.pairs`.

A model draws several pictures of each caption, and the verifier's partial credit ranks them: what a
model would learn from people who looked at its own pictures. Beside the pictures lie
metadata.jsonl (caption, images, scores: `train_dpo_sd15.py` reads it), the captions in train.txt,
others in held_out.txt, and drawn scenes of the training captions in `scenes/`, for methods that
want pictures that are right.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from dojo import bars, cli
from dojo.cli import UserError, ranges
from dojo.lazy import torch
from dojo.models import loaded
from dojo.pocket import scenes, score, verifier
from dojo.run.checkpoint import write_whole

SEEDS = {"train": 21, "held_out": 22, "scenes": 23}  # of captions and scenes; others draw elsewhere


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to draw, and where to put it."""

    pretrained_model_name_or_path: str = "models/pocket-sd15"
    """folder of the pipeline that draws"""
    output_dir: Path = Path("outputs/pocket-pairs")
    """folder that receives pictures, metadata.jsonl, train.txt, held_out.txt and scenes/"""
    num_captions: int = 600
    """captions to train on"""
    num_images: int = 4
    """pictures of each of them"""
    num_held_out: int = 240
    """captions for evaluation, none of them among those to train on"""
    guidance_scale: float = 4.0
    """classifier-free guidance; 1 switches it off"""
    num_inference_steps: int = 20
    """sampling steps"""
    seed: int = 0
    """seed of the first picture of the first caption; every picture has its own"""

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError("--num_images must be at least 2: one picture makes no pair")
        ranges.check(self, "num_captions num_held_out num_inference_steps", least=1)
        ranges.check(self, "guidance_scale", least=0)
        ranges.check_seed(self, "seed")


def captions(num_train: int, num_held_out: int) -> tuple[list[str], list[str]]:
    """Captions to train on and others for evaluation, the six tasks in turn, each once."""
    held_out = _distinct(num_held_out, SEEDS["held_out"], set())
    return _distinct(num_train, SEEDS["train"], set(held_out)), held_out


def _distinct(count: int, seed: int, without: set[str]) -> list[str]:
    """The first captions of an endless list that are new; tasks that run out are left behind."""
    found: dict[str, None] = {}
    drawn = scenes.evaluation_captions(40 * count + 400, seed)
    for text in drawn:
        if text not in without:
            found.setdefault(text)
        if len(found) == count:
            break
    return list(found)


def main(args: Args) -> None:
    """Draws, ranks and writes; a folder that is complete is left as it is."""
    folder = args.output_dir
    if (folder / "metadata.jsonl").is_file():
        print(f"{folder} holds pairs already: nothing to do")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} is not empty; remove it, or choose another folder")
    write_whole(folder, partial(_make, args))
    with (folder / "metadata.jsonl").open() as file:
        scores = [score for line in file for score in json.loads(line)["scores"]]
    mean = sum(scores) / len(scores)
    print(f"{len(scores)} pictures of {args.num_captions} captions in {folder}, mean {mean:.3f}")


def _make(args: Args, folder: Path) -> None:
    """Draws, ranks and writes into an empty folder."""
    train, held_out = captions(args.num_captions, args.num_held_out)
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEEDS["scenes"])
    rows = []
    for i, caption in enumerate(train):
        picture = scenes.draw(scenes.realise(scenes.parse(caption), draw))
        Image.fromarray(picture).save(folder / "scenes" / f"{i:04d}.png")
        rows.append({"file_name": f"{i:04d}.png", "text": caption})
    _write_rows(folder / "scenes" / "metadata.jsonl", rows)
    for name, some in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in some))

    bars.leave_out_others()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = loaded.pipeline(
        args.pretrained_model_name_or_path, flag="--pretrained_model_name_or_path"
    ).to(device)
    repeated = [caption for caption in train for _ in range(args.num_images)]
    drawn = score.generate(
        pipeline,
        repeated,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        max_sequence_length=None,
        seed=args.seed,
    )
    scores = verifier.score(drawn, repeated, strict=False).tolist()
    rows = []
    for i, caption in enumerate(train):
        places = range(i * args.num_images, (i + 1) * args.num_images)
        best_first = sorted(places, key=lambda place: -scores[place])
        names = [f"{i:04d}-{place - places[0]}.png" for place in best_first]
        for name, place in zip(names, best_first, strict=True):
            Image.fromarray(verifier.pictures(drawn[place][None])[0]).save(folder / name)
        ranked = [round(scores[place], 6) for place in best_first]
        rows.append({"caption": caption, "images": names, "scores": ranked})
    _write_rows(folder / "metadata.jsonl", rows)


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
