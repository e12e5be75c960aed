"""DreamBooth with LoRA on Stable Diffusion 1.5: one subject from a few pictures.

A rare word in `--instance_prompt` ("a photo of sks dog") learns to mean the subject of the pictures
(Ruiz et al. 2022, arXiv:2208.12242). With prior preservation every batch holds as many pictures of
the class, drawn by the base model, and the loss is

    mean over the instance's half + prior_loss_weight * mean over the class's half

of the error of the predicted noise or velocity (arXiv:2006.11239, Equation 14; arXiv:2202.00512,
Appendix D). `--train_text_encoder` puts adapters on CLIP too. With `--new_tokens` CLIP learns words
of its own (Gal et al. 2022, arXiv:2208.01618) beside the adapter: pivotal tuning.

    accelerate launch train_dreambooth_lora_sd15.py \
        --pretrained_model_name_or_path models/pocket-sd15 --instance_data_dir datas/dog \
        --instance_prompt "a photo of sks dog" --resolution 64 --output_dir outputs/dog-sd15
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dojo import cli, data, finetune, publish, rng
from dojo.evaluate import ValidationArgs, Validator
from dojo.inputs import class_pictures, pictures
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
    prior: class_pictures.PriorArgs
    lora: finetune.LoraArgs
    text_encoder: finetune.TextEncoderArgs
    tokens: finetune.PivotalArgs
    noise: sd15.NoiseArgs
    optim: OptimArgs
    ema: EmaArgs
    validation: ValidationArgs
    publish: publish.PublishArgs

    def __post_init__(self) -> None:
        self.text_encoder.check(self.optim)
        self.tokens.check(self.optim)


def main(args: Args) -> None:
    """Trains from the options to the saved adapters."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = sd15.open_model(args.model, args.text)
    model = args.tokens.taught(model, run.seed)
    train_text = args.text_encoder.train_text_encoder
    trained = finetune.Adapters(run, args.lora, model=model, tokens=args.tokens, text=train_text)
    args.validation.check(model)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained.check(args.optim)
    args.text_encoder.check_model(model)
    paired = args.prior.with_prior_preservation

    # --------------------------------------------------------------------------------- data
    sources = pictures.open_sources(run, args)
    size, batch_size = sources.size, args.optim.train_batch_size
    objective = model.objective(size, args.noise)
    if not args.run.dry_run:
        if paired:
            class_pictures.draw(run, args.prior, model, args.data, size)
            own = class_pictures.open_class(args.prior, args.data)
            sources.train = data.join([sources.train, own])
        sources = pictures.check_samples(run, sources, model, args, pair_regularisation=paired)
    pictures.plan(run, sources, args.optim)
    args.ema.check(args.optim.kind, run.num_steps)
    shape = finetune.shape_of(run, model, size)
    cost = partial(finetune.cost_of, run, trained, model, batch_size * (1 + paired), shape)
    needs = partial(
        *(pictures.needs, run, model, args, size, batch_size),
        drawn=bool(args.validation.texts),
        class_pictures=class_pictures.at_a_time(args.prior, args.data),
    )
    if not finetune.begin(run, args, trained, cost, needs):
        return
    texts, train_text = args.validation.texts, train_text or model.words is not None
    inputs = pictures.prepare(run, sources, model, args, texts, train_text=train_text)

    # -------------------------------------------------------------------------------- model
    clips = inputs.text.encoders.trainable if inputs.text.encoders else []
    rates = args.text_encoder.rates
    trained.load(model, objective, text_encoders=[*clips], text_rates=rates)
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
            clean = inputs.latents(batch)  # [B or 2 B, C, h, w]
            noise = rng.normal(clean.shape[1:], run.keys("noise", places), run.device)
            if strength := args.noise.noise_offset:  # moves whole channels
                moves = rng.normal((len(noise[0]), 1, 1), run.keys("offset", places), run.device)
                noise = ddpm.offset_noise(noise, moves, strength)
            seen = noise
            if strength := args.noise.input_perturbation:  # seen, and not predicted
                more = rng.normal(clean.shape[1:], run.keys("perturbation", places), run.device)
                seen = ddpm.offset_noise(noise, more, strength)
            uniform = rng.uniform(run.keys("timestep", places))
            timestep = objective.level(uniform).to(run.device)  # [B or 2 B]
            noisy = ddpm.add_noise(clean, seen, timestep, objective.schedule)

            conditions = inputs.conditions(batch)
            predicted = model.predict(learner.network, noisy, timestep, conditions, run.dtype)
            area = inputs.area(batch)
            errors = objective.errors(
                predicted, noisy, timestep, clean=clean, noise=noise, area=area
            )
            weight = objective.weight(timestep)
            # The class's rows carry prior_loss_weight, and each half is a mean over B.
            loss = (weight * batch["weight"].to(run.device) * errors).sum() / batch_size
            stepped = learner.step(loss)
        if stepped:
            learner.look(evaluate, due=args.validation.due(run.step, run.num_steps))
            learner.keep()

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title=f"DreamBooth LoRA for {model.title}",
        dataset=args.data.location,
        tags=("lora", "dreambooth", "stable-diffusion", "text-to-image"),
        instance_prompt=args.data.instance_prompt,
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__)
