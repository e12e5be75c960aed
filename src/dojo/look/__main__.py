"""A look at the training pictures before anything is trained.

    python -m dojo.look datas/dog --resolution 512 --aspect_buckets

The options of the data are those of the scripts. What is written: look.html (every picture as it
will be cut, with its captions and what is wrong with it), look.txt (what the screen says) and
look.jsonl (everything that was found). Nothing in the data is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dojo import cli, data
from dojo.cli import ranges
from dojo.cli.words import first_word_as


@dataclass(frozen=True, kw_only=True)
class LookArgs:
    """What is looked for, and what is shown."""

    output_dir: Path = cli.option(Path("outputs/look"), common=True)
    """folder of look.html, look.txt and look.jsonl"""
    pretrained_model_name_or_path: str | None = cli.option(None, common=True)
    """model that will be trained: its tokenizers count the captions' tokens and its step decides
    which sizes there are. Unset: CLIP's tokenizer with 77 tokens, and steps of 16 px"""
    near_bits: int = cli.option(48, common=True)
    """bits of 256 that the perceptual hashes of two pictures may differ in that are told as nearly
    the same; 0 compares none. Of photographs of different things 90 and more differ"""
    max_shown: int = cli.option(2000, common=True)
    """pictures on the page; of more, so many from all over the set. About 10 kB each"""
    thumbnail: int = 192
    """pixels of the longer side of a picture on the page"""
    seed: int = 0
    """of the crop and the mirroring that are shown, where they are random"""

    def __post_init__(self) -> None:
        ranges.check(self, "near_bits", least=0, most=128)
        ranges.check(self, "max_shown", least=1)
        ranges.check(self, "thumbnail", least=16, most=1024)
        ranges.check_seed(self, "seed")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group."""

    data: data.DataArgs
    look: LookArgs = field(default_factory=LookArgs)


def main(args: Args) -> None:
    """Looks, writes, and says what was found."""
    from dojo.inputs.pictures import refuse_inside
    from dojo.look import page, survey

    wanted = args.look
    refuse_inside(wanted.output_dir, args.data.location, "output_dir")
    readers, step = _model(wanted.pretrained_model_name_or_path)
    samples = survey.open_samples(args.data)
    found = survey.survey(samples, args.data, readers, step=step, near=wanted.near_bits)
    draws = page.Draws(found, args.data, data.CaptionArgs(), wanted.seed)
    lines = page.write(
        *(found, draws, wanted.output_dir, args.data.location),
        most=wanted.max_shown,
        side=wanted.thumbnail,
    )
    print("\n".join(lines), flush=True)
    print(f"page: {wanted.output_dir / page.PAGE_NAME}", flush=True)


_STEP = 16  # px: that of SD3; the UNets' is 8


def _model(name: str | None) -> tuple[list[Any], int]:
    """The tokenizers that read captions, and the step of the sizes in pixels."""
    from dojo.models.truncation import Reader

    if name is None:
        return [Reader("CLIP", _Clip(), 77)], _STEP
    from dojo.models.family import ModelArgs
    from dojo.models.opening import open_model

    model = open_model(ModelArgs(pretrained_model_name_or_path=name))
    return model.readers(), model.pixel_step


class _Clip:
    """CLIP's tokenizer as open_clip carries it, so that no model is needed to count tokens."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer()

    def __call__(self, texts: Sequence[str], *, verbose: bool) -> dict[str, list[list[int]]]:
        """As transformers' tokenizers, with the marks of the beginning and the end."""
        tokenizer = self.tokenizer
        begin, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        return {"input_ids": [[begin, *tokenizer.encode(text), end] for text in texts]}


if __name__ == "__main__":
    sys.argv[1:] = first_word_as("--dataset_name", sys.argv[1:])
    cli.run(main, Args, __doc__)
