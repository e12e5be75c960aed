"""LoRA fine-tuning of Hunyuan-DiT by denoising.

A frozen transformer with low-rank adapters (Hu et al. 2021, arXiv:2106.09685) learns to tell the
velocity v of a noised latent (Salimans and Ho 2022, arXiv:2202.00512, Appendix D; Li et al. 2024,
arXiv:2405.08748, Section 2.1):

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,    loss = w(t) |f(x_t, t, c) - v|^2
    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0

It reads captions in Chinese or English with two encoders, a BERT of 77 tokens and mT5 of 256, and
tells a variance beside v, which is let go, as in drawing. v1.2 ends with more signal than v1.0 and
v1.1 (beta_end 0.018 and 0.03), and these are also told a style, which is always 0, and each
picture's size in the file, its crop and the size that is trained.

It departs from Tencent's own script on purpose: captions are padded with token 0, as in drawing;
the adapters are on query, key and value separately, and float32 whatever the base is; the file has
their alpha. diffusers' pipeline loads no LoRA of this network in one call: demo.py does, and the
result's model card says how else.

    accelerate launch train_lora_hunyuandit.py --pretrained_model_name_or_path models/HunyuanDiT \
        --dataset_name datas/naruto-blip-captions --resolution 1024 --output_dir outputs/hunyuandit
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dojo import cli, data, finetune, publish, rng
from dojo.evaluate import ValidationArgs, Validator
from dojo.inputs import pictures
from dojo.launch import interrupt
from dojo.maths import ddpm
from dojo.models import hunyuandit
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: hunyuandit.ModelArgs
    run: RunArgs
    data: data.DataArgs
    captions: data.CaptionArgs
    cache: data.CacheArgs
    lora: finetune.LoraArgs
    noise: hunyuandit.NoiseArgs
    optim: OptimArgs
    ema: EmaArgs
    validation: ValidationArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved adapter."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = hunyuandit.open_model(args.model)
    trained = finetune.Adapters(run, args.lora)
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
        title=f"LoRA for {model.title}",
        dataset=args.data.location,
        tags=("lora", "hunyuan-dit", "text-to-image"),
        instance_prompt=args.data.instance_prompt,
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__)
