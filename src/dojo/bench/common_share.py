"""Measures how much of their gradient the groups of an epoch have in common, by objective.

A group of pictures of one prompt gives a gradient of the adapter. What all groups have in common is
what an epoch learns; the rest is noise that only more groups average out. The common share of a
group's squared gradient, |mean|^2 / mean |gradient|^2, is estimated without bias from the products
of different groups, so it may come out below zero where there is nothing. It decides how much work
a step in the right direction takes: with N groups the signal is as large as the noise for
N = (1 - share) / share. Nothing is trained.

    python -m dojo.bench common_share --pretrained_model_name_or_path models/pocket-sd3 \\
        --prompt_set pocket --reward pocket --resolution 64 --max_sequence_length 24

GRPO draws its pictures with `--branch` and trains one step; the others draw along the ODE. All
begin at the model as it is, where every policy is the base. `shuffled` deals nft's advantages out
anew within each group, and has to come out as nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from dojo import data, finetune, rewards, rng
from dojo.bench.table import markdown
from dojo.cli import UserError, option, ranges
from dojo.files import outputs
from dojo.inputs import prompts, texts
from dojo.inputs.steering import Steering
from dojo.lazy import torch
from dojo.maths import denoising, flow, forward, passes, rollout
from dojo.maths.advantages import Spread, group_advantages
from dojo.maths.objective import Flow
from dojo.maths.surrogate import log_ratio
from dojo.methods import rl
from dojo.models import sd3
from dojo.run import OptimArgs, Run, RunArgs, start

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.maths.advantages import Advantages

Kind = Literal["grpo", "nft", "ram", "awm", "dgpo", "shuffled"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class MeasureArgs:
    """What is measured, on how many pictures."""

    output_dir: Path = option(Path("outputs/common-share"), common=True)
    """folder of share.json and share.md"""
    objectives: tuple[Kind, ...] = KINDS
    """which objectives; shuffled is the control"""
    num_groups: int = option(96, common=True)
    """prompts, a group each"""
    group_size: int = 8
    """pictures of each"""
    groups_at_once: int = 6
    """groups that are drawn together"""
    resolution: int = option(64, common=True)
    """height and width in pixels"""
    sample_steps: int = 4
    """denoising steps of a picture"""
    sigma_grid: flow.Grid = "pipeline"
    """where they begin: the pipeline's table, or even, as good with one step less"""
    flow_shift: float | None = None
    """shift of sigma; unset is the model's own"""
    num_train_timesteps: int = 2
    """levels at which a finished picture is noised anew"""
    timestep_range: float = 0.5
    """share of the levels, from the noisiest on, that they are drawn from"""
    trained_step: int = 1
    """grpo: the step, from 0, that is trained"""
    noise_level: float = 0.8
    """grpo: strength of its noise"""
    advantage_std: Spread = "group"
    """what a picture's distance from its group's mean is divided by"""
    mixed_precision: Literal["no", "bf16"] = "no"
    """arithmetic"""
    seed: int = option(0, common=True)
    """seed of prompts, pictures and noise"""

    def __post_init__(self) -> None:
        ranges.check(self, "group_size", least=2)
        ranges.check(self, "num_groups", least=3)
        ranges.check(self, "groups_at_once resolution", least=1)
        # Of coefficients-preserving sampling: on the pipeline's grid the last two steps have no
        # noise to speak of, on the even one the last.
        room = self.sample_steps - (2 if self.sigma_grid == "pipeline" else 1)
        if not 0 <= self.trained_step < room:
            raise ValueError(
                f"--trained_step {self.trained_step} must lie in 0 .. {room - 1} (--sample_steps)"
            )
        ranges.check_seed(self, "seed")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError("--flow_shift must be positive")
        if self.num_groups % self.groups_at_once:
            raise ValueError("--num_groups must be a multiple of --groups_at_once")
        self.levels()  # checks itself, as the next does
        self.rollout()

    @property
    def sample(self) -> rl.SampleArgs:
        """As the scripts' options."""
        return rl.SampleArgs(
            resolution=self.resolution,
            num_prompts_per_epoch=self.num_groups,
            group_size=self.group_size,
            flow_shift=self.flow_shift,
        )

    def levels(self) -> rl.LevelArgs:
        """As the scripts' options."""
        return rl.LevelArgs(
            sample_steps=self.sample_steps,
            sigma_grid=self.sigma_grid,
            num_train_timesteps=self.num_train_timesteps,
            timestep_range=self.timestep_range,
        )

    def rollout(self) -> rl.RolloutArgs:
        """As the scripts' options."""
        return rl.RolloutArgs(
            noise_level=self.noise_level,
            sample_steps=self.sample_steps,
            sigma_grid=self.sigma_grid,
            window_size=1,
            window_first=self.trained_step,
            window_range=(self.trained_step + 1) / self.sample_steps,
        )

    def passes(self, kind: Kind) -> float:
        """Forward passes of a picture in training, with one optimizer step an epoch."""
        if kind == "grpo":
            trained = self.rollout().trained_steps(0, 0)
            return passes.of_way(self.sample_steps, trained, copies=self.group_size)
        asked = sum(nft_args(kind).asked(self.num_train_timesteps, 1).values())
        drawn = self.levels().way(1.0).predictions
        return passes.of_finished(drawn, self.num_train_timesteps, asked)


@dataclass(frozen=True, kw_only=True)
class CommonShareArgs:
    """Options by group."""

    measure: MeasureArgs
    model: sd3.ModelArgs
    text: sd3.TextArgs
    prompts: prompts.PromptArgs
    cache: data.TextCacheArgs
    reward: rewards.RewardArgs
    lora: rl.PolicyLoraArgs


def nft_args(kind: Kind) -> rl.NftArgs:
    """The options of an objective that learns from finished pictures: its defaults."""
    return rl.NftArgs(objective="nft" if kind == "shuffled" or kind == "grpo" else kind)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What the groups' gradients have in common."""

    value: float
    error: float
    """its standard error, by the jackknife over groups"""
    groups: int


def share_of(gradients: Tensor) -> Share:
    """The common share of the groups' gradients [N, P].

    Raises:
        ValueError: fewer than three groups.
        UserError: none has a gradient.
    """
    number = len(gradients)
    if number < 3:
        raise ValueError(f"{number} groups: their gradients' common share wants at least three")
    products = (gradients @ gradients.T).double()
    own, rows = products.diagonal(), products.sum(1)
    if not own.any():
        raise UserError("--reward: no group has a gradient, as all its pictures score alike")
    value = _ratio(rows.sum() - own.sum(), own.sum(), number)
    # Without one group, for each in turn.
    others = _ratio(
        rows.sum() - own.sum() - 2 * (rows - own), own.sum() - own, torch.tensor(number - 1)
    )
    spread = (number - 1) / number * (others - others.mean()).square().sum()
    return Share(value=float(value), error=float(spread.sqrt()), groups=number)


def _ratio(across: Tensor, own: Tensor, number: int | Tensor) -> Tensor:
    return across / (number * (number - 1)) / (own / number)


def main(args: CommonShareArgs) -> None:
    """Draws, takes the gradients, prints the table and writes it down."""
    measure = args.measure
    outputs.check(measure.output_dir, "run", overwrite=True, flag="--output_dir")
    settings = RunArgs(
        output_dir=measure.output_dir,
        overwrite_output_dir=True,
        seed=measure.seed,
        mixed_precision=measure.mixed_precision,
        report_to=("none",),
    )
    run = start(settings, OptimArgs())
    if run.accelerator.num_processes > 1:
        raise UserError("common_share is for one process")
    world = open_world(run, args)
    kinds: list[Kind] = [kind for kind in measure.objectives if kind != "grpo"]
    gradients = of_finished(world, kinds) if kinds else {}
    if "grpo" in measure.objectives:
        gradients["grpo"] = of_way(world)
    found = {kind: share_of(gradients[kind]) for kind in measure.objectives}
    rows = [row(measure, kind, found[kind]) for kind in measure.objectives]
    table = markdown(rows)
    print(table)
    content = {
        "settings": asdict(measure, dict_factory=lambda items: {k: str(v) for k, v in items}),
        "model": args.model.pretrained_model_name_or_path,
        "shares": {kind: asdict(one) for kind, one in found.items()},
    }
    folder = measure.output_dir
    outputs.own(folder / "share.md").write_text(table + "\n", encoding="utf-8")
    outputs.own(folder / "share.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    run.finish()


def row(args: MeasureArgs, kind: Kind, share: Share) -> dict[str, str]:
    """What the table says of an objective."""
    cost = args.passes(kind)
    known = share.value > 2 * share.error
    pictures = (1 - share.value) / share.value * args.group_size if known else 0.0
    until = f"{pictures:,.0f}" if known else "not known"
    return {
        "objective": "nft, advantages shuffled" if kind == "shuffled" else kind,
        "common share": f"{share.value:.4f} ± {share.error:.4f}",
        "forward passes per picture": f"{cost:g}",
        "share per forward pass": f"{share.value / cost:.5f}",
        "pictures until signal = noise": until,
        "forward passes until then": f"{pictures * cost:,.0f}" if known else "not known",
    }


# ---- The gradients ----


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What is asked: the policy, and how its pictures are drawn and scored."""

    run: Run
    args: MeasureArgs
    source: prompts.Prompts
    reward: rewards.Reward
    trained: finetune.Trained
    steering: Steering
    decode: Callable[[Tensor], Tensor]
    shift: float

    def batches(self) -> list[rl.Batch]:
        """The groups, some at a time."""
        args, run = self.args, self.run
        drawn = self.source.draw(run.seed, 0, args.num_groups, replace=False)
        size = args.groups_at_once * args.group_size
        return rl.batches(run, args.sample, self.source.train, drawn, 0, size)

    def velocity(self, words: Sequence[str]) -> rollout.Velocity:
        """What the policy says of these prompts."""
        return self.steering(self.trained.network, words)

    def starts(self, copies: int) -> Iterator[tuple[rl.Batch, Tensor]]:
        """The groups' pictures as noise, `copies` of them from the same."""
        shape = self.steering.model.latent_shape(*self.args.sample.size)
        for batch in self.batches():
            yield batch, rng.normal(shape, batch.noise_keys(self.run, copies), self.run.device)

    def scored(self, made: Sequence[tuple[rl.Batch, Tensor]]) -> Advantages:
        """How much better than its group each picture is, by its latents."""
        scoring = rl.Scoring(self.run, self.reward, self.args.sample.max_invalid)
        for batch, latents in made:
            with torch.no_grad():
                scoring.submit(batch, self.decode(latents))
        found = scoring.collect()
        spread = self.args.advantage_std
        return group_advantages(found.scores, found.prompt_ids, found.valid, spread)

    def gradient(self, loss: Tensor) -> Tensor:
        """Of the trained weights, flat: [P]."""
        params = list(self.trained.params)
        found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        zeros = map(torch.zeros_like, params)
        return torch.cat(
            [(own if one is None else one).flatten() for one, own in zip(found, zeros, strict=True)]
        )


def open_world(run: Run, args: CommonShareArgs) -> World:
    """Loads the model, an adapter that says nothing yet, and the reward."""
    measure = args.measure
    model = sd3.open_model(args.model, args.text)
    size = measure.sample.size
    finetune.shape_of(run, model, size)
    objective = model.objective(size, sd3.NoiseArgs(flow_shift=measure.sample.flow_shift))
    source = prompts.open_together(run, args.prompts)
    (reward,) = args.reward.load(run.device)
    rewards.check_prompts(run.say, reward, source.train, measure.sample.max_invalid)
    embed = texts.prepare(run, model, args.cache, [source.texts])
    trained = finetune.choose(
        finetune.FinetuneArgs(), run, lora=args.lora, full=finetune.FullArgs()
    )
    trained.load(model, objective, with_reference=True)
    return World(
        run=run,
        args=measure,
        source=source,
        reward=reward,
        trained=trained,
        steering=measure.sample.steering(model, embed, run.dtype),
        decode=partial(model.decode, model.load_vae(run.device)),
        shift=objective.shift,
    )


def of_way(world: World) -> Tensor:
    """GRPO's gradients [N, P]."""
    args = world.args
    plan = args.rollout().plan(world.shift, world.run.seed, 0)
    (number,) = plan.trained
    made: list[tuple[rl.Batch, rollout.Trajectory]] = []
    for batch, noise in world.starts(args.group_size):
        ask, keys = world.velocity(batch.texts), batch.keys(world.run, "way")
        made.append((batch, rollout.sample(ask, noise, plan, keys, copies=args.group_size)))
    advantages = world.scored([(batch, way.final) for batch, way in made])
    found: list[Tensor] = []
    for batch, way in made:
        step = way.steps[number]
        new, _ = rollout.predict(
            world.velocity(batch.texts), step.latents, number, plan, step.copies
        )
        ratio = log_ratio(new, step.policy, step.reached).exp()
        gain = advantages.at(batch.places, 5.0).to(ratio.device) * ratio
        found += [world.gradient(-own.mean()) for own in gain.unflatten(0, (-1, args.group_size))]
    return torch.stack(found)


def of_finished(world: World, kinds: Sequence[Kind]) -> dict[Kind, Tensor]:
    """The gradients [N, P] of objectives that learn from finished pictures: the same pictures."""
    way = world.args.levels().way(world.shift)
    made = [
        (batch, denoising.sample(world.velocity(batch.texts), noise, way))
        for batch, noise in world.starts(1)
    ]
    advantages = world.scored(made)
    found: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
    for shared in (1, world.args.group_size):
        some: list[Kind] = [kind for kind in kinds if (kind == "dgpo") == (shared > 1)]
        for batch, latents in made if some else ():
            for chunk in _groups(world, batch, latents, way, shared):
                gradients = _gradients(world, chunk, some, advantages)
                for kind, gradient in zip(some, gradients, strict=True):
                    found[kind].append(gradient)
    return {kind: torch.stack(gradients) for kind, gradients in found.items()}


def _groups(
    world: World, batch: rl.Batch, latents: Tensor, way: denoising.FlowWay, shared: int
) -> list[rl.Finished]:
    """A batch's groups, noised anew."""
    args = world.args
    objective = world.trained.objective
    assert isinstance(objective, Flow)
    made = [(batch, latents)]
    return rl.noised(world.run, args.levels(), made, args.group_size, way.sigmas, objective, shared)


def _gradients(
    world: World, chunk: rl.Finished, kinds: Sequence[Kind], advantages: Advantages
) -> list[Tensor]:
    """Of one group, the mean over its levels, by objective."""
    levels = world.args.num_train_timesteps
    own = advantages.at(chunk.batch.places, 5.0).to(chunk.clean.device)
    order = torch.randperm(len(own), generator=rng.generator("shuffled", chunk.batch.places[0]))
    velocity = world.velocity(chunk.batch.texts)
    losses: list[list[Tensor]] = [[] for _ in kinds]
    for k in range(levels):
        sigma, noisy, target = chunk.noised(world.run, k)
        predicted = velocity(noisy, sigma)
        now = predicted.detach()
        said = {"old": now, "sampled": now, "reference": now}
        for kind, kept in zip(kinds, losses, strict=True):
            dealt = own[order] if kind == "shuffled" else own
            loss = forward.Loss(objective=nft_args(kind).objective)
            kept.append(loss(chunk.shared, predicted, target, sigma, dealt, said).mean() / levels)
    return [world.gradient(torch.stack(kept).sum()) for kept in losses]
