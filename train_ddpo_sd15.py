"""DDPO for Stable Diffusion 1.5, with any mix of rewards.

Pictures of prompts drawn at random are sampled by DDIM with fresh noise at every step (`--eta`), so
that a step is a draw from a Gaussian; a picture that scores better than its prompt's pictures did
of late has its steps made likelier (Black et al. 2023, arXiv:2305.13301; DDIM's step is Equation 12
of arXiv:2010.02502, the clipped surrogate PPO's, arXiv:1707.06347):

    x' = sqrt(abar') x0 + sqrt(1 - abar' - std^2) eps + std z,    std = eta times that of DDPM
    A = (reward - mean of the prompt's buffer) / std,    r = p_new(x' | x) / p_old(x' | x)
    loss = max(-A r, -A clip(r, 1 - c, 1 + c))

x0 and eps are what the guided network points to, in sampling and in training. A prompt that has
been seen too seldom is judged by all pictures of the epoch; `--baseline group` compares the
`--group_size` pictures of a prompt with each other instead, which is GRPO.
TRL's and ddpo-pytorch's names of options are answered with those of this script.

    accelerate launch train_ddpo_sd15.py --pretrained_model_name_or_path models/pocket-sd15 \
        --prompt_set pocket --reward jpeg_compressibility --resolution 64 \
        --output_dir outputs/ddpo-sd15
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dojo import cli, data, finetune, publish, rewards, rng
from dojo.inputs import prompts, texts
from dojo.launch import interrupt
from dojo.lazy import torch
from dojo.maths import denoising, rollout
from dojo.maths.advantages import PromptBuffer
from dojo.maths.surrogate import log_ratio
from dojo.methods import rl
from dojo.methods.drawing import evaluator
from dojo.models import sd15
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd15.ModelArgs
    run: RunArgs
    prompts: prompts.PromptArgs
    cache: data.TextCacheArgs
    reward: rewards.RewardArgs
    sample: rl.DiffusionDdpoSampleArgs
    rollout: rl.DiffusionRolloutArgs
    ddpo: rl.DdpoArgs
    finetune: finetune.FinetuneArgs
    lora: rl.PolicyLoraArgs
    full: finetune.FileArgs
    optim: OptimArgs
    ema: EmaArgs
    evaluation: rl.EvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = sd15.open_model(args.model)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained = finetune.choose(args.finetune, run, lora=args.lora, full=args.full)
    trained.check(args.optim)

    # ------------------------------------------------------------------------------ prompts
    source = prompts.open_together(run, args.prompts)
    least = args.ddpo.min_group
    args.sample.check(args.optim, run.accelerator.num_processes, min_group=least)
    size, shape = args.sample.size, finetune.shape_of(run, model, args.sample.size)
    objective = model.objective(size)
    batch_size, train_batch_size = args.sample.batch_size(args.optim), args.optim.train_batch_size
    passes = args.ddpo.num_inner_epochs
    rl.plan(run, args.sample, args.optim, source, passes)
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(rl.episode_cost, run, trained, model, args, passes)
    needs = partial(rl.needs, run, model, args)
    if not finetune.begin(run, args, trained, cost, needs):
        return
    reward, *watched = args.reward.load(run.device, *args.evaluation.held_out_rewards)
    rewards.check_prompts(run.say, reward, source.train, args.sample.max_invalid)
    words = [*source.texts, args.sample.negative_prompt]
    embed = texts.prepare(run, model, args.cache, [words])

    # -------------------------------------------------------------------------------- model
    vae = model.load_vae(run.device)
    trained.load(model, objective)
    buffer = PromptBuffer(args.ddpo.buffer_size, args.ddpo.buffer_min_count)
    # A batch is learned from in all its trained steps, a backward pass each.
    backwards, parts = len(args.rollout.trained_steps(run.seed, 0)), {rl.BUFFER: buffer}
    learner = Learner(run, trained, args.optim, args.ema, passes=backwards, parts=parts)
    steering = args.sample.steering(model, embed, run.dtype)
    steered = args.evaluation.steered(steering)
    evaluate = evaluator(
        run, args.evaluation, source.held_out, [reward, *watched], steered, trained, vae, batch_size
    )
    way = denoising.Way.of(
        *(objective.schedule, args.rollout.sample_steps),
        eta=args.rollout.eta,
        offset=model.steps_offset,
        prediction=objective.prediction_type,
    )
    copies = args.sample.copies

    # --------------------------------------------------------------------------------- loop
    due = args.evaluation.due(run.epoch) or run.step >= run.num_steps
    learner.catch_up(evaluate, due=due)
    for epoch in run.epochs():
        began = run.step
        plan = args.rollout.plan(way, run.seed, epoch)
        count = args.sample.num_prompts_per_epoch
        drawn = source.draw(run.seed, epoch, count, replace=args.ddpo.repeats_prompts)
        scoring = rl.Scoring(run, reward, args.sample.max_invalid)
        chunks: list[rl.Chunk] = []
        with learner.asked_freely():
            for batch in rl.batches(run, args.sample, source.train, drawn, epoch, batch_size):
                with run.phase("sample", wait=True):
                    predict = steering(trained.network, batch.texts)
                    noise = rng.normal(shape, batch.noise_keys(run, copies), run.device)
                    keys = batch.keys(run, "way")
                    trajectory = rollout.sample(predict, noise, plan, keys, copies=copies)
                    again = partial(steering, trained.network)
                    chunks += rl.split(batch, trajectory, train_batch_size, again)
                with run.phase("decode", wait=True), torch.no_grad():
                    images = model.decode(vae, trajectory.final)  # [B, 3, H, W]
                scoring.submit(batch, images)
            with run.phase("reward"):
                scores = scoring.collect()

        advantages = args.ddpo.judge(buffer, scores)
        run.note({**scores.row(), **advantages.row()})

        for chunk in rl.shuffled(chunks, run, epoch, passes):
            predict = steering(learner.network, chunk.batch.texts)
            advantage = advantages.at(chunk.batch.places, args.ddpo.adv_clip_max).to(run.device)
            for number, step in chunk.steps.items():
                with learner.accumulate():
                    new, _ = rollout.predict(predict, step.latents, number, plan, step.copies)
                    moved = log_ratio(new, step.policy, step.reached, args.ddpo.ratio)
                    surrogate = args.ddpo.surrogate(moved, advantage, new.kl(step.policy))
                    loss = plan.weight(number) * surrogate.loss.mean()
                    rl.record(run, surrogate, fresh=run.step == began)
                    learner.step(loss)
        run.log_rest()
        due = args.evaluation.due(epoch + 1) or run.step >= run.num_steps
        learner.look(evaluate, due=due)
        learner.keep(since=began)

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title=f"{model.title}, trained by DDPO",
        dataset=args.prompts.location,
        tags=("stable-diffusion", "text-to-image", "ddpo", "reinforcement-learning"),
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__, {"--list_rewards": rewards.table})
