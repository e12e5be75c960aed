"""What `--dry_run` prints: options, sizes, steps, memory, operations and hours."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from dojo.files import records
from dojo.run import folders, machine, phases
from dojo.run.cost import Cost
from dojo.run.run import Run


def print_plan(
    run: Run,
    args: Any,
    model: nn.Module,
    cost: Cost,
    batch_size: int,
    *,
    needs: phases.Needs,
    bytes_per_weight: int = 16,
) -> None:
    """Prints what `--dry_run` promises: options, sizes, steps, memory, operations and hours.

    Args:
        model: holds the parameters in the dtype that they will have.
        cost: of a micro-batch of `batch_size`.
        bytes_per_weight: what training one weight takes: itself, its gradient, the optimizer's
            state, an average.
        needs: what is held beside the network.
    Raises:
        UserError: the run would be refused: its folder, or the checkpoint that it goes on from.
    """
    total = sum(param.numel() for param in model.parameters())
    trained = [param for param in model.parameters() if param.requires_grad]
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    frozen_bytes = sum(weights.values()) - sum(weights[id(p)] for p in trained)
    trained_bytes = bytes_per_weight * sum(param.numel() for param in trained)
    kept = frozen_bytes + trained_bytes
    gib = (kept + cost.saved_bytes) / 2**30
    found = phases.memory(needs, sum(weights.values()), kept, kept + cost.saved_bytes)
    micro_batches = run.samples_per_step / batch_size / run.accelerator.num_processes
    rows = {
        "trainable parameters": f"{sum(param.numel() for param in trained):,}",
        "total parameters": f"{total:,}",
        "effective batch size": f"{run.samples_per_step}",
        "optimizer steps": f"{run.num_steps}",
        "steps per epoch": f"{run.epoch_length:.2f}",
        "memory of training per process, estimated": f"{gib:.2f} GiB (weights "
        f"{frozen_bytes / 2**30:.2f}, training state {trained_bytes / 2**30:.2f}, "
        f"activations {cost.saved_bytes / 2**30:.2f}; the autoencoder not included)",
        **phases.told(found),
        "operations per process and step": f"{cost.flops * micro_batches / 1e12:.3f} TFLOP",
        "hours to finish": hours(run, cost.flops * micro_batches),
    }
    run.say(json.dumps(folders.options(args), indent=1))
    for name, value in rows.items():
        run.say(f"{name}: {value}")
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
