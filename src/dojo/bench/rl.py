"""Times `train_grpo_sd3.py` or `train_ddpo_*.py`: where the seconds of a picture go.

The script runs as a user would start it, without evaluation, with an epoch per row of its
metrics.jsonl, and is ended when the rows are there: it writes no checkpoint and no result.

    python -m dojo.bench rl --model pocket --cases standard
    python -m dojo.bench rl --model sd35-medium --train_timesteps all --guidance_scale 4.5
    python -m dojo.bench rl --model sd35-medium --method ddpo -- --sampler sde
    python -m dojo.bench rl --model sd15 --method ddpo --train_timesteps all --guidance_scale 5

What follows `--` goes to the script as it is. Beside the time stands what arithmetic expects, in
forward passes per picture: one for every step of the rollout; three for every trained step (a
backward pass is two, and with checkpointing there is one more); one more for every trained step
with --beta; all of them twice with guidance.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from dojo.bench import models, supervised
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, ranges
from dojo.files import outputs
from dojo.files.records import read_table
from dojo.methods import rl

if TYPE_CHECKING:
    from dojo.bench.supervised import Rows, Trace

# The families whose scripts there are.
SCRIPTS = {"grpo": ("sd3",), "ddpo": ("sd3", "sd15", "sdxl")}
PHASES = ("sample", "decode", "reward", "train", "reference")
NETWORK = ("sample", "train", "reference")  # those that ask the transformer
GUIDANCE, BETA = 4.5, 1e-3  # of the standard cases; the time does not depend on their values
_PASSES = 3.0  # of a trained step by the rule, without checkpointing
_SPARE_EPOCHS = 1000  # that the script still has to go when it is ended
_NEVER = 10**9  # optimizer steps


@dataclass(frozen=True, kw_only=True)
class RlArgs(supervised.CaseArgs):
    """What is timed; the defaults are those of the script where nothing else is said."""

    method: Literal["grpo", "ddpo"] = "grpo"
    """which script: train_grpo_sd3.py, or train_ddpo_*.py of the model's family"""
    cases: Literal["one", "standard"] = "one"
    """one: what the other flags say; standard: a window and all steps, each without and with
    guidance, and a window with --beta, one after the other"""
    finetune: Literal["lora", "full"] = "lora"
    """adapters or every weight"""
    resolution: int | None = None
    """height and width in pixels; unset is 64 for pocket models, 1024 for sdxl and 512 otherwise"""
    num_prompts: int | None = None
    """prompts of an epoch, over all processes; unset is 24 per process for pocket models and 4
    otherwise"""
    group_size: int | None = None
    """pictures of each of them; unset is 8 for pocket models and 16 otherwise"""
    batch_size: int | None = None
    """pictures per process that are learned from together; unset is 48 for pocket models and 16
    otherwise"""
    sample_batch_size: int | None = None
    """pictures per process that are sampled together; unset is the same"""
    sample_steps: int | None = None
    """denoising steps of a rollout; unset is 8 for pocket models, 20 for sd15 and sdxl and 10
    otherwise"""
    train_timesteps: Literal["all", "fraction", "window"] = "window"
    """which of them are trained"""
    window_size: int = 3
    """steps in the window"""
    guidance_scale: float = 1.0
    """classifier-free guidance while sampling and in training; 1 is none"""
    beta: float = 0.0
    """weight of the divergence from the model before training (grpo); 0 does not ask that model"""
    reward: str | None = None
    """what to maximise; unset is pocket for pocket models and jpeg_compressibility, which has no
    network, otherwise"""
    prompt_set: Literal["pocket", "animals"] | None = None
    """prompts; unset is pocket for pocket models and animals otherwise"""
    num_epochs: int = 3
    """epochs that count"""
    warmup_epochs: int = 1
    """epochs before them that do not"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            *("resolution", "num_prompts", "group_size", "batch_size", "sample_batch_size"),
            *("sample_steps", "window_size", "num_epochs"),
        )
        ranges.check(self, "guidance_scale", least=1)
        ranges.check(self, "beta", least=0)
        if self.warmup_epochs < 1:
            raise ValueError("--warmup_epochs must be at least 1: the first is never typical")
        if self.family not in SCRIPTS[self.method]:
            raise ValueError(
                f"--method {self.method}: there is no such script for {self.model} (--method ddpo)"
            )
        ranges.check_choice(self, "train_timesteps", {"window": "window_size"})
        if self.beta and self.method == "ddpo":
            raise ValueError("--beta needs --method grpo: DDPO has no such term")
        for name, plain in (("train_timesteps", "window"), ("guidance_scale", 1.0), ("beta", 0.0)):
            if self.cases != "one" and getattr(self, name) != plain:
                raise ValueError(f"--cases {self.cases} chooses --{name} itself: leave it out")
        if self.chosen("reward").startswith("pocket") and self.chosen("prompt_set") != "pocket":
            raise ValueError(f"--reward {self.chosen('reward')} needs --prompt_set pocket")

    @property
    def family(self) -> str:
        """What the script's name ends with."""
        return models.family_name(self.model)

    def chosen(self, name: str) -> Any:
        """An option, or what it is for the model when it is unset."""
        value = getattr(self, name)
        if value is not None:
            return value
        pocket, other = {
            "resolution": (64, 1024 if self.family == "sdxl" else 512),
            "num_prompts": (24 * self.num_processes, 4 * self.num_processes),
            "group_size": (8, 16),
            "batch_size": (48, 16),
            "sample_steps": (8, 10 if self.family == "sd3" else 20),
            "reward": ("pocket", "jpeg_compressibility"),
            "prompt_set": ("pocket", "animals"),
        }[name]
        return pocket if self.model in models.POCKETS else other


def main(args: RlArgs, extra: Sequence[str] = ()) -> None:
    """Makes what is missing, runs case after case, prints; a case that fails does not end it.

    Args:
        extra: flags for the script.
    Raises:
        UserError: an SD3.5 without CUDA, or no script to start.
        TrainingStopped: of at least one case, after the table of the others.
    """
    supervised.check_numbers(args)
    model = supervised.model_folder(args)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    todo = cases(args)
    try:
        for number, case in enumerate(todo, 1):
            name = describe(case)
            print(f"case {number} of {len(todo)}: {name}", file=sys.stderr)
            try:
                results.append(measure(case, model, extra))
            except TrainingStopped as error:
                failed.append(f"{name}: {error}")
    finally:  # also when it is interrupted: what has been measured is kept
        if results:
            supervised.write_numbers(args, results)
            print(markdown([table_row(result) for result in results]))
    if failed:
        raise TrainingStopped("; ".join(failed))


def cases(args: RlArgs) -> list[RlArgs]:
    """The runs that `--cases` means."""
    if args.cases == "one":
        return [args]
    window = replace(args, cases="one")
    every = replace(window, train_timesteps="all")
    return [
        *(window, replace(window, guidance_scale=GUIDANCE)),
        *(every, replace(every, guidance_scale=GUIDANCE)),
        *([replace(window, beta=BETA)] if args.method == "grpo" else []),
    ]


def describe(case: RlArgs) -> str:
    """What distinguishes a case, in a few words."""
    words = [f"{case.method}, --train_timesteps {case.train_timesteps}"]
    words += [f"--guidance_scale {case.guidance_scale:g}"] if case.guidance_scale > 1 else []
    words += [f"--beta {case.beta:g}"] if case.beta else []
    return " ".join(words)


def measure(args: RlArgs, model: Path, extra: Sequence[str]) -> dict[str, Any]:
    """The numbers of one case."""
    run = args.work_dir.absolute() / "runs" / f"{args.model}-{args.method}"
    words = command(args, model, run, extra)
    goal = args.warmup_epochs + args.num_epochs
    outputs.check(run, "run", overwrite=True, flag="--work_dir")
    trace = supervised.follow(words, run / "metrics.jsonl", goal, epochs_done, "epochs")
    result = summarise(args, trace, read_table(run / "args.json"))
    return {**result, "extra": list(extra)}


def command(args: RlArgs, model: Path, run: Path, extra: Sequence[str]) -> list[str]:
    """The command line of the script; `extra` comes last and wins."""
    values = {
        "prompt_set": args.chosen("prompt_set"),
        "max_prompts": args.chosen("num_prompts"),  # the fewer, the sooner it starts
        "num_eval_prompts": 0,
        "reward": args.chosen("reward"),
        "finetune": args.finetune,
        "resolution": args.chosen("resolution"),
        "num_prompts_per_epoch": args.chosen("num_prompts"),
        "group_size": args.chosen("group_size"),
        "train_batch_size": args.chosen("batch_size"),
        **({"sample_batch_size": args.sample_batch_size} if args.sample_batch_size else {}),
        "sample_steps": args.chosen("sample_steps"),
        "train_timesteps": args.train_timesteps,
        **({"window_size": args.window_size} if args.train_timesteps == "window" else {}),
        "guidance_scale": args.guidance_scale,
        **({"beta": args.beta} if args.method == "grpo" else {}),
        "num_train_epochs": args.warmup_epochs + args.num_epochs + _SPARE_EPOCHS,
        "checkpointing_steps": _NEVER,
        "logging_steps": _NEVER,  # there is a row at the end of every epoch
    }
    script = f"train_{args.method}_{args.family}.py"
    return supervised.start_script(script, args, model, run, values, extra)


def epochs_done(rows: Rows) -> int:
    """How many epochs some rows of metrics hold whole."""
    return int(max((row["epoch"] for row in rows if "epoch" in row), default=0))


# -- numbers ----------------------------------------------------------------------------------


def summarise(args: RlArgs, trace: Trace, record: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a run, by what it says that it did.

    Speeds and seconds are medians over the epochs after the warm-up, per picture that was sampled,
    over all processes. `images_per_s_by_the_clock` is the mean over the same epochs as seen from
    outside.

    Args:
        record: the run's args.json.
    """
    options = record["args"]
    sample = options["sample"]
    pictures = sample["num_prompts_per_epoch"] * sample["group_size"]
    seconds, ends = _by_epoch(trace)
    first, last = args.warmup_epochs, args.warmup_epochs + args.num_epochs
    counted = [seconds[number] for number in range(first + 1, last + 1)]
    speeds = [pictures / sum(epoch.values()) for epoch in counted]

    height, width = (sample[side] or sample["resolution"] for side in ("height", "width"))
    cost = supervised.cost_per_image(options["finetune"]["finetune"], record, height, width)
    exact = forward_passes(record, cost.flops / cost.forward_flops)
    tflop = {name: passes * cost.forward_flops / 1e12 for name, passes in exact.items()}
    checkpointing = options["model"]["gradient_checkpointing"]
    rows = trace.rows
    utilisation = [row["mfu"] for row in rows if "mfu" in row and row["epoch"] > first]
    return {
        "case": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(args).items()},
        "images_per_epoch": pictures,
        "seconds_per_image": {
            phase: median(epoch[phase] for epoch in counted) / pictures for phase in PHASES
        },
        "images_per_s": median(speeds),
        "images_per_s_range": [min(speeds), max(speeds)],
        "images_per_s_by_the_clock": pictures * args.num_epochs / (ends[last] - ends[first]),
        "seconds_to_first_epoch": ends[1],
        "memory_gib": max(row["memory_gib"] for row in rows if "memory_gib" in row),
        "forward_passes_by_rule": forward_passes(record, _PASSES + checkpointing),
        "tflop_per_image": tflop,
        "tflops": median(speeds) * sum(tflop.values()) / record["num_processes"],
        "mfu": median(utilisation) if utilisation else None,
        "pixels": [height, width],
        "trained_steps": _num_trained(record),
        "options": options,
        **{name: record[name] for name in ("num_processes", "mixed_precision")},
        **supervised.machine(record),
        "rows": rows,
    }


def _by_epoch(trace: Trace) -> tuple[dict[int, dict[str, float]], dict[int, float]]:
    """By the number of the epoch, from 1: seconds of every phase, and when it was over."""
    seconds: dict[int, dict[str, float]] = {}
    ends: dict[int, float] = {}
    for row, arrival in zip(trace.rows, trace.arrivals, strict=True):
        if "epoch" not in row:  # an evaluation, which an extra flag asked for
            continue
        number = math.ceil(row["epoch"])
        ends[number] = arrival
        spent = seconds.setdefault(number, dict.fromkeys(PHASES, 0.0))
        for phase in PHASES:
            spent[phase] += row.get(f"seconds_{phase}", 0.0)
    return seconds, ends


def forward_passes(record: Mapping[str, Any], trained: float) -> dict[str, float]:
    """What a picture costs, in forward passes of it.

    Args:
        trained: cost of a trained step, forward and backward, of one branch of guidance.
    """
    options = record["args"]
    sample, optim = options["sample"], options["optim"]
    policy = options.get("grpo") or options["ddpo"]
    branches = 2 if sample["guidance_scale"] > 1 else 1
    steps = _num_trained(record)
    # In training's smaller batches the rollout's trained steps are computed once more.
    again = sample["sample_batch_size"] not in (None, optim["train_batch_size"])
    uses = branches * steps * policy["num_inner_epochs"]
    return {
        "sample": branches * (options["rollout"]["sample_steps"] + again * steps),
        "train": uses * trained,
        "reference": uses if policy.get("beta") else 0,
    }


def _num_trained(record: Mapping[str, Any]) -> int:
    options = supervised.group(record, "rollout")
    kind = rl.DiffusionRolloutArgs if "eta" in options else rl.RolloutArgs
    return len(kind(**options).trained_steps(0, 0))


# -- table ------------------------------------------------------------------------------------


def table_row(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of the Markdown table."""
    case, options = result["case"], result["options"]
    finetune, sample = options["finetune"]["finetune"], options["sample"]
    flags = [f"r{options['lora']['rank']}"] if finetune == "lora" else []
    flags += ["checkpointing"] if options["model"]["gradient_checkpointing"] else []
    flags += ["compile"] if options["model"].get("torch_compile") else []
    height, width = result["pixels"]
    batch, at_once = options["optim"]["train_batch_size"], sample["sample_batch_size"]
    guidance, mfu = sample["guidance_scale"], result["mfu"]
    beta = options.get("grpo", {}).get("beta", 0)
    spent, passes = result["seconds_per_image"], result["forward_passes_by_rule"]
    return {
        "model": case["model"],
        "method": " ".join([case["method"], finetune, *flags, *result.get("extra", ())]),
        "px": f"{height}" if height == width else f"{height} x {width}",
        "T5 tokens": str(options["model"].get("max_sequence_length", "")),
        "precision": supervised.precision(result["mixed_precision"]),
        "pictures": f"{sample['num_prompts_per_epoch']} x {sample['group_size']}",
        "batch": f"{batch}" if at_once in (None, batch) else f"{batch} of {at_once}",
        "device": f"{result['num_processes']} x {result['device']}",
        "trained steps": f"{result['trained_steps']} of {options['rollout']['sample_steps']}",
        "CFG": f"{guidance:g}" if guidance > 1 else "no",
        "KL": f"{beta:g}" if beta else "no",
        **{f"{phase} s/image": f"{spent[phase]:.4f}" for phase in PHASES},
        "images/s": f"{result['images_per_s']:.2f}",
        "images/s by the clock": f"{result['images_per_s_by_the_clock']:.2f}",
        "share of time": _shares([spent[phase] for phase in NETWORK]),
        "share of operations": _shares([result["tflop_per_image"][phase] for phase in NETWORK]),
        "forward passes by rule": " + ".join(f"{passes[phase]:g}" for phase in NETWORK),
        "share of these": _shares([passes[phase] for phase in NETWORK]),
        "TFLOP/image": f"{sum(result['tflop_per_image'].values()):.4g}",
        "TFLOP/s": f"{result['tflops']:.3g}",
        "MFU": "" if mfu is None else f"{mfu:.1%}",
        "peak GiB": f"{result['memory_gib']:.2f}",
    }


def _shares(values: Sequence[float]) -> str:
    """Of sampling, training and the reference, in percent of the three."""
    return " : ".join(f"{100 * value / sum(values):.0f}" for value in values) + " %"


def documented(args: RlArgs, result: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The heading of the table in docs/benchmarks.md that a measurement belongs to, and its row."""
    options, passes = result["options"], result["forward_passes_by_rule"]
    steps, spent = options["rollout"]["sample_steps"], result["seconds_per_image"]
    window = args.train_timesteps == "window"
    case = f"window of {args.window_size}" if window else f"all steps ({result['trained_steps']})"
    case += ", guidance" if args.guidance_scale > 1 else ""
    case += ", beta" if args.beta else ""
    with_reference = bool(passes["reference"])
    row = {
        "case": case,
        "forward passes by rule": " + ".join(f"{n:g}" for n in passes.values() if n),
        "sample s/image": f"{spent['sample']:.3f}",
        **{name: f"{spent[name]:.3f}" for name in ("decode", "reward", "train")},
        "reference": f"{spent['reference']:.3f}" if with_reference else "",
        "images/s": f"{result['images_per_s']:.2f}",
        "peak GiB": f"{result['memory_gib']:.1f}",
        "command": f"`{supervised.command_line('rl', args)}`",
    }
    px = " x ".join(str(side) for side in dict.fromkeys(result["pixels"]))
    name = f"{models.TITLES[args.model]} on {result['device']}, {px} px, {steps} steps"
    return f"{name}, {args.method}", row
