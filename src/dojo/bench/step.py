"""Where the time of a training step goes, and which share of it is not the network's own work.

The scripts run as a user would start them, without evaluation, and are ended when the steps are
there (`dojo.bench.profiled`). A step is one of the optimizer; of GRPO and DDPO, whose steps of the
optimizer come several at a time, it is an epoch: pictures drawn, decoded, scored and learned from.

    python -m dojo.bench step --model pocket
    python -m dojo.bench step --model pocket-sd15 --methods lora dpo --output outputs/step.json
    python -m dojo.bench step --model sd35-medium --methods lora -- --lora_layers attn+ff

What follows `--` goes to the scripts as it is. A share is of a whole step, from one batch to the
next, by the clock; on a GPU the parts wait for their kernels, so that a part's time is its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

from dojo import files
from dojo.bench import models, processes, profiled, rl, supervised
from dojo.bench.table import markdown
from dojo.cli import TrainingStopped, ranges
from dojo.files import outputs
from dojo.files.records import read_table

Method = Literal["lora", "full", "dpo", "grpo", "ddpo"]
GOAL = 0.06  # of a step that is not the network's own forward and backward passes
BY_EPOCH = ("grpo", "ddpo")
_SUPERVISED = ("lora", "full")
COLUMNS = ("forward", "backward", "other networks", "optimizer", "data", profiled.REST)


@dataclass(frozen=True, kw_only=True)
class StepArgs(supervised.CaseArgs):
    """What is profiled; the rest is as in `rl` and `supervised`."""

    methods: tuple[Method, ...] = ()
    """whose steps, one after the other; unset is lora, full, dpo and grpo, where the model has no
    GRPO ddpo"""
    resolution: int | None = None
    """height and width in pixels; unset is the model's own, for reinforcement learning 512 for
    sd35-medium and sd35-large"""
    batch_size: int | None = None
    """pictures, or pairs (dpo), of a batch; unset is 16 for lora and full of pocket models and 4
    otherwise, and that of `rl` for the others"""
    num_steps: int = 5
    """steps that count; of grpo and ddpo one epoch counts"""
    warmup_steps: int = 3
    """steps before them that do not; of grpo and ddpo one epoch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.check(self, "resolution batch_size num_steps warmup_steps", least=1)
        if self.num_processes > 1:
            raise ValueError("--num_processes: a step is profiled in one process")
        for method in self.methods:
            self.case(method)

    @property
    def chosen(self) -> tuple[Method, ...]:
        """The methods, as given or as the model's family has them."""
        learned: Method = "grpo" if models.family_name(self.model) == "sd3" else "ddpo"
        return self.methods or ("lora", "full", "dpo", learned)

    def case(self, method: Method) -> supervised.SupervisedArgs | rl.RlArgs:
        """What `bench supervised` or `bench rl` would time.

        Raises:
            ValueError: the model has no such script.
        """
        common = {one.name: getattr(self, one.name) for one in fields(supervised.CaseArgs)}
        size: dict[str, Any] = {"resolution": self.resolution, "output": None}
        if method in _SUPERVISED:
            batch = self.batch_size or (16 if self.model in models.POCKETS else 4)
            more: dict[str, Any] = {"method": method, "batch_size": batch}
            return supervised.SupervisedArgs(**{**common, **size, **more})
        more = {"method": method, "batch_size": self.batch_size}
        return rl.RlArgs(**{**common, **size, **more})


def main(args: StepArgs, extra: Sequence[str] = ()) -> None:
    """Makes what is missing, profiles script after script, prints.

    Args:
        extra: flags for the scripts.
    Raises:
        UserError: a model of a published size without CUDA, or no script to start.
        TrainingStopped: of at least one method, after the table of the others.
    """
    if args.output is not None:
        files.check_output(args.output, "--output", is_ours=lambda text: '"outside"' in text)
    model = supervised.model_folder(args)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for method in args.chosen:
        print(f"a step of {method}", file=sys.stderr)
        try:
            results.append(measure(args, method, model, extra))
        except TrainingStopped as error:
            failed.append(f"{method}: {error}")
    if results:
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(markdown([table_row(result) for result in results]))
    if failed:
        raise TrainingStopped("; ".join(failed))


def measure(args: StepArgs, method: Method, model: Path, extra: Sequence[str]) -> dict[str, Any]:
    """The numbers of one method; see `summarise`.

    Raises:
        TrainingStopped: the script ended before its last step.
    """
    case, work_dir = args.case(method), args.work_dir.absolute()
    run, file = work_dir / "runs" / f"{args.model}-{method}", work_dir / "spent.json"
    if isinstance(case, rl.RlArgs):
        words = rl.command(case, model, run, extra)
    else:
        data = supervised.make_data(case, work_dir / "datas")
        words = supervised.command(case, model, data, run, extra)
    outputs.check(run, "run", overwrite=True, flag="--work_dir")
    warmup, steps = (1, 1) if method in BY_EPOCH else (args.warmup_steps, args.num_steps)
    python, *script = words
    file.unlink(missing_ok=True)
    words = [python, "-m", "dojo.bench.profiled", str(file), str(warmup), str(steps), *script]
    with processes.started(words, env=supervised.environment(), stdout=2) as process:
        code = process.wait()
    if code or not file.is_file():
        raise TrainingStopped(
            f"the training ended with exit code {code} before the last step was measured; its own "
            "message stands above"
        )
    found = json.loads(file.read_text())
    file.unlink()
    record = read_table(run / "args.json")
    return {
        **summarise(method, found),
        "case": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(case).items()},
        "extra": list(extra),
        **supervised.machine(record),
    }


def summarise(method: Method, found: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of a step, each the median over the steps.

    `outside` is what is not the network's own forward and backward passes; without the pictures'
    decoder and rewards, which a method needs beside the network, it is `outside_networks`.
    `products` is the share of operators' time in the profiled step that sums of products take.

    Args:
        found: what `dojo.bench.profiled` has written.
    """
    steps: list[dict[str, float]] = found["steps"]
    whole = [sum(step.values()) for step in steps]

    def share(*names: str) -> float:
        parts = (sum(step.get(name, 0.0) for name in names) for step in steps)
        return median(part / all_ for part, all_ in zip(parts, whole, strict=True))

    own = ("forward", "backward")
    operators: dict[str, dict[str, float]] = found["operators"]
    computed = sum(one["seconds"] for one in operators.values())
    products = sum(
        one["seconds"]
        for name, one in operators.items()
        if any(word in name for word in profiled.PRODUCTS)
    )
    return {
        "method": method,
        "outside": 1 - share(*own),
        "outside_networks": 1 - share(*own, "other networks"),
        "goal": GOAL,
        "seconds_per_step": median(whole),
        "shares": {name: share(name) for name in COLUMNS},
        "products": products / computed if computed else None,
        "steps": steps,
        "operators": dict(list(operators.items())[:30]),
    }


def table_row(result: Mapping[str, Any]) -> dict[str, str]:
    """The row of the Markdown table."""
    case, outside, products = result["case"], result["outside_networks"], result["products"]
    return {
        "model": case["model"],
        "method": " ".join([result["method"], *result["extra"]]),
        "precision": supervised.precision(case["mixed_precision"]),
        "device": result["device"],
        "s/step": f"{result['seconds_per_step']:.4f}",
        **{name: f"{result['shares'][name]:.1%}" for name in COLUMNS},
        "not the network": f"{result['outside']:.1%}",
        "without other networks": f"{outside:.1%}",
        f"below {result['goal']:.0%}": "yes" if outside < result["goal"] else "no",
        "products": "" if products is None else f"{products:.0%}",
    }
