"""Makes the pocket training sets: `python -m dojo.pocket.datasets --set NAME`.

`hearts`: pictures of a shape that the pocket base was never trained on, with captions of the
grammar; the repository ships it. `framed`: scenes of all six tasks in a style that the base never
saw. What the base does know (shapes, colours, sizes, counts, places) should carry over to both.
`careless`: scenes whose captions are wrong now and then, as those of the web are. A base that has
learned from them can draw what a caption says and does so only now and then: it is what
reinforcement learning is for. `careless_compositional`: the same of captions with up to four
objects.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from dojo import cli
from dojo.cli import UserError, ranges
from dojo.pocket import chinese, compositions, scenes, style
from dojo.pocket.score import shape_captions
from dojo.run.checkpoint import write_whole

if TYPE_CHECKING:
    import numpy as np

CARELESS = 0.25  # share of the careless captions that belong to another scene of the same task
SEED = 7  # not that of the captions that `dojo.pocket.score` and `dojo.pocket.proof` draw


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which set, where it goes and how large it is."""

    set: Literal["hearts", "framed", "careless", "careless_compositional"] = "hearts"
    """hearts: a new shape; framed: scenes in a new style; careless: scenes of which a quarter have
    another's caption; careless_compositional: the same of captions with up to four objects"""
    output_dir: Path | None = None
    """folder of the pictures and metadata.jsonl; unset is datas/pocket-hearts, or of the other sets
    outputs/pocket-NAME"""
    language: Literal["english", "chinese"] = "english"
    """of the captions; the pictures are the same"""
    count: int = 64
    """pictures"""

    def __post_init__(self) -> None:
        ranges.check(self, "count", least=1)


def hearts(count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Captions about hearts and their pictures."""
    draw = random.Random(SEED)
    for caption in shape_captions("heart", count, SEED):
        yield caption, scenes.draw(scenes.realise(scenes.parse(caption), draw))


def framed(count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Captions of the six tasks in turn and their pictures in the style."""
    draw = random.Random(SEED)
    for i in range(count):
        yield style.sample(draw, scenes.TASKS[i % len(scenes.TASKS)])


def careless(count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Captions of the six tasks in turn and their scenes, or others of the same task."""

    def spec(draw: random.Random, i: int) -> scenes.Spec:
        return scenes.random_spec(draw, scenes.TASKS[i % len(scenes.TASKS)])

    return _careless(count, spec)


def careless_compositional(count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Captions of one to four objects in turn and their scenes, or others of as many."""

    def spec(draw: random.Random, i: int) -> scenes.Spec:
        return compositions.random_spec(draw, i % compositions.MOST + 1)

    return _careless(count, spec)


def _careless(
    count: int, spec_of: Callable[[random.Random, int], scenes.Spec]
) -> Iterator[tuple[str, np.ndarray]]:
    draw = random.Random(SEED)
    for i in range(count):
        spec = spec_of(draw, i)
        scene = scenes.realise(spec, draw)
        if draw.random() < CARELESS:
            scene = scenes.realise(spec_of(draw, i), draw)
        yield scenes.caption(spec), scenes.draw(scene)


SETS = {
    "hearts": hearts,
    "framed": framed,
    "careless": careless,
    "careless_compositional": careless_compositional,
}


def main(args: Args) -> None:
    """Draws the pictures and writes them beside their captions."""
    shipped = "datas" if args.set == "hearts" else "outputs"
    folder = args.output_dir or Path(shipped) / f"pocket-{args.set}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} is not empty; remove it, or choose another folder")

    def write(inside: Path) -> None:
        rows = []
        for i, (caption, picture) in enumerate(SETS[args.set](args.count)):
            caption = chinese.translated(caption) if args.language == "chinese" else caption
            file = f"{i:03d}.png"
            Image.fromarray(picture).save(inside / file, optimize=True)
            rows.append(json.dumps({"file_name": file, "text": caption}, ensure_ascii=False))
        (inside / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    write_whole(folder, write)
    print(f"{args.count} pictures in {folder}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
