"""Times training scripts beside those of diffusers' examples, on the pocket models and one CPU.

It takes the folder of a clone of diffusers and holds no code of it. Both sides train a LoRA on the
same layers of the same model with the same pictures, in float32; each is started anew in every
round, with empty caches, theirs and ours by turns, and timed by what it writes for TensorBoard,
step by step. The examples encode pictures and texts at every step and ours once, before the first:
how long the first step is waited for, from the start of the process, is told beside the speed.

    python -m dojo.bench peers --clone path/to/diffusers
    python -m dojo.bench peers --clone path/to/diffusers --cases lora_sdxl dpo_sdxl --num_rounds 5
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

from PIL import Image

from dojo import files
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, UserError, ranges
from dojo.run import checkpoint

CaseName = Literal[
    "lora_sd15", "dreambooth_lora_sd15", "dpo_sd15", "lora_sdxl", "dreambooth_lora_sdxl", "dpo_sdxl"
]
ROOT = Path(__file__).parents[3]
_LAYERS = "to_k,to_q,to_v,to_out.0"  # that all of these examples adapt
_PROMPT = "a photo of a heart"


@dataclass(frozen=True)
class Case:
    """One of our scripts and the example that does the same."""

    ours: str
    theirs: str
    """in the clone"""
    model: str
    data: Literal["captions", "instance", "pairs"]
    images: int = 1
    """that go through the network for a row of a batch"""


_EXAMPLES, _DPO = "examples", "examples/research_projects/diffusion_dpo"
CASES: dict[str, Case] = {
    "lora_sd15": Case(
        "train_lora_sd15.py",
        f"{_EXAMPLES}/text_to_image/train_text_to_image_lora.py",
        "pocket-sd15",
        "captions",
    ),
    "dreambooth_lora_sd15": Case(
        "train_dreambooth_lora_sd15.py",
        f"{_EXAMPLES}/dreambooth/train_dreambooth_lora.py",
        "pocket-sd15",
        "instance",
    ),
    "dpo_sd15": Case(
        "train_dpo_sd15.py", f"{_DPO}/train_diffusion_dpo.py", "pocket-sd15", "pairs", images=2
    ),
    "lora_sdxl": Case(
        "train_lora_sdxl.py",
        f"{_EXAMPLES}/text_to_image/train_text_to_image_lora_sdxl.py",
        "pocket-sdxl",
        "captions",
    ),
    "dreambooth_lora_sdxl": Case(
        "train_dreambooth_lora_sdxl.py",
        f"{_EXAMPLES}/dreambooth/train_dreambooth_lora_sdxl.py",
        "pocket-sdxl",
        "instance",
    ),
    "dpo_sdxl": Case(
        "train_dpo_sdxl.py",
        f"{_DPO}/train_diffusion_dpo_sdxl.py",
        "pocket-sdxl",
        "pairs",
        images=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class PeerArgs:
    """What is compared."""

    clone: Path
    """folder of a clone of huggingface/diffusers that goes with the installed version"""
    cases: tuple[CaseName, ...] = ("lora_sd15", "lora_sdxl", "dpo_sdxl")
    """which pairs of scripts"""
    batch_size: int = 8
    """pictures, or pairs of pictures, of a batch"""
    rank: int = 16
    """of the LoRA"""
    resolution: int = 64
    """height and width in pixels"""
    num_steps: int = 30
    """steps that count in every round"""
    warmup_steps: int = 5
    """steps before them that do not"""
    num_rounds: int = 3
    """starts of each script, theirs and ours by turns"""
    work_dir: Path = Path("outputs/peers")
    """folder of data, and of caches and runs for as long as they last"""
    output: Path | None = None
    """also write every number to this JSON file"""

    def __post_init__(self) -> None:
        names = "batch_size rank resolution num_steps warmup_steps num_rounds"
        ranges.check(self, names, least=1)


def main(args: PeerArgs) -> None:
    """Runs every case and prints a table of ratios.

    Raises:
        UserError: the clone, a script or a model is missing.
        TrainingStopped: a script failed; its own message stands above.
    """
    for name in args.cases:
        check(args, CASES[name])
    if args.output is not None:
        files.check_output(args.output, "--output", is_ours=lambda text: '"ratio"' in text)
    results = [compare(args, name) for name in args.cases]
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown([table_row(result) for result in results]))


def check(args: PeerArgs, case: Case) -> None:
    """
    Raises:
        UserError: naming what is missing.
    """
    needed = {args.clone / case.theirs: "--clone", ROOT / case.ours: "--cases"}
    needed[ROOT / "models" / case.model / "model_index.json"] = "--cases"
    for path, flag in needed.items():
        if not path.is_file():
            raise UserError(f"{flag}: there is no {path}")


def compare(args: PeerArgs, name: str) -> dict[str, Any]:
    """The rounds of one case: images per second of both sides, their ratio, and the seconds from
    the start of a process to the end of its first step."""
    case, work_dir = CASES[name], args.work_dir.absolute()
    data = make_data(args, case, work_dir / "datas")
    found: dict[str, list[float]] = {"theirs": [], "ours": []}
    waited: dict[str, list[float]] = {"theirs": [], "ours": []}
    for number in range(args.num_rounds):
        for side in found:
            make = our_command if side == "ours" else their_command
            # Nothing is left of a start: the next one finds no run and no cache to go on from.
            with tempfile.TemporaryDirectory(dir=work_dir, prefix="start-") as place:
                run, caches = Path(place) / "run", Path(place) / "caches"
                caches.mkdir()
                words = make(args, case, data, run, caches)
                started = start(words, f"{name}, round {number + 1}, {side}", caches)
                times = step_times(run)
            waited[side].append(times[0] - started)
            seconds = median(durations(times)[args.warmup_steps - 1 :])
            found[side].append(args.batch_size * case.images / seconds)
    return {
        "case": name,
        "theirs": case.theirs,
        "ours": case.ours,
        **{f"{side}_images_per_s": speeds for side, speeds in found.items()},
        **{f"{side}_seconds_to_first_step": seconds for side, seconds in waited.items()},
        "ratio": median(found["ours"]) / median(found["theirs"]),
        "args": {key: str(value) for key, value in asdict(args).items()},
    }


def our_command(args: PeerArgs, case: Case, data: Path, run: Path, caches: Path) -> list[str]:
    """The command line of a script of this repository."""
    values: dict[str, object] = {
        **_common(args, case, run),
        "latent_cache_dir": caches / "ours",
        "lora_layers": _LAYERS,
        "logging_steps": 1,
    }
    if case.data == "instance":
        values |= {"instance_data_dir": data, "instance_prompt": _PROMPT}
    else:
        values["dataset_name"] = data
    if case.data == "pairs":
        values |= {"finetune": "lora", "eval_fraction": 0}
    return [sys.executable, str(ROOT / case.ours), *_flags(values), "--overwrite_output_dir"]


def their_command(args: PeerArgs, case: Case, data: Path, run: Path, caches: Path) -> list[str]:
    """The command line of an example of the clone."""
    values: dict[str, object] = _common(args, case, run)
    if case.data == "instance":
        values |= {"instance_data_dir": data, "instance_prompt": _PROMPT}
    elif case.data == "captions":
        values["train_data_dir"] = data
    else:
        values |= {"dataset_name": data, "dataset_split_name": "train"}
        values["cache_dir"] = caches / "datasets"
    return [sys.executable, str(args.clone.absolute() / case.theirs), *_flags(values)]


def _common(args: PeerArgs, case: Case, run: Path) -> dict[str, object]:
    """Flags that both sides know."""
    steps = args.warmup_steps + args.num_steps + 1
    return {
        "pretrained_model_name_or_path": ROOT / "models" / case.model,
        "output_dir": run,
        "resolution": args.resolution,
        "train_batch_size": args.batch_size,
        "rank": args.rank,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "max_train_steps": steps,
        "checkpointing_steps": 10 * steps,
        "dataloader_num_workers": 0,
        "mixed_precision": "no",
        "report_to": "tensorboard",
        "seed": 0,
    }


def _flags(values: Mapping[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def start(words: Sequence[str], what: str, caches: Path) -> float:
    """Runs a script to its end, without a network; its output goes to stderr.

    Args:
        caches: an empty folder for what it keeps of the data, so that every start pays for it.
    Returns:
        When it was started, by `time.time`, which TensorBoard's writers take too.
    Raises:
        TrainingStopped: it failed.
    """
    print(f"== {what}", file=sys.stderr, flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}
    environment["HF_DATASETS_CACHE"] = str(caches / "datasets")
    started = time.time()
    code = subprocess.run(words, env=environment, stdout=2, check=False).returncode
    if code:
        raise TrainingStopped(f"{what}: {words[1]} ended with exit code {code}; see above")
    return started


def step_times(run: Path) -> list[float]:
    """When each step of a run was logged: seconds, by step.

    Raises:
        TrainingStopped: the run logged nothing.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    times: dict[int, float] = {}
    for path in sorted(run.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        tags: list[str] = events.Tags()["scalars"]
        for tag in tags:
            for event in events.Scalars(tag):
                seen: float = event.wall_time  # pyright: ignore[reportAssignmentType]
                times[event.step] = min(seen, times.get(event.step, seen))
    if not times:
        raise TrainingStopped(f"{run} holds no scalars for TensorBoard")
    return [times[step] for step in sorted(times)]


def durations(times: Sequence[float]) -> list[float]:
    """From each of some times to the next."""
    return [after - before for before, after in pairwise(times)]


def make_data(args: PeerArgs, case: Case, parent: Path) -> Path:
    """Random pictures: with captions, alone, or in pairs; four batches of them."""
    count, size = 4 * args.batch_size, args.resolution
    folder = parent / f"{case.data}-{size}px-{count}"
    if folder.is_dir():
        return folder
    draw = random.Random(0)

    def picture() -> Image.Image:
        noise = Image.frombytes("RGB", (16, 16), draw.randbytes(16 * 16 * 3))
        return noise.resize((2 * size, 2 * size))  # as photographs, larger than what is trained

    def write(partial: Path) -> None:
        if case.data == "pairs":
            _write_pairs(partial, [(picture(), picture()) for _ in range(count)])
            return
        for i in range(count):
            picture().save(partial / f"{i:03d}.png")
        if case.data == "captions":
            rows = [{"file_name": f"{i:03d}.png", "text": f"colours {i}"} for i in range(count)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (partial / "metadata.jsonl").write_text(lines)

    checkpoint.write_whole(folder, write)
    return folder


def _write_pairs(folder: Path, pairs: Sequence[tuple[Image.Image, Image.Image]]) -> None:
    """One Parquet file with Pick-a-Pic's columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def encoded(image: Image.Image) -> bytes:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()

    columns = {
        "jpg_0": [encoded(one) for one, _ in pairs],
        "jpg_1": [encoded(two) for _, two in pairs],
        "label_0": [i % 2 for i in range(len(pairs))],
        "caption": [f"colours {i}" for i in range(len(pairs))],
    }
    pq.write_table(pa.table(columns), folder / "train.parquet")


def table_row(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of the Markdown table."""

    def told(name: str) -> str:
        values = result[name]
        return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    return {
        "ours": result["ours"],
        "diffusers' example": Path(result["theirs"]).name,
        "ours, images/s": told("ours_images_per_s"),
        "theirs, images/s": told("theirs_images_per_s"),
        "ratio": f"{result['ratio']:.2f}",
        "ours, s to first step": told("ours_seconds_to_first_step"),
        "theirs, s to first step": told("theirs_seconds_to_first_step"),
    }
