"""Claims about rollouts along a diffusion: DDIM's noise, a ratio of exactly 1, the last step.

The schedules are Stable Diffusion's with predicted noise, and one that ends without signal with v.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dojo import rewards, rng
from dojo.maths import ddpm, denoising, rollout
from dojo.maths.advantages import PromptBuffer, group_advantages
from dojo.maths.rollout import DiffusionPlan
from dojo.maths.surrogate import clipped_surrogate, log_ratio, masked_surrogate
from dojo.methods.rl import DiffusionRolloutArgs, RolloutArgs
from dojo.pocket.models import DDPM
from tests.maths.test_rollout import SHAPE, Network, keys, start, velocity_of

SCHEDULE = ddpm.Schedule.of(DDPM)
DARK = ddpm.Schedule.of(DDPM | {"rescale_betas_zero_snr": True})
NOISE = (SCHEDULE, "epsilon")
VELOCITY = (DARK, "v_prediction")
each_kind = pytest.mark.parametrize("kind", [NOISE, VELOCITY], ids=["epsilon", "v"])


def plan(
    kind: Any, steps: int = 6, trained: range | None = None, eta: float = 1.0
) -> DiffusionPlan:
    schedule, prediction = kind
    way = denoising.Way.of(schedule, steps, eta=eta, prediction=prediction)
    return DiffusionPlan(way=way, trained=range(steps - 1) if trained is None else trained)


def draw(name: str) -> Tensor:
    return rng.normal(SHAPE, [(name, i) for i in range(2)])


def predictor(network: Network, **how: Any) -> rollout.Velocity:
    """The network as the scripts use it, at timesteps."""
    ask = velocity_of(network, 6, **how)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.dtype == torch.int64
        return ask(latents, timestep / 1000)

    return predict


def said_of(kind: Any, clean: Tensor, noise: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """The noised latents at a timestep, and what a perfect network says of them."""
    level = torch.full((len(clean),), timestep)
    noisy = ddpm.add_noise(clean, noise, level, kind[0])
    return noisy, noise if kind == NOISE else ddpm.velocity(clean, noise, level, kind[0])


# -- the transition -----------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("steps", [5, 20])
def test_a_trained_step_at_eta_1_is_the_posterior_of_ddpm(kind: Any, steps: int) -> None:
    # Ho et al. 2020, Equations 6 and 7, for the two timesteps of a coarse step.
    own, clean, noise = plan(kind, steps), draw("clean"), draw("noise")
    for step, (timestep, previous) in enumerate(ddpm.pairwise(own.way.timesteps)[:-1]):
        abar, before = kind[0].at(timestep), kind[0].at(previous)
        alpha = abar / before
        noisy, said = said_of(kind, clean, noise, timestep)
        there = own.transition(step, noisy, said)
        mean = math.sqrt(before) * (1 - alpha) / (1 - abar) * clean
        mean = mean + math.sqrt(alpha) * (1 - before) / (1 - abar) * noisy
        torch.testing.assert_close(there.mean, mean, atol=3e-5, rtol=1e-4)
        assert there.std**2 == pytest.approx((1 - before) / (1 - abar) * (1 - alpha))


@each_kind
def test_eta_scales_the_noise_and_keeps_the_level(kind: Any) -> None:
    whole, half, clean, noise = plan(kind), plan(kind, eta=0.5), draw("clean"), draw("noise")
    for step, (timestep, previous) in enumerate(ddpm.pairwise(whole.way.timesteps)[:-1]):
        noisy, said = said_of(kind, clean, noise, timestep)
        there = half.transition(step, noisy, said)
        assert there.std == pytest.approx(whole.transition(step, noisy, said).std / 2)
        # What is kept of the noise and what is new have together the variance of the timestep.
        kept = (there.mean - math.sqrt(kind[0].at(previous)) * clean) / noise
        torch.testing.assert_close(kept, kept[0, 0, 0, 0].expand_as(kept), atol=1e-2, rtol=1e-2)
        variance = kept.median().item() ** 2 + there.std**2
        assert variance == pytest.approx(1 - kind[0].at(previous), rel=1e-3)


@each_kind
def test_a_step_that_is_not_trained_is_ddims_without_noise(kind: Any) -> None:
    own, still = plan(kind, trained=range(1, 3)), plan(kind, eta=0.0)
    given = (draw("latents"), draw("said"))
    for step in range(own.num_steps):
        there = own.transition(step, *given)
        if step in own.trained:
            assert there.std > 0
        else:
            assert there.std == 0
            assert torch.equal(
                there.mean, still.transition(step, draw("latents"), draw("said")).mean
            )


@each_kind
def test_the_last_step_is_never_trained_and_leads_to_the_picture_itself(kind: Any) -> None:
    own, clean, noise = plan(kind), draw("clean"), draw("noise")
    last = own.num_steps - 1
    noisy, said = said_of(kind, clean, noise, own.level(last))
    there = own.transition(last, noisy, said)
    assert there.std == 0
    torch.testing.assert_close(there.mean, clean, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="last is never trained"):
        plan(kind, 6, range(6))


@each_kind
@pytest.mark.parametrize("steps", [2, 10, 20, 50, 200])
def test_every_trained_step_has_a_std_that_rounding_does_not_touch(kind: Any, steps: int) -> None:
    own, zeros = plan(kind, steps), torch.zeros(1, *SHAPE)
    stds = [own.transition(step, zeros, zeros).std for step in own.trained]
    assert len(stds) == steps - 1
    assert min(stds) > 0.01  # float32 rounds latents of size 4 at 2e-7
    if steps > 2:  # and no step's ratio is so sensitive that it drowns the others'
        assert all(own.sensitivity(step) < 10 for step in own.trained)


@each_kind
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_weighted_steps_pull_alike(kind: Any, eta: float) -> None:
    own = replace(plan(kind, 8, eta=eta), step_weighting="velocity")
    noise = draw("noise")[:1]
    for step in own.trained:
        said = torch.zeros(1, *SHAPE, requires_grad=True)
        now, _ = rollout.predict(lambda x, t, said=said: said, torch.zeros(1, *SHAPE), step, own)
        log_prob = now.log_prob(now.sample(noise).detach()).sum()
        (slope,) = torch.autograd.grad(own.weight(step) * log_prob, said)
        torch.testing.assert_close(slope.abs(), noise.abs() / noise.numel(), rtol=1e-3, atol=1e-6)
        assert replace(own, step_weighting="none").weight(step) == 1
    with pytest.raises(ValueError, match="without noise"):
        own.sensitivity(own.num_steps - 1)


# -- the options --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, -0.5, 1.5, math.nan])
def test_noise_without_a_likelihood_is_refused(eta: float) -> None:
    assert DiffusionRolloutArgs().eta == 1
    with pytest.raises(ValueError, match=r"--eta .* must lie in \(0, 1\]"):
        DiffusionRolloutArgs(eta=eta)


def test_the_steps_are_chosen_as_those_of_a_flow() -> None:
    way = denoising.Way.of(SCHEDULE, 10, eta=1.0)
    every = DiffusionRolloutArgs(sample_steps=10).plan(way, 0, 0)
    assert (every.trained, every.num_steps) == (range(9), 10)
    assert [every.level(step) for step in range(10)] == list(way.timesteps)
    some = {"sample_steps": 10, "train_timesteps": "window", "window_size": 2, "window_first": 1}
    args = DiffusionRolloutArgs(**some)  # pyright: ignore[reportArgumentType]
    flow = RolloutArgs(**some, sampler="sde")  # pyright: ignore[reportArgumentType]
    for epoch in range(20):
        assert args.trained_steps(3, epoch) == flow.trained_steps(3, epoch)
    with pytest.raises(ValueError, match="--sample_steps must be at least 2"):
        DiffusionRolloutArgs(sample_steps=1)


# -- the way, and the ratio ---------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_whole_way_is_that_of_sampling_to_the_bit(kind: Any, eta: float) -> None:
    own = plan(kind, eta=eta, trained=None if eta else range(0))
    predict = predictor(Network())
    ours = rollout.sample(predict, start(range(6)), own, keys(range(6)))
    theirs = denoising.sample(predict, start(range(6)), own.way, keys(range(6)))
    assert torch.equal(ours.final, theirs)


@each_kind
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_before_the_first_update_training_has_the_gaussian_of_the_rollout(
    kind: Any, guidance: float, autocast: bool
) -> None:
    network = Network()
    predict = predictor(network, guidance=guidance, autocast=autocast)
    trajectory = rollout.sample(predict, start(range(6)), plan(kind), keys(range(6)))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])

    def moved() -> Sequence[Tensor]:
        found = []
        for number, step in trajectory.steps.items():
            new, _ = rollout.predict(predict, step.latents, number, trajectory.plan)
            assert new.std == step.policy.std
            found.append(log_ratio(new, step.policy, step.reached))
            divergence = new.kl(step.policy)
            masked = masked_surrogate(found[-1], advantages, divergence, 1e-5)
            clipped = clipped_surrogate(found[-1], advantages, 1e-5)
            for surrogate in (masked, clipped):
                assert torch.equal(surrogate.ratio, torch.ones(6)) == (not changed)
            assert (divergence == 0).all() == (not changed)
            clipped.loss.mean().backward()
        return found

    changed = False
    assert all(torch.equal(one, torch.zeros(6)) for one in moved())
    gradients = [param.grad for param in network.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)
    with torch.no_grad():
        for param in network.parameters():
            assert param.grad is not None
            param -= 0.01 * param.grad.sign()
    changed = True
    assert all((one != 0).all() for one in moved())


def test_samples_that_part_late_share_their_way_until_then() -> None:
    asked: list[int] = []

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        asked.append(len(latents))
        return latents * timestep.view(-1, 1, 1, 1) / 1000

    own, noise = plan(NOISE, trained=range(2, 4)), start(range(2))
    way = rollout.sample(predict, noise, own, keys(range(6)), copies=3)
    assert asked == [2] * 3 + [6] * 3
    whole = rollout.sample(predict, noise.repeat_interleave(3, 0), own, keys(range(6)))
    torch.testing.assert_close(way.final, whole.final)


# -- all of it together: smaller files --------------------------------------------------------


class Damped(nn.Module):
    """Says that a part of the latents is noise; which part is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.tensor(0.6))

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return self.part * latents


@pytest.mark.parametrize("name", ["jpeg_compressibility", "jpeg_incompressibility"])
@pytest.mark.parametrize("baseline", ["buffer", "group"])
def test_one_trained_step_makes_files_smaller_or_larger_as_is_rewarded(
    name: str, baseline: str
) -> None:
    # Two steps, of which one is trained; the latents are the picture, so the noise that is left
    # decides the size of its file.
    network, own, judge = Damped(), plan(NOISE, 2), rewards.load(name)
    buffer = PromptBuffer(size=64, min_count=16)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    ids, valid = torch.arange(64) // 32, torch.ones(64, dtype=torch.bool)

    def epoch(number: int) -> tuple[rollout.Trajectory, Tensor]:
        noise = rng.normal((3, 16, 16), [("start", i) for i in range(64)])
        trajectory = rollout.sample(network, noise, own, [("way", number, i) for i in range(64)])
        images = (0.5 + 0.1 * trajectory.final).clamp(0, 1)
        return trajectory, judge(images, [""] * 64).scores

    before = epoch(0)[1].mean()
    for number in range(8):
        trajectory, scores = epoch(number)
        found = (buffer.advantages if baseline == "buffer" else group_advantages)(
            scores, ids, valid
        )
        for step, kept in trajectory.steps.items():
            optimizer.zero_grad()
            new, _ = rollout.predict(network, kept.latents, step, own)
            moved = log_ratio(new, kept.policy, kept.reached)
            clipped_surrogate(moved, found.values, 0.2).loss.mean().backward()
            optimizer.step()
    assert epoch(0)[1].mean() > before  # the reward rises: minus the size, or the size
