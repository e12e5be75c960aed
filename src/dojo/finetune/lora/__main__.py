"""Converts LoRA files, exactly, between the formats of diffusers, kohya and ComfyUI.

    python -m dojo.lora convert --input outputs/hearts --output hearts.safetensors \
        --lora_format kohya

Beside convert there are merge (into a model, or several into one), resize (to a smaller rank) and
info (what a file is): `python -m dojo.lora merge --help` and so on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dojo import cli
from dojo.cli import UserError
from dojo.finetune.lora import bases, formats, info, merging, reading, resizing
from dojo.finetune.lora.files import find
from dojo.finetune.lora.placing import check_lost
from dojo.models.folders import UNET
from dojo.models.keys import Blocks


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to convert, and into what."""

    input: str
    """LoRA file, folder or hub id of any public trainer"""
    output: Path
    """the .safetensors file to write"""
    lora_format: formats.Format
    """its format"""
    base: str | None = None
    """what it is for: a family (a wrong one is told which there are), or a model's folder;
    unset: told by the file (header, text encoders, widths)"""
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
    file = reading.read_any(
        source, where, partial=args.partial, blocks=_blocks(args.base), kin=False
    )
    adapters, lost = file.lora, file.lost
    if not args.partial:
        check_lost(adapters, lost, where)
    elif not adapters:
        raise UserError(f"{where} has no layer of a Stable Diffusion")
    base, reason = bases.chosen(args.base, adapters, file.metadata)
    formats.write(args.output, adapters, args.lora_format, base)
    for name in lost:
        print(f"left out: {name}")
    layers = {part: len(there) for part, there in adapters.items()}
    print(f"{args.output}: {layers} layers in {args.lora_format}'s format")
    if args.lora_format != "diffusers" and base.has_unet:
        print(f"written for {base.family}: {reason} (--base says otherwise)")


def _blocks(base: str | None) -> Blocks | None:
    """How the UNet of a model's folder is built."""
    path = Path(base or "") / UNET / "config.json"
    return Blocks.of(json.loads(path.read_text())) if base and path.is_file() else None


COMMANDS: dict[str, Any] = {"merge": merging, "resize": resizing, "info": info}


def command() -> None:
    """The command line: what it does stands before its options, by name."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        del sys.argv[1]
        module = COMMANDS[name]
        cli.run(module.main, module.Args, module.__doc__)
        return
    if name == "convert":
        del sys.argv[1]
    cli.run(main, Args, __doc__)


if __name__ == "__main__":
    command()
