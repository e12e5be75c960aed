"""What an epoch of pictures costs, per training batch, counted on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dojo import rewards
from dojo.finetune import lora
from dojo.finetune import whole as full
from dojo.maths import rollout
from dojo.methods.rl.args import SampleArgs
from dojo.methods.rl.trained import Options
from dojo.models import folder as pipelines
from dojo.models import sd3
from dojo.run import phases
from dojo.run.cost import Cost
from dojo.run.run import Run


def needs(run: Run, config: sd3.Config, args: Any) -> phases.Needs:
    """What a run of reinforcement learning holds beside its network, for the dry run.

    The rewards are loaded on the CPU, so that what they lack is said.

    Raises:
        UserError: weights are not there, or a reward cannot be loaded.
    """
    config.check_weights(("vae", *sd3.TEXT_ENCODERS[:2], "transformer"))
    sample: SampleArgs = args.sample
    loaded = args.reward.load(torch.device("cpu"), *args.evaluation.held_out_rewards)
    batch_size = sample.batch_size(args.optim)
    return phases.Needs(
        config=config,
        text=sd3.TEXT_ENCODERS,
        dtype=run.dtype,
        vae_dtype=pipelines.DTYPES[args.model.vae_dtype],
        size=sample.size,
        decoded=max(batch_size, args.evaluation.eval_batch_size or batch_size),
        scorers=rewards.networks(loaded),
    )


def episode_cost(
    run: Run,
    config: sd3.Config,
    args: Options,
    sample: SampleArgs,
    steps: rollout.RolloutArgs,
    batch_size: int,
    *,
    num_inner_epochs: int,
    with_reference: bool,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The model as it will be trained, and the cost of a training batch.

    All its trained steps, its share of the sampling, and the reference's forward passes where
    there is one. The autoencoder and the rewards are not counted.
    """
    is_lora = args.finetune.is_lora

    def adapt(model: nn.Module) -> object:
        return lora.add(model, args.lora) if is_lora else full.thaw(model, args.full)

    rows = batch_size * (2 if sample.guidance_scale > 1 else 1)
    step: Cost
    model: Any
    model, step = sd3.training_cost(
        *(config, args.model, run.dtype, adapt, rows, config.latent_shape(*sample.size)),
        checkpointing=checkpointing,
    )
    trained = len(steps.trained_steps(0, 0))
    passes = steps.sample_steps / num_inner_epochs + (trained if with_reference else 0)
    flops = trained * step.flops + passes * step.forward_flops
    if not is_lora:
        model.to(args.full.dtype)  # the frozen weights too
    return model, replace(step, flops=round(flops))
