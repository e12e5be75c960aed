"""The steps of `python -m dojo.bench check` that train: a script's own run, files and numbers."""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo import cli
from dojo.bench import memory as memories
from dojo.bench import models, rl, supervised
from dojo.bench.report import Skip
from dojo.bench.rl import RlArgs
from dojo.bench.supervised import SupervisedArgs
from dojo.cli import TrainingStopped
from dojo.files.records import read_rows
from dojo.finetune import lora
from dojo.lazy import accelerate, torch

if TYPE_CHECKING:
    from dojo.bench.report import Place, Report

CLIP_RANGE = 1e-4  # of the scripts: what the ratio may be off without being clipped for it
LOSS_OFF = 1e-3
"""What a loss may be off as a share of it when sums come in another order."""
_STEPS = 4


def determinism(report: Report, place: Place) -> None:
    """Equal commands give equal bytes, also resumed, also with recomputed activations."""
    for name in ("pocket", "pocket-sd15"):
        _equal_runs(report, place, name)


def _equal_runs(report: Report, place: Place, name: str) -> None:
    first = _train(place, name, "first")
    weights = (first / lora.WEIGHTS).read_bytes()
    again = {
        "the same command again": [],
        "--resume_from_checkpoint": [
            *("--resume_from_checkpoint", str(first / f"checkpoint-{_STEPS // 2}"))
        ],
        "--gradient_checkpointing": ["--gradient_checkpointing"],
    }
    for what, flags in again.items():
        other = _train(place, name, what.strip("-").replace(" ", "-"), *flags)
        same = (other / lora.WEIGHTS).read_bytes() == weights
        report.claim(f"{name}, {what}: equal bytes", "equal" if same else "not equal", same)


def _train(place: Place, name: str, folder: str, *more: str) -> Path:
    """A few steps of LoRA in this process, and the folder that they left."""
    output = place.folder / "runs" / f"check-{name}-{folder}"
    values = {**_few_steps(place, name), "rank": 4}
    run_script(f"train_lora_{models.family_name(name)}", place, output, values, more)
    return output


def _few_steps(place: Place, name: str) -> dict[str, object]:
    """The options of a few steps of supervised training on a pocket model."""
    args = SupervisedArgs(model=_name(name), batch_size=2, work_dir=place.folder)
    return {
        "pretrained_model_name_or_path": models.pocket(name),
        "dataset_name": supervised.make_data(args, place.folder / "datas"),
        "resolution": args.size,
        "train_batch_size": 2,
        "max_train_steps": _STEPS,
        "checkpointing_steps": _STEPS // 2,
        **({} if args.tokens is None else {"max_sequence_length": args.tokens}),
    }


def _name(name: str) -> Any:
    return name


def ratio(report: Report, place: Place) -> None:
    """Before the first update of an epoch the policy is the one that drew: the ratio is 1."""
    off = _first_ratio(place, "check-ratio")
    report.claim("Flow-GRPO's ratio before the first update is 1", f"off by {off:g}", off == 0)


def ratio_compiled(report: Report, place: Place) -> None:
    """The same where sampling and training are compiled apart: less than what is clipped."""
    if not place.on_gpu:
        raise Skip("compiling takes minutes on a CPU")
    off = _first_ratio(place, "check-ratio-compiled", "--torch_compile")
    report.below("with --torch_compile the ratio is off by less than is clipped", off, CLIP_RANGE)


def _first_ratio(place: Place, folder: str, *more: str) -> float:
    """How far the ratio is off before the first update, over two epochs."""
    output = place.folder / "runs" / folder
    values = {
        "pretrained_model_name_or_path": models.pocket("pocket"),
        "prompt_set": "pocket",
        "reward": "jpeg_incompressibility",
        "max_prompts": 6,
        "num_eval_prompts": 0,
        "resolution": 64,
        "num_prompts_per_epoch": 2,
        "group_size": 4,
        "train_batch_size": 4,
        "sample_steps": 4,
        "window_size": 2,
        "max_train_steps": 4,
        "max_sequence_length": 24,
        "rank": 4,
    }
    run_script("train_grpo_sd3", place, output, values, more)
    rows, _ = read_rows(output / "metrics.jsonl")
    found = [row["ratio_max_deviation"] for row in rows if "ratio_max_deviation" in row]
    return max(found, default=math.nan)


def run_script(
    name: str, place: Place, output: Path, values: Mapping[str, object], more: Sequence[str]
) -> None:
    """A training script from beginning to end, in this process."""
    if str(models.ROOT) not in sys.path:
        sys.path.insert(0, str(models.ROOT))
    script: Any = importlib.import_module(name)
    shutil.rmtree(output, ignore_errors=True)  # of an earlier check
    try:
        script.main(cli.parse(script.Args, None, [*_flags(place, output, values), *more]))
    finally:
        # accelerate keeps the first Accelerator's state; the next run opens one of its own.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        accelerate.PartialState._reset_state()


def _flags(place: Place, output: Path, values: Mapping[str, object]) -> list[str]:
    every = {
        "latent_cache_dir": place.folder / "cache",
        "mixed_precision": place.mixed_precision,
        "report_to": "none",
        "logging_steps": 1,
        "seed": 0,
        **values,
        "output_dir": output,
    }
    return [word for flag, value in every.items() for word in (f"--{flag}", str(value))]


# -- several processes ------------------------------------------------------------------------


def deepspeed(report: Report, place: Place) -> None:
    """Each ZeRO stage as a user starts it, against the same steps without, in float32: on two GPUs
    where there are two, on one otherwise."""
    if not place.on_gpu:
        raise Skip("DeepSpeed needs a GPU")
    if find_spec("deepspeed") is None:
        raise Skip("DeepSpeed is not installed: pip install deepspeed")
    processes = min(torch.cuda.device_count(), 2)
    plain = launched(place, "multi_gpu" if processes > 1 else "one_gpu", processes)
    for stage in (1, 2, 3):
        losses = launched(place, f"deepspeed_zero{stage}", processes)
        off = furthest(losses, plain)
        text = f"ZeRO-{stage}, {processes} processes, {_STEPS} steps: losses are off by a share"
        report.below(text, off, LOSS_OFF)
        report.note(f"ZeRO-{stage}, losses", losses)
    report.note("without DeepSpeed, losses", plain)


def launched(place: Place, config: str, processes: int) -> list[float]:
    """The losses of a few steps of full fine-tuning of the pocket model, by `accelerate launch`.

    Args:
        config: of scripts/accelerate, without its ending.
    Raises:
        TrainingStopped: the script failed; what it said stands above.
    """
    output = place.folder / "runs" / f"check-{config}"
    shutil.rmtree(output, ignore_errors=True)  # of an earlier check
    words = launch_command(place, config, processes, output)
    if code := subprocess.run(words, check=False, env=supervised.environment()).returncode:
        raise TrainingStopped(f"{config}.yaml: exit status {code}")
    rows, _ = read_rows(output / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def launch_command(place: Place, config: str, processes: int, output: Path) -> list[str]:
    """What a user would type."""
    values = {**_few_steps(place, "pocket"), "mixed_precision": "no"}
    yaml = models.ROOT / "scripts" / "accelerate" / f"{config}.yaml"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    words += ["--config_file", str(yaml), "--num_processes", str(processes)]
    words += ["--mixed_precision", "no"]
    return [*words, str(models.ROOT / "train_full_sd3.py"), *_flags(place, output, values)]


def furthest(losses: Sequence[float], plain: Sequence[float]) -> float:
    """The largest difference as a share of the plain loss; NaN where a step is missing."""
    if len(losses) != len(plain) or not plain:
        return math.nan
    return max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))


# -- speed and memory -------------------------------------------------------------------------


def lora_medium(report: Report, place: Place) -> None:
    """SD3.5-Medium's LoRA at 1024 px."""
    _speed(report, place, "sd35-medium", "lora", batch_size=8, gradient_checkpointing=True)


def full_medium(report: Report, place: Place) -> None:
    """Every weight of SD3.5-Medium at 1024 px."""
    _speed(report, place, "sd35-medium", "full", batch_size=8, gradient_checkpointing=True)


def lora_sdxl(report: Report, place: Place) -> None:
    """SDXL's LoRA at 1024 px."""
    _speed(report, place, "sdxl", "lora", batch_size=16, gradient_checkpointing=True)


def _speed(report: Report, place: Place, name: str, method: Any, **case: Any) -> None:
    """Times a script, and keeps its row of docs/benchmarks.md."""
    if place.pocket:
        name = {"sd35-medium": "pocket", "sdxl": "pocket-sdxl"}[name]
        case |= {"batch_size": 2, "num_steps": 2, "warmup_steps": 1}
    precision: Any = place.mixed_precision
    args = SupervisedArgs(
        model=_name(name),
        method=method,
        mixed_precision=precision,
        work_dir=place.folder,
        **{"num_steps": 10, "warmup_steps": 4, **case},
    )
    result = supervised.measure(args)
    report.note("numbers", {key: value for key, value in result.items() if key != "rows"})
    report.row(*supervised.documented(args, result))
    finite = all(math.isfinite(one["loss"]) for one in result["rows"] if "loss" in one)
    report.claim("every loss is finite", f"{len(result['rows'])} steps", finite)


def grpo_medium(report: Report, place: Place) -> None:
    """A window of three steps of SD3.5-Medium's Flow-GRPO at 512 px."""
    precision: Any = place.mixed_precision
    small: dict[str, Any] = {"num_prompts": 2, "group_size": 2, "batch_size": 2, "sample_steps": 6}
    args = RlArgs(
        model="pocket" if place.pocket else "sd35-medium",
        mixed_precision=precision,
        work_dir=place.folder,
        num_epochs=1,
        **(small if place.pocket else {}),
    )
    result = rl.measure(args, supervised.model_folder(args), [])
    report.note("numbers", {key: value for key, value in result.items() if key != "rows"})
    report.row(*rl.documented(args, result))
    off = [row["ratio_max_deviation"] for row in result["rows"] if "ratio_max_deviation" in row]
    furthest = max(off, default=math.nan)
    report.claim("the ratio before the first update is 1", f"off by {furthest:g}", furthest == 0)


def memory(report: Report, place: Place) -> None:
    """The phases of a LoRA run of SD3.5-Medium: computed and measured."""
    _memory(report, place, "lora")


def memory_grpo(report: Report, place: Place) -> None:
    """The same of Flow-GRPO, which draws what it learns from; an epoch is a few pictures."""
    _memory(report, place, "grpo", num_steps=1)


def _memory(report: Report, place: Place, method: memories.Method, **case: Any) -> None:
    args = memories.MemoryArgs(
        model="pocket" if place.pocket else "sd35-medium",
        method=method,
        batch_size=2 if place.pocket else 4,
        resolution=64 if place.pocket else 512,
        mixed_precision="bf16" if place.on_gpu else "no",
        work_dir=place.folder,
        **case,
    )
    computed, measured = memories.measure(args)
    report.note("computed, GiB", computed)
    report.note("measured, GiB", measured)
    missed = sorted({*computed} ^ {*measured})
    report.claim("the phases are those that were computed", ", ".join(missed) or "all", not missed)
    if not place.on_gpu:
        report.skip("memory is compared on a GPU only: on a CPU it is the libraries' most of all")
        return
    for one in memories.compare(computed, measured):
        text = f"{one.phase}: {one.computed:.2f} GiB computed, {one.measured:.2f} measured"
        report.claim(
            f"{text}, within {args.tolerance:.0%}", f"{one.off:+.1%}", one.fits(args.tolerance)
        )
