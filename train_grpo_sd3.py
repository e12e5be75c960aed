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
from pathlib import Path
from typing import Literal

from dojo import cli, data, publish, report, rewards, rng
from dojo.finetune import whole as full
from dojo.inputs import prompts, texts
from dojo.launch import interrupt
from dojo.maths import advantages as policy
from dojo.maths import rollout
from dojo.methods import rl
from dojo.models import sd3
from dojo.run import averaging, optim
from dojo.run import run as training


@dataclass(frozen=True, kw_only=True)
class GrpoArgs(rl.PolicyArgs):
    """Advantages, the clipped surrogate, and the tie to the model as it was."""

    advantage_std: policy.Spread = "group"
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


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd3.ModelArgs
    text: sd3.TextArgs
    run: training.RunArgs
    prompts: prompts.PromptArgs
    cache: data.TextCacheArgs
    reward: rewards.RewardArgs
    sample: rl.SampleArgs
    rollout: rollout.RolloutArgs
    grpo: GrpoArgs
    finetune: rl.FinetuneArgs
    lora: rl.PolicyLoraArgs
    full: full.FullArgs
    optim: optim.OptimArgs
    ema: averaging.EmaArgs
    evaluation: rl.EvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = training.start(args.run, args.optim)
    config = sd3.open_model(args.model)
    args.publish.check(args.run.output_dir, args.run.report_to)
    rl.check(run, args, is_lora=args.finetune.is_lora)

    # ------------------------------------------------------------------------------ prompts
    with run.accelerator.main_process_first():
        source = prompts.open_prompts(args.prompts)
    run.say(source.description)
    args.sample.check(args.optim, run.accelerator.num_processes, min_group=2)
    shape = config.latent_shape(*args.sample.size)
    shift = config.shift(args.sample.flow_shift, *args.sample.size)
    batch_size, train_batch_size = args.sample.batch_size(args.optim), args.optim.train_batch_size
    uses = args.sample.samples * args.grpo.num_inner_epochs
    together = {"train_batch_size": train_batch_size, "sample_batch_size": batch_size}
    run.plan(args.optim, uses, source.fingerprint, whole_epochs=True, together=together)
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(
        rl.episode_cost,
        *(run, config, args, args.sample, args.rollout, train_batch_size),
        num_inner_epochs=args.grpo.num_inner_epochs,
        with_reference=args.grpo.beta > 0,
    )
    if args.run.dry_run:
        planned = cost(checkpointing=args.model.gradient_checkpointing)
        state = rl.bytes_per_weight(
            run, args, is_lora=args.finetune.is_lora, with_reference=args.grpo.beta > 0
        )
        needs = rl.needs(run, config, args)
        return training.print_plan(
            run, args, *planned, train_batch_size, needs=needs, bytes_per_weight=state
        )
    if not run.begin(args, rl.result_name(is_lora=args.finetune.is_lora)):
        return None
    reward, *watched = args.reward.load(run.device, *args.evaluation.held_out_rewards)
    rewards.check_prompts(run.say, reward, source.train, args.sample.max_invalid)
    words = [*source.texts, args.sample.negative_prompt]
    embed = texts.prepare(run, config, args.model, args.text, args.cache, [words])

    # -------------------------------------------------------------------------------- model
    vae = sd3.load_vae(config, args.model, run.device)
    trained = rl.Trained(run, config, args, shift, with_reference=args.grpo.beta > 0)
    optimizer, schedule = optim.make(trained.params, args.optim, run)
    averaged = averaging.Averaged(trained.params, args.ema, optimizer)
    run.watch_flops(lambda: cost(checkpointing=False)[1], train_batch_size)

    def save(folder: Path) -> None:
        trained.save(folder, averaged)

    def restore(folder: Path) -> None:
        trained.restore(folder, averaged)

    run.resume(restore, optimizer, schedule, averaged.shadows)
    network = trained.network
    model, optimizer = run.accelerator.prepare(network, optimizer)
    # A batch is learned from in all its trained steps, a backward pass each.
    run.accelerator.gradient_accumulation_steps *= len(args.rollout.trained_steps(run.seed, 0))
    copies = args.sample.copies
    steering = rl.Steering.of(args.sample, embed, run.dtype)
    evaluate = rl.evaluator(
        run, config, vae, args, source.held_out, [reward, *watched], embed, trained, shift
    )
    keep = partial(run.save_checkpoint, save, optimizer, schedule)

    # --------------------------------------------------------------------------------- loop
    with averaged.applied():
        evaluate.catch_up(due=args.evaluation.due(run.epoch) or run.step >= run.num_steps)
    for epoch in run.epochs():
        began = run.step
        plan = args.rollout.plan(shift, run.seed, epoch)
        drawn = source.draw(run.seed, epoch, args.sample.num_prompts_per_epoch, replace=False)
        scoring = rl.Scoring(run, reward, args.sample.max_invalid)
        chunks: list[rl.Chunk] = []
        with run.kept_when_stopped(partial(keep, now=True)):
            for batch in rl.batches(run, args.sample, source.train, drawn, epoch, batch_size):
                with run.phase("sample", wait=True):
                    velocity = steering(network, batch.texts)
                    noise = rng.normal(shape, batch.noise_keys(run, copies), run.device)
                    way = rollout.sample(
                        velocity, noise, plan, batch.keys(run, "way"), copies=copies
                    )
                    chunks += rl.split(batch, way, train_batch_size, partial(steering, network))
                with run.phase("decode", wait=True):
                    images = sd3.decode(vae, config, way.final)  # [B, 3, H, W]
                scoring.submit(batch, images)
            with run.phase("reward"):
                scores = scoring.collect()

        groups = (scores.prompt_ids, scores.valid, args.grpo.advantage_std)
        if args.grpo.reward_aggregation == "gdpo":
            advantages = policy.decoupled_advantages(*scores.table(reward.weights), *groups)
        else:
            advantages = policy.group_advantages(scores.scores, *groups)
        run.note({**scores.row(), **advantages.row()})

        for chunk in rl.shuffled(chunks, run, epoch, args.grpo.num_inner_epochs):
            embeds = steering.embeds(chunk.batch.texts)
            velocity = steering.velocity(model, embeds)
            advantage = advantages.at(chunk.batch.places, args.grpo.adv_clip_max).to(run.device)
            for number, step in chunk.steps.items():
                with run.accelerator.accumulate(model):
                    now, predicted = rollout.predict(
                        velocity, step.latents, number, plan, step.copies
                    )
                    moved = policy.log_ratio(now, step.policy, step.reached, args.grpo.ratio)
                    surrogate = policy.clipped_surrogate(moved, advantage, args.grpo.clip_range)
                    loss = plan.weight(number) * surrogate.loss.mean()
                    rl.record(run, surrogate, fresh=run.step == began)
                    if args.grpo.beta:
                        then, usual = trained.before(steering, embeds, step, number, plan)
                        exact = args.grpo.kl == "transition"
                        kl = now.kl(then) if exact else policy.velocity_kl(predicted, usual)
                        loss = loss + args.grpo.beta * kl.mean()
                        run.average(kl=kl)
                    grad_norm = run.update(
                        loss, trained.params, optimizer, schedule, args.optim.max_grad_norm
                    )
                if grad_norm is None:
                    continue
                averaged.update(run.step)
                run.log_step(optim.learning_rate(optimizer), grad_norm)
        run.log_rest()
        if run.pictures_due(args.evaluation.due(epoch + 1) or run.step >= run.num_steps):
            with run.kept_when_stopped(partial(keep, now=True)), averaged.applied():
                evaluate()
        keep(since=began)

    # ------------------------------------------------------------------------------- result
    if run.main:
        with averaged.applied():
            result = trained.save_result(args.run.output_dir)
        evaluate.finish()
        publish.write_card(
            args.run.output_dir,
            title="Stable Diffusion 3, trained by Flow-GRPO",
            base_model=args.model.pretrained_model_name_or_path,
            dataset=args.prompts.location,
            options=training.options(args),
            steps=run.step,
            repo_id=args.publish.hub_model_id,
            tags=("stable-diffusion-3", "text-to-image", "grpo", "reinforcement-learning"),
            weights=trained.card_weights,
        )
        report.write(args.run.output_dir)
        run.say(f"done: {result}")
    run.finish()
    if run.main:
        publish.upload(args.run.output_dir, args.publish)
    return None


if __name__ == "__main__":
    interrupt.watch()
    cli.run(main, Args, __doc__, {"--list_rewards": rewards.table})
