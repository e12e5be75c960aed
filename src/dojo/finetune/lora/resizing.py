"""Writes a LoRA of a smaller rank, the best there is by singular values; of LoHa and LoKr too.

    python -m dojo.lora resize --input big.safetensors --output small.safetensors --rank 8
    python -m dojo.lora resize --input big.safetensors --output small.safetensors --rank 32 \
        --dynamic 0.95

alpha / rank stays what it was in every layer, so that strengths mean what they meant. No layer gets
more ranks than it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.finetune.lora import algebra, bases, formats, reading
from dojo.finetune.lora.files import find, together
from dojo.finetune.lora.layers import is_dora
from dojo.finetune.lora.placing import check_lost
from dojo.lazy import torch

if TYPE_CHECKING:
    from dojo.finetune.lora.layers import Lora


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to resize, and to what."""

    input: str
    """LoRA, LoHa or LoKr: file, folder or hub id of any public trainer"""
    output: Path
    """the .safetensors file to write"""
    rank: int
    """the most ranks that a layer may have"""
    dynamic: float | None = None
    """give each layer only as many ranks as keep this share of its squared norm, such as 0.95"""
    base: str | None = None
    """what it is for: a family (a wrong one is told which there are), or a model's folder;
    unset: told by the file"""
    lora_format: formats.Format = "diffusers"
    """its format"""
    overwrite: bool = False
    """replace the output if it is there"""

    def __post_init__(self) -> None:
        if self.output.suffix != ".safetensors":
            raise ValueError("--output must end in .safetensors")
        if self.rank < 1:
            raise ValueError("--rank must be at least 1")
        if self.dynamic is not None and not 0 < self.dynamic <= 1:
            raise ValueError("--dynamic must lie in (0, 1]")


def main(args: Args) -> None:
    """Reads, resizes, writes, and says what is lost."""
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output: {args.output} is there already (--overwrite replaces it)")
    where = f"--input: {args.input}"
    file = reading.read_any(find(args.input, "--input"), where)
    check_lost(together({}, file.lora, file.kin), file.lost, where)
    if any(map(is_dora, file.lora.values())):
        raise UserError(f"{where} is a DoRA, whose norms no smaller rank keeps")
    lora: Lora = {}
    shares: list[float] = []
    for part, layers in file.lora.items():
        for name, factors in layers.items():
            smaller, share = algebra.resized(factors, args.rank, args.dynamic)
            lora.setdefault(part, {})[name] = smaller
            shares.append(share)
    for part, updates in file.kin.items():
        for name, update in updates.items():
            shape = update.delta().shape
            smaller, share = algebra.factored(update, shape, args.rank, args.dynamic)
            lora.setdefault(part, {})[name] = smaller
            shares.append(share)
    base = bases.chosen(args.base, lora, file.metadata)[0]
    formats.write(args.output, lora, args.lora_format, base)
    ranks = [factors.rank for layers in lora.values() for factors in layers.values()]
    kept = torch.tensor(shares)
    print(
        f"{args.output}: {len(ranks)} layers of rank {min(ranks)} to {max(ranks)}; kept of the "
        f"squared norms: {100 * kept.min():.1f} % at least, {100 * kept.mean():.1f} % on average"
    )
