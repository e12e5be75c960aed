"""Times `train_lora_*.py` or `train_full_*.py` on a model of a published size.

The script runs as a user would start it, with a step per row of its metrics.jsonl, and is ended
when the rows are there: it writes no checkpoint and no result, which for full fine-tuning would be
tens of gigabytes.

    python -m dojo.bench supervised --model sd35-medium --method lora --resolution 1024
    python -m dojo.bench supervised --model sdxl --method full --batch_size 8
    python -m dojo.bench supervised --model pocket --method full --batch_size 16
    python -m dojo.bench supervised --model sd35-medium -- --lora_layers attn+ff

What follows `--` goes to the script as it is.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from dojo import files
from dojo.bench import limits, models, processes
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, UserError, ranges
from dojo.files import outputs
from dojo.files.records import read_rows, read_table
from dojo.finetune import lora, whole
from dojo.lazy import torch
from dojo.models import family, opening
from dojo.run import checkpoint

if TYPE_CHECKING:
    from dojo.run.cost import Cost

Rows = list[dict[str, float]]

_SPARE_STEPS = 1000  # that the script still has to go when it is ended


@dataclass(frozen=True, kw_only=True)
class CaseArgs:
    """What is timed, whichever script it is."""

    model: models.Name
    """pocket is models/pocket-sd3, pocket-sd15 and pocket-sdxl lie beside it; the others are made
    once, with random weights, in work_dir"""
    max_sequence_length: int | None = None
    """tokens of T5, where there is one; unset is 24 for pocket and 256 otherwise"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """precision of the frozen parts and the arithmetic"""
    gradient_checkpointing: bool = False
    """recompute the blocks' activations in the backward pass"""
    torch_compile: bool = False
    """compile the network's repeated blocks"""
    num_processes: int = 1
    """processes (GPUs) on this machine, started by torchrun"""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """random weights on the disk"""
    work_dir: Path = Path("outputs/bench")
    """folder of the models made here (sd35-medium and sdxl 5 GB, sd35-large 17 GB, sd15 2 GB),
    pictures, caches, runs"""
    output: Path | None = None
    """also write every number to this JSON file"""
    allow_cpu: bool = False
    """time a model of a published size without CUDA too; a step takes minutes"""

    def __post_init__(self) -> None:
        self.check_positive("max_sequence_length", "num_processes")
        if self.max_sequence_length and not models.has_option(self.model, "max_sequence_length"):
            raise ValueError(
                f"--max_sequence_length: the scripts for {self.model} have no such option"
            )

    def check_positive(self, *names: str) -> None:
        """Refuses numbers below 1.

        Raises:
            ValueError: naming the flag.
        """
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1")

    @property
    def tokens(self) -> int | None:
        """Tokens of T5; None for a model without one."""
        if not models.has_option(self.model, "max_sequence_length"):
            return None
        return self.max_sequence_length or (24 if self.model == "pocket" else 256)


@dataclass(frozen=True, kw_only=True)
class SupervisedArgs(CaseArgs):
    """What is timed; the defaults are those of the script where it has the option."""

    method: limits.Method = "lora"
    """which script: train_lora_*.py or train_full_*.py of the model's family"""
    resolution: int | None = None
    """height and width in pixels; unset is the model's own: 64 for the pockets, 512 for sd15 and
    1024 otherwise"""
    batch_size: int = 4
    """pictures per process and micro-step"""
    gradient_accumulation_steps: int = 1
    """micro-steps per optimizer step"""
    rank: int = 16
    """rank of the LoRA"""
    optimizer: str = "adamw"
    """optimizer of the script"""
    num_steps: int = 20
    """optimizer steps that count"""
    warmup_steps: int = 5
    """optimizer steps before them that do not"""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check(self, "resolution batch_size gradient_accumulation_steps rank", least=1)
        ranges.check(self, "num_steps", least=1)
        if self.warmup_steps < 1:
            raise ValueError("--warmup_steps must be at least 1: the first step is never typical")

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.resolution or models.native_size(self.model)

    @property
    def samples_per_step(self) -> int:
        """The effective batch size."""
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes


@dataclass(frozen=True)
class Trace:
    """What a run left, and when."""

    rows: Rows
    """of metrics.jsonl"""
    arrivals: list[float]
    """when each row was seen, in seconds since the process was started"""


def main(args: SupervisedArgs, extra: Sequence[str] = ()) -> None:
    """Makes what is missing, runs, prints.

    Args:
        extra: flags for the script.
    Raises:
        UserError: a model of a published size without CUDA, or no script to start.
        TrainingStopped: the script ended before its last step.
    """
    check_numbers(args)
    result = measure(args, extra)
    write_numbers(args, result)
    print(markdown([table_row(result)]))


def measure(args: SupervisedArgs, extra: Sequence[str] = ()) -> dict[str, Any]:
    """The numbers of one training; see `main`."""
    model, work_dir = model_folder(args), args.work_dir.absolute()
    run = work_dir / "runs" / f"{args.model}-{args.method}"
    words = command(args, model, make_data(args, work_dir / "datas"), run, extra)
    outputs.check(run, "run", overwrite=True, flag="--work_dir")
    trace = follow(words, run / "metrics.jsonl", args.warmup_steps + args.num_steps)
    return {**summarise(args, trace, read_table(run / "args.json")), "extra": list(extra)}


def model_folder(args: CaseArgs) -> Path:
    """The model that is timed; one that is missing is made.

    Raises:
        UserError: a model of a published size without CUDA, or no such pocket model.
    """
    if args.model in ("pocket", "pocket-sd15", "pocket-sdxl"):
        return models.pocket(args.model)
    if not torch.cuda.is_available() and not args.allow_cpu:
        raise UserError(
            f"--model {args.model} needs CUDA: on a CPU a step takes minutes and tens of gigabytes "
            "(--allow_cpu starts it nevertheless, the pocket models are made for CPUs)"
        )
    folder = args.work_dir.absolute() / "models" / f"{args.model}-{args.dtype}"
    print(f"model: {folder}", file=sys.stderr)
    return models.make_model(args.model, args.dtype, folder)


def check_numbers(args: CaseArgs) -> None:
    """Refuses an `--output` that something else is at.

    Raises:
        UserError: naming it.
    """
    if args.output is not None:
        files.check_output(
            args.output, "--output", is_ours=lambda text: '"images_per_s' in text or text == "[]\n"
        )


def write_numbers(args: CaseArgs, numbers: Any) -> None:
    """Writes `--output`, if it is wanted."""
    if args.output is not None:
        check_numbers(args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(numbers, indent=1) + "\n")


def command(
    args: SupervisedArgs, model: Path, data: Path, run: Path, extra: Sequence[str]
) -> list[str]:
    """The command line of the script; `extra` comes last and wins."""
    name = f"train_{args.method}_{models.family_name(args.model)}.py"
    values = {"dataset_name": data, **training_flags(args)}
    return start_script(name, args, model, run, values, extra)


def training_flags(args: SupervisedArgs) -> dict[str, object]:
    """What a script that learns captioned pictures is told, these apart."""
    steps = args.warmup_steps + args.num_steps + _SPARE_STEPS
    return {
        "resolution": args.size,
        "train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "optimizer": args.optimizer,
        "max_train_steps": steps,
        "checkpointing_steps": steps,
        "logging_steps": 1,
        **({"rank": args.rank} if args.method == "lora" else {}),
    }


def start_script(
    name: str,
    args: CaseArgs,
    model: Path,
    run: Path,
    values: Mapping[str, object],
    extra: Sequence[str],
) -> list[str]:
    """The command line of any training script, with what all of them know.

    Args:
        run: the output folder; caches lie beside the folder it lies in.
        values: the script's further flags.
        extra: comes last and wins.
    Raises:
        UserError: there is no such script.
    """
    script = models.ROOT / name
    if not script.is_file():
        raise UserError(f"{script} is missing: start the benchmark from a clone of the repository")
    python = [sys.executable]
    if args.num_processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone"]
        python += ["--nproc_per_node", str(args.num_processes)]
    values = {
        "pretrained_model_name_or_path": model,
        "output_dir": run,
        "latent_cache_dir": run.parents[1] / "cache",
        **({} if args.tokens is None else {"max_sequence_length": args.tokens}),
        "mixed_precision": args.mixed_precision,
        "report_to": "none",
        "seed": 0,
        **values,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    flags.append("--overwrite_output_dir")
    for flag in ("gradient_checkpointing", "torch_compile"):
        flags += [f"--{flag}"] if getattr(args, flag) else []
    return [*python, str(script), *flags, *extra]


def make_data(args: SupervisedArgs, parent: Path) -> Path:
    """Random pictures with captions, twice as many as a batch has; latents are cached anyway."""
    folder = parent / f"{args.size}px-{2 * args.batch_size}"
    if folder.is_dir():
        return folder

    def write(partial: Path) -> None:
        rng = random.Random(0)
        rows = []
        for i in range(2 * args.batch_size):
            random_picture(rng, args.size).save(partial / f"{i:03d}.png")
            rows.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"random colours {i}"}))
        (partial / "metadata.jsonl").write_text("\n".join(rows) + "\n")

    checkpoint.write_whole(folder, write)
    return folder


def random_picture(source: random.Random, size: int) -> Image.Image:
    """Colours of chance, square, in pixels."""
    return Image.frombytes("RGB", (16, 16), source.randbytes(16 * 16 * 3)).resize((size, size))


def follow(
    words: Sequence[str],
    metrics: Path,
    goal: int,
    done: Callable[[Rows], int] = len,
    unit: str = "steps",
) -> Trace:
    """Starts a training, waits for its first rows of metrics, and ends it.

    Its output goes to stderr, so that stdout holds the table alone.

    Args:
        goal: how much the rows have to hold.
        done: how much some rows hold: as many steps as there are rows, unless it says otherwise.
        unit: what is counted, for the message.
    Returns:
        The trace up to the row that reaches the goal.
    Raises:
        TrainingStopped: it ended by itself before.
    """
    metrics.unlink(missing_ok=True)  # of the run before
    started = time.perf_counter()
    arrivals: list[float] = []
    rows: Rows = []
    with processes.started(words, env=environment(), stdout=2) as process:
        while done(rows) < goal:
            running = process.poll() is None
            rows = read_rows(metrics)[0]
            now = time.perf_counter() - started
            arrivals += [now] * (len(rows) - len(arrivals))
            if not running and done(rows) < goal:
                raise TrainingStopped(
                    f"the training ended with exit code {process.returncode} after {done(rows)} of "
                    f"{goal} {unit}; its own message stands above"
                )
            time.sleep(0.02)
    while done(rows[:-1]) >= goal:  # these came while it was being ended
        rows.pop()
    return Trace(rows, arrivals[: len(rows)])


def environment() -> dict[str, str]:
    """The variables of a script that is started here."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        found["ACCELERATE_USE_CPU"] = "true"
    return found


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
        **machine(record),
        "rows": trace.rows,
    }


def _tflop_per_image(args: SupervisedArgs, record: Mapping[str, Any]) -> float:
    data = group(record, "data")
    height, width = (data[side] or data["resolution"][0] for side in ("height", "width"))
    return cost_per_image(args.method, record, height, width).flops / 1e12


def cost_per_image(
    method: limits.Method, record: Mapping[str, Any], height: int, width: int
) -> Cost:
    """Of a forward and a backward pass, counted from what the run says it did, so that extra flags
    count too."""
    options = group(record, "model")
    name = str(options["pretrained_model_name_or_path"])
    door = opening.family_of(family.ModelArgs(pretrained_model_name_or_path=name))
    model = door.ModelArgs(**options)
    adapter = (
        lora.LoraArgs(**group(record, "lora"))
        if method == "lora"
        else whole.FullArgs(**group(record, "full"))
    )
    return limits.cost_per_image(door.open_model(model), model, adapter, height, width)


def machine(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured where, of the run's args.json."""
    names = ("device", "git_revision", "versions")
    return {"num_cpus": os.cpu_count(), **{name: record[name] for name in names}}


def group(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A group of options in args.json, as its dataclass wants it."""
    values = record["args"][name]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


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
        "T5 tokens": str(result["t5_tokens"] or ""),
        "precision": precision(case["mixed_precision"]),
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


def precision(mixed: str) -> str:
    """What `--mixed_precision` means."""
    return "fp32" if mixed == "no" else mixed


# -- rows of docs/benchmarks.md -----------------------------------------------------------------


def documented(args: SupervisedArgs, result: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The heading of the table in docs/benchmarks.md that a measurement belongs to, and its row."""
    kind = f"LoRA r{args.rank}" if args.method == "lora" else "full"
    with_tokens = args.tokens is not None
    mfu = result["mfu"]
    # Of an H100 or H200, as the other rows there.
    limit = limits.LimitArgs().tflops / result["tflop_per_image"] if mfu is not None else None
    row = {
        **({} if with_tokens else {"model": models.TITLES[args.model]}),
        "px": str(result["pixels"]),
        "method": kind if args.optimizer == "adamw" else f"{kind}, {args.optimizer}",
        "checkpointing": "yes" if args.gradient_checkpointing else "no",
        **({"compiled": "yes" if args.torch_compile else "no"} if with_tokens else {}),
        "limit, images/s": "" if limit is None else f"{limit:.1f}",
        "images/s": f"{result['images_per_s']:.1f}",
        "peak GiB": f"{result['memory_gib']:.1f}",
        "MFU": "" if mfu is None else f"{mfu:.1%}",
        "command": f"`{command_line('supervised', args)}`",
    }
    of = models.TITLES[args.model] if with_tokens else "SD1.5 and SDXL"
    return f"{of} on {result['device']}", row


def command_line(name: str, args: CaseArgs) -> str:
    """The command that measures a case, without what is as usual."""
    left_out = {"output", "work_dir", "allow_cpu"}
    words: list[str] = []
    for one in fields(args):
        value = getattr(args, one.name)
        if one.name in left_out or value == one.default:
            continue
        words += [f"--{one.name}"] if value is True else [f"--{one.name}", str(value)]
    return " ".join([f"python -m dojo.bench {name}", *words])
