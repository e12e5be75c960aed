"""Makes the pocket training sets that the repository ships: `python -m dojo.pocket.datasets`.

`hearts`: pictures of a shape that the pocket base was never trained on, with captions of the
grammar. What the base does know (colours, sizes, counts, places) should carry over.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dojo import cli
from dojo.pocket import scenes
from dojo.pocket.score import shape_captions

SEED = 7  # not that of the captions that `dojo.pocket.score` draws


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the set goes and how large it is."""

    output_dir: Path = Path("datas/pocket-hearts")
    """folder of the pictures and metadata.jsonl"""
    count: int = 64
    """pictures"""


def main(args: Args) -> None:
    """Draws the pictures and writes them beside their captions."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEED)
    rows = []
    for i, caption in enumerate(shape_captions("heart", args.count, SEED)):
        picture = scenes.draw(scenes.realise(scenes.parse(caption), draw))
        file = f"{i:03d}.png"
        Image.fromarray(picture).save(args.output_dir / file, optimize=True)
        rows.append(json.dumps({"file_name": file, "text": caption}))
    (args.output_dir / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    print(f"{len(rows)} pictures in {args.output_dir}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
