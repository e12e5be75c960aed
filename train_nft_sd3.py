"""DiffusionNFT, RAM, AWM and DGPO for Stable Diffusion 3 and 3.5: learning from finished pictures.

Pictures are drawn along the ODE, scored, and noised anew at a few levels. There the velocity is
pulled towards the picture's own, u = eps - x0, where it was better than the others of its prompt,
and away where it was worse, A = (reward - mean of the group) / std:

    nft: DiffusionNFT, two branches about the old policy     (Zheng et al. 2025, arXiv:2509.16117)
    ram: |v - (v_ref + m A (u - v_old))|^2                   (2026, arXiv:2605.10759)
    awm: max(-a r, -a clip(r)), r = exp(l(v) - l(v_sampled)) (Xue et al. 2025, arXiv:2509.25050)
    dgpo: DPO's loss of a whole group, better against worse  (Luo et al. 2025, arXiv:2510.08425)

The old policy, a second set of weights, follows slowly and draws (not for awm). The sibling that
learns from the steps of the way is `train_grpo_sd3.py`.

    accelerate launch train_nft_sd3.py --pretrained_model_name_or_path models/pocket-sd3 \
        --prompt_set pocket --reward pocket --resolution 64 --output_dir outputs/nft
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from dojo import cli, data, finetune, publish, rewards, rng
from dojo.inputs import prompts, texts
from dojo.launch import interrupt
from dojo.lazy import torch
from dojo.maths import denoising, forward
from dojo.maths.advantages import decoupled_advantages, group_advantages
from dojo.maths.flow import squared_error
from dojo.methods import rl
from dojo.models import sd3
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start

if TYPE_CHECKING:
    from torch import Tensor

LAGGED = "old.safetensors"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd3.ModelArgs
    text: sd3.TextArgs
    run: RunArgs
    prompts: prompts.PromptArgs
    cache: data.TextCacheArgs
    reward: rewards.RewardArgs
    sample: rl.SampleArgs
    levels: rl.LevelArgs
    nft: rl.NftArgs
    finetune: finetune.FinetuneArgs
    lora: rl.PolicyLoraArgs
    full: finetune.FullArgs
    optim: OptimArgs
    ema: EmaArgs
    evaluation: rl.NftEvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = sd3.open_model(args.model, args.text)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained = finetune.choose(args.finetune, run, lora=args.lora, full=args.full)
    trained.check(args.optim)

    # ------------------------------------------------------------------------------ prompts
    source = prompts.open_together(run, args.prompts)
    args.sample.check(args.optim, run.accelerator.num_processes, min_group=2)
    size, shape = args.sample.size, finetune.shape_of(run, model, args.sample.size)
    objective = model.objective(size, sd3.NoiseArgs(flow_shift=args.sample.flow_shift))
    batch_size, train_batch_size = args.sample.batch_size(args.optim), args.optim.train_batch_size
    passes, levels = args.nft.num_inner_epochs, args.levels.num_train_timesteps
    rl.plan(run, args.sample, args.optim, source, passes)
    args.ema.check(args.optim.kind, run.num_steps)
    shared = args.nft.shared(args.sample, args.optim)
    steps = passes * args.optim.epoch_length(args.sample.samples, run.accelerator.num_processes)
    asked = args.nft.asked(levels, steps)
    cost = partial(rl.finished_cost, run, trained, model, args, passes, sum(asked.values()))
    needs = partial(rl.needs, run, model, args)
    if not finetune.begin(run, args, trained, cost, needs, with_reference=True, lagged=True):
        return
    reward, *watched = args.reward.load(run.device, *args.evaluation.held_out_rewards)
    rewards.check_prompts(run.say, reward, source.train, args.sample.max_invalid)
    embed = texts.prepare(run, model, args.cache, [[*source.texts, args.sample.negative_prompt]])

    # -------------------------------------------------------------------------------- model
    vae = model.load_vae(run.device)
    trained.load(model, objective, with_reference=True)
    old = finetune.Lagged(trained.network, trained.params)
    learner = Learner(run, trained, args.optim, args.ema, passes=levels, parts={LAGGED: old})
    drawing = args.sample.steering(model, embed, run.dtype)
    steering = replace(drawing, guidance_scale=1.0)  # that of training
    scorers = [reward, *watched]
    evaluate = rl.evaluators(
        run, args.evaluation, source.held_out, scorers, drawing, trained, vae, batch_size
    )
    way = args.levels.way(objective.shift)
    as_it_is = partial(nullcontext, trained.network)
    policies = {"old": old.applied, "reference": trained.reference, "sampled": as_it_is}

    # --------------------------------------------------------------------------------- loop
    due = args.evaluation.due(run.epoch) or run.step >= run.num_steps
    learner.catch_up(*evaluate, due=due)
    for epoch in run.epochs():
        began = run.step
        drawn = source.draw(run.seed, epoch, args.sample.num_prompts_per_epoch, replace=False)
        scoring = rl.Scoring(run, reward, args.sample.max_invalid)
        made: list[tuple[rl.Batch, Tensor]] = []
        with learner.asked_freely():
            for batch in rl.batches(run, args.sample, source.train, drawn, epoch, batch_size):
                policy = old.applied if args.nft.draws_old else as_it_is
                with run.phase("sample", wait=True), policy() as network:
                    velocity = drawing(network, batch.texts)
                    noise = rng.normal(shape, batch.keys(run, "noise"), run.device)
                    made.append((batch, denoising.sample(velocity, noise, way)))
                with run.phase("decode", wait=True), torch.no_grad():
                    images = model.decode(vae, made[-1][1])  # [B, 3, H, W]
                scoring.submit(batch, images)
            with run.phase("reward"):
                scores = scoring.collect()

        groups = (scores.prompt_ids, scores.valid, args.nft.advantage_std)
        if args.nft.reward_aggregation == "gdpo":
            advantages = decoupled_advantages(*scores.table(reward.weights), *groups)
        else:
            advantages = group_advantages(scores.scores, *groups)
        run.note({**scores.row(), **advantages.row()})

        with run.phase("reference", wait=True):
            at = (made, train_batch_size, way.sigmas, objective, shared)
            chunks = rl.noised(run, args.levels, *at)
            rl.ask(run, chunks, steering, policies, asked)
        for chunk in rl.shuffled(chunks, run, epoch, passes):
            velocity = steering(learner.network, chunk.batch.texts)
            advantage = advantages.at(chunk.batch.places, args.nft.adv_clip_max).to(run.device)
            for k in range(levels):
                with learner.accumulate():
                    sigma, noisy, target = chunk.noised(run, k)
                    predicted = velocity(noisy, sigma)  # [B, ...], without guidance
                    now = predicted.detach()  # what was not asked is what the weights say now
                    said = {"old": now, "sampled": now, **chunk.at(k)}
                    loss = args.nft.loss(shared, predicted, target, sigma, advantage, said)  # [B]
                    if (reference := said.get("reference")) is not None:
                        ratio = forward.norm_ratio(predicted, reference)
                        far = squared_error(predicted, reference)
                        loss = loss + args.nft.kl_beta * far
                        loss = loss + args.nft.norm_guard * forward.norm_excess(ratio)
                        run.average(kl=far, norm_ratio=ratio)
                    run.average(
                        old_deviate=squared_error(predicted, said["old"]),
                        x0_norm=chunk.clean.square().flatten(1).mean(1).sqrt(),
                    )
                    learner.step(loss.mean())
        old.follow(args.nft.old_decay(epoch))
        run.log_rest()
        due = args.evaluation.due(epoch + 1) or run.step >= run.num_steps
        learner.look(*evaluate, due=due)
        learner.keep(since=began)

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title=f"Stable Diffusion 3, trained by {args.nft.name}",
        dataset=args.prompts.location,
        tags=("stable-diffusion-3", "text-to-image", "nft", "reinforcement-learning"),
    )
    publish.finish(run, args, learner, trained, evaluate[0], card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__, {"--list_rewards": rewards.table})
