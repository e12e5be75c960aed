"""What training a network costs, counted on the meta device; and the plan of a dry run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dojo import loading
from dojo.cli import UserError
from dojo.finetune import fit, offload
from dojo.lazy import torch
from dojo.models import attention
from dojo.run.dry_run import print_plan
from dojo.run.processes import ABOUT_SIZE

if TYPE_CHECKING:
    from torch import nn

    from dojo.finetune.contract import Trained
    from dojo.models.family import Model
    from dojo.run.cost import Cost
    from dojo.run.phases import Needs
    from dojo.run.run import Run


def shape_of(run: Run, model: Model, size: tuple[int, int]) -> tuple[int, int, int]:
    """[C, h, w] of the largest pictures; what the user should hear about their size is said.

    Args:
        size: height and width in pixels.
    Raises:
        UserError: the model takes no such size.
    """
    shape = model.latent_shape(*size)
    if (said := model.remark(*size)) is not None:
        run.say_once(ABOUT_SIZE, said)
    return shape


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

    def adapt(network: nn.Module) -> None:
        trained.adapt(network)
        trained.stored(network)
        if model.args.activations_on_cpu:
            offload.keep_activations_on_cpu(network)

    return model.training_cost(run.dtype, adapt, rows, shape, checkpointing=checkpointing)


def begin(
    run: Run,
    args: Any,
    trained: Trained,
    cost: Callable[..., tuple[Any, Cost]],
    needs: Callable[[], Needs],
    *,
    with_reference: bool = False,
    lagged: bool = False,
) -> bool:
    """Prints the plan of a dry run, or opens the output folder (`Run.begin`).

    Args:
        args: the script's options.
        cost: that of a training batch, by whether activations are recomputed (`checkpointing`).
        needs: what is held beside the network.
        with_reference: whether the model as it was is asked for.
        lagged: whether a second set of the trained weights is kept.
    Returns:
        Whether there is something to train.
    Raises:
        UserError: the folder holds another run, the trained weights cannot lag, or attention cannot
            be computed as it should.
        Planned: a plan for `--fit` ends here.
    """
    trained.check_model(args.model)
    attention.check_run(args, run.device, run.dtype)
    if lagged:
        _check_lagged(trained, shard=args.run.shard)
    batch_size = args.optim.train_batch_size
    if args.run.dry_run:
        state = trained.bytes_per_weight(args.optim, args.ema) + trained.dtype.itemsize * lagged
        if fit.asked():
            raise fit.Planned(fit.Tried(args, trained, cost, needs(), state, with_reference))
        network, counted = cost(checkpointing=args.model.gradient_checkpointing)
        how = (args.optim, args.ema, with_reference)
        held = fit.held(trained, network, counted, state, *how)
        print_plan(run, args, held, counted, batch_size, needs=needs(), beside=trained.beside)
        return False
    if not run.begin(args, trained.result_name):
        return False
    loading.settle()
    run.watch_flops(lambda: cost(checkpointing=False)[1], batch_size)
    return True


def _check_lagged(trained: Trained, *, shard: bool) -> None:
    if shard:
        raise UserError(
            "--shard does not work with an old policy: it changes places with the trained weights "
            "whole, and a process has parts of them"
        )
    if trained.dtype != torch.float32:
        raise UserError(
            "--train_dtype bf16: the policy that lags behind moves in steps that bfloat16 rounds "
            "away; leave it at fp32"
        )
