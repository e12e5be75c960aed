"""DreamBooth with LoRA on Stable Diffusion 3 and 3.5: one subject from a few pictures.

A rare word in `--instance_prompt` ("a photo of sks dog") learns to mean the subject of the pictures
(Ruiz et al. 2022, arXiv:2208.12242). With prior preservation every batch holds as many pictures of
the class, drawn by the base model, and the loss is

    mean over the instance's half + prior_loss_weight * mean over the class's half

of the flow-matching error (arXiv:2403.03206). `--train_text_encoder` puts adapters on CLIP-L and
CLIP-G too. With `--new_tokens` the CLIPs learn words of their own beside the adapter (pivotal
tuning); T5, which learns none, reads `--initializer_token` in their place.

    accelerate launch train_dreambooth_lora_sd3.py \
        --pretrained_model_name_or_path models/pocket-sd3 --instance_data_dir datas/dog \
        --instance_prompt "a photo of sks dog" --resolution 64 --output_dir outputs/dog
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dojo import cli, data, finetune, publish, rng
from dojo.evaluate import ValidationArgs, Validator
from dojo.inputs import class_pictures, pictures
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
    prior: class_pictures.PriorArgs
    lora: finetune.LoraArgs
    text_encoder: finetune.TextEncoderArgs
    tokens: finetune.PivotalArgs
    noise: sd3.NoiseArgs
    scheduled: scheduled.ScheduledArgs
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
    model = open_model(args.model, args.text)
    model = args.tokens.taught(model, run.seed)
    train_text = args.text_encoder.train_text_encoder
    trained = finetune.Adapters(run, args.lora, model=model, tokens=args.tokens, text=train_text)
    args.validation.check(model)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained.check(args.optim)
    args.scheduled.check(run)
    args.text_encoder.check_model(model)
    paired = args.prior.with_prior_preservation

    # --------------------------------------------------------------------------------- data
    sources = pictures.open_sources(run, args)
    size, batch_size = sources.size, args.optim.train_batch_size
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
    trained.load(model, model.objective(size, args.noise), text_encoders=[*clips], text_rates=rates)
    learner = Learner(run, trained, args.optim, args.ema)
    learner.network.train()
    clips[:] = learner.modules[1:]  # these answer for captions from here on
    led = scheduled.Scheduled(run, args.scheduled, model, learner)
    evaluate = Validator(run, inputs, trained.network, args.noise, args.validation, size)

    # --------------------------------------------------------------------------------- loop
    learner.catch_up(evaluate, due=args.validation.due(run.step, run.num_steps))
    for batch in run.batches(inputs.loader(batch_size)):
        places = batch["place"]
        rng.seed_global(run.seed, "dropout", places[0])
        with learner.accumulate():
            clean = inputs.latents(batch)  # [B or 2 B, C, h, w]
            noise = rng.normal(clean.shape[1:], run.keys("noise", places), run.device)
            uniform = rng.uniform(run.keys("sigma", places))
            objective = model.objective(batch["size"][0], args.noise)
            sigma = objective.level(uniform).to(run.device)  # [B or 2 B]
            noisy, target = flow.interpolate(clean, noise, sigma), flow.velocity(clean, noise)

            conditions = inputs.conditions(batch)
            if args.scheduled.scheduled_sampling:  # inputs that the network's own steps lead to
                noisy, target = led(objective, clean, noise, sigma, conditions, places)
            predicted = model.predict(learner.network, noisy, sigma, conditions, run.dtype)
            if args.noise.precondition_outputs:
                predicted, target = flow.clean_estimate(noisy, predicted, sigma), clean
            errors = flow.squared_error(predicted, target, inputs.area(batch))
            weight = flow.loss_weight(sigma, args.noise.weighting_scheme)
            # The class's rows carry prior_loss_weight, and each half is a mean over B.
            loss = (weight * batch["weight"].to(run.device) * errors).sum() / batch_size
            stepped = learner.step(loss)
        if stepped:
            learner.look(evaluate, due=args.validation.due(run.step, run.num_steps))
            learner.keep()

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title="DreamBooth LoRA for Stable Diffusion 3",
        dataset=args.data.location,
        tags=("lora", "dreambooth", "stable-diffusion-3", "text-to-image"),
        instance_prompt=args.data.instance_prompt,
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__)
