"""Claims about the samplers' steps: the papers' formulas, and what they do to known marginals."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal

from dojo.maths import transitions as samplers
from dojo.maths.flow import sigma_schedule
from dojo.maths.gaussian import Gaussian
from dojo.maths.transitions import NOISE_LEVELS, Sampler

NOISY: tuple[Sampler, ...] = ("sde", "cps", "dance")
SIGMAS = sigma_schedule(10, 3.0)
STEPS = list(pairwise(SIGMAS))


def state(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Latents and velocity [2, 3, 4]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=generator, dtype=dtype)
    return x, torch.randn(2, 3, 4, generator=generator, dtype=dtype)


def check(ours: Gaussian, mean: Tensor, std: float) -> None:
    torch.testing.assert_close(ours.mean, mean, rtol=1e-9, atol=1e-12)
    assert ours.std == pytest.approx(std, rel=1e-9, abs=1e-12)


# The formulas, written as the papers and their code have them


@pytest.mark.parametrize(("sigma", "after"), STEPS)
def test_sde_is_the_step_of_flow_grpo(sigma: float, after: float) -> None:
    (x, v), a, dt = state(), 0.7, after - sigma
    s = a * math.sqrt(sigma / (1 - (SIGMAS[1] if sigma == 1 else sigma)))
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    check(samplers.transition("sde", x, v, sigma, after, a), mean, s * math.sqrt(-dt))


@pytest.mark.parametrize(("sigma", "after"), STEPS)
def test_cps_is_the_step_of_coefficients_preserving_sampling(sigma: float, after: float) -> None:
    (x, v), a = state(), 0.8
    s = after * math.sin(a * math.pi / 2)
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    mean = (1 - after) * clean + math.sqrt(after**2 - s**2) * noise
    check(samplers.transition("cps", x, v, sigma, after, a), mean, s)


@pytest.mark.parametrize(("sigma", "after"), STEPS)
def test_dance_is_the_step_of_dance_grpo(sigma: float, after: float) -> None:
    (x, v), eta, dt = state(), 0.3, after - sigma
    score = -(x - (x - sigma * v) * (1 - sigma)) / sigma**2
    mean = x + dt * v - 0.5 * eta**2 * score * dt
    check(samplers.transition("dance", x, v, sigma, after, eta), mean, eta * math.sqrt(-dt))


@pytest.mark.parametrize(
    ("sampler", "stds"),
    [
        ("sde", [0.70, 0.74, 0.54, 0.45, 0.39, 0.35, 0.32, 0.28, 0.23, 0.006]),
        ("cps", [0.91, 0.87, 0.82, 0.75, 0.67, 0.57, 0.44, 0.26, 0.008, 0]),
    ],
)
def test_the_noise_of_sd3s_ten_steps(sampler: Sampler, stds: list[float]) -> None:
    x, v = state()
    ours = [samplers.transition(sampler, x, v, *step, NOISE_LEVELS[sampler]).std for step in STEPS]
    assert ours == pytest.approx(stds, abs=0.006)


# An independent derivation: the reverse SDE of data whose score is known by autograd


@pytest.mark.parametrize("sampler", ["sde", "dance"])
@pytest.mark.parametrize(("sigma", "after"), STEPS[1:])
def test_the_sdes_are_reverse_time_diffusions_with_the_same_marginals(
    sampler: Sampler, sigma: float, after: float
) -> None:
    mean, std, level = 0.4, 0.6, NOISE_LEVELS[sampler]  # of the data
    x = state()[0].requires_grad_()
    spread = math.sqrt(((1 - sigma) * std) ** 2 + sigma**2)
    log_density = Normal((1 - sigma) * mean, spread).log_prob(x).sum()
    (score,) = torch.autograd.grad(log_density, x)
    x = x.detach()
    noise = -sigma * score  # Tweedie: the expected noise
    v = noise - (x - sigma * noise) / (1 - sigma)
    g = level if sampler == "dance" else level * math.sqrt(sigma / (1 - sigma))
    # d x = (v - g^2 / 2 score) d sigma + g d w, with sigma falling
    drift = v - g**2 / 2 * score
    check(
        samplers.transition(sampler, x, v, sigma, after, level),
        x + drift * (after - sigma),
        g * math.sqrt(sigma - after),
    )


# What the steps do to data N(0, 1), where all is linear and exact


def variance(sigma: float) -> float:
    """Of the noisy data (1 - sigma) x0 + sigma eps."""
    return (1 - sigma) ** 2 + sigma**2


def after_step(sampler: Sampler, sigma: float, after: float, before: float) -> float:
    """The variance after a step of samples with variance `before`."""
    x = torch.ones(1, 1, dtype=torch.float64)
    v = x * (2 * sigma - 1) / variance(sigma)  # E[eps - x0 | x]
    moved = samplers.transition(sampler, x, v, sigma, after, NOISE_LEVELS.get(sampler, 0.0))
    return moved.mean.item() ** 2 * before + moved.std**2


def test_the_first_step_of_the_sde_adds_noise_in_excess_and_cps_does_not() -> None:
    assert variance(SIGMAS[1]) == pytest.approx(0.9234, abs=5e-5)  # what it should be
    assert after_step("ode", 1, SIGMAS[1], 1) == pytest.approx(SIGMAS[1] ** 2)
    assert after_step("cps", 1, SIGMAS[1], 1) == pytest.approx(SIGMAS[1] ** 2)  # 0.9218
    assert after_step("sde", 1, SIGMAS[1], 1) == pytest.approx(1.0014, abs=5e-5)


@pytest.mark.parametrize("sampler", ["ode", "sde", "dance"])
def test_the_marginals_are_those_of_the_data_when_steps_are_small(sampler: Sampler) -> None:
    own = 1.0
    for sigma, after in pairwise(sigma_schedule(1000, 3.0)):
        own = after_step(sampler, sigma, after, own)
        if after < 0.9:  # the first step of `sde` is as coarse as ever: 1 + a^4 / 4
            assert own == pytest.approx(variance(after), rel=0.02)


@pytest.mark.parametrize(("sigma", "after"), STEPS)
def test_cps_keeps_the_share_of_noise_that_the_schedule_asks_for(
    sigma: float, after: float
) -> None:
    # On the true path of x0 = 0 and eps = 1 the mean is what remains of the old noise.
    x, v = torch.full((1, 1), sigma, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def noise(sampler: Sampler) -> float:
        moved = samplers.transition(sampler, x, v, sigma, after, NOISE_LEVELS[sampler])
        return moved.mean.item() ** 2 + moved.std**2

    assert noise("cps") == pytest.approx(after**2, abs=1e-12)
    for sampler in ("sde", "dance"):
        assert noise(sampler) > after**2


# Edges


@pytest.mark.parametrize("sampler", get_args(Sampler))
@pytest.mark.parametrize(("sigma", "after"), STEPS)
def test_without_noise_every_sampler_is_the_euler_step_of_diffusers(
    sampler: Sampler, sigma: float, after: float
) -> None:
    x, v = state(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    place = SIGMAS.index(sigma)
    theirs = scheduler.step(v, scheduler.timesteps[place], x)[0]  # pyright: ignore
    ours = samplers.transition(sampler, x, v, sigma, after, 0.0)
    assert ours.std == 0
    assert torch.equal(ours.mean, theirs)


def test_all_noise_is_fresh_at_level_one_of_cps() -> None:
    x, v = state()
    ours = samplers.transition("cps", x, v, 0.8, 0.6, 1.0)
    check(ours, 0.4 * (x - 0.8 * v), 0.6)


@pytest.mark.parametrize("sampler", NOISY)
def test_a_velocity_in_half_precision_is_worked_on_in_float32(sampler: Sampler) -> None:
    x, v = state(torch.float32)
    low = samplers.transition(sampler, x, v.bfloat16(), 0.8, 0.6, 0.5)
    assert low.mean.dtype == torch.float32
    exact = samplers.transition(sampler, x, v.bfloat16().float(), 0.8, 0.6, 0.5)
    assert torch.equal(low.mean, exact.mean)


def test_latents_in_half_precision_are_refused() -> None:
    x, v = state(torch.float32)
    with pytest.raises(ValueError, match="float32"):
        samplers.transition("cps", x.bfloat16(), v, 0.8, 0.6, 0.5)


@pytest.mark.parametrize("step", [(0.5, 0.5), (0.5, 0.6), (1.1, 0.5), (0.5, -0.1), (0.0, 0.0)])
def test_sigma_has_to_fall(step: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="fall"):
        samplers.transition("ode", *state(), *step, 0.0)


def test_guidance_is_combined_in_float32() -> None:
    conditional, unconditional = (one.bfloat16() for one in state(torch.float32))
    ours = samplers.guided(conditional, unconditional, 4.5)
    exact = unconditional.double() + 4.5 * (conditional.double() - unconditional.double())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(samplers.guided(conditional, unconditional, 0), unconditional.float())


@pytest.mark.parametrize("sampler", NOISY)
@pytest.mark.parametrize("step", range(8))
def test_sensitivity_is_the_derivative_of_the_mean_in_stds(sampler: Sampler, step: int) -> None:
    (x, v), (sigma, after) = state(), STEPS[step]
    v.requires_grad_()
    ours = samplers.transition(sampler, x, v, sigma, after, 0.6)
    (slope,) = torch.autograd.grad(ours.mean.sum(), v)
    expected = torch.full_like(v, slope.flatten()[0].item())
    torch.testing.assert_close(slope, expected)  # the same in every dimension
    found = samplers.sensitivity(sampler, sigma, after, 0.6)
    assert found == pytest.approx(abs(slope.flatten()[0].item()) / ours.std, rel=1e-9)


def test_a_step_without_noise_has_no_sensitivity() -> None:
    with pytest.raises(ValueError, match="without noise"):
        samplers.sensitivity("ode", 0.8, 0.7, 0.5)
