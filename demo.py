"""Pictures from any Stable Diffusion folder or hub id, with or without LoRA, before and after.

    python demo.py --pretrained_model_name_or_path models/pocket-sd3 --prompt "a red star"
    python demo.py --pretrained_model_name_or_path models/pocket-sd3 --compare \
        --lora_weights_path outputs/quickstart --prompt "a red heart" "two hearts"

Every picture has its own seed (`--seed`, `--seed` + 1, ...), so a picture does not depend on which
others are drawn with it; `prompts.json` beside the pictures says what made each.
"""

from __future__ import annotations

import inspect
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tqdm import tqdm

from dojo import cli, inference, lora
from dojo.cli import UserError
from dojo.pictures import labelled_grid, slug
from dojo.prompts import read_file

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to draw, with which model."""

    pretrained_model_name_or_path: str
    """folder or hub id of a text-to-image pipeline, or one .safetensors file of SD3"""
    single_file_config: str | None = None
    """folder or hub id with the configurations and tokenizers that a single file lacks"""
    prompt: tuple[str, ...] = ()
    """one or more prompts"""
    prompt_file: Path | None = None
    """more prompts: .txt with one per line, or .jsonl or .csv with a column prompt (or text)"""
    negative_prompt: str | None = None
    """what the pictures should not show"""
    lora_weights_path: tuple[str, ...] = ()
    """LoRA files, folders or hub ids, all active at once; those of SD3 also in kohya's or ComfyUI's
    form"""
    lora_scale: tuple[float, ...] = (1.0,)
    """strength of each LoRA, or one for all"""
    compare: bool = False
    """also draw without LoRA and lay both side by side in compare.png"""
    height: int | None = None
    """height in pixels; unset is the model's native size"""
    width: int | None = None
    """width in pixels; unset is the model's native size"""
    guidance_scale: float = 5.0
    """classifier-free guidance; 1 switches it off"""
    num_inference_steps: int = 28
    """sampling steps"""
    num_images_per_prompt: int = 1
    """pictures per prompt"""
    max_sequence_length: int | None = None
    """tokens of T5 (SD3); unset is the pipeline's 256; use what was trained with"""
    uncond: Literal["empty_string", "zeros"] = "empty_string"
    """what guidance takes for no prompt (SD3): the embeddings of "", or zeros; use what was trained
    with"""
    t5_padding: Literal["unmodified", "zero"] = "unmodified"
    """T5's rows of padding (SD3): as they come, or zeros; use what was trained with"""
    skip_guidance_layers: tuple[int, ...] = ()
    """layers for skip-layer guidance (SD3.5-Medium: 7 8 9)"""
    skip_layer_guidance_scale: float = 2.8
    """strength of skip-layer guidance"""
    skip_layer_guidance_start: float = 0.01
    """fraction of the steps at which skip-layer guidance begins"""
    skip_layer_guidance_stop: float = 0.2
    """fraction of the steps at which skip-layer guidance ends"""
    seed: int | None = None
    """seed of the first picture of each prompt; unset is drawn and written to prompts.json"""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """precision; auto is bf16 on CUDA, fp16 on MPS, fp32 on a CPU"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """where to compute"""
    offload: Literal["none", "model", "sequential"] = "none"
    """keep parts of the model in CPU memory while they are not needed (CUDA)"""
    output_dir: Path = Path("outputs/demo")
    """folder of the pictures"""

    def __post_init__(self) -> None:
        if not self.prompt and self.prompt_file is None:
            raise ValueError("give --prompt or --prompt_file")
        if len(self.lora_scale) not in (1, len(self.lora_weights_path)):
            raise ValueError("--lora_scale takes one number, or one for each --lora_weights_path")
        if self.compare and not self.lora_weights_path:
            raise ValueError("--compare needs --lora_weights_path")
        if self.num_images_per_prompt < 1 or self.num_inference_steps < 1:
            raise ValueError("--num_images_per_prompt and --num_inference_steps: at least 1")


def main(args: Args) -> None:
    """Draws every prompt and writes pictures, prompts.json and, to compare, a grid."""
    in_file = read_file(args.prompt_file, "--prompt_file") if args.prompt_file else []
    prompts = [*args.prompt, *(prompt.text for prompt in in_file)]
    device = choose_device(args)
    auto = {"cuda": torch.bfloat16, "mps": torch.float16}.get(device.type, torch.float32)
    pipeline = inference.load_pipeline(
        args.pretrained_model_name_or_path, DTYPES.get(args.dtype, auto), args.single_file_config
    )
    names = [f"lora{i}" for i in range(len(args.lora_weights_path))]
    base_scheduler, tuned_scheduler = pipeline.scheduler, pipeline.scheduler
    for name, path in zip(names, args.lora_weights_path, strict=True):
        arrived = lora.load(pipeline, path, name)
        print(f"{path}: {arrived} tensors")
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if (folder / "scheduler").is_dir():  # the shift that it was trained with
            tuned_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
                folder, subfolder="scheduler"
            )
    if args.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif args.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)

    seed = secrets.randbits(31) if args.seed is None else args.seed
    seeds = [seed + k for k in range(args.num_images_per_prompt)]
    scales = args.lora_scale * (len(names) if len(args.lora_scale) == 1 else 1)
    rows: list[list[Image.Image]] = []
    records: list[dict[str, Any]] = []
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(tqdm(prompts, desc="prompts")):
        columns: list[list[Image.Image]] = []
        if args.compare:
            pipeline.scheduler = base_scheduler
            pipeline.disable_lora()
            columns.append(draw(pipeline, args, prompt, seeds))
            pipeline.enable_lora()
        if names:
            pipeline.set_adapters(names, list(scales))
        pipeline.scheduler = tuned_scheduler
        columns.append(draw(pipeline, args, prompt, seeds))
        for k, picture in enumerate(columns[-1]):
            file = f"{i:04d}-{slug(prompt)}-seed{seeds[k]}.png"
            picture.save(args.output_dir / file)
            records.append({"file": file, "prompt": prompt, "seed": seeds[k]})
            rows.append([column[k] for column in columns])
    options = {name: str(value) for name, value in vars(args).items() if value not in (None, ())}
    summary = json.dumps({"options": options, "pictures": records}, indent=1, ensure_ascii=False)
    (args.output_dir / "prompts.json").write_text(summary, encoding="utf-8")
    if args.compare:
        labels = [f"{record['prompt']} (seed {record['seed']})" for record in records]
        grid = labelled_grid(rows, row_labels=labels, column_labels=["before", "after"])
        grid.save(args.output_dir / "compare.png")
    print(f"{len(records)} pictures in {args.output_dir}")


def draw(pipeline: Any, args: Args, prompt: str, seeds: list[int]) -> list[Image.Image]:
    """One picture per seed."""
    options: dict[str, Any] = {"height": args.height, "width": args.width}
    optional = {
        "max_sequence_length": args.max_sequence_length,
        "negative_prompt": args.negative_prompt,
    }
    if args.skip_guidance_layers:
        blocks = getattr(getattr(pipeline, "transformer", None), "transformer_blocks", ())
        if blocks and max(args.skip_guidance_layers) >= len(blocks):
            raise UserError(f"--skip_guidance_layers: the model has layers 0 to {len(blocks) - 1}")
        optional["skip_guidance_layers"] = list(args.skip_guidance_layers)
        for name in ("scale", "start", "stop"):
            option = f"skip_layer_guidance_{name}"
            optional[option] = getattr(args, option)
    accepted = inspect.signature(pipeline.__call__).parameters
    texts: dict[str, Any] = {"prompt": prompt}
    if args.uncond == "zeros" or args.t5_padding == "zero":
        found = inference.embeddings(
            *(pipeline, prompt, args.negative_prompt or ""),
            max_sequence_length=args.max_sequence_length or 256,
            uncond=args.uncond,
            t5_padding=args.t5_padding,
        )
        # The pipeline repeats prompts, not embeddings.
        texts = {name: value.repeat_interleave(len(seeds), 0) for name, value in found.items()}
        optional["negative_prompt"] = None
    for name, value in optional.items():
        if value is not None and name not in accepted:
            raise UserError(f"--{name}: {type(pipeline).__name__} has no such option")
        if value is not None:
            options[name] = value
    try:
        return pipeline(
            **texts,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            num_images_per_prompt=len(seeds) if "prompt" in texts else 1,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **options,
        ).images
    except ValueError as error:  # a size or length that the model does not take
        raise UserError(str(error).strip().splitlines()[0]) from error


def choose_device(args: Args) -> torch.device:
    """The named device, or the best that there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = args.device
    if name == "auto":
        name = next((kind for kind, usable in there.items() if usable), "cpu")
    elif not there.get(name, True):
        raise UserError(f"--device {name}: this machine has none")
    if args.offload != "none" and name != "cuda":
        raise UserError(f"--offload {args.offload} needs a CUDA device")
    return torch.device(name)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
