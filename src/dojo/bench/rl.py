"""Times a script that learns from rewards or preferences: where the seconds of a picture go.

The script (GRPO, DDPO, NFT, ReFL, DPO) runs as a user would start it, without evaluation, with an
epoch, of ReFL and DPO an optimizer step, per row of its metrics.jsonl, and is ended when the rows
are there: it writes no checkpoint and no result.

    python -m dojo.bench rl --model pocket --cases standard
    python -m dojo.bench rl --model sd35-medium --train_timesteps all --guidance_scale 4.5
    python -m dojo.bench rl --model sd35-medium --method ddpo -- --sampler sde
    python -m dojo.bench rl --model sd15 --method ddpo --train_timesteps all --guidance_scale 5
    python -m dojo.bench rl --model pocket --method nft -- --solver ab2 --sigma_grid even
    python -m dojo.bench rl --model pocket --method dpo

What follows `--` goes to the script as it is. Beside the time stands what arithmetic expects, in
forward passes per picture: one for every time that the network is asked on its way; three for every
time that it is trained (a backward pass is two, and with checkpointing there is one more); one for
every time that a frozen policy is asked; all of a guided picture's way twice.
"""

from __future__ import annotations

import json
import math
import random
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
from dojo.methods import refl, rl
from dojo.run import checkpoint

if TYPE_CHECKING:
    from dojo.bench.supervised import Rows, Trace

Method = Literal["grpo", "ddpo", "nft", "refl", "dpo"]
_ALL = ("sd3", "sd15", "sdxl")
# The families whose scripts there are.
SCRIPTS: dict[Method, tuple[str, ...]] = {
    **{"grpo": ("sd3",), "ddpo": _ALL, "nft": ("sd3",), "refl": _ALL, "dpo": _ALL}
}
BY_STEP = ("refl", "dpo")  # their pictures do not come in epochs
# What the others do not read: trained steps of a picture's way, and pictures that are drawn.
OF_A_WAY, DRAWING = ("grpo", "ddpo"), ("grpo", "ddpo", "nft", "refl")
PHASES = ("sample", "decode", "reward", "train", "reference")
NETWORK = ("sample", "train", "reference")  # those that ask the transformer
GUIDANCE, BETA = 4.5, 1e-3  # of the standard cases; the time does not depend on their values
_PASSES = 3.0  # of a trained step by the rule, without checkpointing
_SPARE_EPOCHS = 1000  # that the script still has to go when it is ended
_NEVER = 10**9  # optimizer steps


@dataclass(frozen=True, kw_only=True)
class RlArgs(supervised.CaseArgs):
    """What is timed; the defaults are those of the script where nothing else is said."""

    method: Method = "grpo"
    """which script: train_METHOD_*.py of the model's family"""
    cases: Literal["one", "standard"] = "one"
    """one: what the other flags say; standard: a window and all steps, each without and with
    guidance, and a window with --beta, one after the other; of a method that trains no steps of a
    way, without and with guidance, if it draws"""
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
    """pictures, or pairs (dpo), per process that are learned from together; unset is 48 for pocket
    models and 16 otherwise, of refl and dpo 8 and 4"""
    sample_batch_size: int | None = None
    """pictures per process that are sampled together; unset is the same"""
    sample_steps: int | None = None
    """denoising steps of a picture; unset is 8 for pocket models, 20 for sd15 and sdxl, 14 for nft,
    20 for refl and 10 otherwise"""
    train_timesteps: Literal["all", "fraction", "window"] = "window"
    """which of them are trained"""
    window_size: int = 3
    """steps in the window"""
    guidance_scale: float = 1.0
    """classifier-free guidance while sampling, and in training where steps of a way are trained; 1
    is none"""
    beta: float = 0.0
    """weight of the divergence from the model before training (grpo); 0 does not ask that model"""
    reward: str | None = None
    """what to maximise; unset is pocket for pocket models and jpeg_compressibility, which has no
    network, otherwise; for refl, which wants a gradient, clip (of pocket models pocket-clip)"""
    prompt_set: Literal["pocket", "animals"] | None = None
    """prompts; unset is pocket for pocket models and animals otherwise"""
    num_epochs: int = 3
    """epochs that count, of refl and dpo optimizer steps"""
    warmup_epochs: int = 1
    """those before them that do not"""

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
            there = " or ".join(
                name for name, families in SCRIPTS.items() if self.family in families
            )
            raise ValueError(
                f"--method {self.method}: there is no such script for {self.model} (--method "
                f"{there})"
            )
        if self.beta and self.method != "grpo":
            raise ValueError(f"--beta needs --method grpo: {self.method} has no such term")
        self._check_unread()
        for name, plain in (("train_timesteps", "window"), ("guidance_scale", 1.0), ("beta", 0.0)):
            if self.cases != "one" and getattr(self, name) != plain:
                raise ValueError(f"--cases {self.cases} chooses --{name} itself: leave it out")
        if not self.prompted:
            return
        if self.chosen("reward").startswith("pocket") and self.chosen("prompt_set") != "pocket":
            raise ValueError(f"--reward {self.chosen('reward')} needs --prompt_set pocket")

    def _check_unread(self) -> None:
        why = f"with --method {self.method}"
        if self.method not in OF_A_WAY:
            ranges.check_unread(self, "train_timesteps window_size", why)
        ranges.check_choice(self, "train_timesteps", {"window": "window_size"})
        if self.method in BY_STEP:
            ranges.check_unread(self, "num_prompts group_size sample_batch_size", why)
        if not self.prompted:
            ranges.check_unread(self, "sample_steps guidance_scale reward prompt_set", why)

    @property
    def prompted(self) -> bool:
        """Whether the script draws pictures of prompts."""
        return self.method in DRAWING

    @property
    def family(self) -> str:
        """What the script's name ends with."""
        return models.family_name(self.model)

    def chosen(self, name: str) -> Any:
        """An option, or what it is for the model when it is unset."""
        value = getattr(self, name)
        if value is not None:
            return value
        by_step = self.method in BY_STEP
        drawn = {"nft": 14, "refl": 20}.get(self.method, 10 if self.family == "sd3" else 20)
        rewards = ("pocket", "jpeg_compressibility")
        if self.method == "refl":
            rewards = (f"clip[model={models.POCKET.parent / 'pocket-clip'}]", "clip")
        pocket, other = {
            "resolution": (64, 1024 if self.family == "sdxl" else 512),
            "num_prompts": (24 * self.num_processes, 4 * self.num_processes),
            "group_size": (8, 16),
            "batch_size": (8, 4) if by_step else (48, 16),
            "sample_steps": (8, drawn),
            "reward": rewards,
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
    if args.method not in OF_A_WAY:
        return [window, replace(window, guidance_scale=GUIDANCE)] if args.prompted else [window]
    every = replace(window, train_timesteps="all")
    return [
        *(window, replace(window, guidance_scale=GUIDANCE)),
        *(every, replace(every, guidance_scale=GUIDANCE)),
        *([replace(window, beta=BETA)] if args.method == "grpo" else []),
    ]


def describe(case: RlArgs) -> str:
    """What distinguishes a case, in a few words."""
    steps = f", --train_timesteps {case.train_timesteps}" if case.method in OF_A_WAY else ""
    words = [case.method + steps]
    words += [f"--guidance_scale {case.guidance_scale:g}"] if case.guidance_scale > 1 else []
    words += [f"--beta {case.beta:g}"] if case.beta else []
    return " ".join(words)


def measure(args: RlArgs, model: Path, extra: Sequence[str]) -> dict[str, Any]:
    """The numbers of one case."""
    run = args.work_dir.absolute() / "runs" / f"{args.model}-{args.method}"
    words = command(args, model, run, extra)
    goal = args.warmup_epochs + args.num_epochs
    outputs.check(run, "run", overwrite=True, flag="--work_dir")
    done, unit = (steps_done, "steps") if args.method in BY_STEP else (epochs_done, "epochs")
    trace = supervised.follow(words, run / "metrics.jsonl", goal, done, unit)
    result = summarise(args, trace, read_table(run / "args.json"))
    return {**result, "extra": list(extra)}


def command(args: RlArgs, model: Path, run: Path, extra: Sequence[str]) -> list[str]:
    """The command line of the script; `extra` comes last and wins."""
    values: dict[str, object] = {
        "finetune": args.finetune,
        "resolution": args.chosen("resolution"),
        "train_batch_size": args.chosen("batch_size"),
        "checkpointing_steps": _NEVER,
        "num_eval_prompts": 0,
    }
    whole = args.warmup_epochs + args.num_epochs + _SPARE_EPOCHS
    if args.method in BY_STEP:
        values |= {"max_train_steps": whole, "logging_steps": 1}
    else:
        values |= {
            "num_prompts_per_epoch": args.chosen("num_prompts"),
            "group_size": args.chosen("group_size"),
            **({"sample_batch_size": args.sample_batch_size} if args.sample_batch_size else {}),
            "num_train_epochs": whole,
            "logging_steps": _NEVER,  # there is a row at the end of every epoch
        }
    if args.prompted:
        values |= {
            "prompt_set": args.chosen("prompt_set"),
            "max_prompts": args.chosen("num_prompts"),  # the fewer, the sooner it starts
            "reward": args.chosen("reward"),
            "sample_steps": args.chosen("sample_steps"),
            "guidance_scale": args.guidance_scale,
        }
    else:
        del values["num_eval_prompts"]
        values |= {"dataset_name": make_pairs(args), "eval_fraction": 0}
    if args.method in OF_A_WAY:
        values["train_timesteps"] = args.train_timesteps
        if args.train_timesteps == "window":
            values["window_size"] = args.window_size
    if args.method == "grpo":
        values["beta"] = args.beta
    script = f"train_{args.method}_{args.family}.py"
    return supervised.start_script(script, args, model, run, values, extra)


def make_pairs(args: RlArgs) -> Path:
    """Pairs of random pictures, twice as many as the batches hold; latents are cached anyway."""
    size, count = args.chosen("resolution"), 2 * args.chosen("batch_size") * args.num_processes
    folder = args.work_dir.absolute() / "datas" / f"pairs-{size}px-{count}"
    if folder.is_dir():
        return folder

    def write(partial: Path) -> None:
        source, rows = random.Random(0), []
        for i in range(count):
            names = [f"{i:03d}-{side}.png" for side in ("better", "worse")]
            for name in names:
                supervised.random_picture(source, size).save(partial / name)
            rows.append({"caption": f"random colours {i}", "images": names, "scores": [1, 0]})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (partial / "metadata.jsonl").write_text(text)

    checkpoint.write_whole(folder, write)
    return folder


def steps_done(rows: Rows) -> int:
    """How many optimizer steps some rows of metrics hold."""
    return int(max((row["step"] for row in rows if "loss" in row), default=0))


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
    said = facts(record)
    seconds, ends = _by_epoch(trace, by_step=args.method in BY_STEP)
    pictures = said.pictures
    first, last = args.warmup_epochs, args.warmup_epochs + args.num_epochs
    counted = [seconds[number] for number in range(first + 1, last + 1)]
    speeds = [pictures / sum(epoch.values()) for epoch in counted]

    height, width = said.size
    cost = supervised.cost_per_image(options["finetune"]["finetune"], record, height, width)
    exact = forward_passes(record, cost.flops / cost.forward_flops)
    tflop = {name: passes * cost.forward_flops / 1e12 for name, passes in exact.items()}
    checkpointing = options["model"]["gradient_checkpointing"]
    rows = trace.rows
    after = "step" if args.method in BY_STEP else "epoch"
    utilisation = [row["mfu"] for row in rows if "mfu" in row and row[after] > first]
    return {
        "case": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(args).items()},
        "images_per_epoch": pictures,
        "seconds_per_image": {
            phase: median(epoch[phase] for epoch in counted) / pictures for phase in PHASES
        },
        "images_per_s": median(speeds),
        "images_per_hour": 3600 * median(speeds),
        "images_per_s_range": [min(speeds), max(speeds)],
        "images_per_s_by_the_clock": pictures * args.num_epochs / (ends[last] - ends[first]),
        "seconds_to_first_epoch": ends[1],
        "memory_gib": max(row["memory_gib"] for row in rows if "memory_gib" in row),
        "forward_passes_by_rule": forward_passes(record, _PASSES + checkpointing),
        "tflop_per_image": tflop,
        "tflops": median(speeds) * sum(tflop.values()) / record["num_processes"],
        "mfu": median(utilisation) if utilisation else None,
        "pixels": [height, width],
        "trained_steps": said.trained,
        "sample_steps": said.steps,
        "guidance_scale": said.guidance,
        "options": options,
        **{name: record[name] for name in ("num_processes", "mixed_precision")},
        **supervised.machine(record),
        "rows": rows,
    }


def _by_epoch(
    trace: Trace, *, by_step: bool = False
) -> tuple[dict[int, dict[str, float]], dict[int, float]]:
    """By the number of the epoch, from 1: seconds of every phase, and when it was over.

    Args:
        by_step: of optimizer steps the same.
    """
    seconds: dict[int, dict[str, float]] = {}
    ends: dict[int, float] = {}
    for row, arrival in zip(trace.rows, trace.arrivals, strict=True):
        if "epoch" not in row:  # an evaluation, which an extra flag asked for
            continue
        number = int(row["step"]) if by_step else math.ceil(row["epoch"])
        ends[number] = arrival
        spent = seconds.setdefault(number, dict.fromkeys(PHASES, 0.0))
        for phase in PHASES:
            spent[phase] += row.get(f"seconds_{phase}", 0.0)
    return seconds, ends


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run says that it does."""

    pictures: int
    """of an epoch, or of an optimizer step, over all processes"""
    size: tuple[int, int]
    guidance: float
    steps: int
    """of a picture's way; 0 where none is drawn"""
    trained: int
    """times that the network is trained on a picture"""
    passes: tuple[float, float, float]
    """forward passes per picture: those of its way, trained ones (each once), of frozen policies"""


def facts(record: Mapping[str, Any]) -> Facts:
    """Read from args.json."""
    options, optim = record["args"], record["args"]["optim"]
    batch = optim["train_batch_size"] * record["num_processes"]
    if "refl" in options:
        own = _refl(record)
        trained, guided = own.grad_steps, 2 if own.guidance_scale > 1 else 1
        way = sum(own.steps) / 2 + 1 - trained  # on average
        return Facts(
            pictures=batch * optim["gradient_accumulation_steps"],
            size=(own.resolution, own.resolution),
            guidance=own.guidance_scale,
            steps=own.sample_steps,
            trained=trained,
            passes=(guided * way, guided * trained, 0),
        )
    if "dpo" in options:
        size = options["data"]["resolution"]
        return Facts(
            pictures=2 * batch * optim["gradient_accumulation_steps"],
            size=(size, size),
            guidance=1.0,
            steps=0,
            trained=1,
            passes=(0, 1, 0 if options["dpo"]["sft"] else 1),
        )
    sample = options["sample"]
    height, width = (sample[side] or sample["resolution"] for side in ("height", "width"))
    finished = "nft" in options
    return Facts(
        pictures=sample["num_prompts_per_epoch"] * sample["group_size"],
        size=(height, width),
        guidance=sample["guidance_scale"],
        steps=options["levels" if finished else "rollout"]["sample_steps"],
        trained=_levels(record).num_train_timesteps if finished else _num_trained(record),
        passes=_of_finished(record) if finished else _of_way(record),
    )


def _refl(record: Mapping[str, Any]) -> refl.EstimateArgs:
    options = supervised.group(record, "refl")
    return (refl.FlowReflArgs if "sigma_grid" in options else refl.ReflArgs)(**options)


def _levels(record: Mapping[str, Any]) -> rl.LevelArgs:
    return rl.LevelArgs(**supervised.group(record, "levels"))


def _of_finished(record: Mapping[str, Any]) -> tuple[float, float, float]:
    nft, levels = rl.NftArgs(**supervised.group(record, "nft")), _levels(record)
    sample, optim = record["args"]["sample"], record["args"]["optim"]
    at_once = optim["train_batch_size"] * optim["gradient_accumulation_steps"]
    pictures = sample["num_prompts_per_epoch"] * sample["group_size"]
    steps = nft.num_inner_epochs * pictures / (at_once * record["num_processes"])
    number = levels.num_train_timesteps
    drawn = levels.way(1.0).predictions * (2 if sample["guidance_scale"] > 1 else 1)
    return drawn, nft.num_inner_epochs * number, sum(nft.asked(number, steps).values())


def _of_way(record: Mapping[str, Any]) -> tuple[float, float, float]:
    options = record["args"]
    sample, optim = options["sample"], options["optim"]
    policy = options.get("grpo") or options["ddpo"]
    branches = 2 if sample["guidance_scale"] > 1 else 1
    steps = _num_trained(record)
    # In training's smaller batches the rollout's trained steps are computed once more.
    again = sample["sample_batch_size"] not in (None, optim["train_batch_size"])
    uses = branches * steps * policy["num_inner_epochs"]
    drawn = branches * (options["rollout"]["sample_steps"] + again * steps)
    return drawn, uses, uses if policy.get("beta") else 0


def forward_passes(record: Mapping[str, Any], trained: float) -> dict[str, float]:
    """What a picture costs, in forward passes of it.

    Args:
        trained: cost of a trained step, forward and backward, of one branch of guidance.
    """
    drawn, uses, reference = facts(record).passes
    return {"sample": drawn, "train": uses * trained, "reference": reference}


def _num_trained(record: Mapping[str, Any]) -> int:
    options = supervised.group(record, "rollout")
    kind = rl.DiffusionRolloutArgs if "eta" in options else rl.RolloutArgs
    return len(kind(**options).trained_steps(0, 0))


# -- table ------------------------------------------------------------------------------------


def table_row(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of the Markdown table."""
    case, options = result["case"], result["options"]
    finetune, sample = options["finetune"]["finetune"], options.get("sample", {})
    flags = [f"r{options['lora']['rank']}"] if finetune == "lora" else []
    flags += ["checkpointing"] if options["model"]["gradient_checkpointing"] else []
    flags += ["compile"] if options["model"].get("torch_compile") else []
    height, width = result["pixels"]
    batch, at_once = options["optim"]["train_batch_size"], sample.get("sample_batch_size")
    guidance, mfu = result["guidance_scale"], result["mfu"]
    beta = (options.get("grpo") or {}).get("beta", 0)
    pictures = str(result["images_per_epoch"])
    if sample:
        pictures = f"{sample['num_prompts_per_epoch']} x {sample['group_size']}"
    spent, passes = result["seconds_per_image"], result["forward_passes_by_rule"]
    return {
        "model": case["model"],
        "method": " ".join([case["method"], finetune, *flags, *result.get("extra", ())]),
        "px": f"{height}" if height == width else f"{height} x {width}",
        "T5 tokens": str(options["model"].get("max_sequence_length", "")),
        "precision": supervised.precision(result["mixed_precision"]),
        "pictures": pictures,
        "batch": f"{batch}" if at_once in (None, batch) else f"{batch} of {at_once}",
        "device": f"{result['num_processes']} x {result['device']}",
        "trained steps": f"{result['trained_steps']} of {result['sample_steps']}"
        if result["sample_steps"]
        else f"{result['trained_steps']}",
        "CFG": f"{guidance:g}" if guidance > 1 else "no",
        "KL": f"{beta:g}" if beta else "no",
        **{f"{phase} s/image": f"{spent[phase]:.4f}" for phase in PHASES},
        "images/s": f"{result['images_per_s']:.2f}",
        "images/hour": f"{result['images_per_hour']:,.0f}",
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
    passes = result["forward_passes_by_rule"]
    steps, spent = result["sample_steps"], result["seconds_per_image"]
    window = args.train_timesteps == "window"
    case = f"window of {args.window_size}" if window else f"all steps ({result['trained_steps']})"
    if args.method not in OF_A_WAY:
        case = f"trained {result['trained_steps']} times a picture"
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
