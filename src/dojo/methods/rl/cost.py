"""What an epoch of pictures costs, per training batch, counted on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dojo import rewards
from dojo.finetune import Trained, cost_of
from dojo.maths.rollout import RolloutArgs
from dojo.methods.rl.args import SampleArgs
from dojo.models.family import Model
from dojo.run.cost import Cost
from dojo.run.phases import Needs
from dojo.run.run import Run


def needs(run: Run, model: Model, args: Any) -> Needs:
    """What a run of reinforcement learning holds beside its network, for the dry run.

    The rewards are loaded on the CPU, so that what they lack is said.

    Args:
        args: the script's options.
    Raises:
        UserError: weights are not there, or a reward cannot be loaded.
    """
    sample: SampleArgs = args.sample
    model.check_weights(model.needed)
    loaded = args.reward.load(torch.device("cpu"), *args.evaluation.held_out_rewards)
    batch_size = sample.batch_size(args.optim)
    return model.needs(
        run.dtype,
        sample.size,
        decoded=max(batch_size, args.evaluation.eval_batch_size or batch_size),
        scorers=rewards.networks(loaded),
    )


def episode_cost(
    run: Run,
    trained: Trained,
    model: Model,
    args: Any,
    passes: int,
    *,
    with_reference: bool = False,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The model as it will be trained, and the cost of a training batch.

    All its trained steps, its share of the sampling, and the reference's forward passes where
    there is one. The autoencoder and the rewards are not counted.

    Args:
        args: the script's options.
        passes: over the pictures of an epoch.
    """
    sample: SampleArgs = args.sample
    steps: RolloutArgs = args.rollout
    rows = args.optim.train_batch_size * (2 if sample.guidance_scale > 1 else 1)
    shape = model.latent_shape(*sample.size)
    network, step = cost_of(run, trained, model, rows, shape, checkpointing=checkpointing)
    backward = len(steps.trained_steps(0, 0))
    forward = steps.sample_steps / passes + (backward if with_reference else 0)
    flops = backward * step.flops + forward * step.forward_flops
    return network, replace(step, flops=round(flops))
