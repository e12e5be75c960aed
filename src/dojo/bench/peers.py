"""Times training scripts beside those of diffusers' examples, on the pocket models and one CPU.

It takes the folder of a clone of diffusers and holds no code of it. Both sides train a LoRA on the
same layers of the same model with the same pictures, in float32; each is started anew in every
round, with empty caches, theirs and ours by turns. Two things are compared: the speed of the loop,
by what a script writes for TensorBoard at every step, and the whole run, from the start of the
process to its end, in seconds by the clock and of the processor. Most examples encode pictures and
texts at every step and ours once, before the first: how long the first step is waited for is told
beside the speed.

    python -m dojo.bench peers --clone path/to/diffusers
    python -m dojo.bench peers --clone path/to/diffusers --num_steps 120 --num_rounds 5
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
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
from dojo.bench import processes
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, UserError, ranges
from dojo.run import checkpoint

CaseName = Literal[
    "lora_sd3",
    "dreambooth_lora_sd3",
    "lora_sd15",
    "dreambooth_lora_sd15",
    "dpo_sd15",
    "lora_sdxl",
    "dreambooth_lora_sdxl",
    "dpo_sdxl",
]
ROOT = Path(__file__).parents[3]
_LAYERS = "to_k,to_q,to_v,to_out.0"  # that all of these examples adapt
_PROMPT = "a photo of a heart"
_TOKENS = 77  # of a text, for T5 by default of SD3's example and for CLIP as it is written there
_SIDES = ("theirs", "ours")


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
    goal: float | None = None
    """the largest share of the example's wall time that a whole run of ours is meant to take"""
    tokens: int | None = None
    """that CLIP and T5 read of a text, in a copy of the model; None: as the model has it"""
    place: Literal["train_data_dir", "dataset_name"] = "train_data_dir"
    """how the example calls a folder of captioned pictures"""
    their_words: tuple[str, ...] = ()
    """what this example alone is told"""


_EXAMPLES, _DPO = "examples", "examples/research_projects/diffusion_dpo"
_SD3 = f"{_EXAMPLES}/dreambooth/train_dreambooth_lora_sd3.py"
_SD3_WORDS = ("--lora_layers", _LAYERS, "--max_sequence_length", str(_TOKENS))
CASES: dict[str, Case] = {
    # Only DreamBooth has an example for SD3, which reads captions too but insists on a prompt.
    "lora_sd3": Case(
        "train_lora_sd3.py",
        _SD3,
        "pocket-sd3",
        "captions",
        goal=0.75,
        tokens=_TOKENS,
        place="dataset_name",
        their_words=(
            *_SD3_WORDS,
            *("--image_column", "image", "--caption_column", "text", "--instance_prompt", _PROMPT),
        ),
    ),
    # Its cache of latents goes with one prompt alone: with captions it loses whose they are.
    "dreambooth_lora_sd3": Case(
        "train_dreambooth_lora_sd3.py",
        _SD3,
        "pocket-sd3",
        "instance",
        goal=0.75,
        tokens=_TOKENS,
        their_words=(*_SD3_WORDS, "--cache_latents"),
    ),
    "lora_sd15": Case(
        "train_lora_sd15.py",
        f"{_EXAMPLES}/text_to_image/train_text_to_image_lora.py",
        "pocket-sd15",
        "captions",
        goal=0.6,
    ),
    "dreambooth_lora_sd15": Case(
        "train_dreambooth_lora_sd15.py",
        f"{_EXAMPLES}/dreambooth/train_dreambooth_lora.py",
        "pocket-sd15",
        "instance",
        goal=0.6,
    ),
    "dpo_sd15": Case(
        "train_dpo_sd15.py",
        f"{_DPO}/train_diffusion_dpo.py",
        "pocket-sd15",
        "pairs",
        images=2,
        goal=0.6,
    ),
    "lora_sdxl": Case(
        "train_lora_sdxl.py",
        f"{_EXAMPLES}/text_to_image/train_text_to_image_lora_sdxl.py",
        "pocket-sdxl",
        "captions",
        goal=0.6,
    ),
    "dreambooth_lora_sdxl": Case(
        "train_dreambooth_lora_sdxl.py",
        f"{_EXAMPLES}/dreambooth/train_dreambooth_lora_sdxl.py",
        "pocket-sdxl",
        "instance",
        goal=0.6,
    ),
    "dpo_sdxl": Case(
        "train_dpo_sdxl.py",
        f"{_DPO}/train_diffusion_dpo_sdxl.py",
        "pocket-sdxl",
        "pairs",
        images=2,
        goal=0.6,
    ),
}


@dataclass(frozen=True, kw_only=True)
class PeerArgs:
    """What is compared."""

    clone: Path
    """folder of a clone of huggingface/diffusers that goes with the installed version"""
    cases: tuple[CaseName, ...] = ("lora_sd3", "lora_sd15", "lora_sdxl", "dpo_sdxl")
    """which pairs of scripts"""
    batch_size: int = 8
    """pictures, or pairs of pictures, of a batch"""
    rank: int = 16
    """of the LoRA"""
    resolution: int = 64
    """height and width in pixels"""
    num_steps: int = 36
    """steps of every run"""
    warmup_steps: int = 5
    """the first of them, which do not count for the speed"""
    num_rounds: int = 3
    """starts of each script, theirs and ours by turns"""
    work_dir: Path = Path("outputs/peers")
    """folder of data, and of caches and runs for as long as they last"""
    output: Path | None = None
    """also write every number to this JSON file"""

    def __post_init__(self) -> None:
        names = "batch_size rank resolution num_steps warmup_steps num_rounds"
        ranges.check(self, names, least=1)
        if self.num_steps <= self.warmup_steps:
            raise ValueError(
                f"--num_steps {self.num_steps} must be above --warmup_steps {self.warmup_steps}"
            )


@dataclass(frozen=True)
class Run:
    """One run of a script, from the start of its process to its end."""

    started: float
    """by `time.time`, which TensorBoard's writers take too"""
    wall: float
    """seconds"""
    cpu: float
    """seconds of the processor, of the process and those that it waited for, on all cores; 0 on
    Windows, which does not tell"""


def main(args: PeerArgs) -> None:
    """Runs every case and prints tables of ratios: of whole runs, and of speeds.

    Raises:
        UserError: the clone, a script or a model is missing.
        TrainingStopped: a script failed; its own message stands above.
    """
    for name in args.cases:
        check(args, CASES[name])
    if args.output is not None:
        files.check_output(args.output, "--output", is_ours=lambda text: '"ratio"' in text)
    results: list[dict[str, Any]] = []
    for name in args.cases:
        results.append(compare(args, name))
        if args.output is not None:  # what a later case, or its failure, cannot take away
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{markdown([whole_row(result) for result in results])}\n")
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
    """The rounds of one case: images per second of both sides, the seconds from the start of a
    process to the end of its first step, those of whole runs by the clock and of the processor,
    and the ratios, ours over theirs."""
    case, work_dir = CASES[name], args.work_dir.absolute()
    data = make_data(args, case, work_dir / "datas")
    make_model(args, case)
    found: dict[str, list[float]] = {side: [] for side in _SIDES}
    waited: dict[str, list[float]] = {side: [] for side in _SIDES}
    runs: dict[str, list[Run]] = {side: [] for side in _SIDES}
    for number in range(args.num_rounds):
        # Who comes second finds the other's libraries in memory, so that they change places.
        for side in _SIDES if number % 2 == 0 else reversed(_SIDES):
            make = our_command if side == "ours" else their_command
            # Nothing is left of a start: the next one finds no run and no cache to go on from.
            with tempfile.TemporaryDirectory(dir=work_dir, prefix="start-") as place:
                run, caches = Path(place) / "run", Path(place) / "caches"
                caches.mkdir()
                words = make(args, case, data, run, caches)
                ended = start(words, f"{name}, round {number + 1}, {side}", caches)
                times = step_times(run)
            if len(times) != args.num_steps:
                raise TrainingStopped(
                    f"{name}, {side}: {len(times)} of {args.num_steps} steps were logged"
                )
            runs[side].append(ended)
            waited[side].append(times[0] - ended.started)
            seconds = median(durations(times)[args.warmup_steps - 1 :])
            found[side].append(args.batch_size * case.images / seconds)
    spent = {
        f"{side}_{kind}_seconds": [getattr(one, kind) for one in runs[side]]
        for kind in ("wall", "cpu")
        for side in _SIDES
    }
    return {
        "case": name,
        "theirs": case.theirs,
        "ours": case.ours,
        "goal": case.goal,
        **spent,
        "wall_ratio": shares(spent["ours_wall_seconds"], spent["theirs_wall_seconds"]),
        "cpu_ratio": shares(spent["ours_cpu_seconds"], spent["theirs_cpu_seconds"]),
        **{f"{side}_images_per_s": speeds for side, speeds in found.items()},
        **{f"{side}_seconds_to_first_step": seconds for side, seconds in waited.items()},
        "ratio": median(found["ours"]) / median(found["theirs"]),
        "args": {key: str(value) for key, value in asdict(args).items()},
    }


def shares(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float] | None:
    """Ours over theirs, of the medians and of the minima; None where nothing was told."""
    if not min(theirs):
        return None
    return {
        "median": median(ours) / median(theirs),
        "minimum": min(ours) / min(theirs),
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
    if case.tokens is not None:
        values["max_sequence_length"] = case.tokens
    return [sys.executable, str(ROOT / case.ours), *_flags(values), "--overwrite_output_dir"]


def their_command(args: PeerArgs, case: Case, data: Path, run: Path, caches: Path) -> list[str]:
    """The command line of an example of the clone."""
    values: dict[str, object] = _common(args, case, run)
    if case.data == "instance":
        values |= {"instance_data_dir": data, "instance_prompt": _PROMPT}
    elif case.data == "pairs":
        values |= {"dataset_name": data, "dataset_split_name": "train"}
    else:
        values[case.place] = data
    if "dataset_name" in values:
        values["cache_dir"] = caches / "datasets"
    script = args.clone.absolute() / case.theirs
    return [sys.executable, str(script), *_flags(values), *case.their_words]


def _common(args: PeerArgs, case: Case, run: Path) -> dict[str, object]:
    """Flags that both sides know."""
    return {
        "pretrained_model_name_or_path": model_folder(args, case),
        "output_dir": run,
        "resolution": args.resolution,
        "train_batch_size": args.batch_size,
        "rank": args.rank,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "max_train_steps": args.num_steps,
        "checkpointing_steps": 10 * args.num_steps,
        "dataloader_num_workers": 0,
        "mixed_precision": "no",
        "report_to": "tensorboard",
        "seed": 0,
    }


def _flags(values: Mapping[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def start(words: Sequence[str], what: str, caches: Path) -> Run:
    """Runs a script to its end, without a network; its output goes to stderr.

    Args:
        caches: an empty folder for what it keeps of the data, so that every start pays for it.
    Raises:
        TrainingStopped: it failed.
    """
    print(f"== {what}", file=sys.stderr, flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}
    environment["HF_DATASETS_CACHE"] = str(caches / "datasets")
    environment = processes.with_compiled_modules(environment)
    before, started, began = os.times(), time.time(), time.perf_counter()
    code = subprocess.run(words, env=environment, stdout=2, check=False).returncode
    wall, after = time.perf_counter() - began, os.times()
    if code:
        raise TrainingStopped(f"{what}: {words[1]} ended with exit code {code}; see above")
    cpu = after.children_user - before.children_user
    cpu += after.children_system - before.children_system
    return Run(started=started, wall=wall, cpu=cpu)


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


def model_folder(args: PeerArgs, case: Case) -> Path:
    """Where the model of both sides is; one for longer texts is made by `make_model`."""
    if case.tokens is None:
        return ROOT / "models" / case.model
    return args.work_dir.absolute() / "models" / f"{case.model}-{case.tokens}"


def make_model(args: PeerArgs, case: Case) -> None:
    """The pocket model with texts of so many tokens for CLIP, where the case asks for it: SD3's
    example takes 77 for granted, the pocket SD3's CLIPs read 20. Positions beyond are copies."""
    folder, source, tokens = model_folder(args, case), ROOT / "models" / case.model, case.tokens
    if tokens is None or folder.is_dir():
        return

    def write(partial: Path) -> None:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        for number in ("", "_2"):
            _lengthen(partial / f"text_encoder{number}", partial / f"tokenizer{number}", tokens)

    checkpoint.write_whole(folder, write)


def _lengthen(encoder: Path, tokenizer: Path, tokens: int) -> None:
    """Gives a CLIP more positions, and its tokenizer leave to fill them."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    for path, name in (
        (encoder / "config.json", "max_position_embeddings"),
        (tokenizer / "tokenizer_config.json", "model_max_length"),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), name: tokens}))
    weights = load_file(encoder / "model.safetensors")
    [name] = (name for name in weights if name.endswith("position_embedding.weight"))
    rows = np.arange(tokens) % len(weights[name])
    weights[name] = weights[name][rows]
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})


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


def whole_row(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of the Markdown table of whole runs: medians, in brackets minima."""

    def told(name: str) -> str:
        values = result[name]
        return f"{median(values):.1f} ({min(values):.1f})" if min(values) else ""

    def share(kind: str) -> str:
        found = result[f"{kind}_ratio"]
        return f"{found['median']:.2f} ({found['minimum']:.2f})" if found else ""

    goal, found = result["goal"], result["wall_ratio"]["median"]
    return {
        "ours": result["ours"],
        "diffusers' example": Path(result["theirs"]).name,
        "ours, s": told("ours_wall_seconds"),
        "theirs, s": told("theirs_wall_seconds"),
        "ratio": share("wall"),
        "goal": f"{goal:g}" if goal else "",
        "reached": ("yes" if found <= goal else "no") if goal else "",
        "ours, CPU s": told("ours_cpu_seconds"),
        "theirs, CPU s": told("theirs_cpu_seconds"),
        "CPU ratio": share("cpu"),
    }


def table_row(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of the Markdown table of speeds."""

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
