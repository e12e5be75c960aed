"""Full fine-tuning of Stable Diffusion 1.5 by denoising.

Every weight of the UNet learns to tell the noise, or the velocity v, from a noised latent (Ho et
al. 2020, arXiv:2006.11239, Equation 14; Salimans and Ho 2022, arXiv:2202.00512, Appendix D):

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,    loss = w(t) |f(x_t, t, caption) - target|^2
    target = eps,  or  v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0

The weights are float32 while they train and the arithmetic follows `--mixed_precision`;
`--train_dtype bf16` trains bfloat16 weights whose other halves the optimizer keeps. With
`--use_ema` an average of the weights is validated and saved. The result is a whole pipeline folder.

    accelerate launch train_full_sd15.py --pretrained_model_name_or_path models/pocket-sd15 \
        --dataset_name datas/pocket-hearts --resolution 64 --output_dir outputs/hearts-sd15-full
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dojo import cli, data, finetune, publish, rng
from dojo.evaluate import ValidationArgs, Validator
from dojo.inputs import pictures
from dojo.launch import interrupt
from dojo.maths import ddpm
from dojo.models import sd15
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd15.ModelArgs
    text: sd15.TextArgs
    run: RunArgs
    data: data.DataArgs
    captions: data.CaptionArgs
    cache: data.CacheArgs
    full: finetune.FileArgs
    noise: sd15.NoiseArgs
    optim: OptimArgs
    ema: EmaArgs
    validation: ValidationArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved pipeline."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = sd15.open_model(args.model, args.text)
    trained = finetune.AllWeights(run, args.full)
    args.validation.check(model)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained.check(args.optim)

    # --------------------------------------------------------------------------------- data
    sources = pictures.open_sources(run, args)
    size, batch_size = sources.size, args.optim.train_batch_size
    objective = model.objective(size, args.noise)
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
    trained.load(model, objective)
    learner = Learner(run, trained, args.optim, args.ema)
    learner.network.train()
    evaluate = Validator(run, inputs, trained.network, args.noise, args.validation, size)

    # --------------------------------------------------------------------------------- loop
    learner.catch_up(evaluate, due=args.validation.due(run.step, run.num_steps))
    for batch in run.batches(inputs.loader(batch_size)):
        places = batch["place"]
        with learner.accumulate():
            clean = inputs.latents(batch)  # [B, C, h, w]
            noise = rng.normal(clean.shape[1:], run.keys("noise", places), run.device)
            if strength := args.noise.noise_offset:  # moves whole channels
                moves = rng.normal((len(noise[0]), 1, 1), run.keys("offset", places), run.device)
                noise = ddpm.offset_noise(noise, moves, strength)
            seen = noise
            if strength := args.noise.input_perturbation:  # seen, and not predicted
                more = rng.normal(clean.shape[1:], run.keys("perturbation", places), run.device)
                seen = ddpm.offset_noise(noise, more, strength)
            uniform = rng.uniform(run.keys("timestep", places))
            timestep = objective.level(uniform).to(run.device)  # [B]
            noisy = ddpm.add_noise(clean, seen, timestep, objective.schedule)

            conditions = inputs.conditions(batch)
            predicted = model.predict(learner.network, noisy, timestep, conditions, run.dtype)
            area = inputs.area(batch)
            errors = objective.errors(  # [B]
                predicted, noisy, timestep, clean=clean, noise=noise, area=area
            )
            weight = objective.weight(timestep)
            loss = (weight * batch["weight"].to(run.device) * errors).mean()
            stepped = learner.step(loss)
        if stepped:
            learner.look(evaluate, due=args.validation.due(run.step, run.num_steps))
            learner.keep()

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title=f"{model.title}, fine-tuned",
        dataset=args.data.location,
        tags=("stable-diffusion", "text-to-image"),
        instance_prompt=args.data.instance_prompt,
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__)
