"""Times `train_lora_sd3.py` or `train_full_sd3.py` on a model of a published size.

The script runs as a user would start it, with a step per row of its metrics.jsonl, and is ended
when the rows are there: it writes no checkpoint and no result, which for full fine-tuning would be
tens of gigabytes.

    python -m dojo.bench supervised --model sd35-medium --method lora --resolution 1024
    python -m dojo.bench supervised --model pocket --method full --batch_size 16
    python -m dojo.bench supervised --model sd35-medium -- --lora_layers attn+ff

What follows `--` goes to the script as it is.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil
import torch
from PIL import Image

from dojo import checkpoint, full, lora, sd3
from dojo.bench import limits, models
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, UserError

SCRIPTS = {"lora": "train_lora_sd3.py", "full": "train_full_sd3.py"}
_SPARE_STEPS = 1000  # that the script still has to go when it is ended


@dataclass(frozen=True, kw_only=True)
class SupervisedArgs:
    """What is timed; the defaults are those of the script where it has the option."""

    model: Literal["pocket", "sd35-medium", "sd35-large"]
    """pocket is models/pocket-sd3; the others are made once, with random weights, in work_dir"""
    method: limits.Method = "lora"
    """which script: train_lora_sd3.py or train_full_sd3.py"""
    resolution: int | None = None
    """height and width in pixels; unset is the model's own, 64 for pocket and 1024 otherwise"""
    batch_size: int = 4
    """pictures per process and micro-step"""
    gradient_accumulation_steps: int = 1
    """micro-steps per optimizer step"""
    max_sequence_length: int | None = None
    """tokens of T5; unset is 24 for pocket and 256 otherwise"""
    rank: int = 16
    """rank of the LoRA"""
    optimizer: str = "adamw"
    """optimizer of the script"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """precision of the frozen parts and the arithmetic"""
    gradient_checkpointing: bool = False
    """recompute the blocks' activations in the backward pass"""
    torch_compile: bool = False
    """compile the transformer's repeated blocks"""
    num_processes: int = 1
    """processes (GPUs) on this machine, started by torchrun"""
    num_steps: int = 20
    """optimizer steps that count"""
    warmup_steps: int = 5
    """optimizer steps before them that do not"""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """random weights on the disk"""
    work_dir: Path = Path("outputs/bench")
    """folder of the models made here (5 GB for Medium, 17 GB for Large), pictures, caches, runs"""
    output: Path | None = None
    """also write every number to this JSON file"""
    allow_cpu: bool = False
    """time SD3.5 without CUDA too; a step takes minutes"""

    def __post_init__(self) -> None:
        for name in (
            "resolution",
            "batch_size",
            "gradient_accumulation_steps",
            "max_sequence_length",
            "num_processes",
            "num_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1")
        if self.warmup_steps < 1:
            raise ValueError("--warmup_steps must be at least 1: the first step is never typical")

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.resolution or (64 if self.model == "pocket" else 1024)

    @property
    def tokens(self) -> int:
        """Tokens of T5."""
        return self.max_sequence_length or (24 if self.model == "pocket" else 256)

    @property
    def samples_per_step(self) -> int:
        """The effective batch size."""
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes


@dataclass(frozen=True)
class Trace:
    """What a run left, and when."""

    rows: list[dict[str, float]]
    """of metrics.jsonl, one per step"""
    arrivals: list[float]
    """when each row was seen, in seconds since the process was started"""


def main(args: SupervisedArgs, extra: Sequence[str] = ()) -> None:
    """Makes what is missing, runs, prints.

    Args:
        extra: flags for the script.
    Raises:
        UserError: an SD3.5 without CUDA, or no script to start.
        TrainingStopped: the script ended before its last step.
    """
    if args.model != "pocket" and not torch.cuda.is_available() and not args.allow_cpu:
        raise UserError(
            f"--model {args.model} needs CUDA: on a CPU a step takes minutes and tens of gigabytes "
            "(--allow_cpu starts it nevertheless, --model pocket is made for CPUs)"
        )
    work_dir = args.work_dir.absolute()
    model = models.POCKET
    if args.model != "pocket":
        folder = work_dir / "models" / f"{args.model}-{args.dtype}"
        print(f"model: {folder}", file=sys.stderr)
        model = models.make_model(args.model, args.dtype, folder)
    run = work_dir / "runs" / f"{args.model}-{args.method}"
    words = command(args, model, _make_data(args, work_dir / "datas"), run, extra)
    trace = follow(words, run / "metrics.jsonl", args.warmup_steps + args.num_steps)
    result = summarise(args, trace, json.loads((run / "args.json").read_text()))
    result["extra"] = list(extra)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown([table_row(result)]))


def command(
    args: SupervisedArgs, model: Path, data: Path, run: Path, extra: Sequence[str]
) -> list[str]:
    """The command line of the script; `extra` comes last and wins."""
    script = models.ROOT / SCRIPTS[args.method]
    if not script.is_file():
        raise UserError(f"{script} is missing: start the benchmark from a clone of the repository")
    python = [sys.executable]
    if args.num_processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone"]
        python += ["--nproc_per_node", str(args.num_processes)]
    steps = args.warmup_steps + args.num_steps + _SPARE_STEPS
    values = {
        "pretrained_model_name_or_path": model,
        "dataset_name": data,
        "output_dir": run,
        "latent_cache_dir": run.parents[1] / "cache",
        "resolution": args.size,
        "max_sequence_length": args.tokens,
        "train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "optimizer": args.optimizer,
        "mixed_precision": args.mixed_precision,
        "max_train_steps": steps,
        "checkpointing_steps": steps,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 0,
        **({"rank": args.rank} if args.method == "lora" else {}),
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    flags.append("--overwrite_output_dir")
    for name in ("gradient_checkpointing", "torch_compile"):
        flags += [f"--{name}"] if getattr(args, name) else []
    return [*python, str(script), *flags, *extra]


def _make_data(args: SupervisedArgs, parent: Path) -> Path:
    """Random pictures with captions, twice as many as a batch has; latents are cached anyway."""
    folder = parent / f"{args.size}px-{2 * args.batch_size}"
    if folder.is_dir():
        return folder

    def write(partial: Path) -> None:
        rng = random.Random(0)
        rows = []
        for i in range(2 * args.batch_size):
            noise = Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3))
            noise.resize((args.size, args.size)).save(partial / f"{i:03d}.png")
            rows.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"random colours {i}"}))
        (partial / "metadata.jsonl").write_text("\n".join(rows) + "\n")

    checkpoint.write_whole(folder, write)
    return folder


def follow(words: Sequence[str], metrics: Path, num_rows: int) -> Trace:
    """Starts a training, waits for its first rows of metrics, and ends it.

    Its output goes to stderr, so that stdout holds the table alone.

    Raises:
        TrainingStopped: it ended by itself before.
    """
    metrics.unlink(missing_ok=True)  # of the run before
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    started = time.perf_counter()
    arrivals: list[float] = []
    rows: list[dict[str, float]] = []
    # A SIGTERM for us must not leave the training behind.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(words, env=environment, stdout=2, start_new_session=True)
    try:
        while len(rows) < num_rows:
            running = process.poll() is None
            rows = _whole_rows(metrics)
            now = time.perf_counter() - started
            arrivals += [now] * (len(rows) - len(arrivals))
            if not running and len(rows) < num_rows:
                raise TrainingStopped(
                    f"the training ended with exit code {process.returncode} after {len(rows)} of "
                    f"{num_rows} steps; its own message stands above"
                )
            time.sleep(0.02)
    finally:
        _kill(process)
        signal.signal(signal.SIGTERM, previous)
    return Trace(rows[:num_rows], arrivals[:num_rows])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all below it; torchrun gives its workers sessions of their own."""
    if process.poll() is None:
        whole = psutil.Process(process.pid)
        for one in [whole, *whole.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def _whole_rows(metrics: Path) -> list[dict[str, float]]:
    if not metrics.is_file():
        return []
    lines = metrics.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summarise(args: SupervisedArgs, trace: Trace, record: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a run.

    Speeds are medians over the steps after the warm-up. `images_per_s_by_the_clock` is the mean
    over the same steps seen from outside, logging and averaging included.

    Args:
        record: the run's args.json.
    """
    counted = trace.rows[args.warmup_steps :]
    speeds = [row["images_per_s"] for row in counted]
    seconds = trace.arrivals[-1] - trace.arrivals[args.warmup_steps - 1]
    tflop = _tflop_per_image(args, record)
    other = limits.by_rule(
        args.model, args.method, args.gradient_checkpointing, args.size, args.tokens
    )
    utilisation = [row["mfu"] for row in counted if "mfu" in row]
    return {
        "case": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(args).items()},
        "images_per_s": median(speeds),
        "images_per_s_range": [min(speeds), max(speeds)],
        "images_per_s_by_the_clock": args.samples_per_step * len(counted) / seconds,
        "seconds_per_step": median(args.samples_per_step / speed for speed in speeds),
        "seconds_data": median(row["seconds_data"] for row in counted),
        "seconds_to_first_step": trace.arrivals[0],
        "memory_gib": max(row["memory_gib"] for row in counted),
        "tflop_per_image": tflop,
        "tflop_per_image_by_rule": other,
        "tflops": median(speeds) * tflop / args.num_processes,
        "mfu": median(utilisation) if utilisation else None,
        "pixels": args.size,
        "t5_tokens": args.tokens,
        "num_cpus": os.cpu_count(),
        **{name: record[name] for name in ("device", "git_revision", "versions")},
        "rows": trace.rows,
    }


def _tflop_per_image(args: SupervisedArgs, record: Mapping[str, Any]) -> float:
    """Counted from what the run says it did, so that extra flags count too."""

    def group(name: str) -> dict[str, Any]:
        values = record["args"][name]
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    model = sd3.ModelArgs(**group("model"))
    adapter = (
        lora.LoraArgs(**group("lora")) if args.method == "lora" else full.FullArgs(**group("full"))
    )
    data = group("data")
    height, width = (data[side] or data["resolution"][0] for side in ("height", "width"))
    return limits.flops_per_image(sd3.open_model(model), model, adapter, height, width) / 1e12


def table_row(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of the Markdown table."""
    case = result["case"]
    flags = [f"r{case['rank']}"] if case["method"] == "lora" else []
    if case["optimizer"] != "adamw":
        flags.append(case["optimizer"])
    flags += ["checkpointing"] if case["gradient_checkpointing"] else []
    flags += ["compile"] if case["torch_compile"] else []
    steps = case["gradient_accumulation_steps"]
    batch = f"{case['batch_size']}" + (f" x {steps}" if steps > 1 else "")
    mfu = result["mfu"]
    rule = result["tflop_per_image_by_rule"]
    return {
        "model": case["model"],
        "method": " ".join([case["method"], *flags, *result.get("extra", ())]),
        "px": str(result["pixels"]),
        "T5 tokens": str(result["t5_tokens"]),
        "precision": "fp32" if case["mixed_precision"] == "no" else case["mixed_precision"],
        "batch": batch,
        "device": f"{case['num_processes']} x {result['device']}",
        "images/s": f"{result['images_per_s']:.2f}",
        "images/s by the clock": f"{result['images_per_s_by_the_clock']:.2f}",
        "s/step": f"{result['seconds_per_step']:.4f}",
        "peak GiB": f"{result['memory_gib']:.2f}",
        "TFLOP/image": f"{result['tflop_per_image']:.4g}",
        "by rule": f"{rule:.4g}" if rule else "",
        "TFLOP/s": f"{result['tflops']:.3g}",
        "MFU": "" if mfu is None else f"{mfu:.1%}",
        "s to first step": f"{result['seconds_to_first_step']:.1f}",
    }
