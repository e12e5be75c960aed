"""What an epoch of pictures costs, per training batch, counted on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dojo import rewards
from dojo.finetune import cost_of
from dojo.inputs import texts
from dojo.lazy import torch
from dojo.maths import passes as counted
from dojo.methods.rl.finished import LevelArgs
from dojo.methods.rl.nft import NftArgs
from dojo.methods.rl.steps import DiffusionRolloutArgs, RolloutArgs

if TYPE_CHECKING:
    from dojo.finetune import Trained
    from dojo.methods.rl.args import EpochArgs
    from dojo.methods.rl.steps import StepArgs
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
    sample: EpochArgs = args.sample
    model.check_weights(model.needed)
    loaded = args.reward.load(torch.device("cpu"), *args.evaluation.held_out_rewards)
    batch_size = sample.batch_size(args.optim)
    evaluated = args.evaluation.eval_batch_size or batch_size
    rows = batch_size * (2 if sample.guidance_scale > 1 else 1)
    guidance = args.evaluation.eval_guidance_scale or sample.guidance_scale
    return model.needs(
        run.dtype,
        sample.size,
        decoded=max(batch_size, evaluated),
        rows=max(rows, evaluated * (2 if guidance > 1 else 1)),
        before_texts=["rewards"],
        batch_is_free=False,
        live_text=texts.live(model, args.cache),
        scored=True,
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
    steps: StepArgs = args.rollout
    trained_steps, sample = steps.trained_steps(args.run.seed or 0, 0), args.sample
    drawn, backward = counted.of_steps(steps.sample_steps, trained_steps, sample.copies)
    again = sample.batch_size(args.optim) != args.optim.train_batch_size
    forward = (drawn + again * backward) / passes + with_reference * backward
    guided = args.sample.guidance_scale > 1
    return _batch_cost(
        *(run, trained, model, args, backward, forward),
        rows=2 if guided else 1,
        checkpointing=checkpointing,
    )


def finished_cost(
    run: Run,
    trained: Trained,
    model: Model,
    args: Any,
    passes: int,
    asked: int,
    *,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """The same where finished pictures are learned from, without guidance in training.

    Args:
        asked: forward passes of frozen policies per picture.
    """
    levels: LevelArgs = args.levels
    branches = 2 if args.sample.guidance_scale > 1 else 1
    drawn = levels.way(1.0).predictions  # whatever the shift
    forward = (branches * drawn + asked) / passes
    backward = levels.num_train_timesteps
    return _batch_cost(
        *(run, trained, model, args, backward, forward), rows=1, checkpointing=checkpointing
    )


def passes_of(record: Mapping[str, Any]) -> float:
    """Forward passes per sampled picture of a run, its training included; see `maths.passes`.

    Args:
        record: the run's args.json.
    """
    options: dict[str, dict[str, Any]] = {
        name: {key: tuple(v) if isinstance(v, list) else v for key, v in group.items()}
        for name, group in record["args"].items()
    }
    sample, optim = options["sample"], options["optim"]
    branches = 2 if sample["guidance_scale"] > 1 else 1
    if "nft" in options:
        nft, levels = NftArgs(**options["nft"]), LevelArgs(**options["levels"])
        uses, number = nft.num_inner_epochs, levels.num_train_timesteps
        at_once = optim["train_batch_size"] * optim["gradient_accumulation_steps"]
        pictures = sample["num_prompts_per_epoch"] * sample["group_size"]
        steps = uses * pictures / (at_once * record["num_processes"])
        asked = sum(nft.asked(number, steps).values())
        drawn = levels.way(1.0).predictions
        return counted.of_finished(drawn, number, asked, branches=branches, uses=uses)
    policy = options.get("grpo") or options["ddpo"]
    diffusion = "eta" in options["rollout"]
    way = (DiffusionRolloutArgs if diffusion else RolloutArgs)(**options["rollout"])
    return counted.of_way(
        way.sample_steps,
        way.trained_steps(record["args"]["run"]["seed"] or 0, 0),
        copies=sample["group_size"] if sample["branch"] else 1,
        branches=branches,
        again=sample["sample_batch_size"] not in (None, optim["train_batch_size"]),
        tied=policy.get("beta", 0) > 0,
        uses=policy["num_inner_epochs"],
    )


def _batch_cost(
    run: Run,
    trained: Trained,
    model: Model,
    args: Any,
    backward: float,
    forward: float,
    *,
    rows: int,
    checkpointing: bool,
) -> tuple[Any, Cost]:
    """Of a training batch with so many passes per picture; `rows` of the network's each."""
    shape = model.latent_shape(*args.sample.size)
    rows *= args.optim.train_batch_size
    network, step = cost_of(run, trained, model, rows, shape, checkpointing=checkpointing)
    flops = backward * step.flops + forward * step.forward_flops
    return network, replace(step, flops=round(flops))
