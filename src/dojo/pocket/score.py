"""How often a model draws what the caption says: `python -m dojo.pocket.score`.

Draws pictures of captions of the pocket grammar with any pipeline folder, with and without LoRA,
and lets the verifier judge: the six tasks of GenEval in small, captions of up to four objects (in
the manner of GenEval2), or a shape that the base never saw.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dojo import bars, cli, files
from dojo.bars import Bar
from dojo.cli import ranges
from dojo.finetune import lora
from dojo.lazy import no_grad, torch
from dojo.models import loaded
from dojo.pocket import atoms, compositions, scenes, verifier

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to score."""

    pretrained_model_name_or_path: str = "models/pocket-sd3"
    """folder of the pipeline"""
    lora_weights_path: str | None = None
    """score with this LoRA too, beside the base"""
    shape: str | None = None
    """captions about this shape only (heart is new to the base); unset is the six tasks"""
    compositional: bool = False
    """captions of one to four objects in up to two noun phrases, judged by their atoms too"""
    num_captions: int = 96
    """captions, one picture each"""
    guidance_scale: float = 4.0
    """classifier-free guidance; 1 switches it off"""
    num_inference_steps: int = 20
    """sampling steps"""
    max_sequence_length: int = 24
    """tokens of T5, where the model has one"""
    seed: int = 0
    """seed of captions and pictures"""
    output: Path | None = None
    """JSON file for the scores"""

    def __post_init__(self) -> None:
        ranges.check(self, "num_captions num_inference_steps max_sequence_length", least=1)
        ranges.check(self, "guidance_scale", least=0)
        ranges.check_seed(self, "seed")
        if self.compositional and self.shape:
            raise ValueError("--compositional and --shape ask for different captions: give one")

    def captions(self) -> list[str]:
        """What is asked for."""
        if self.compositional:
            return compositions.captions(self.num_captions, self.seed)
        if self.shape:
            return shape_captions(self.shape, self.num_captions, self.seed)
        return scenes.evaluation_captions(self.num_captions, self.seed)


def shape_captions(shape: str, count: int, seed: int) -> list[str]:
    """Captions about one shape: alone, coloured, counted or placed."""
    draw = random.Random(seed)
    captions: list[str] = []
    while len(captions) < count:
        task = ("single_object", "colors", "counting", "position")[len(captions) % 4]
        spec = scenes.random_spec(draw, task, shapes=(shape,))
        if len(spec.parts) == 1:
            captions.append(scenes.caption(spec))
    return captions


@no_grad
def generate(
    pipeline: Any,
    captions: Sequence[str],
    *,
    guidance_scale: float,
    num_inference_steps: int,
    max_sequence_length: int | None,
    seed: int,
    batch_size: int = 50,
    **options: Any,
) -> Tensor:
    """One picture per caption, each from its own seed: float32 [B, 3, 64, 64] in [0, 1].

    Args:
        max_sequence_length: tokens of T5; None for a pipeline that has no such option.
        options: further options of the pipeline's call, the same for every picture.
    """
    pipeline.set_progress_bar_config(disable=True)
    size = scenes.CANVAS
    t5 = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    pictures = []
    for start in Bar(range(0, len(captions), batch_size), desc="drawing", leave=False):
        some = list(captions[start : start + batch_size])
        output = pipeline(
            some,
            height=size,
            width=size,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            **t5,
            **options,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(some))],
            output_type="pt",
        )
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures)


def judged(pictures: Tensor, captions: Sequence[str], *, by_atoms: bool) -> dict[str, float]:
    """The rows of the table: the strict scores by task, and the means over all captions."""
    graded = verifier.score(pictures, captions, strict=False).mean().item()
    if not by_atoms:
        return {**verifier.task_scores(pictures, captions), "graded": graded}
    strict = verifier.score(pictures, captions, strict=True)
    numbers = torch.tensor([scenes.parse(caption).num_objects for caption in captions])
    rows = {
        f"{count} object{'s' * (count > 1)}": strict[numbers == count].mean().item()
        for count in sorted(set(numbers.tolist()))
    }
    rows |= {"all": strict.mean().item(), "graded": graded}
    for kind in get_args(atoms.Mean):
        rows[f"atoms, {kind} mean"] = atoms.score(pictures, captions, kind).mean().item()
    return rows


_HEAD = '{\n "base": {'  # how the file begins


def main(args: Args) -> None:
    """Prints the scores as a table, base against LoRA."""
    if args.output is not None:
        files.check_output(args.output, "--output", is_ours=lambda text: text.startswith(_HEAD))
    captions = args.captions()
    bars.leave_out_others()
    pipeline = loaded.pipeline(
        args.pretrained_model_name_or_path, flag="--pretrained_model_name_or_path"
    )
    has_t5 = "text_encoder_3" in pipeline.components
    tokens = args.max_sequence_length if has_t5 else None
    columns = {"base": None, "LoRA": args.lora_weights_path}
    scores: dict[str, dict[str, float]] = {}
    for name, weights in columns.items():
        if name == "LoRA":
            if weights is None:
                continue
            lora.load(pipeline, weights, "tuned")
        pictures = generate(
            pipeline,
            captions,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            max_sequence_length=tokens,
            seed=args.seed,
        )
        scores[name] = judged(pictures, captions, by_atoms=args.compositional)
    print(f"{'strict score by task':24}" + "".join(f"{name:>8}" for name in scores))
    for task in next(iter(scores.values())):
        print(f"{task:24}" + "".join(f"{column[task]:8.2f}" for column in scores.values()))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(scores, indent=1))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
