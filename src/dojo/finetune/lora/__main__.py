"""Converts LoRA files of SD3 and SD1, exactly, between the formats of diffusers, kohya and ComfyUI.

    python -m dojo.lora convert --input outputs/hearts --output hearts.safetensors \
        --lora_format kohya
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from dojo import cli
from dojo.cli import UserError
from dojo.finetune.lora import formats, reading
from dojo.finetune.lora.files import find
from dojo.finetune.lora.placing import check_lost


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to convert, and into what."""

    input: str
    """LoRA file, folder or hub id of any public trainer"""
    output: Path
    """the .safetensors file to write"""
    lora_format: formats.Format
    """its format"""
    partial: bool = False
    """leave out layers that cannot be taken over as they were meant (LoHa, LoKr, whole
    differences, a missing half) in place of refusing the file"""
    overwrite: bool = False
    """replace the output if it is there"""

    def __post_init__(self) -> None:
        if self.output.suffix != ".safetensors":
            raise ValueError("--output must end in .safetensors")


def main(args: Args) -> None:
    """Reads, converts, writes, and says what was left out."""
    if args.output.is_dir():
        raise UserError(f"--output: {args.output} is a folder; name a file in it")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output: {args.output} is there already (--overwrite replaces it)")
    source = find(args.input, "--input")
    where = f"--input: {args.input}"
    adapters, lost = reading.read(source, where, partial=args.partial)
    if not args.partial:
        check_lost(adapters, lost, where)
    elif not adapters:
        raise UserError(f"{where} has no layer of Stable Diffusion 3 or 1")
    formats.write(args.output, adapters, args.lora_format)
    for name in lost:
        print(f"left out: {name}")
    layers = {part: len(there) for part, there in adapters.items()}
    print(f"{args.output}: {layers} layers in {args.lora_format}'s format")


def command() -> None:
    """The command line: what it does stands before its options, by name."""
    if sys.argv[1:2] == ["convert"]:
        del sys.argv[1]
    cli.run(main, Args, __doc__)


if __name__ == "__main__":
    command()
