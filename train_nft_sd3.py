"""DiffusionNFT, RAM and AWM for Stable Diffusion 3 and 3.5: learning from finished pictures.

Pictures are drawn along the ODE, scored, and noised anew at a few levels. There the velocity is
pulled towards the picture's own, u = eps - x0, where it was better than the others of its prompt,
and away where it was worse, A = (reward - mean of the group) / std:

    nft: DiffusionNFT, two branches about the old policy  (Zheng et al. 2025, arXiv:2509.16117)
    ram: |v - (v_ref + m A (u - v_old))|^2                (2026, arXiv:2605.10759)
    awm: max(-a r, -a clip(r)), r = exp(l(v) - l(v_old))  (Xue et al. 2025, arXiv:2509.25050)

The old policy, a second set of weights, follows slowly and draws for nft and ram. The sibling that
learns from the steps of the way is `train_grpo_sd3.py`.

    accelerate launch train_nft_sd3.py --pretrained_model_name_or_path models/pocket-sd3 \
        --prompt_set pocket --reward pocket --resolution 64 --output_dir outputs/nft
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dojo import cli, data, finetune, publish, rewards, rng
from dojo.cli import UserError, ranges
from dojo.inputs import prompts, texts
from dojo.launch import interrupt
from dojo.maths import forward, rollout
from dojo.maths.advantages import Spread, decoupled_advantages, group_advantages
from dojo.maths.flow import squared_error
from dojo.methods import rl
from dojo.methods.drawing import evaluator
from dojo.models import sd3
from dojo.run import EmaArgs, Learner, OptimArgs, RunArgs, start

LAGGED = "old.safetensors"
# By objective: how fast the share that the old policy keeps grows with the epochs, and its most.
RAMPS = {"nft": (0.001, 0.5), "ram": (0.01, 0.9), "awm": (0.001, 0.3)}


@dataclass(frozen=True, kw_only=True)
class NftArgs:
    """The objective, the old policy, and the tie to the model as it was."""

    objective: forward.Objective = "nft"
    """nft (DiffusionNFT), ram (tied to the base model) or awm"""
    num_inner_epochs: int = 1
    """passes over the pictures of an epoch"""
    advantage_std: Spread = "global"
    """what a picture's distance from its group's mean reward is divided by: the std of all pictures
    of the epoch, or of the group"""
    reward_aggregation: Literal["sum", "gdpo"] = "sum"
    """several rewards: their weighted sum, or each normalised within its groups first (GDPO)"""
    adv_clip_max: float = 5.0
    """advantages are clamped to this"""
    nft_beta: float = 1.0
    """nft: how strongly the old policy holds; 1, or 0.1 where the reward is hard to move"""
    no_adaptive_weight: bool = False
    """nft: do not divide each branch by its own mean absolute error"""
    reward_multiplier: float = 100.0
    """ram: the inverse temperature, where training stops by itself; 100 to 1000 is usual"""
    ghuber_power: float = 0.25
    """awm: power of the error in what stands for the likelihood"""
    clip_range: float = 1.0
    """awm: how far that likelihood's ratio may leave 1; with one optimizer step an epoch it is 1"""
    ema_kl_beta: float = 1.0
    """awm: weight of the squared distance from the old policy, without which bad pictures push
    without bound"""
    kl_beta: float = 1e-4
    """weight of the squared distance from the base model (ram is tied to it anyway)"""
    norm_guard: float = 0.0
    """weight of a hinge that holds the velocity's norm at the base model's"""
    old_decay_flat: int = 0
    """epochs at whose end the old policy takes over the weights as they are"""
    old_decay_ramp: float | None = None
    """by how much an epoch raises the share that it keeps; unset: 0.001, with ram 0.01"""
    old_decay_max: float | None = None
    """the largest such share; unset: 0.5 for nft, 0.9 for ram, 0.3 for awm"""

    def __post_init__(self) -> None:
        positive = "adv_clip_max nft_beta reward_multiplier ghuber_power clip_range"
        ranges.check(self, positive, above=0)
        ranges.check(self, "num_inner_epochs", least=1)
        ranges.check(self, "ema_kl_beta kl_beta norm_guard old_decay_flat", least=0)
        if self.objective == "awm" and not self.ema_kl_beta:
            raise ValueError("--ema_kl_beta 0: awm's bad pictures would push without bound")
        for name in ("old_decay_ramp", "old_decay_max"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"--{name} must lie in [0, 1)")

    def old_decay(self, epoch: int) -> float:
        """The share of itself that the old policy keeps at the end of an epoch, from 0 on."""
        ramp, most = RAMPS[self.objective]
        ramp = ramp if self.old_decay_ramp is None else self.old_decay_ramp
        most = most if self.old_decay_max is None else self.old_decay_max
        return min(max(0, epoch + 1 - self.old_decay_flat) * ramp, most)

    @property
    def draws_old(self) -> bool:
        """Whether the old policy draws the pictures."""
        return self.objective != "awm"

    @property
    def asks_reference(self) -> bool:
        """Whether the loss needs the base model, at every level."""
        return self.objective == "ram" or self.kl_beta > 0 or self.norm_guard > 0

    def loss(
        self, velocity: Tensor, target: Tensor, sigma: Tensor, a: Tensor, asked: dict[str, Tensor]
    ) -> Tensor:
        """The objective's loss of a batch at one level: [B]."""
        old = asked["old"]
        if self.objective == "nft":
            limit, beta = self.adv_clip_max, self.nft_beta
            settings: dict[str, Any] = {"limit": limit, "adaptive": not self.no_adaptive_weight}
            return forward.nft(velocity, old, target, sigma, a, beta=beta, **settings)
        if self.objective == "ram":
            times = self.reward_multiplier
            return forward.ram(velocity, old, asked["reference"], target, a, multiplier=times)
        settings = {"power": self.ghuber_power, "limit": self.adv_clip_max}
        sampled = asked["sampled"]
        loss = forward.awm(
            velocity, sampled, target, sigma, a, clip_range=self.clip_range, **settings
        )
        return loss + self.ema_kl_beta * squared_error(velocity, old)


@dataclass(frozen=True, kw_only=True)
class NftEvalArgs(rl.EvalArgs):
    """Held-out prompts, drawn as in training, and as a user would."""

    eval_guidance_scale: float | None = 4.5
    """guidance of a second evaluation (eval_guided_reward): learning without guidance makes
    pictures without guidance good, and users draw with it; 1 leaves it out"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options by group; every group is documented where its code is."""

    model: sd3.ModelArgs
    text: sd3.TextArgs
    run: RunArgs
    prompts: prompts.PromptArgs
    cache: data.TextCacheArgs
    reward: rewards.RewardArgs
    sample: rl.SampleArgs
    levels: rl.LevelArgs
    nft: NftArgs
    finetune: finetune.FinetuneArgs
    lora: rl.PolicyLoraArgs
    full: finetune.FullArgs
    optim: OptimArgs
    ema: EmaArgs
    evaluation: NftEvalArgs
    publish: publish.PublishArgs


def main(args: Args) -> None:
    """Trains from the options to the saved result."""
    # ---------------------------------------------------------------------------------- run
    run = start(args.run, args.optim)
    if args.run.shard:  # a process has parts of weights, which cannot be changed for others
        raise UserError("--shard does not work with an old policy yet: leave it out")
    model = sd3.open_model(args.model, args.text)
    args.publish.check(args.run.output_dir, args.run.report_to)
    trained = finetune.choose(args.finetune, run, lora=args.lora, full=args.full)
    trained.check(args.optim)

    # ------------------------------------------------------------------------------ prompts
    source = prompts.open_together(run, args.prompts)
    args.sample.check(args.optim, run.accelerator.num_processes, min_group=2)
    size, shape = args.sample.size, finetune.shape_of(run, model, args.sample.size)
    objective = model.objective(size, sd3.NoiseArgs(flow_shift=args.sample.flow_shift))
    batch_size, train_batch_size = args.sample.batch_size(args.optim), args.optim.train_batch_size
    passes, levels = args.nft.num_inner_epochs, args.levels.num_train_timesteps
    rl.plan(run, args.sample, args.optim, source, passes)
    args.ema.check(args.optim.kind, run.num_steps)
    # Who is asked at how many levels. The reference says how far norms have grown, at one at least.
    counts = {"old": levels, "reference": levels if args.nft.asks_reference else 1}
    if args.nft.objective == "awm":
        counts["sampled"] = levels
    asked = sum(counts.values())
    cost = partial(rl.finished_cost, run, trained, model, args, passes, asked)
    needs = partial(rl.needs, run, model, args)
    if not finetune.begin(run, args, trained, cost, needs, with_reference=True, lagged=True):
        return
    reward, *watched = args.reward.load(run.device, *args.evaluation.held_out_rewards)
    rewards.check_prompts(run.say, reward, source.train, args.sample.max_invalid)
    embed = texts.prepare(run, model, args.cache, [[*source.texts, args.sample.negative_prompt]])

    # -------------------------------------------------------------------------------- model
    vae = model.load_vae(run.device)
    trained.load(model, objective, with_reference=True)
    old = finetune.Lagged(trained.params)
    learner = Learner(run, trained, args.optim, args.ema, passes=levels, parts={LAGGED: old})
    drawing = args.sample.steering(model, embed, run.dtype)
    steering = replace(drawing, guidance_scale=1.0)
    about = (source.held_out, [reward, *watched])
    evaluate = [evaluator(run, args.evaluation, *about, steering, trained, vae, batch_size)]
    if (args.evaluation.eval_guidance_scale or 1) > 1:
        guided = args.evaluation.steered(drawing)
        looks = (guided, trained, vae, batch_size, "guided")
        evaluate.append(evaluator(run, args.evaluation, *about, *looks))
    plan = rollout.ode_plan(args.levels.sample_steps, objective.shift)

    @contextmanager
    def lagged() -> Iterator[Any]:
        with old.applied():
            yield trained.network

    policies = {
        "old": (counts["old"], lagged),
        "reference": (counts["reference"], trained.reference),
        "sampled": (counts.get("sampled", 0), partial(nullcontext, trained.network)),
    }

    # --------------------------------------------------------------------------------- loop
    due = args.evaluation.due(run.epoch) or run.step >= run.num_steps
    learner.catch_up(*evaluate, due=due)
    for epoch in run.epochs():
        began = run.step
        drawn = source.draw(run.seed, epoch, args.sample.num_prompts_per_epoch, replace=False)
        scoring = rl.Scoring(run, reward, args.sample.max_invalid)
        made: list[tuple[rl.Batch, Tensor]] = []
        with learner.kept_when_stopped():
            for batch in rl.batches(run, args.sample, source.train, drawn, epoch, batch_size):
                policy = old.applied() if args.nft.draws_old else nullcontext()
                with run.phase("sample", wait=True), policy:
                    velocity = drawing(trained.network, batch.texts)
                    noise = rng.normal(shape, batch.keys(run, "noise"), run.device)
                    made.append((batch, rollout.sample(velocity, noise, plan).final))
                with run.phase("decode", wait=True), torch.no_grad():
                    images = model.decode(vae, made[-1][1])  # [B, 3, H, W]
                scoring.submit(batch, images)
            with run.phase("reward"):
                scores = scoring.collect()

        groups = (scores.prompt_ids, scores.valid, args.nft.advantage_std)
        if args.nft.reward_aggregation == "gdpo":
            advantages = decoupled_advantages(*scores.table(reward.weights), *groups)
        else:
            advantages = group_advantages(scores.scores, *groups)
        run.note({**scores.row(), **advantages.row()})

        with run.phase("reference", wait=True):
            schedule = (plan.sigmas, objective.shift)
            chunks = rl.ask(run, args.levels, made, train_batch_size, steering, *schedule, policies)
        for chunk in rl.shuffled(chunks, run, epoch, passes):
            velocity = steering(learner.network, chunk.batch.texts)
            advantage = advantages.at(chunk.batch.places, args.nft.adv_clip_max).to(run.device)
            for k in range(levels):
                with learner.accumulate():
                    sigma, noisy, target = chunk.noised(run, k)
                    predicted = velocity(noisy, sigma)  # [B, ...], without guidance
                    said = chunk.at(k)
                    loss = args.nft.loss(predicted, target, sigma, advantage, said)
                    if (reference := said.get("reference")) is not None:
                        ratio = forward.norm_ratio(predicted, reference)
                        far = squared_error(predicted, reference)
                        loss = loss + args.nft.kl_beta * far
                        loss = loss + args.nft.norm_guard * forward.norm_excess(ratio)
                        run.average(kl=far, norm_ratio=ratio)
                    run.average(
                        old_deviate=squared_error(predicted, said["old"]),
                        x0_norm=chunk.clean.square().flatten(1).mean(1).sqrt(),
                    )
                    learner.step(loss.mean())
        old.follow(args.nft.old_decay(epoch))
        run.log_rest()
        due = args.evaluation.due(epoch + 1) or run.step >= run.num_steps
        learner.look(*evaluate, due=due)
        learner.keep(since=began)

    # ------------------------------------------------------------------------------- result
    names = {"nft": "DiffusionNFT", "ram": "Reinforce Adjoint Matching", "awm": "AWM"}
    card = publish.Card(
        title=f"Stable Diffusion 3, trained by {names[args.nft.objective]}",
        dataset=args.prompts.location,
        tags=("stable-diffusion-3", "text-to-image", "nft", "reinforcement-learning"),
    )
    publish.finish(run, args, learner, trained, evaluate[0], card)


if __name__ == "__main__":
    interrupt.watch()
    cli.run(finetune.planned(main), Args, __doc__, {"--list_rewards": rewards.table})
