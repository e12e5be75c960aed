"""Textual inversion for Stable Diffusion 1.5: a new word from a few pictures.

UNet and CLIP stay as they are; the embedding vectors v of a word that CLIP does not know
(`--new_tokens "<dog>"`) learn to mean what the pictures show (Gal et al. 2022, arXiv:2208.01618,
Equation 2), by the error of the predicted noise, or the velocity (arXiv:2006.11239, Equation 14;
arXiv:2202.00512, Appendix D):

    v* = argmin_v  E w(t) |f(x_t, t, c_v(caption)) - target|^2

The result is a file of a few kilobytes for each word.

    accelerate launch train_textual_inversion_sd15.py \
        --pretrained_model_name_or_path models/pocket-sd15 --dataset_name datas/dog \
        --new_tokens "<dog>" --initializer_token dog --instance_prompt "a photo of <dog>" \
        --resolution 64 --output_dir outputs/dog-token-sd15
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
    tokens: finetune.InversionArgs
    noise: sd15.NoiseArgs
    optim: OptimArgs
    ema: EmaArgs
    validation: ValidationArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved words."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = sd15.open_model(args.model, args.text)
    model = args.tokens.taught(model, run.seed)
    trained = finetune.Inversion(run, model)
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
    texts = args.validation.texts
    inputs = pictures.prepare(run, sources, model, args, texts, train_text=True)

    # -------------------------------------------------------------------------------- model
    clips = inputs.text.encoders.trainable if inputs.text.encoders else []
    trained.load(model, objective, text_encoders=[*clips])
    learner = Learner(run, trained, args.optim, args.ema)
    learner.network.train()
    clips[:] = learner.modules[1:]  # these answer for captions from here on
    evaluate = Validator(run, inputs, trained.network, args.noise, args.validation, size)

    # --------------------------------------------------------------------------------- loop
    learner.catch_up(evaluate, due=args.validation.due(run.step, run.num_steps))
    for batch in run.batches(inputs.loader(batch_size)):
        places = batch["place"]
        rng.seed_global(run.seed, "dropout", places[0])
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
        title=f"Textual inversion for {model.title}",
        dataset=args.data.location,
        tags=("textual_inversion", "stable-diffusion", "text-to-image"),
        instance_prompt=args.data.instance_prompt,
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__)
