"""Full fine-tuning of Stable Diffusion 3 and 3.5 by flow matching.

Every weight of the MMDiT learns the velocity of the straight path from a latent to noise (Esser et
al. 2024, arXiv:2403.03206, Equations 13 to 23):

    z = (1 - sigma) x0 + sigma eps,    loss = w(sigma) |v(z, sigma, caption) - (eps - x0)|^2

The weights are float32 while they train and the arithmetic follows `--mixed_precision`;
`--train_dtype bf16` trains bfloat16 weights whose other halves the optimizer keeps. With
`--use_ema` an average of the weights is validated and saved. The result is a whole pipeline folder.

    accelerate launch train_full_sd3.py --pretrained_model_name_or_path models/pocket-sd3 \
        --dataset_name datas/pocket-hearts --resolution 64 --output_dir outputs/hearts-full
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dojo import cli, data, finetune, publish, rng
from dojo.evaluate import ValidationArgs, Validator
from dojo.inputs import pictures
from dojo.launch import interrupt
from dojo.maths import flow
from dojo.methods import scheduled
from dojo.models import sd3
from dojo.models.opening import open_model
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd3.ModelArgs
    text: sd3.TextDropoutArgs
    run: RunArgs
    data: data.DataArgs
    captions: data.CaptionArgs
    cache: data.CacheArgs
    full: finetune.FullArgs
    noise: sd3.NoiseArgs
    scheduled: scheduled.ScheduledArgs
    optim: OptimArgs
    ema: EmaArgs
    validation: ValidationArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved pipeline."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = open_model(args.model, args.text)
    trained = finetune.AllWeights(run, args.full)
    args.validation.check(model)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained.check(args.optim)
    args.scheduled.check(run)

    # --------------------------------------------------------------------------------- data
    sources = pictures.open_sources(run, args)
    size, batch_size = sources.size, args.optim.train_batch_size
    if not args.run.dry_run:
        sources = pictures.check_samples(run, sources, model, args)
    pictures.plan(run, sources, args.optim)
    args.ema.check(args.optim.kind, run.num_steps)
    shape = finetune.shape_of(run, model, size)
    cost = partial(finetune.cost_of, run, trained, model, batch_size, shape)
    drawn = bool(args.validation.texts)
    needs = partial(pictures.needs, run, model, args, size, batch_size, drawn=drawn)
    if not finetune.begin(run, args, trained, cost, needs):
        return
    inputs = pictures.prepare(run, sources, model, args, args.validation.texts)

    # -------------------------------------------------------------------------------- model
    trained.load(model, model.objective(size, args.noise))
    learner = Learner(run, trained, args.optim, args.ema)
    learner.network.train()
    led = scheduled.Scheduled(run, args.scheduled, model, learner)
    evaluate = Validator(run, inputs, trained.network, args.noise, args.validation, size)

    # --------------------------------------------------------------------------------- loop
    learner.catch_up(evaluate, due=args.validation.due(run.step, run.num_steps))
    for batch in run.batches(inputs.loader(batch_size)):
        places = batch["place"]
        with learner.accumulate():
            clean = inputs.latents(batch)  # [B, C, h, w]
            noise = rng.normal(clean.shape[1:], run.keys("noise", places), run.device)
            uniform = rng.uniform(run.keys("sigma", places))
            objective = model.objective(batch["size"][0], args.noise)
            sigma = objective.level(uniform).to(run.device)  # [B]
            noisy, target = flow.interpolate(clean, noise, sigma), flow.velocity(clean, noise)

            conditions = inputs.conditions(batch)
            if args.scheduled.scheduled_sampling:  # inputs that the network's own steps lead to
                noisy, target = led(objective, clean, noise, sigma, conditions, places)
            predicted = model.predict(learner.network, noisy, sigma, conditions, run.dtype)
            if args.noise.precondition_outputs:
                predicted, target = flow.clean_estimate(noisy, predicted, sigma), clean
            errors = flow.squared_error(predicted, target, inputs.area(batch))  # [B]
            weight = flow.loss_weight(sigma, args.noise.weighting_scheme)
            loss = (weight * batch["weight"].to(run.device) * errors).mean()
            stepped = learner.step(loss)
        if stepped:
            learner.look(evaluate, due=args.validation.due(run.step, run.num_steps))
            learner.keep()

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title="Stable Diffusion 3, fine-tuned",
        dataset=args.data.location,
        tags=("stable-diffusion-3", "text-to-image"),
        instance_prompt=args.data.instance_prompt,
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__)
