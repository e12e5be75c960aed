"""What training a network costs, counted on the meta device; and the plan of a dry run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dojo.finetune.contract import Trained
from dojo.models.family import Model
from dojo.run.cost import Cost
from dojo.run.dry_run import print_plan
from dojo.run.phases import Needs
from dojo.run.run import Run


def cost_of(
    run: Run,
    trained: Trained,
    model: Model,
    rows: int,
    shape: tuple[int, int, int],
    *,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The network as it will be trained, and the cost of a forward and backward pass of some rows.

    Args:
        shape: [C, h, w] of a latent.
    """
    network, cost = model.training_cost(
        run.dtype, trained.adapt, rows, shape, checkpointing=checkpointing
    )
    return trained.stored(network), cost


def begin(
    run: Run,
    args: Any,
    trained: Trained,
    cost: Callable[..., tuple[Any, Cost]],
    needs: Callable[[], Needs],
    *,
    with_reference: bool = False,
) -> bool:
    """Prints the plan of a dry run, or opens the output folder (`Run.begin`).

    Args:
        args: the script's options.
        cost: that of a training batch, by whether activations are recomputed (`checkpointing`).
        needs: what is held beside the network.
        with_reference: whether the model as it was is asked for.
    Returns:
        Whether there is something to train.
    Raises:
        UserError: the folder holds another run.
    """
    batch_size = args.optim.train_batch_size
    if args.run.dry_run:
        planned = cost(checkpointing=args.model.gradient_checkpointing)
        state = trained.bytes_per_weight(args.optim, args.ema, with_reference=with_reference)
        print_plan(run, args, *planned, batch_size, needs=needs(), bytes_per_weight=state)
        return False
    if not run.begin(args, trained.result_name):
        return False
    run.watch_flops(lambda: cost(checkpointing=False)[1], batch_size)
    return True
