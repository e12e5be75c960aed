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
from pathlib import Path
from typing import Any

from dojo import cli, data, publish, report, rng
from dojo import evaluate as validation
from dojo.finetune import whole as full
from dojo.inputs import pictures as frozen
from dojo.launch import interrupt
from dojo.maths import flow
from dojo.models import sd3
from dojo.run import averaging, optim
from dojo.run import run as training


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd3.ModelArgs
    text: sd3.TextDropoutArgs
    run: training.RunArgs
    data: data.DataArgs
    captions: data.CaptionArgs
    cache: data.CacheArgs
    full: full.FullArgs
    noise: sd3.NoiseArgs
    optim: optim.OptimArgs
    ema: averaging.EmaArgs
    validation: validation.ValidationArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved pipeline."""
    # ---------------------------------------------------------------------------------- run
    run = training.start(args.run, args.optim)
    config = sd3.open_model(args.model)
    args.validation.check(config)
    args.publish.check(args.run.output_dir, args.run.report_to)
    args.full.check(run.dtype)
    optim.check(args.optim, args.full.dtype)

    # --------------------------------------------------------------------------------- data
    sources = frozen.open_sources(run, args)
    size = sources.size
    shift = config.shift(args.noise.flow_shift, *size)
    if not args.run.dry_run:
        sources = frozen.check_samples(run, sources, config, args)
    batch_size = args.optim.train_batch_size
    whole_batch = batch_size * run.accelerator.num_processes
    run.plan(args.optim, sources.samples_per_epoch, sources.fingerprint(whole_batch))
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(
        sd3.training_cost,
        *(config, args.model, run.dtype, partial(full.thaw, args=args.full)),
        *(batch_size, config.latent_shape(*size)),
    )
    if args.run.dry_run:
        planned: tuple[Any, Any] = cost(checkpointing=args.model.gradient_checkpointing)
        planned[0].to(args.full.dtype)  # the frozen weights too
        autocast = run.dtype.itemsize if run.dtype != args.full.dtype else 0  # its copy
        state = args.optim.state_bytes(args.full.dtype) + args.ema.bytes_per_weight + autocast
        drawn = bool(args.validation.texts)
        needs = frozen.needs(run, config, args, size, batch_size, drawn=drawn)
        return training.print_plan(
            run, args, *planned, batch_size, needs=needs, bytes_per_weight=state
        )
    if not run.begin(args, full.RESULT):
        return None
    fixed = frozen.prepare(run, sources, config, args, args.validation.texts)

    # -------------------------------------------------------------------------------- model
    transformer = sd3.load_transformer(config, args.model, args.full.dtype, run.device)
    params = full.thaw(transformer, args.full)
    optimizer, schedule = optim.make(params, args.optim, run)
    averaged = averaging.Averaged(params, args.ema, optimizer)
    run.watch_flops(lambda: cost(checkpointing=False)[1], batch_size)

    def save(folder: Path) -> None:
        full.save(folder / full.TRANSFORMER, transformer)
        averaged.save(folder, lambda: full.save(folder / full.AVERAGE, transformer))
        config.save_scheduler(folder, shift)

    def restore(folder: Path) -> None:
        averaged.restore(folder, lambda: full.restore(folder / full.AVERAGE, transformer))
        full.restore(folder / full.TRANSFORMER, transformer)

    run.resume(restore, optimizer, schedule, averaged.shadows)
    model, optimizer = run.accelerator.prepare(transformer, optimizer)
    model.train()
    keep = partial(run.save_checkpoint, save, optimizer, schedule)
    validate = validation.Validator(run, fixed, config, args.noise, args.validation, shift, size)

    # --------------------------------------------------------------------------------- loop
    with averaged.applied():
        validate.catch_up(model, due=args.validation.due(run.step, run.num_steps))
    for batch in run.batches(fixed.loader(batch_size)):
        places = batch["place"]
        with run.accelerator.accumulate(model):
            mean, std = fixed.latents(batch)
            posterior_noise = rng.normal(mean.shape[1:], run.keys("posterior", places), run.device)
            clean = config.scaled(mean, std, posterior_noise)  # [B, C, h, w]
            noise = rng.normal(clean.shape[1:], run.keys("noise", places), run.device)
            uniform = rng.uniform(run.keys("sigma", places))
            batch_shift = config.shift(args.noise.flow_shift, *batch["size"][0])
            sigma = args.noise.draw(uniform, batch_shift).to(run.device)  # [B]
            noisy = flow.interpolate(clean, noise, sigma)

            predicted = sd3.velocity(
                model, noisy, sigma, **fixed.conditions(batch), dtype=run.dtype
            )
            target = flow.velocity(clean, noise)
            if args.noise.precondition_outputs:
                predicted, target = flow.clean_estimate(noisy, predicted, sigma), clean
            errors = flow.squared_error(predicted, target, fixed.area(batch))  # [B]
            weight = flow.loss_weight(sigma, args.noise.weighting_scheme)
            loss = (weight * batch["weight"].to(run.device) * errors).mean()

            grad_norm = run.update(loss, params, optimizer, schedule, args.optim.max_grad_norm)
        if grad_norm is None:
            continue
        averaged.update(run.step)
        run.log_step(optim.learning_rate(optimizer), grad_norm)
        if run.pictures_due(args.validation.due(run.step, run.num_steps)):
            with run.kept_when_stopped(partial(keep, now=True)), averaged.applied():
                validate(model)
        keep()

    # ------------------------------------------------------------------------------- result
    if run.main:
        with averaged.applied():
            full.save_result(args.run.output_dir, transformer, config, args.model, args.full, shift)
        validate.finish()
        publish.write_card(
            args.run.output_dir,
            title="Stable Diffusion 3, fine-tuned",
            base_model=args.model.pretrained_model_name_or_path,
            dataset=args.data.location,
            options=training.options(args),
            steps=run.step,
            repo_id=args.publish.hub_model_id,
            tags=("stable-diffusion-3", "text-to-image"),
            weights="",
        )
        report.write(args.run.output_dir)
    run.finish()
    run.say(f"done: {args.run.output_dir}")
    if run.main:
        publish.upload(args.run.output_dir, args.publish)
    return None


if __name__ == "__main__":
    interrupt.watch()
    cli.run(main, Args, __doc__)
