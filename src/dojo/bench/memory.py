"""Compares the memory that a dry run computes, phase by phase, with the peaks on a GPU.

A script is started twice, as a user would start it: with `--dry_run`, and for a few steps (of GRPO,
DDPO and NFT: epochs) with empty caches and a picture, or a batch of them, to evaluate. Both count
tensors; what the allocator and CUDA itself take comes on top of both. It fails when a phase is
further off than `--tolerance`.

    python -m dojo.bench memory --model sd35-medium --method lora --batch_size 4
    python -m dojo.bench memory --model sdxl --method full --batch_size 1 -- --optimizer adafactor
    python -m dojo.bench memory --model sd35-medium --method grpo -- --guidance_scale 4.5
    python -m dojo.bench memory --model sd15 --method dreambooth_lora

What follows `--` goes to the script as it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dojo.bench import models, rl, supervised
from dojo.bench.table import markdown
from dojo.bench.watched import OUTSIDE
from dojo.cli import TrainingStopped, UserError, ranges
from dojo.files.records import read_table
from dojo.lazy import torch

Method = Literal["lora", "full", "dreambooth_lora", "dpo", "refl", "ddpo", "grpo", "nft"]
_SUPERVISED = ("lora", "full", "dreambooth_lora")
SLACK = 0.1  # GiB that no phase is blamed for: workspaces of kernels
_CLASS_PICTURES = 4  # as many as are drawn at a time


@dataclass(frozen=True, kw_only=True)
class MemoryArgs(supervised.CaseArgs):
    """Which training is measured; the defaults are those of the script where it has the option."""

    method: Method = "lora"
    """which script: train_METHOD_*.py of the model's family"""
    finetune: Literal["lora", "full"] = "lora"
    """adapters or every weight, where the script has both: of dpo, refl, ddpo, grpo and nft"""
    resolution: int | None = None
    """height and width in pixels; unset is the model's own, for learning from rewards and
    preferences that of `bench rl`"""
    batch_size: int = 4
    """pictures, or pairs (dpo), of a micro-step; those that learn from what they have drawn draw as
    many at a time"""
    gradient_accumulation_steps: int = 1
    """micro-steps per optimizer step"""
    rank: int | None = None
    """rank of the LoRA; unset is the script's"""
    optimizer: str = "adamw"
    """optimizer of the script"""
    tolerance: float = 0.1
    """largest share of the measured peak that a computed one may be off"""
    num_steps: int = 2
    """optimizer steps that are measured; of grpo, ddpo and nft epochs"""
    warmup_steps: int = 1
    """those before them, which are measured too"""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check(self, "tolerance", above=0)
        ranges.check(self, "resolution batch_size gradient_accumulation_steps rank", least=1)
        ranges.check(self, "num_steps warmup_steps", least=1)
        if self.num_processes > 1:
            raise ValueError("--num_processes: memory is measured with one process")
        if self.method in _SUPERVISED:
            ranges.check_unread(self, "finetune", f"with --method {self.method}")
        if "full" in (self.method, self.finetune):
            ranges.check_unread(self, "rank", "where every weight is trained")
        _ = self.case

    @property
    def case(self) -> supervised.SupervisedArgs | rl.RlArgs:
        """What `bench supervised` or `bench rl` would time; of DreamBooth, which neither does, the
        LoRA.

        Raises:
            ValueError: the model has no such script.
        """
        common = {one.name: getattr(self, one.name) for one in fields(supervised.CaseArgs)}
        common |= {"output": None, "resolution": self.resolution, "batch_size": self.batch_size}
        steps = self.gradient_accumulation_steps
        more: dict[str, Any]
        if self.method in _SUPERVISED:
            more = {
                "method": "full" if self.method == "full" else "lora",
                "gradient_accumulation_steps": steps,
                "optimizer": self.optimizer,
                "num_steps": self.num_steps,
                "warmup_steps": self.warmup_steps,
                **({} if self.rank is None else {"rank": self.rank}),
            }
            return supervised.SupervisedArgs(**common, **more)
        more = {"method": self.method, "finetune": self.finetune}
        more |= {"num_epochs": self.num_steps, "warmup_epochs": self.warmup_steps}
        if self.method not in rl.BY_STEP:  # an optimizer step an epoch, of pictures of one prompt
            more |= {"num_prompts": steps, "group_size": max(2, self.batch_size)}
        return rl.RlArgs(**common, **more)


@dataclass(frozen=True)
class Compared:
    """A phase of a run: GiB of tensors as computed and as measured."""

    phase: str
    computed: float
    measured: float

    @property
    def off(self) -> float:
        """How far the computed peak is from the measured one, as a share of it; with its sign."""
        return (self.computed - self.measured) / self.measured if self.measured else 0.0

    def fits(self, tolerance: float) -> bool:
        """Whether that is near enough; a tenth of a GiB always is."""
        return abs(self.computed - self.measured) <= max(SLACK, tolerance * self.measured)


def main(args: MemoryArgs, extra: Sequence[str] = ()) -> None:
    """Measures, prints.

    Raises:
        UserError: there is no GPU.
        TrainingStopped: a phase is further off than the tolerance, or the script failed.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "python -m dojo.bench memory needs a GPU: on a CPU a process's memory is that of its "
            "libraries for the most part, and nothing that is computed could be compared with it"
        )
    supervised.check_numbers(args)
    compared = compare(*measure(args, extra))
    print(markdown([row(one, args.tolerance) for one in compared]))
    supervised.write_numbers(args, [{**vars(one), "images_per_s": None} for one in compared])
    refuse(compared, args.tolerance)


def refuse(compared: Sequence[Compared], tolerance: float) -> None:
    """Fails where a phase is too far off.

    Raises:
        TrainingStopped: naming them all.
    """
    wrong = [
        f"{one.phase} {one.computed:.2f} computed, {one.measured:.2f} measured ({one.off:+.0%})"
        for one in compared
        if not one.fits(tolerance)
    ]
    if wrong:
        raise TrainingStopped(f"further off than {tolerance:.0%}: {'; '.join(wrong)}")


def compare(computed: Mapping[str, float], measured: Mapping[str, float]) -> list[Compared]:
    """The phases that both know, in the order of the computed ones.

    A phase that was computed and did not come, or came and was not computed, is compared with 0.

    Args:
        computed, measured: GiB by phase.
    """
    names = [*computed, *(name for name in measured if name not in computed)]
    return [Compared(name, computed.get(name, 0.0), measured.get(name, 0.0)) for name in names]


def row(one: Compared, tolerance: float) -> dict[str, str]:
    """A phase's row of the table."""
    return {
        "phase": one.phase,
        "computed, GiB": f"{one.computed:.2f}",
        "measured, GiB": f"{one.measured:.2f}",
        "off": f"{one.off:+.1%}",
        f"within {tolerance:.0%}": "yes" if one.fits(tolerance) else "no",
    }


def measure(
    args: MemoryArgs, extra: Sequence[str] = ()
) -> tuple[dict[str, float], dict[str, float]]:
    """GiB by phase of a training, computed and measured."""
    model, work_dir = supervised.model_folder(args), args.work_dir.absolute()
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="memory-", dir=work_dir) as name:
        folder = Path(name)
        run = folder / "runs" / "run"
        _, *words = command(args, model, run, extra)
        begin = [sys.executable, "-m", "dojo.bench.watched"]
        computed = _computed([*begin, str(folder / "computed.json"), *words, "--dry_run"])
        peaks = folder / "peaks.json"
        done, unit = counted(args.method)
        goal = args.warmup_steps + args.num_steps
        supervised.follow([*begin, str(peaks), *words], run / "metrics.jsonl", goal, done, unit)
        measured = {phase: size / 2**30 for phase, size in read_table(peaks).items()}
    measured.pop(OUTSIDE, None)
    return computed, measured


def counted(method: Method) -> tuple[Callable[[supervised.Rows], int], str]:
    """How the steps of a method are counted, and what they are called."""
    epochs = method not in (*_SUPERVISED, *rl.BY_STEP)
    return (rl.epochs_done, "epochs") if epochs else (rl.steps_done, "steps")


def command(args: MemoryArgs, model: Path, run: Path, extra: Sequence[str]) -> list[str]:
    """The command line of the script; `extra` comes last and wins.

    Args:
        run: the output folder; caches and class pictures lie beside the folder it lies in.
    """
    case = args.case
    if isinstance(case, rl.RlArgs):
        return rl.command(case, model, run, [*_of_rewards(args), *extra])
    data = supervised.make_data(case, args.work_dir.absolute() / "datas")
    shown = ["--validation_prompt", "random colours 0", "--validation_inference_steps", "2"]
    if args.method != "dreambooth_lora":
        return supervised.command(case, model, data, run, [*shown, *extra])
    values = {
        **supervised.training_flags(case),
        "instance_data_dir": data,
        "instance_prompt": "random colours",
        "class_data_dir": run.parents[1] / "class",
        "class_prompt": "colours",
        "num_class_images": _CLASS_PICTURES,
        "sample_batch_size": _CLASS_PICTURES,
        "prior_inference_steps": 2,
    }
    name = f"train_{args.method}_{models.family_name(args.model)}.py"
    own = ["--with_prior_preservation", *shown, *extra]
    return supervised.start_script(name, case, model, run, values, own)


def _of_rewards(args: MemoryArgs) -> list[str]:
    """What a script that learns from rewards or preferences is told besides: an evaluation of a
    whole batch comes first, as the dry run counts one."""
    values = {
        "optimizer": args.optimizer,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **({} if args.rank is None else {"rank": args.rank}),
        "num_eval_images": args.batch_size,
        "eval_sample_steps": 2,
    }
    if args.method == "dpo":
        values["validation_prompt"] = "random colours 0"
    else:
        values["num_eval_prompts"] = 1
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _computed(words: Sequence[str]) -> dict[str, float]:
    """What a dry run computes.

    Raises:
        TrainingStopped: it failed.
    """
    result = subprocess.run(words, stdout=2, check=False, env=supervised.environment())
    file: Any = Path(words[3])
    if result.returncode or not file.is_file():
        raise TrainingStopped(f"the dry run failed with exit code {result.returncode}")
    return json.loads(file.read_text())
