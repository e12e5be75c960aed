"""ReFL for Stable Diffusion 1.5: a reward is back-propagated into the last steps of sampling.

Pictures are denoised without gradients up to a step drawn from the last quarter. There one more
prediction, with gradients, points to a clean picture; it is decoded and scored, and the score's own
gradient teaches the network (Xu et al. 2023, arXiv:2304.05977, Algorithm 1 and Equation 5):

    x0 = (x_t - sqrt(1 - abar_t) eps(x_t, t, prompt)) / sqrt(abar_t)
    loss = grad_scale relu(margin - r(decode(x0), prompt)) + pretrain_weight |eps(z_s, s, c) - e|^2

The second term needs captioned pictures (`--pretrain_data_dir`); the authors' public code has left
it out. `--grad_steps K` with the last step learns through a chain, as DRaFT-K does
(arXiv:2309.17400). Any reward that gradients pass may be taken, `--list_rewards` tells which.

    accelerate launch train_refl_sd15.py --pretrained_model_name_or_path models/pocket-sd15 \
        --prompt_set pocket --reward "clip[model=models/pocket-clip]" --resolution 64 \
        --output_dir outputs/refl
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dojo import cli, data, publish, report, rewards, rng
from dojo.evaluate import held_out as evaluation
from dojo.finetune import lora
from dojo.finetune import weights as trained
from dojo.finetune import whole as full
from dojo.inputs import pretraining_pictures as pretraining
from dojo.inputs import prompts, steering, texts
from dojo.launch import interrupt
from dojo.maths import denoising, preference
from dojo.methods import refl as direct
from dojo.models import sd15
from dojo.run import averaging, optim
from dojo.run import run as training


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd15.ModelArgs
    run: training.RunArgs
    prompts: prompts.PromptArgs
    cache: data.CacheArgs
    reward: rewards.RewardArgs
    refl: direct.ReflArgs
    pretrain: pretraining.PretrainArgs
    finetune: direct.FinetuneArgs
    lora: lora.LoraArgs
    full: full.WholeArgs
    optim: optim.OptimArgs
    ema: averaging.EmaArgs
    evaluation: direct.EvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = training.start(args.run, args.optim)
    config = sd15.open_model(args.model)
    is_lora, size = args.finetune.use_lora, (args.refl.resolution, args.refl.resolution)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained.check(run, args, is_lora=is_lora)
    shape = config.latent_shape(*size)

    # ------------------------------------------------------------------------------ prompts
    with run.accelerator.main_process_first():
        source = prompts.open_prompts(args.prompts)
    run.say(source.description)
    batch_size = args.optim.train_batch_size
    pictures = None
    if not args.run.dry_run:
        pictures = pretraining.open_pictures(run, config, args.pretrain, args.cache, size)
    known = source.fingerprint + (pictures.fingerprint if pictures else "")
    together = {"train_batch_size": batch_size}
    run.plan(args.optim, len(source.train), known, together=together)
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(
        direct.reward_cost,
        *(run, config, args, batch_size, shape),
        grad_steps=args.refl.grad_steps,
        other_steps=sum(args.refl.steps) / 2 + 1 - args.refl.grad_steps,
        guided=args.refl.guidance_scale > 1,
    )
    if args.run.dry_run:
        planned: tuple[Any, Any] = cost(checkpointing=args.model.gradient_checkpointing)
        state = trained.bytes_per_weight(run, args, is_lora=is_lora, with_reference=False)
        loaded = args.reward.load(run.device, *args.evaluation.held_out_rewards)
        loaded[0].require_differentiable()
        needs = direct.needs(
            *(run, config, args.model, size, loaded),
            encoded=data.encoded_at_a_time(size) * bool(args.pretrain.location),
            decoded=args.evaluation.eval_batch_size or batch_size,
        )
        return training.print_plan(
            run, args, *planned, batch_size, needs=needs, bytes_per_weight=state
        )
    stream = partial(source.stream, run.seed, batch_size, **run.share)
    next(stream())  # refuses a batch that is larger than the set
    if not run.begin(args, trained.result_name(is_lora=is_lora)):
        return None
    reward, *watched = args.reward.load(run.device, *args.evaluation.held_out_rewards)
    reward.require_differentiable()
    rewards.check_prompts(run.say, reward, source.train)
    margin = reward.good_enough if args.refl.margin is None else args.refl.margin
    run.say(f"margin: {'none, the score is maximised' if margin is None else f'{margin:g}'}")

    # -------------------------------------------------------------------------------- model
    vae = sd15.load_vae(
        config, args.model, run.device, checkpointing=args.model.gradient_checkpointing
    )
    if pictures is not None:
        pictures.prepare(run, config, vae, args.model.vae_dtype, args.cache)
    others = ["", args.refl.negative_prompt, args.evaluation.eval_negative_prompt]
    words = [*(pictures.texts if pictures else ()), *others]
    embed = texts.prepare_sd15(run, config, args.model, args.cache, [source.texts, words])
    family = trained.Sd15Family(config, args.model)
    policy = trained.Trained(run, family, args, is_lora=is_lora, with_reference=False)
    optimizer, schedule = optim.make(policy.params, args.optim, run)
    averaged = averaging.Averaged(policy.params, args.ema, optimizer)
    run.watch_flops(lambda: cost(checkpointing=False)[1], batch_size)

    def save(folder: Path) -> None:
        policy.save(folder, averaged)

    def restore(folder: Path) -> None:
        policy.restore(folder, averaged)

    run.resume(restore, optimizer, schedule, averaged.shadows)
    model, optimizer = run.accelerator.prepare(policy.network, optimizer)
    way = denoising.Way.of(
        *(config.schedule, args.refl.sample_steps),
        eta=float(args.refl.sampler == "ddpm"),
        offset=config.steps_offset,
    )
    evaluate = direct.evaluator(
        run, config, vae, args, source.held_out, [reward, *watched], embed, policy, size
    )
    keep = partial(run.save_checkpoint, save, optimizer, schedule)
    guidance = {
        "guidance_scale": args.refl.guidance_scale,
        "negative_prompt": args.refl.negative_prompt,
    }
    right = pictures.batches(run, batch_size) if pictures else None

    # --------------------------------------------------------------------------------- loop
    with averaged.applied():
        evaluate.catch_up(due=args.evaluation.due(run.step, run.num_steps))
    micro_batch = batch_size * run.accelerator.num_processes
    for places, batch in run.batches(stream(first_batch=run.samples // micro_batch)):
        captions = [prompt.text for prompt in batch]
        with run.accelerator.accumulate(model):
            scored = args.refl.draw(run.seed, places[0] // micro_batch)
            epsilon = steering.predictor(model, embed, captions, run.dtype, **guidance)
            noise = rng.normal(shape, run.keys("noise", places), run.device)
            clean = denoising.estimate(
                *(epsilon, noise, way, run.keys("way", places)),
                last=scored,
                grad_steps=args.refl.grad_steps,
            )
            images = sd15.decode(vae, config, clean)  # [B, 3, H, W]
            stopping = run.kept_when_stopped(partial(keep, now=True))
            with stopping, run.phase("reward", wait=True), evaluation.together(run):
                output = reward(images, captions, [prompt.metadata for prompt in batch])
            direct.pull_only(images, output.valid)
            missing = preference.shortfall(output.scores, margin)  # [B]
            counted = output.valid.sum().clamp(min=1)
            loss = args.refl.grad_scale * (missing * output.valid).sum() / counted
            direct.record(run, output, missing, margin)

            if right is not None:
                errors = direct.pretraining_errors(run, config, vae, model, embed, next(right))
                loss = loss + args.pretrain.pretrain_weight * errors.mean()
                run.average(pretrain_loss=errors)

            grad_norm = run.update(
                loss, policy.params, optimizer, schedule, args.optim.max_grad_norm
            )
        if grad_norm is None:
            continue
        averaged.update(run.step)
        run.log_step(optim.learning_rate(optimizer), grad_norm)
        if run.pictures_due(args.evaluation.due(run.step, run.num_steps)):
            with run.kept_when_stopped(partial(keep, now=True)), averaged.applied():
                evaluate()
        keep()

    # ------------------------------------------------------------------------------- result
    if run.main:
        with averaged.applied():
            result = policy.save_result(args.run.output_dir)
        evaluate.finish()
        publish.write_card(
            args.run.output_dir,
            title="Stable Diffusion 1.5, trained by ReFL",
            base_model=args.model.pretrained_model_name_or_path,
            dataset=args.prompts.location,
            options=training.options(args),
            steps=run.step,
            repo_id=args.publish.hub_model_id,
            tags=("stable-diffusion", "text-to-image", "refl", "reward-fine-tuning"),
            weights=policy.card_weights,
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
