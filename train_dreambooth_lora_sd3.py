"""DreamBooth with LoRA on Stable Diffusion 3 and 3.5: one subject from a few pictures.

A rare word in `--instance_prompt` ("a photo of sks dog") learns to mean the subject of the pictures
(Ruiz et al. 2022, arXiv:2208.12242). With prior preservation every batch holds as many pictures of
the class, drawn by the base model, and the loss is

    mean over the instance's half + prior_loss_weight * mean over the class's half

of the flow-matching error (arXiv:2403.03206). `--train_text_encoder` puts adapters on CLIP-L and
CLIP-G too. New tokens (pivotal tuning, textual inversion) are not here yet.

    accelerate launch train_dreambooth_lora_sd3.py \
        --pretrained_model_name_or_path models/pocket-sd3 --instance_data_dir datas/dog \
        --instance_prompt "a photo of sks dog" --resolution 64 --output_dir outputs/dog
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dojo import cli, data, publish, report, rng
from dojo import evaluate as validation
from dojo.finetune import lora
from dojo.inputs import class_pictures as prior
from dojo.inputs import pictures as frozen
from dojo.launch import interrupt
from dojo.maths import flow
from dojo.models import sd3
from dojo.run import averaging, optim
from dojo.run import run as training


@dataclass(frozen=True, kw_only=True)
class TextEncoderArgs:
    """The two CLIPs."""

    train_text_encoder: bool = False
    """train adapters on CLIP-L and CLIP-G too; T5 stays as it is"""
    text_encoder_lr: float = 5e-6
    """their learning rate"""

    def __post_init__(self) -> None:
        if self.text_encoder_lr <= 0:
            raise ValueError("--text_encoder_lr must be positive")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd3.ModelArgs
    text: sd3.TextDropoutArgs
    run: training.RunArgs
    data: data.DataArgs
    captions: data.CaptionArgs
    cache: data.CacheArgs
    prior: prior.PriorArgs
    lora: lora.LoraArgs
    text_encoder: TextEncoderArgs
    noise: sd3.NoiseArgs
    optim: optim.OptimArgs
    ema: averaging.EmaArgs
    validation: validation.ValidationArgs
    publish: publish.PublishArgs

    def __post_init__(self) -> None:
        te = self.text_encoder
        one_rate = te.text_encoder_lr == self.optim.learning_rate
        if te.train_text_encoder and self.optim.kind == "prodigy" and not one_rate:
            raise ValueError("--optimizer prodigy has one rate: --text_encoder_lr must equal it")


def main(args: Args) -> None:
    """Trains from the options to the saved adapters."""
    # ---------------------------------------------------------------------------------- run
    run = training.start(args.run, args.optim)
    config = sd3.open_model(args.model)
    args.validation.check(config)
    args.publish.check(args.run.output_dir, args.run.report_to)
    optim.check(args.optim, torch.float32)
    paired = args.prior.with_prior_preservation

    # --------------------------------------------------------------------------------- data
    sources = frozen.open_sources(run, args)
    size = sources.size
    shift = config.shift(args.noise.flow_shift, *size)
    if not args.run.dry_run:
        if paired:
            prior.draw_class_images(run, args.prior, config, args.model, args.data, size)
            sources.train = data.join([sources.train, prior.open_class(args.prior, args.data)])
        sources = frozen.check_samples(run, sources, config, args, pair_regularisation=paired)
    batch_size = args.optim.train_batch_size
    whole_batch = batch_size * run.accelerator.num_processes
    run.plan(args.optim, sources.samples_per_epoch, sources.fingerprint(whole_batch))
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(
        sd3.training_cost,
        *(config, args.model, run.dtype, partial(lora.add, args=args.lora)),
        *(batch_size * (1 + paired), config.latent_shape(*size)),
    )
    if args.run.dry_run:
        planned = cost(checkpointing=args.model.gradient_checkpointing)
        state = args.optim.state_bytes(torch.float32) + args.ema.bytes_per_weight
        needs = frozen.needs(
            *(run, config, args, size, batch_size),
            drawn=bool(args.validation.texts),
            class_pictures=args.prior.sample_batch_size * paired,
        )
        return training.print_plan(
            run, args, *planned, batch_size, needs=needs, bytes_per_weight=state
        )
    if not run.begin(args, lora.WEIGHTS):
        return None
    train_clip = args.text_encoder.train_text_encoder
    fixed = frozen.prepare(run, sources, config, args, args.validation.texts, train_clip=train_clip)

    # -------------------------------------------------------------------------------- model
    transformer = sd3.load_transformer(config, args.model, run.dtype, run.device)
    clips = fixed.text.encoders.clips if fixed.text.encoders else []
    rng.seed_global(run.seed, "adapter")
    groups: list[dict[str, Any]] = [{"params": lora.add(transformer, args.lora)}]
    for clip in clips:
        groups.append(
            {"params": lora.add_text(clip, args.lora), "lr": args.text_encoder.text_encoder_lr}
        )
    lora.start_from(args.lora, transformer, *clips)
    params = [param for group in groups for param in group["params"]]
    optimizer, schedule = optim.make(groups, args.optim, run)
    averaged = averaging.Averaged(params, args.ema, optimizer)
    run.watch_flops(lambda: cost(checkpointing=False)[1], batch_size)

    def save(folder: Path) -> None:
        lora.save(folder, transformer, *clips)
        averaged.save(folder, lambda: lora.save(folder / averaging.FOLDER, transformer, *clips))
        config.save_scheduler(folder, shift)

    def restore(folder: Path) -> None:
        average = folder / averaging.FOLDER
        averaged.restore(folder, lambda: lora.restore(average, transformer, *clips))
        lora.restore(folder, transformer, *clips)

    run.resume(restore, optimizer, schedule, averaged.shadows)
    model, optimizer, *trained_clips = run.accelerator.prepare(transformer, optimizer, *clips)
    if fixed.text.encoders:
        fixed.text.encoders.clips = trained_clips
    model.train()
    keep = partial(run.save_checkpoint, save, optimizer, schedule)
    validate = validation.Validator(run, fixed, config, args.noise, args.validation, shift, size)

    # --------------------------------------------------------------------------------- loop
    with averaged.applied():
        validate.catch_up(model, due=args.validation.due(run.step, run.num_steps))
    for batch in run.batches(fixed.loader(batch_size)):
        places = batch["place"]
        rng.seed_global(run.seed, "dropout", places[0])
        with run.accelerator.accumulate(model, *trained_clips):
            mean, std = fixed.latents(batch)
            posterior_noise = rng.normal(mean.shape[1:], run.keys("posterior", places), run.device)
            clean = config.scaled(mean, std, posterior_noise)  # [B or 2 B, C, h, w]
            noise = rng.normal(clean.shape[1:], run.keys("noise", places), run.device)
            uniform = rng.uniform(run.keys("sigma", places))
            batch_shift = config.shift(args.noise.flow_shift, *batch["size"][0])
            sigma = args.noise.draw(uniform, batch_shift).to(run.device)  # [B or 2 B]
            noisy = flow.interpolate(clean, noise, sigma)

            predicted = sd3.velocity(
                model, noisy, sigma, **fixed.conditions(batch), dtype=run.dtype
            )
            target = flow.velocity(clean, noise)
            if args.noise.precondition_outputs:
                predicted, target = flow.clean_estimate(noisy, predicted, sigma), clean
            errors = flow.squared_error(predicted, target, fixed.area(batch))
            weight = flow.loss_weight(sigma, args.noise.weighting_scheme)
            # The class's rows carry prior_loss_weight, and each half is a mean over B.
            loss = (weight * batch["weight"].to(run.device) * errors).sum() / batch_size

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
            lora.save(args.run.output_dir, transformer, *clips)
        config.save_scheduler(args.run.output_dir, shift)
        lora.export(args.run.output_dir, args.lora.lora_format)
        validate.finish()
        publish.write_card(
            args.run.output_dir,
            title="DreamBooth LoRA for Stable Diffusion 3",
            base_model=args.model.pretrained_model_name_or_path,
            dataset=args.data.location,
            options=training.options(args),
            steps=run.step,
            repo_id=args.publish.hub_model_id,
            tags=("lora", "dreambooth", "stable-diffusion-3", "text-to-image"),
            instance_prompt=args.data.instance_prompt,
        )
        report.write(args.run.output_dir)
    run.finish()
    run.say(f"done: {args.run.output_dir / lora.WEIGHTS}")
    if run.main:
        publish.upload(args.run.output_dir, args.publish)
    return None


if __name__ == "__main__":
    interrupt.watch()
    cli.run(main, Args, __doc__)
