"""ReFL for Stable Diffusion XL: a reward is back-propagated into the last steps of sampling.

Pictures are denoised without gradients up to a step drawn from the last quarter. There one more
prediction, with gradients, points to a clean picture; it is decoded and scored, and the score's own
gradient teaches the network (Xu et al. 2023, arXiv:2304.05977, Algorithm 1 and Equation 5):

    x0 = (x_t - sqrt(1 - abar_t) eps(x_t, t, prompt)) / sqrt(abar_t)
    loss = grad_scale relu(margin - r(decode(x0), prompt)) + pretrain_weight |eps(z_s, s, c) - e|^2

A model that predicts v points to x0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v, and learns v of z_s.
Pictures that are drawn count as whole ones of their size (arXiv:2307.01952, Section 2.2).
The second term needs captioned pictures (`--pretrain_data_dir`); the authors' public code has left
it out. `--grad_steps K` with the last step learns through a chain, as DRaFT-K does
(arXiv:2309.17400). Any reward that gradients pass may be taken, `--list_rewards` tells which.

    accelerate launch train_refl_sdxl.py --pretrained_model_name_or_path models/pocket-sdxl \
        --prompt_set pocket --reward "clip[model=models/pocket-clip]" --resolution 64 \
        --output_dir outputs/refl-sdxl
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from dojo import cli, data, finetune, publish, rewards, rng
from dojo.evaluate import held_out
from dojo.inputs import pretraining_pictures, prompts, texts
from dojo.inputs.steering import Steering
from dojo.launch import interrupt
from dojo.maths import denoising, preference
from dojo.methods import drawing, refl
from dojo.models import sdxl
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sdxl.ModelArgs
    text: sdxl.TextArgs
    run: RunArgs
    prompts: prompts.PromptArgs
    cache: data.CacheArgs
    reward: rewards.RewardArgs
    refl: refl.ReflArgs
    pretrain: pretraining_pictures.PretrainArgs
    finetune: finetune.FinetuneAllArgs
    lora: finetune.LoraArgs
    full: finetune.FileArgs
    optim: OptimArgs
    ema: EmaArgs
    evaluation: drawing.EvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = sdxl.open_model(args.model, args.text)
    size = (args.refl.resolution, args.refl.resolution)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained = finetune.choose(args.finetune, run, lora=args.lora, full=args.full)
    trained.check(args.optim)
    shape = finetune.shape_of(run, model, size)

    # ------------------------------------------------------------------------------ prompts
    source = prompts.open_together(run, args.prompts)
    batch_size = args.optim.train_batch_size
    pictures = None
    if not args.run.dry_run:
        pictures = pretraining_pictures.open_pictures(run, model, args.pretrain, args.cache, size)
    known = source.fingerprint + (pictures.fingerprint if pictures else "")
    run.plan(args.optim, len(source.train), known, together={"train_batch_size": batch_size})
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(refl.reward_cost, run, trained, model, args.refl, batch_size, shape)
    needs = partial(refl.needs, run, model, args, size)
    stream = partial(source.stream, run.seed, batch_size, **run.share)
    if not args.run.dry_run:
        next(stream())  # refuses a batch that is larger than the set
    if not finetune.begin(run, args, trained, cost, needs):
        return
    reward, *watched = args.reward.load(run.device, *args.evaluation.held_out_rewards)
    reward.require_differentiable()
    rewards.check_prompts(run.say, reward, source.train)
    margin = reward.good_enough if args.refl.margin is None else args.refl.margin
    run.say(f"margin: {'none, the score is maximised' if margin is None else f'{margin:g}'}")

    # -------------------------------------------------------------------------------- model
    vae = model.load_vae(run.device, checkpointing=args.model.gradient_checkpointing)
    if pictures is not None:
        pictures.prepare(run, model, vae, args.cache)
    others = ["", args.refl.negative_prompt, args.evaluation.eval_negative_prompt]
    words = [*(pictures.texts if pictures else ()), *others]
    embed = texts.prepare(run, model, args.cache, [source.texts, words])
    objective = model.objective(size)
    trained.load(model, objective)
    learner = Learner(run, trained, args.optim, args.ema)
    unguided = Steering(model=model, texts=embed, size=size, dtype=run.dtype)
    steering = replace(
        unguided,
        guidance_scale=args.refl.guidance_scale,
        negative_prompt=args.refl.negative_prompt,
    )
    steered, watched = args.evaluation.steered(unguided), [reward, *watched]
    evaluate = drawing.evaluator(
        run, args.evaluation, source.held_out, watched, steered, trained, vae, batch_size
    )
    plan = denoising.Way.of(
        *(objective.schedule, args.refl.sample_steps),
        eta=float(args.refl.sampler == "ddpm"),
        offset=model.steps_offset,
        prediction=objective.prediction_type,
    )
    remembered = pictures.batches(run, batch_size) if pictures else None

    # --------------------------------------------------------------------------------- loop
    learner.catch_up(evaluate, due=args.evaluation.due(run.step, run.num_steps))
    micro_batch = batch_size * run.accelerator.num_processes
    for places, batch in run.batches(stream(first_batch=run.samples // micro_batch)):
        captions = [prompt.text for prompt in batch]
        with learner.accumulate():
            scored = args.refl.draw(run.seed, places[0] // micro_batch)
            predict = steering(learner.network, captions)
            noise = rng.normal(shape, run.keys("noise", places), run.device)
            clean = denoising.estimate(
                *(predict, noise, plan, run.keys("way", places)),
                last=scored,
                grad_steps=args.refl.grad_steps,
            )
            images = model.decode(vae, clean)  # [B, 3, H, W]
            stopping = learner.kept_when_stopped()
            with stopping, run.phase("reward", wait=True), held_out.together(run):
                output = reward(images, captions, [prompt.metadata for prompt in batch])
            refl.pull_only(images, output.valid)
            missing = preference.shortfall(output.scores, margin)  # [B]
            # Over all of the batch: every picture weighs the same, whichever process has it.
            loss = args.refl.grad_scale * (missing * output.valid).mean()
            refl.record(run, output, missing, margin)

            if remembered is not None:
                errors = refl.pretraining_errors(
                    *(run, model, objective, vae, learner.network, unguided, next(remembered))
                )
                loss = loss + args.pretrain.pretrain_weight * errors.mean()
                run.average(pretrain_loss=errors)
            stepped = learner.step(loss)
        if stepped:
            learner.look(evaluate, due=args.evaluation.due(run.step, run.num_steps))
            learner.keep()

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title="Stable Diffusion XL, trained by ReFL",
        dataset=args.prompts.location,
        tags=("stable-diffusion-xl", "text-to-image", "refl", "reward-fine-tuning"),
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__, {"--list_rewards": rewards.table})
