"""What `--dry_run` prints: options, sizes, steps, memory, operations and hours."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dojo.files import records
from dojo.run import folders, machine, phases

if TYPE_CHECKING:
    from dojo.run.cost import Cost
    from dojo.run.phases import Held, Needs
    from dojo.run.run import Run


def print_plan(
    run: Run,
    args: Any,
    held: Held,
    cost: Cost,
    batch_size: int,
    *,
    needs: Needs,
    beside: int = 0,
) -> None:
    """Prints what `--dry_run` promises: options, sizes, steps, memory, operations and hours.

    Args:
        held: what training holds of the network.
        cost: of a micro-batch of `batch_size`.
        needs: what is held beside the network.
        beside: numbers that are trained outside of it.
    Raises:
        UserError: the run would be refused: its folder, or the checkpoint that it goes on from.
    """
    params = list(held.network.parameters())
    micro_batches = run.samples_per_step / batch_size / run.accelerator.num_processes
    trained = beside + sum(one.numel() for one in params if one.requires_grad)
    rows = [
        f"trainable parameters: {trained:,}",
        f"total parameters: {sum(one.numel() for one in params):,}",
        f"effective batch size: {run.samples_per_step}",
        f"optimizer steps: {run.num_steps}",
        f"steps per epoch: {run.epoch_length:.2f}",
        *phases.table(phases.compute(needs, held)),
        f"operations per process and step: {cost.flops * micro_batches / 1e12:.3f} TFLOP",
        f"hours to finish: {hours(run, cost.flops * micro_batches)}",
    ]
    run.say(json.dumps(folders.options(args), indent=1, ensure_ascii=False))
    for row in rows:
        run.say(row)
    run.check_folder(args)  # refuses what `begin` would refuse


def hours(run: Run, flops: float) -> str:
    """What is left of the run in hours, in words, where a speed is known.

    Args:
        flops: operations per process and step.
    """
    rows, _ = records.read_rows(run.output_dir / "metrics.jsonl")
    speeds = [row["images_per_s"] for row in rows if row.get("images_per_s")]
    done = max((int(row["step"]) for row in rows), default=0)
    if speeds:
        left = max(0, run.num_steps - done) * run.samples_per_step / speeds[-1]
        return f"{left / 3600:.1f} (at the {speeds[-1]:.1f} images/s of this folder's run)"
    if peak := machine.device_peak_flops(run.device):
        least = run.num_steps * flops / peak / 3600
        return f"{least:.1f} at the least, at this GPU's peak; trainings reach a part of it"
    return "not known (no earlier run in the folder, and no GPU whose peak is known)"
