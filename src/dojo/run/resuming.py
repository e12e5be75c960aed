"""Whether a run can go on from a checkpoint exactly: asked before the work that it would cost."""

from __future__ import annotations

from pathlib import Path

from dojo.cli import UserError
from dojo.lazy import accelerate
from dojo.run import checkpoint
from dojo.run.optim import OptimArgs, Span, new_span
from dojo.run.processes import Processes
from dojo.run.replicas import Replicas


def check(
    folder: Path,
    here: checkpoint.State,
    optim: OptimArgs,
    num_steps: int,
    processes: Processes,
    replicas: Replicas,
) -> Span:
    """Refuses what could not go on exactly: a collective.

    Args:
        folder: the checkpoint.
        here: where the run stands, in its own words.
        num_steps: the run's length.
        replicas: how the processes share the work now.
    Returns:
        The optimizer steps that the learning rate's schedule runs over.
    Raises:
        UserError: the checkpoint is damaged; or saying with which options it could go on.
    """

    _check_whole(folder, processes)
    replicas.check_resume(folder)
    saved = checkpoint.read_state(folder)
    checkpoint.check_batches(folder, saved, here, processes.accelerator.num_processes)
    made = Span(saved.lr_start, saved.lr_steps)
    span = new_span(optim, made, saved.step, num_steps)
    if made.steps and span != made:
        begun = f"from step {span.start} " if span.start else ""
        processes.say(
            f"the run was {made.start + made.steps} steps long and is {num_steps} now; "
            f"--lr_scheduler {optim.lr_scheduler} runs {begun}over {span.steps}"
        )
    return span


def _check_whole(folder: Path, processes: Processes) -> None:
    """Reads the checkpoint, each process a share of its files; what one refuses, all refuse."""
    trouble = ""
    try:
        if not checkpoint.check_whole(folder, **processes.share):
            processes.say(f"{folder} has no checksums yet: whether it is whole is not known")
    except UserError as error:
        trouble = str(error)
    if processes.accelerator.num_processes > 1:
        trouble = next(filter(None, accelerate.utils.gather_object([trouble])), "")
    if trouble:
        raise UserError(trouble)
