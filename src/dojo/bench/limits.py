"""What a training step must compute, and how many pictures per second that allows at most."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dojo.bench import models
from dojo.bench.table import markdown
from dojo.cli import ranges
from dojo.finetune import lora, whole
from dojo.lazy import torch

if TYPE_CHECKING:
    from dojo.models import family
    from dojo.run.cost import Cost

Method = Literal["lora", "full"]

# TFLOP per picture by a rule of thumb, worked out apart from this code: with a forward pass of L in
# convolutions and linear layers and A in attention, LoRA takes 2L + 3A (its own few not counted),
# with checkpointing 3L + 4A, full 3L + 3A, with checkpointing 4L + 4A, in this order, by (pixels,
# T5 tokens). Of a UNet, three things that are not so little are taken off: with LoRA what lies
# before the first adapter (E), which needs no gradient and is not computed twice, and with
# checkpointing what lies outside of what is checkpointed (S: layers between the blocks and
# projections round the transformers) and the last layer of each checkpointed piece (T), where
# PyTorch stops computing it again: 2L + 3A - E, 3L + 4A - S - T - 2E, 3L + 3A, 4L + 4A - S - T.
# L + A, E, S and T are for SD1.5 at 512 px 0.677 + 0.126, 0.016, 0.099, 0.099, for SDXL at 1024 px
# 5.98 + 0.784, 0.179, 0.331, 1.126.
BY_RULE: dict[str, dict[tuple[int, int | None], tuple[float, float, float, float]]] = {
    "sd35-medium": {
        (512, 77): (4.56, 6.70, 6.41, 8.55),
        (512, 256): (5.24, 7.68, 7.33, 9.77),
        (1024, 77): (25.6, 36.4, 32.3, 43.1),
        (1024, 256): (26.7, 38.0, 33.8, 45.0),
    },
    "sd15": {(512, None): (1.717, 2.305, 2.410, 3.014), (1024, None): (11.26, 15.07, 14.02, 17.90)},
    "sdxl": {(512, None): (3.188, 4.368, 4.766, 5.991), (1024, None): (14.13, 19.25, 20.28, 25.59)},
}


@dataclass(frozen=True, kw_only=True)
class LimitArgs:
    """Pictures per second that a machine's arithmetic allows, from counted operations alone."""

    model: models.Size = "sd35-medium"
    """whose sizes"""
    resolution: tuple[int, ...] = (512, 1024)
    """height and width of the pictures in pixels"""
    max_sequence_length: tuple[int, ...] = ()
    """tokens of T5, where there is one; unset is 77 and 256; CLIP has 77 more"""
    rank: int = 16
    """rank of the LoRA"""
    tflops: float = 790.0
    """TFLOP/s that large matrix products reach; the default is 80 % of the 989 dense bf16 TFLOP/s
    in the data sheets of H100 and H200"""

    def __post_init__(self) -> None:
        ranges.check(self, "resolution max_sequence_length rank", least=1)
        ranges.check(self, "tflops", above=0)
        if self.max_sequence_length and not models.has_option(self.model, "max_sequence_length"):
            raise ValueError(f"--max_sequence_length: {self.model} has no T5")

    @property
    def tokens(self) -> tuple[int | None, ...]:
        """Tokens of T5, or one None where there is none."""
        if not models.has_option(self.model, "max_sequence_length"):
            return (None,)
        return self.max_sequence_length or (77, 256)


def cost_per_image(
    config: family.Model,
    model: family.ModelArgs,
    adapter: lora.LoraArgs | whole.FullArgs,
    height: int,
    width: int,
) -> Cost:
    """Of forward and backward pass for one picture, recomputation included."""
    add = (
        partial(lora.add, args=adapter)
        if isinstance(adapter, lora.LoraArgs)
        else partial(whole.thaw, args=adapter)
    )
    shape = config.latent_shape(height, width)
    checkpointing = model.gradient_checkpointing
    _, cost = config.training_cost(torch.bfloat16, add, 1, shape, checkpointing=checkpointing)
    return cost


def by_rule(
    model: str, method: Method, checkpointing: bool, size: int, tokens: int | None
) -> float | None:
    """TFLOP per picture by the rule, where it was worked out."""
    found = BY_RULE.get(model, {}).get((size, tokens))
    return None if found is None else found[2 * (method == "full") + checkpointing]


def main(args: LimitArgs) -> None:
    """Prints the table."""
    print(markdown(list(_rows(args))))


def _rows(args: LimitArgs) -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / args.model
        models.write_settings(folder, args.model)
        for size in args.resolution:
            for tokens in args.tokens:
                yield from _cases(args, folder, size, tokens)


def _cases(
    args: LimitArgs, folder: Path, size: int, tokens: int | None
) -> Iterator[dict[str, str]]:
    methods: dict[Method, lora.LoraArgs | whole.FullArgs] = {
        "lora": lora.LoraArgs(rank=args.rank),
        "full": whole.FullArgs(),
    }
    door = models.FAMILIES[args.model]
    for method, adapter in methods.items():
        for checkpointing in (False, True):
            model = door.ModelArgs(
                pretrained_model_name_or_path=str(folder),
                gradient_checkpointing=checkpointing,
                **({} if tokens is None else {"max_sequence_length": tokens}),
            )
            flops = cost_per_image(door.open_model(model), model, adapter, size, size).flops
            other = by_rule(args.model, method, checkpointing, size, tokens)
            yield {
                "model": args.model,
                "method": f"LoRA r{args.rank}" if method == "lora" else "full",
                "px": str(size),
                "T5 tokens": str(tokens or ""),
                "checkpointing": "yes" if checkpointing else "no",
                "TFLOP/image": f"{flops / 1e12:.4g}",
                "by rule": f"{other:.4g}" if other else "",
                f"images/s at {args.tflops:g} TFLOP/s": f"{args.tflops * 1e12 / flops:.1f}",
            }
