"""Pictures from any Stable Diffusion folder or hub id, with or without LoRA, before and after.

    python demo.py --pretrained_model_name_or_path models/pocket-sd3 --prompt "a red star"
    python demo.py --pretrained_model_name_or_path models/pocket-sd3 --compare \
        --lora_weights_path outputs/quickstart --prompt "a red heart" "two hearts"
    python demo.py --pretrained_model_name_or_path models/pocket-sd3 --versus outputs/quickstart \
        --prompt_file prompts.txt --reward "clip[model=models/pocket-clip]"
    python demo.py --pretrained_model_name_or_path models/pocket-sd3 --web \
        --lora_weights_path outputs/quickstart

Every picture has its own seed (`--seed`, `--seed` + 1, ...), so a picture does not depend on which
others are drawn with it; `prompts.json` beside the pictures says what made each. With `--versus`
the rewards judge who draws the same prompts and seeds better: versus.csv, versus.json, versus.png.
`--web` opens a page to draw on, base and LoRA side by side.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo import cli, rewards
from dojo.bars import Bar
from dojo.cli import ranges
from dojo.cli.masking import hide
from dojo.evaluate import easel_start, pipelines, versus
from dojo.evaluate.picture import DrawArgs, draw
from dojo.evaluate.placing import PlaceArgs
from dojo.files import outputs
from dojo.files.pictures import labelled_grid
from dojo.inputs.prompts import Prompt, read_file
from dojo.lazy import torch
from dojo.rewards import RewardArgs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to draw, with which model."""

    pretrained_model_name_or_path: str
    """folder or hub id of a text-to-image pipeline, or one .safetensors file of SD3"""
    prompt: tuple[str, ...] = cli.option((), common=True)
    """one or more prompts"""
    prompt_file: Path | None = cli.option(None, common=True)
    """more prompts: .txt with one per line (behind it --n, --w, --h, --d, --s, --l as in kohya's
    sample prompts: negative prompt, width, height, seed, steps, guidance), or .json, .jsonl or .csv
    with a column prompt (or text, or caption), whose other columns go to the rewards"""
    lora_weights_path: tuple[str, ...] = cli.option((), common=True)
    """LoRA files, folders or hub ids of any public trainer, all active at once"""
    lora_scale: tuple[float, ...] = cli.option((1.0,), common=True)
    """strength of each LoRA, or one for all"""
    embeddings: tuple[str, ...] = cli.option((), common=True)
    """files of learned words (textual inversion) of any public trainer, or folders of them; the
    words are printed, and are used in the prompts"""
    compare: bool = cli.option(False, common=True)
    """also draw without LoRA and lay both side by side in compare.png"""
    versus: str | None = None
    """a tuned pipeline, or a LoRA (with the strength lora_scale), that draws the same pictures too;
    the rewards then say which one wins"""
    reward: RewardArgs = field(default_factory=RewardArgs)
    drawing: DrawArgs = field(default_factory=DrawArgs)
    num_images_per_prompt: int = cli.option(1, common=True)
    """pictures per prompt"""
    seed: int | None = cli.option(None, common=True)
    """seed of the first picture of each prompt; unset is drawn and written to prompts.json"""
    place: PlaceArgs = field(default_factory=PlaceArgs)
    output_dir: Path = cli.option(Path("outputs/demo"), common=True)
    """folder of the pictures"""
    web: bool = cli.option(False, common=True)
    """draw on a page in your browser instead, on 127.0.0.1 alone"""
    port: int = 7008
    """of that page; 0 takes a free one"""

    def __post_init__(self) -> None:
        if not self.prompt and self.prompt_file is None and not self.web:
            raise ValueError("give --prompt or --prompt_file")
        if self.web and (self.compare or self.versus is not None):
            raise ValueError("--web goes with neither --compare nor --versus")
        if self.web and self.num_images_per_prompt != 1:
            raise ValueError("--web draws one picture at a time: leave --num_images_per_prompt out")
        if not self.web and self.port != 7008:
            raise ValueError("--port is that of --web")
        if not (self.lora_weights_path or self.versus or self.web):
            ranges.check_unread(self, "lora_scale", "without --lora_weights_path")
        if len(self.lora_scale) not in (1, len(self.lora_weights_path)):
            raise ValueError("--lora_scale takes one number, or one for each --lora_weights_path")
        if self.compare and not self.lora_weights_path:
            raise ValueError("--compare needs --lora_weights_path")
        if self.versus is not None and self.lora_weights_path:
            raise ValueError("--versus takes the LoRA itself, in place of --lora_weights_path")
        if self.versus is None and self.reward != RewardArgs():
            raise ValueError("--reward and its options need --versus")
        ranges.check(self, "num_images_per_prompt", least=1)
        ranges.check(self, "port", least=0, most=65535)
        ranges.check_seed(self, "seed")


def main(args: Args) -> None:
    """Draws every prompt and writes pictures, prompts.json and, to compare, a grid."""
    if args.web:
        prompts = [prompt.text for prompt in prompts_of(args)]
        easel_start.open_page("demo.py", args, prompts, partial(load, args))
        return
    outputs.claim(args.output_dir, "pictures")
    try:
        write_pictures(args)
    finally:
        outputs.release(args.output_dir)


def write_pictures(args: Args) -> None:
    """The same in a folder that has been taken."""
    prompts = prompts_of(args)
    wishes = [args.drawing.said_with(prompt) for prompt in prompts]
    device = args.place.find_device()
    seed = secrets.randbits(31) if args.seed is None else args.seed
    seeds = [seed + k for k in range(args.num_images_per_prompt)]
    if args.versus is not None:
        match = versus.Match(args.pretrained_model_name_or_path, args.versus, device)
        opens = partial(load, args, device=device)
        options = options_of(args)
        match.run(args.output_dir, prompts, seeds, opens, args.drawing, args.reward, options)
        return
    base, loras = args.pretrained_model_name_or_path, args.lora_weights_path
    pipeline, base_scheduler, tuned_scheduler = load(args, base, loras, device)
    args.drawing.tell_cut(pipeline, prompts)

    rows: list[list[Image.Image]] = []
    records: list[dict[str, Any]] = []
    for i, prompt in enumerate(Bar(prompts, desc="prompts")):
        own = [prompt.options.get("seed", seed) + k for k in range(len(seeds))]
        columns: list[list[Image.Image]] = []
        if args.compare:
            pipeline.scheduler = base_scheduler
            pipeline.disable_lora()
            columns.append(draw(pipeline, wishes[i], prompt.text, own))
            pipeline.enable_lora()
        pipeline.scheduler = tuned_scheduler
        columns.append(draw(pipeline, wishes[i], prompt.text, own))
        for k, picture in enumerate(columns[-1]):
            file = versus.file_name(i, prompt.text, own[k])
            picture.save(outputs.own(args.output_dir / file))
            about = {"file": file, "prompt": prompt.text, "seed": own[k]}
            records.append({**prompt.metadata, **prompt.options, **about})
            rows.append([column[k] for column in columns])
    summary = {"options": options_of(args), "pictures": records}
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    outputs.own(args.output_dir / "prompts.json").write_text(text, encoding="utf-8")
    if args.compare:
        labels = [f"{record['prompt']} (seed {record['seed']})" for record in records]
        grid = labelled_grid(rows, row_labels=labels, column_labels=["before", "after"])
        grid.save(outputs.own(args.output_dir / "compare.png"))
    print(f"{len(records)} pictures in {args.output_dir}")


def prompts_of(args: Args) -> list[Prompt]:
    """Those that were given, and then those of a file."""
    prompts = [Prompt(text=text) for text in args.prompt]
    if args.prompt_file:  # pictures that are to be compared are drawn alike; a page has fields
        alike = args.web or args.versus is not None
        prompts += read_file(args.prompt_file, "--prompt_file", with_options=not alike)
    return prompts


def load(args: Args, name: str, loras: Sequence[str], device: torch.device) -> tuple[Any, Any, Any]:
    """A pipeline where it draws, its own scheduler, and the one to draw with its LoRAs by."""
    pipeline = args.place.for_loras(name, loras).load(name, device)
    own = pipeline.scheduler
    pipelines.load_embeddings(pipeline, args.embeddings)
    tuned = pipelines.load_loras(pipeline, loras, args.lora_scale)
    args.place.put(pipeline, device)
    return pipeline, own, tuned


def options_of(args: Args) -> dict[str, str]:
    """What was set, as it is written down; the rewards' options where they have a part in it."""
    options = vars(args) | vars(args.drawing) | vars(args.place) | {"drawing": None, "place": None}
    options |= vars(args.reward) if args.versus else {"reward": None}
    return {name: hide(str(value)) for name, value in options.items() if value not in (None, ())}


if __name__ == "__main__":
    cli.run(main, Args, __doc__, {"--list_rewards": rewards.table})
