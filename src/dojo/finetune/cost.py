"""What training a network costs, counted on the meta device; and the plan of a dry run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dojo import loading
from dojo.cli import UserError
from dojo.finetune import fit, offload
from dojo.lazy import late, torch
from dojo.models import attention
from dojo.run.dry_run import print_plan
from dojo.run.processes import ABOUT_SIZE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dojo.finetune.contract import Trained
    from dojo.models.family import Model
    from dojo.run import cost as costs
    from dojo.run.cost import Cost
    from dojo.run.phases import Needs
    from dojo.run.run import Run
else:
    costs = late("dojo.run.cost")


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

    What text encoders keep of as many captions, if something learns through them, is in its memory;
    their operations are not counted.

    Args:
        shape: [C, h, w] of a latent.
    """

    def adapt(network: nn.Module) -> None:
        trained.adapt(network)
        trained.stored(network)
        if model.args.activations_on_cpu:
            offload.keep_activations_on_cpu(network)

    network, found = model.training_cost(run.dtype, adapt, rows, shape, checkpointing=checkpointing)
    lengths, from_words = model.text_lengths, model.words is not None
    kept = sum(
        _kept_by(clip, rows, lengths[part], run.dtype, from_words=from_words)
        for part, clip in trained.text_networks().items()
    )
    return network, replace(
        found, saved_bytes=found.saved_bytes + kept, peak_bytes=found.peak_bytes + kept
    )


def _kept_by(clip: Any, captions: int, tokens: int, dtype: torch.dtype, *, from_words: bool) -> int:
    """Bytes that a text encoder keeps for its backward pass.

    Args:
        from_words: of all of it, because what its first layer gives is learned.
    """
    words = torch.empty(captions, tokens, dtype=torch.int64, device="meta")

    def loss() -> Tensor:
        return clip(words, output_hidden_states=True).last_hidden_state.sum()

    hooks: list[Any] = []
    if from_words:
        first = clip.get_input_embeddings()
        hooks.append(first.register_forward_hook(lambda _, __, given: given.requires_grad_()))
    found = costs.count_cost(loss, clip.train(), dtype)
    for hook in hooks:
        hook.remove()
    return found.saved_bytes


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
