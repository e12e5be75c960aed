"""Flow-GRPO for Stable Diffusion 3 and 3.5, with any mix of rewards.

Several pictures of each prompt are sampled with noise on their way, so that every step is a draw
from a Gaussian; a picture that scores better than the others of its prompt has its steps made
likelier (Liu et al. 2025, arXiv:2505.05470; the clipped surrogate is PPO's, arXiv:1707.06347):

    A = (reward - mean of the group) / std,    r = p_new(x' | x) / p_old(x' | x)
    loss = max(-A r, -A clip(r, 1 - c, 1 + c)) + beta KL(new || reference)

By default only a window of a few noisy steps is trained, without guidance, and noise is drawn by
coefficients-preserving sampling: three to four times less work than all steps with guidance.

    accelerate launch train_grpo_sd3.py --pretrained_model_name_or_path models/pocket-sd3 \
        --prompt_set pocket --reward pocket --resolution 64 --output_dir outputs/grpo
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from dojo import cli, data, finetune, publish, rewards, rng
from dojo.cli import ranges
from dojo.inputs import prompts, texts
from dojo.launch import interrupt
from dojo.lazy import torch
from dojo.maths import rollout
from dojo.maths.advantages import Spread, decoupled_advantages, group_advantages
from dojo.maths.flow import squared_error
from dojo.maths.surrogate import log_ratio
from dojo.methods import rl
from dojo.methods.drawing import evaluator
from dojo.models import sd3
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start


@dataclass(frozen=True, kw_only=True)
class GrpoArgs(rl.PolicyArgs):
    """Advantages, the surrogate, and the tie to the model as it was."""

    advantage_std: Spread = "group"
    """what a picture's distance from its group's mean reward is divided by: the std of the group,
    or of all pictures of the epoch (global), where prompts that hardly differ count little"""
    reward_aggregation: Literal["sum", "gdpo"] = "sum"
    """several rewards: their weighted sum, or each normalised within its groups first (GDPO), so
    that weights and not scales decide"""
    beta: float = 0.0
    """weight of the divergence from the base model (without adapters); at 0 it drifts further"""
    kl: Literal["velocity", "transition"] = "velocity"
    """that divergence: the mean squared difference of the velocities (beta about 1e-3), or the
    exact one of the transitions (about 1e-2)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ValueError("--beta must not be negative")
        if not self.beta:
            ranges.check_unread(self, "kl", "without --beta")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd3.ModelArgs
    text: sd3.TextArgs
    run: RunArgs
    prompts: prompts.PromptArgs
    cache: data.TextCacheArgs
    reward: rewards.RewardArgs
    sample: rl.WaySampleArgs
    rollout: rl.RolloutArgs
    grpo: GrpoArgs
    finetune: finetune.FinetuneArgs
    lora: rl.PolicyLoraArgs
    full: finetune.FullArgs
    optim: OptimArgs
    ema: EmaArgs
    evaluation: rl.EvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = sd3.open_model(args.model, args.text)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained = finetune.choose(args.finetune, run, lora=args.lora, full=args.full)
    trained.check(args.optim)
    with_reference = args.grpo.beta > 0

    # ------------------------------------------------------------------------------ prompts
    source = prompts.open_together(run, args.prompts)
    args.sample.check(args.optim, run.accelerator.num_processes, min_group=2)
    size, shape = args.sample.size, finetune.shape_of(run, model, args.sample.size)
    objective = model.objective(size, sd3.NoiseArgs(flow_shift=args.sample.flow_shift))
    batch_size, train_batch_size = args.sample.batch_size(args.optim), args.optim.train_batch_size
    passes = args.grpo.num_inner_epochs
    rl.plan(run, args.sample, args.optim, source, passes)
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(
        rl.episode_cost, run, trained, model, args, passes, with_reference=with_reference
    )
    needs = partial(rl.needs, run, model, args)
    if not finetune.begin(run, args, trained, cost, needs, with_reference=with_reference):
        return
    reward, *watched = args.reward.load(run.device, *args.evaluation.held_out_rewards)
    rewards.check_prompts(run.say, reward, source.train, args.sample.max_invalid)
    words = [*source.texts, args.sample.negative_prompt]
    embed = texts.prepare(run, model, args.cache, [words])

    # -------------------------------------------------------------------------------- model
    vae = model.load_vae(run.device)
    trained.load(model, objective, with_reference=with_reference)
    # A batch is learned from in all its trained steps, a backward pass each.
    backwards = len(args.rollout.trained_steps(run.seed, 0))
    learner = Learner(run, trained, args.optim, args.ema, passes=backwards)
    steering = args.sample.steering(model, embed, run.dtype)
    steered = args.evaluation.steered(steering)
    evaluate = evaluator(
        run, args.evaluation, source.held_out, [reward, *watched], steered, trained, vae, batch_size
    )
    copies = args.sample.copies

    # --------------------------------------------------------------------------------- loop
    due = args.evaluation.due(run.epoch) or run.step >= run.num_steps
    learner.catch_up(evaluate, due=due)
    for epoch in run.epochs():
        began = run.step
        plan = args.rollout.plan(objective.shift, run.seed, epoch)
        drawn = source.draw(run.seed, epoch, args.sample.num_prompts_per_epoch, replace=False)
        scoring = rl.Scoring(run, reward, args.sample.max_invalid)
        chunks: list[rl.Chunk] = []
        with learner.asked_freely():
            for batch in rl.batches(run, args.sample, source.train, drawn, epoch, batch_size):
                with run.phase("sample", wait=True):
                    velocity = steering(trained.network, batch.texts)
                    noise = rng.normal(shape, batch.noise_keys(run, copies), run.device)
                    keys = batch.keys(run, "way")
                    trajectory = rollout.sample(velocity, noise, plan, keys, copies=copies)
                    again = partial(steering, trained.network)
                    chunks += rl.split(batch, trajectory, train_batch_size, again)
                with run.phase("decode", wait=True), torch.no_grad():
                    images = model.decode(vae, trajectory.final)  # [B, 3, H, W]
                scoring.submit(batch, images)
            with run.phase("reward"):
                scores = scoring.collect()

        groups = (scores.prompt_ids, scores.valid, args.grpo.advantage_std)
        if args.grpo.reward_aggregation == "gdpo":
            advantages = decoupled_advantages(*scores.table(reward.weights), *groups)
        else:
            advantages = group_advantages(scores.scores, *groups)
        run.note({**scores.row(), **advantages.row()})

        for chunk in rl.shuffled(chunks, run, epoch, passes):
            embeds = steering.embeds(chunk.batch.texts)
            velocity = steering.predictor(learner.network, embeds)
            advantage = advantages.at(chunk.batch.places, args.grpo.adv_clip_max).to(run.device)
            for number, step in chunk.steps.items():
                with learner.accumulate():
                    new, predicted = rollout.predict(
                        velocity, step.latents, number, plan, step.copies
                    )
                    moved = log_ratio(new, step.policy, step.reached, args.grpo.ratio)
                    surrogate = args.grpo.surrogate(moved, advantage, new.kl(step.policy))
                    loss = plan.weight(number) * surrogate.loss.mean()
                    rl.record(run, surrogate, fresh=run.step == began)
                    if args.grpo.beta:
                        reference, own = rl.reference(
                            run, trained, steering, embeds, step, number, plan
                        )
                        exact = args.grpo.kl == "transition"
                        kl = new.kl(reference) if exact else squared_error(predicted, own)
                        loss = loss + args.grpo.beta * kl.mean()
                        run.average(kl=kl)
                    learner.step(loss)
        run.log_rest()
        due = args.evaluation.due(epoch + 1) or run.step >= run.num_steps
        learner.look(evaluate, due=due)
        learner.keep(since=began)

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title="Stable Diffusion 3, trained by Flow-GRPO",
        dataset=args.prompts.location,
        tags=("stable-diffusion-3", "text-to-image", "grpo", "reinforcement-learning"),
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__, {"--list_rewards": rewards.table})
