"""Diffusion-DPO for Stable Diffusion 1.5: of two pictures the preferred one is made likelier.

Both pictures of a pair are noised alike, and the network's error on the winner has to fall against
the reference's, or that on the loser to rise (Wallace et al. 2023, arXiv:2311.12908, Equation 14):

    e(x) = mean |eps(x_t, t, caption) - noise|^2,    d(x) = e(x) - e_reference(x)
    loss = -log sigmoid(-beta / 2 (d(winner) - d(loser)))

The reference is the model as it was: adapters switched off, or a frozen copy. Timesteps are uniform
and carry no weight, as in the authors' code. `--sft` learns the winners by the plain loss instead.

    accelerate launch train_dpo_sd15.py --pretrained_model_name_or_path models/pocket-sd15 \
        --dataset_name outputs/pairs --resolution 64 --use_lora --output_dir outputs/dpo
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dojo import cli, data, publish, report, rewards
from dojo.finetune import lora
from dojo.finetune import weights as trained
from dojo.finetune import whole as full
from dojo.inputs import pairs as paired
from dojo.inputs import texts
from dojo.launch import interrupt
from dojo.maths import preference
from dojo.methods import refl as direct
from dojo.models import sd15
from dojo.run import averaging, optim
from dojo.run import run as training


@dataclass(frozen=True, kw_only=True)
class DpoArgs:
    """The loss."""

    beta_dpo: float = 5000.0
    """how strongly the policy is held to the reference: large holds it near. It multiplies half the
    difference of mean errors, as in the paper's code; diffusers' example writes 2500 for the same,
    and a form with summed errors this divided by the latent's size (16,384 at 512 px: 0.305)"""
    sft: bool = False
    """learn the winners alone, by the plain loss, without a reference: the usual comparison"""

    def __post_init__(self) -> None:
        if self.beta_dpo <= 0:
            raise ValueError("--beta_dpo must be positive")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd15.ModelArgs
    run: training.RunArgs
    data: data.PairArgs
    cache: data.CacheArgs
    scorers: rewards.ScorerArgs
    dpo: DpoArgs
    finetune: direct.FinetuneArgs
    lora: lora.LoraArgs
    full: full.WholeArgs
    optim: optim.OptimArgs
    ema: averaging.EmaArgs
    evaluation: direct.PromptEvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = training.start(args.run, args.optim)
    config = sd15.open_model(args.model)
    is_lora, with_reference = args.finetune.use_lora, not args.dpo.sft
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained.check(run, args, is_lora=is_lora)
    shape = config.latent_shape(*args.data.size)
    shown = args.evaluation.prompts()

    # -------------------------------------------------------------------------------- pairs
    sources = paired.open_sources(run, args)
    if not args.run.dry_run:
        sources = paired.chosen(run, sources, args)
    batch_size = args.optim.train_batch_size
    fingerprint = data.pair_fingerprint(sources.train, args.data)
    run.plan(args.optim, len(sources.train), fingerprint)
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(
        direct.pair_cost,
        *(run, config, args, batch_size, shape),
        with_reference=with_reference,
    )
    if args.run.dry_run:
        planned: tuple[Any, Any] = cost(checkpointing=args.model.gradient_checkpointing)
        state = trained.bytes_per_weight(run, args, is_lora=is_lora, with_reference=with_reference)
        watched = args.scorers.load_all(run.device, args.evaluation.held_out_rewards)
        needs = direct.needs(
            *(run, config, args.model, args.data.size, watched),
            encoded=data.encoded_at_a_time(args.data.size),
            decoded=(args.evaluation.eval_batch_size or batch_size) * bool(shown),
        )
        return training.print_plan(
            run, args, *planned, batch_size, needs=needs, bytes_per_weight=state
        )
    if not run.begin(args, trained.result_name(is_lora=is_lora)):
        return None
    vae = sd15.load_vae(config, args.model, run.device)
    pairs, held_out = paired.prepare(
        run, sources, config, vae, args, with_held_out=is_lora or with_reference
    )
    words = [*(p.text for p in shown), args.evaluation.eval_negative_prompt]
    words += held_out.texts() if held_out else []
    embed = texts.prepare_sd15(run, config, args.model, args.cache, [pairs.texts(), words])
    watched = args.scorers.load_all(run.device, args.evaluation.held_out_rewards)

    # -------------------------------------------------------------------------------- model
    family = trained.Sd15Family(config, args.model)
    policy = trained.Trained(run, family, args, is_lora=is_lora, with_reference=with_reference)
    optimizer, schedule = optim.make(policy.params, args.optim, run)
    averaged = averaging.Averaged(policy.params, args.ema, optimizer)
    run.watch_flops(lambda: cost(checkpointing=False)[1], batch_size)

    def save(folder: Path) -> None:
        policy.save(folder, averaged)

    def restore(folder: Path) -> None:
        policy.restore(folder, averaged)

    run.resume(restore, optimizer, schedule, averaged.shadows)
    model, optimizer = run.accelerator.prepare(policy.network, optimizer)
    keep = partial(run.save_checkpoint, save, optimizer, schedule)
    judge = paired.Judge(run, config, vae, embed, held_out, args.dpo.beta_dpo, batch_size)
    draw = direct.evaluator(run, config, vae, args, shown, watched, embed, policy, args.data.size)

    # --------------------------------------------------------------------------------- loop
    with averaged.applied():
        judge.catch_up(policy, due=args.evaluation.due(run.step, run.num_steps))
        draw.catch_up(due=args.evaluation.due(run.step, run.num_steps))
    for batch in run.batches(paired.loader(run, pairs, batch_size)):
        captions = [*batch["caption"], *batch["caption"]]
        with run.accelerator.accumulate(model):
            keys = run.keys("pair", batch["place"])
            timestep = direct.timesteps(keys, config.schedule)
            noised = paired.noised(batch, keys, timestep, config, vae, run.device)
            if args.dpo.sft:
                noised, captions = noised.winners, batch["caption"]
            errors = paired.errors(model, noised, embed, captions, run.dtype)  # [2B], or [B]
            if args.dpo.sft:
                losses = errors
            else:
                with run.phase("reference", wait=True):
                    usual = paired.reference_errors(policy, noised, embed, captions)
                found = preference.dpo(*errors.chunk(2), *usual.chunk(2), beta=args.dpo.beta_dpo)
                losses = found.loss
                run.average(
                    accuracy=found.accuracy,
                    margin=found.margin,
                    winner_drift=found.winner_drift,
                    loser_drift=found.loser_drift,
                )
            grad_norm = run.update(
                losses.mean(), policy.params, optimizer, schedule, args.optim.max_grad_norm
            )
        if grad_norm is None:
            continue
        averaged.update(run.step)
        run.log_step(optim.learning_rate(optimizer), grad_norm)
        if run.pictures_due(args.evaluation.due(run.step, run.num_steps)):
            with run.kept_when_stopped(partial(keep, now=True)), averaged.applied():
                judge(policy)
                draw()
        keep()

    # ------------------------------------------------------------------------------- result
    if run.main:
        with averaged.applied():
            result = policy.save_result(args.run.output_dir)
        draw.finish()
        publish.write_card(
            args.run.output_dir,
            title="Stable Diffusion 1.5, trained by Diffusion-DPO",
            base_model=args.model.pretrained_model_name_or_path,
            dataset=args.data.location,
            options=training.options(args),
            steps=run.step,
            repo_id=args.publish.hub_model_id,
            tags=("stable-diffusion", "text-to-image", "dpo", "preference-optimization"),
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
