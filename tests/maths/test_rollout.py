"""Claims about rollouts: the schedule, the plan, noise, and a ratio of exactly 1."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from dojo import cli, rng
from dojo.maths import advantages as policy
from dojo.maths import rollout
from dojo.maths.flow import sigma_schedule, squared_error
from dojo.maths.gaussian import Gaussian
from dojo.maths.rollout import FlowPlan, Plan, Trajectory, Velocity
from dojo.maths.surrogate import Ratio, clipped_surrogate, log_ratio
from dojo.maths.transitions import NOISE_LEVELS, Sampler, guided
from dojo.methods.rl import RolloutArgs

NOISY: tuple[Sampler, ...] = ("sde", "cps", "dance")
SHAPE = (4, 4, 4)


def ode_plan(steps: int, shift: float) -> Plan:
    """A plan that trains nothing: the pipeline's own deterministic sampling."""
    return FlowPlan(
        sigmas=sigma_schedule(steps, shift), trained=range(0), sampler="ode", noise_level=0
    )


class Network(nn.Module):
    """A small transformer on 4x4 latents with a label: attention, norms and products, as in SD3."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Conv2d(4, width, 1)
        self.time = nn.Linear(2, width)
        self.label = nn.Embedding(8, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU())
        self.out = nn.Linear(64, 4)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """x [B, 4, 4, 4], sigma and label [B]."""
        h = self.into(x).flatten(2).mT  # [B, 16, width]
        h = h + (self.time(torch.stack([sigma, sigma.cos()], 1)) + self.label(label))[:, None]
        qkv = self.qkv(self.norm(h)).unflatten(-1, (3, 4, -1))  # [B, 16, 3, heads, width / heads]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # [B, 4, 16, width / 4]
        h = h + attended.transpose(1, 2).flatten(2)
        return self.out(self.mlp(h)).mT.unflatten(2, (4, 4))


def velocity_of(
    network: Network, count: int, guidance: float = 1.0, autocast: bool = False
) -> Velocity:
    """The network as the scripts will use it."""
    labels = torch.arange(count) % 7 + 1

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if guidance == 1:
                return network(latents, sigma, labels)
            both = network(
                torch.cat([latents, latents]),
                torch.cat([sigma, sigma]),
                torch.cat([labels, torch.zeros_like(labels)]),
            )
        conditional, unconditional = both.chunk(2)
        return guided(conditional, unconditional, guidance)

    return velocity


def keys(places: range, seed: int = 0) -> list[tuple[rng.Key, ...]]:
    return [(seed, "rollout", place) for place in places]


def start(places: range) -> Tensor:
    return rng.normal(SHAPE, keys(places, seed=1))


def plan(sampler: Sampler = "cps", trained: range = range(1, 4), steps: int = 6) -> Plan:
    return FlowPlan(
        sigmas=sigma_schedule(steps, 3.0),
        trained=trained,
        sampler=sampler,
        noise_level=NOISE_LEVELS[sampler],
    )


def roll(own: Plan, velocity: Velocity, places: range = range(6)) -> Trajectory:
    return rollout.sample(velocity, start(places), own, keys(places))


def pull(latents: Tensor, sigma: Tensor) -> Tensor:
    """A velocity without a network: every number by itself, so no batch size can matter."""
    return latents * sigma.view(-1, 1, 1, 1) - 0.3


# The schedule


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 6.0])
def test_the_schedule_is_that_of_the_pipeline_to_the_bit(shift: float) -> None:
    for steps in (1, 2, 3, 7, 10, 28, 40, 50):
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        assert torch.tensor(sigma_schedule(steps, shift)).equal(scheduler.sigmas)


def test_a_rollout_that_trains_nothing_is_the_pipelines_sampling_to_the_bit() -> None:
    velocity = velocity_of(Network(), 6)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    latents = start(range(6))
    with torch.no_grad():
        for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            predicted = velocity(latents, sigma.expand(6))
            latents = scheduler.step(predicted, t, latents)[0]
    ours = rollout.sample(velocity, start(range(6)), ode_plan(8, 3.0))
    assert torch.equal(ours.final, latents)
    assert ours.steps == {}


# The plan


def args(**options: object) -> RolloutArgs:
    return RolloutArgs(**options)  # pyright: ignore[reportArgumentType]


def test_all_steps_are_trained_but_those_without_noise_worth_the_name() -> None:
    for sampler, count in (("sde", 9), ("dance", 9), ("cps", 8)):
        own = args(train_timesteps="all", sampler=sampler).plan(3.0, 0, 0)
        assert own.trained == range(count)
        stds = [step.policy.std for step in roll(own, pull).steps.values()]
        assert min(stds) > 0.05
    with pytest.raises(ValueError, match="last is never trained"):
        plan(trained=range(6), steps=6)


@pytest.mark.parametrize(
    ("fraction", "steps", "count"), [(0.5, 10, 5), (0.9, 10, 9), (1.0, 10, 9), (0.01, 10, 1)]
)
def test_a_fraction_trains_the_noisiest_steps(fraction: float, steps: int, count: int) -> None:
    own = args(
        train_timesteps="fraction", timestep_fraction=fraction, sample_steps=steps, sampler="sde"
    )
    assert own.trained_steps(0, 0) == range(count)


def test_a_random_window_reaches_all_of_its_range_and_depends_on_seed_and_epoch_only() -> None:
    own = args(window_size=3, window_range=0.5)
    windows = [own.trained_steps(7, epoch) for epoch in range(60)]
    assert {(window.start, window.stop) for window in windows} == {(0, 3), (1, 4), (2, 5)}
    assert windows == [own.trained_steps(7, epoch) for epoch in range(60)]
    assert windows != [own.trained_steps(8, epoch) for epoch in range(60)]


def test_a_sliding_window_moves_by_one_and_begins_again() -> None:
    own = args(window_size=4, window_range=1.0, window_schedule="sliding", window_every=2)
    starts = [own.trained_steps(0, epoch).start for epoch in range(12)]
    assert starts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]  # 8 steps can be trained


def test_the_plan_has_the_schedule_and_the_samplers_own_noise_level() -> None:
    own = args(sampler="sde", sample_steps=8).plan(3.0, 0, 0)
    assert (own.sigmas, own.sampler, own.noise_level) == (sigma_schedule(8, 3.0), "sde", 0.7)
    assert args(noise_level=0.5).plan(3.0, 0, 0).noise_level == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sample_steps": 2}, "--sample_steps"),
        ({"sample_steps": 1, "sampler": "sde"}, "--sample_steps"),
        ({"noise_level": 0.0}, "--noise_level must be above 0"),
        ({"noise_level": 1.1}, "--noise_level must be at most 1"),
        ({"timestep_fraction": 0.0}, "--timestep_fraction"),
        ({"window_range": 1.5}, "--window_range"),
        ({"window_every": 0}, "--window_every"),
        ({"window_size": 0}, "--window_size must lie in 1 .. 5"),
        ({"window_size": 6}, "--window_size must lie in 1 .. 5"),
    ],
)
def test_impossible_options_are_refused_by_name(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        args(**flags)


def test_the_options_are_flags() -> None:
    own = cli.parse(RolloutArgs, None, ["--sampler", "dance", "--window_schedule", "sliding"])
    assert (own.sampler, own.level, own.window_schedule) == ("dance", 0.3, "sliding")


# What is kept


@pytest.mark.parametrize("sampler", NOISY)
def test_only_trained_steps_are_kept_and_they_form_a_chain(sampler: Sampler) -> None:
    trajectory = roll(plan(sampler), velocity_of(Network(), 6, autocast=True))
    assert list(trajectory.steps) == [1, 2, 3]
    for number, step in trajectory.steps.items():
        for tensor in (step.latents, step.reached, step.policy.mean, trajectory.final):
            assert (tensor.dtype, tensor.requires_grad) == (torch.float32, False)
        assert not torch.equal(step.reached, step.policy.mean)
        if number < 3:
            assert trajectory.steps[number + 1].latents is step.reached  # kept once


def test_steps_outside_the_window_are_those_of_the_ode() -> None:
    velocity = velocity_of(Network(), 6)
    noisy, still = roll(plan(trained=range(2, 4)), velocity), roll(ode_plan(6, 3.0), velocity)
    prefix = start(range(6))
    for sigma, after in pairwise(sigma_schedule(6, 3.0)[:3]):
        with torch.no_grad():
            prefix = prefix + (after - sigma) * velocity(prefix, torch.full((6,), sigma))
    assert torch.equal(noisy.steps[2].latents, prefix)
    latents = noisy.steps[3].reached
    for step in (4, 5):
        latents = rollout.predict(velocity, latents, step, noisy.plan)[0].mean
    assert torch.equal(noisy.final, latents)
    assert not torch.equal(noisy.final, still.final)


def test_noise_hangs_on_the_place_and_the_step_and_not_on_the_batches() -> None:
    whole = roll(plan(), pull, range(6))
    parts = [roll(plan(), pull, places) for places in (range(2), range(2, 6))]
    assert torch.equal(whole.final, torch.cat([part.final for part in parts]))
    noise = [step.policy.noise(step.reached) for step in whole.steps.values()]
    flat = torch.cat(noise).flatten(1)
    likeness = (F.normalize(flat) @ F.normalize(flat).T).fill_diagonal_(0)
    assert likeness.abs().max() < 0.6  # 18 draws, none of them twice
    # A step draws the same noise whichever steps were trained before it.
    other = roll(plan(trained=range(3, 4)), pull)
    torch.testing.assert_close(
        other.steps[3].policy.noise(other.steps[3].reached), noise[2], rtol=0, atol=1e-5
    )


def test_every_sample_needs_a_key() -> None:
    with pytest.raises(ValueError, match="5 keys for 6 samples"):
        rollout.sample(pull, start(range(6)), plan(), keys(range(5)))


# The ratio before the first update


def log_ratios(
    trajectory: Trajectory, velocity: Velocity, kind: Ratio = "exact"
) -> dict[int, Tensor]:
    """As a training pass takes them, with gradients."""
    return {
        number: log_ratio(
            rollout.predict(velocity, step.latents, number, trajectory.plan)[0],
            step.policy,
            step.reached,
            kind,
        )
        for number, step in trajectory.steps.items()
    }


@pytest.mark.parametrize("kind", ["exact", "unscaled", "guard"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("sampler", NOISY)
def test_the_ratio_before_the_first_update_is_exactly_one(
    sampler: Sampler, guidance: float, autocast: bool, kind: Ratio
) -> None:
    network = Network()
    velocity = velocity_of(network, 6, guidance, autocast)
    trajectory = roll(plan(sampler, trained=range(5)), velocity)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    for ratio in log_ratios(trajectory, velocity, kind).values():
        surrogate = clipped_surrogate(ratio, advantages, 1e-5)
        assert torch.equal(surrogate.ratio, torch.ones(6))
        surrogate.loss.mean().backward()
    gradients = [p.grad for p in network.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)
    assert sum(grad.abs().sum().item() for grad in gradients if grad is not None) > 0
    # and afterwards it is not: a small step moves the ratio of every sample
    with torch.no_grad():
        for parameter in network.parameters():
            assert parameter.grad is not None
            parameter -= 0.01 * parameter.grad.sign()
    for ratio in log_ratios(trajectory, velocity, kind).values():
        assert (ratio != 0).all()


def test_a_step_along_the_gradient_makes_good_samples_likelier() -> None:
    network = Network()
    velocity = velocity_of(network, 6)
    trajectory = roll(plan(trained=range(5)), velocity)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for ratio in log_ratios(trajectory, velocity).values():
        clipped_surrogate(ratio, advantages, 0.2).loss.mean().backward()
    optimizer.step()
    total = torch.stack([*log_ratios(trajectory, velocity).values()]).sum(0)
    assert (advantages * total).mean() > 0


def test_every_trained_step_of_every_sampler_has_a_finite_likelihood() -> None:
    # The predecessor trained the last step too, whose std is zero, and every loss was NaN.
    for sampler in NOISY:
        for steps in (2, 5, 50):
            own = plan(sampler, trained=range(steps - 1), steps=steps)
            for step in roll(own, pull).steps.values():
                assert step.policy.std > 1e-4
                assert step.policy.log_prob(step.reached).isfinite().all()


def test_the_likelihood_is_that_of_the_transition() -> None:
    # The predecessor took the density of the latents under N(0, 1) instead.
    for step in roll(plan(), pull).steps.values():
        noise = step.policy.noise(step.reached).flatten(1)
        expected = -0.5 * noise.square().mean(1) - math.log(step.policy.std * math.sqrt(math.tau))
        torch.testing.assert_close(step.policy.log_prob(step.reached), expected)


# All of it together: points in the plane learn to go where their prompt's reward is


class Drift(nn.Module):
    """The exact velocity of data N(0, I) in the plane, and a learnt part that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(32, 2)
        self.learnt = nn.Sequential(nn.Linear(2 + 1 + 3, 32), nn.SiLU(), self.last)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        s = sigma[:, None]
        known = F.one_hot(prompt, 3).float()
        base = x * (2 * s - 1) / ((1 - s) ** 2 + s**2)
        return base + self.learnt(torch.cat([x, s, known], 1))


TARGETS = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]])


def score(points: Tensor, prompt: Tensor) -> Tensor:
    return -(points - TARGETS[prompt]).square().sum(1)


Judge = Callable[[Tensor, Tensor], policy.Advantages]


def train(
    sampler: Literal["sde", "cps", "dance"], judge: Judge, ratio: Ratio, noise_level: float
) -> tuple[float, float]:
    """The mean reward of ODE samples before and after 40 epochs of 96 points."""
    network = Drift()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    prompt = torch.arange(96) % 3
    own = RolloutArgs(sampler=sampler, sample_steps=6, window_size=2, noise_level=noise_level)

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return network(latents, sigma, prompt)

    def evaluate() -> float:
        noise = rng.normal((2,), [("eval", i) for i in range(96)])
        points = rollout.sample(velocity, noise, ode_plan(10, 3.0)).final
        return score(points, prompt).mean().item()

    before = evaluate()
    for epoch in range(40):
        noise = rng.normal((2,), [("noise", epoch, i) for i in range(96)])
        places = [("rollout", epoch, i) for i in range(96)]
        trajectory = rollout.sample(velocity, noise, own.plan(3.0, 0, epoch), places)
        advantages = judge(score(trajectory.final, prompt), prompt)
        for inner in range(2):
            for number, step in trajectory.steps.items():
                new, _ = rollout.predict(velocity, step.latents, number, trajectory.plan)
                moved = log_ratio(new, step.policy, step.reached, ratio)
                loss = clipped_surrogate(moved, advantages.values.clamp(-5, 5), 0.2)
                if inner == 0 and number == trajectory.plan.trained[0]:
                    assert torch.equal(loss.ratio, torch.ones(96))
                loss.loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return before, evaluate()


def grouped(scores: Tensor, prompt: Tensor) -> policy.Advantages:
    return policy.group_advantages(scores, prompt, torch.ones(96, dtype=torch.bool))


@pytest.mark.parametrize(
    ("sampler", "ratio", "noise_level"),
    [("sde", "exact", 0.7), ("cps", "exact", 0.8), ("dance", "exact", 0.7), ("cps", "guard", 0.8)],
)
def test_points_learn_to_go_where_their_prompts_reward_is(
    sampler: Literal["sde", "cps", "dance"], ratio: Ratio, noise_level: float
) -> None:
    before, after = train(sampler, grouped, ratio, noise_level)
    assert before < -3  # the targets lie 1.5 from the origin, the points spread by almost 1
    assert after > -0.3


def test_points_learn_from_ddpos_buffer_too() -> None:
    buffer = policy.PromptBuffer(size=64, min_count=16)

    def judge(scores: Tensor, prompt: Tensor) -> policy.Advantages:
        return buffer.advantages(scores, prompt, torch.ones(96, dtype=torch.bool))

    _, after = train("cps", judge, "exact", 0.8)
    assert after > -0.3


def test_points_learn_nothing_from_rewards_that_are_not_theirs() -> None:
    def judge(scores: Tensor, prompt: Tensor) -> policy.Advantages:
        return grouped(rng.uniform([(str(scores.sum()), i) for i in range(96)]), prompt)

    before, after = train("cps", judge, "exact", 0.8)
    assert after < 0.8 * before


def test_the_divergence_from_a_reference_holds_the_policy() -> None:
    network, reference = Drift(), Drift()
    with torch.no_grad():
        network.last.bias.add_(0.5)
    prompt, x = torch.arange(6) % 3, torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    own = plan()
    here, v = rollout.predict(lambda a, s: network(a, s, prompt), x, 1, own)
    there, u = rollout.predict(lambda a, s: reference(a, s, prompt), x, 1, own)
    assert isinstance(here, Gaussian)
    for loss in (here.kl(there).mean(), squared_error(v, u).mean()):
        network.zero_grad()
        loss.backward(retain_graph=True)
        grad = network.last.bias.grad
        assert loss > 0
        assert grad is not None
        assert (grad > 0).all()  # descent takes the bias back to the reference's


@pytest.mark.parametrize("sampler", NOISY)
def test_weighted_steps_pull_alike(sampler: Sampler) -> None:
    """The gradient with respect to a step's velocity is then the drawn noise, whatever the step."""
    plan = FlowPlan(
        sigmas=sigma_schedule(8, 3.0),
        trained=range(6),
        sampler=sampler,
        noise_level=0.7,
        step_weighting="velocity",
    )
    plain = replace(plan, step_weighting="none")
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    for step in plan.trained:
        v = torch.zeros(1, *SHAPE, requires_grad=True)
        now, _ = rollout.predict(lambda x, s, v=v: v, torch.zeros(1, *SHAPE), step, plan)
        log_prob = now.log_prob(now.sample(noise).detach()).sum()
        (slope,) = torch.autograd.grad(plan.weight(step) * log_prob, v)
        torch.testing.assert_close(slope.abs(), noise.abs() / noise.numel(), rtol=1e-3, atol=1e-6)
        assert plain.weight(step) == 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("trained", [range(1), range(2, 4)])
def test_samples_that_part_late_share_their_way_until_then(trained: range, guidance: float) -> None:
    network = Network()
    plan = FlowPlan(sigmas=sigma_schedule(6, 3.0), trained=trained, sampler="cps", noise_level=0.8)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    keys: list[tuple[rng.Key, ...]] = [(0, place) for place in range(6)]
    asked: list[int] = []

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        asked.append(len(latents))
        labels = torch.arange(6)[:: 6 // len(latents)] // 3 + 1  # two prompts, three samples each
        both = [
            network(latents, sigma, labels),
            network(latents, sigma, torch.zeros_like(labels)),
        ]
        return both[0] if guidance == 1 else guided(both[0], both[1], guidance)

    way = rollout.sample(velocity, noise, plan, keys, copies=3)
    first = plan.trained[0]
    assert asked == [2] * (first + 1) + [6] * (plan.num_steps - first - 1)
    whole = rollout.sample(velocity, noise.repeat_interleave(3, 0), plan, keys)
    torch.testing.assert_close(way.final, whole.final, rtol=1e-4, atol=1e-5)
    for number, step in way.steps.items():
        now, _ = rollout.predict(velocity, step.latents, number, plan, step.copies)
        ratio = log_ratio(now, step.policy, step.reached).exp()
        assert torch.equal(ratio, torch.ones(6))
    with pytest.raises(ValueError, match="6 samples"):
        rollout.sample(velocity, noise, plan, keys[:2], copies=3)
