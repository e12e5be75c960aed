"""Flow-DPO for Stable Diffusion 3 and 3.5: of two pictures the preferred one is made likelier.

Both pictures of a pair are noised alike, and the velocity's error on the winner has to fall against
the reference's, or that on the loser to rise (Wallace et al. 2023, arXiv:2311.12908, Equation 14,
for the flow of Esser et al. 2024, arXiv:2403.03206):

    e(x) = w(sigma) mean |v(x_sigma, sigma, caption) - (eps - x)|^2,    d(x) = e(x) - e_reference(x)
    loss = -log sigmoid(-beta / 2 (d(winner) - d(loser)))

The reference is the model as it was: adapters switched off, or a frozen copy. Sigmas and their
weights w are those of SD3's training, where a pair has one sigma and one noise for both pictures.
`--sft` learns the winners by the plain loss instead. Pairs that the model drew itself are made by
`python -m dojo.pairs`.

    accelerate launch train_dpo_sd3.py --pretrained_model_name_or_path models/pocket-sd3 \
        --dataset_name outputs/pairs --resolution 64 --output_dir outputs/dpo-sd3
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from dojo import cli, data, finetune, publish, rewards, rng
from dojo.inputs import pairs, texts
from dojo.inputs.steering import Steering
from dojo.launch import interrupt
from dojo.lazy import torch
from dojo.maths import flow, preference
from dojo.methods import dpo, drawing
from dojo.models import sd3
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start


@dataclass(frozen=True, kw_only=True)
class DpoArgs:
    """The loss."""

    beta_dpo: float = cli.option(2000.0, common=True)
    """how strongly the policy is held to the reference: large holds it near. It multiplies half the
    difference of mean errors; 500 and less let single pairs pull the policy far away, as users of
    other codes report. A form with summed errors has this divided by the latent's size (262,144
    numbers at 1024 px: 0.0076)"""
    winner_preserving_mu: float | None = None
    """hold the loser's pull back where it would make the winner worse (SDPO), from 0 (the winner
    stands still) to 1 (no such pull at all); its authors take 0.9 for SD1.5, 0.6 for SDXL, and say
    nothing of SD3"""
    sft: bool = False
    """learn the winners alone, by the plain loss, without a reference: the usual comparison"""

    def __post_init__(self) -> None:
        if self.beta_dpo <= 0:
            raise ValueError("--beta_dpo must be positive")
        if self.winner_preserving_mu is not None:
            if not 0 <= self.winner_preserving_mu <= 1:
                raise ValueError("--winner_preserving_mu must lie in [0, 1]")
            if self.sft:
                raise ValueError("--winner_preserving_mu: --sft has no loser that would pull")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd3.ModelArgs
    text: sd3.TextArgs
    run: RunArgs
    data: data.PairArgs
    cache: data.CacheArgs
    scorers: rewards.ScorerArgs
    dpo: DpoArgs
    noise: sd3.NoiseArgs
    finetune: finetune.FinetuneArgs
    lora: finetune.LoraArgs
    full: finetune.FullArgs
    optim: OptimArgs
    ema: EmaArgs
    evaluation: drawing.FlowPromptEvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    model = sd3.open_model(args.model, args.text)
    with_reference = not args.dpo.sft
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained = finetune.choose(args.finetune, run, lora=args.lora, full=args.full)
    trained.check(args.optim)
    size, shape = args.data.size, finetune.shape_of(run, model, args.data.size)
    shown = args.evaluation.prompts()

    # -------------------------------------------------------------------------------- pairs
    sources = pairs.open_sources(run, args)
    if not args.run.dry_run:
        sources = pairs.chosen(run, sources, args)
    batch_size = args.optim.train_batch_size
    run.plan(args.optim, len(sources.train), data.pair_fingerprint(sources.train, args.data))
    args.ema.check(args.optim.kind, run.num_steps)
    cost = partial(
        *(dpo.pair_cost, run, trained, model, batch_size, shape), with_reference=with_reference
    )
    needs = partial(dpo.needs, run, model, args, size, drawn=bool(shown))
    if not finetune.begin(run, args, trained, cost, needs, with_reference=with_reference):
        return
    vae = model.load_vae(run.device)
    watches = with_reference or trained.reference_is_free
    inputs = pairs.prepare(run, sources, model, vae, args, with_held_out=watches)
    words = [*(p.text for p in shown), args.evaluation.eval_negative_prompt, *inputs.held_out_texts]
    embed = texts.prepare(run, model, args.cache, [inputs.train.texts(), words])
    watched = args.scorers.load_all(run.device, args.evaluation.held_out_rewards)

    # -------------------------------------------------------------------------------- model
    objective = model.objective(size, args.noise)
    trained.load(model, objective, with_reference=with_reference)
    learner = Learner(run, trained, args.optim, args.ema)
    steering = Steering(model=model, texts=embed, size=size, dtype=run.dtype)
    judge = dpo.Judge(inputs, steering, objective, trained, args.dpo.beta_dpo, batch_size)
    steered = args.evaluation.steered(steering)
    evaluate = drawing.evaluator(
        run, args.evaluation, shown, watched, steered, trained, vae, batch_size
    )

    # --------------------------------------------------------------------------------- loop
    learner.catch_up(judge, evaluate, due=args.evaluation.due(run.step, run.num_steps))
    sides = 1 if args.dpo.sft else 2  # of a pair: the winner alone, or both
    for batch in run.batches(inputs.loader(batch_size)):
        keys = run.keys("pair", batch["place"])
        captions = [*batch["caption"]] * sides
        with learner.accumulate():
            clean = inputs.latents(batch, keys)[: sides * len(keys)]  # [2B, ...], winners first
            noise = inputs.noise(keys, clean)  # [2B, ...], the same for both pictures of a pair
            uniform = rng.uniform([(*key, "sigma") for key in keys])
            sigma = objective.level(uniform).to(run.device).repeat(sides)  # [2B]
            noisy = flow.interpolate(clean, noise, sigma)
            target, weight = flow.velocity(clean, noise), objective.weight(sigma)
            embeds = steering.embeds(captions)
            predicted = steering.predictor(learner.network, embeds)(noisy, sigma)
            pair = {"clean": clean, "noise": noise}
            errors = weight * objective.errors(predicted, noisy, sigma, **pair)
            losses = errors
            if not args.dpo.sft:
                winner, loser = errors.chunk(2)
                if args.dpo.winner_preserving_mu is not None:
                    for_winner, for_loser = (predicted - target).chunk(2)
                    mu = args.dpo.winner_preserving_mu
                    scale = preference.guard(for_winner, for_loser, mu)
                    loser = preference.scaled_pull(loser, scale)
                    run.average(loser_pull=scale)
                with (
                    run.phase("reference", wait=True),
                    torch.no_grad(),
                    trained.reference() as base,
                ):
                    before = steering.predictor(base, embeds)(noisy, sigma)
                    reference = weight * objective.errors(before, noisy, sigma, **pair)
                found = preference.dpo(winner, loser, *reference.chunk(2), beta=args.dpo.beta_dpo)
                losses = found.loss
                run.average(**found.row())
            stepped = learner.step(losses.mean())
        if stepped:
            due = args.evaluation.due(run.step, run.num_steps)
            learner.look(judge, evaluate, due=due)
            learner.keep()

    # ------------------------------------------------------------------------------- result
    card = publish.Card(
        title="Stable Diffusion 3, trained by flow-DPO",
        dataset=args.data.location,
        tags=("stable-diffusion-3", "text-to-image", "dpo", "preference-optimization"),
    )
    publish.finish(run, args, learner, trained, evaluate, card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__, {"--list_rewards": rewards.table})
