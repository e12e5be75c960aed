"""Claims about the rectified flow: its path, its noise levels and its losses."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from scipy import integrate, optimize, special, stats
from torch import Tensor

from dojo.maths import flow

SCHEMES: tuple[flow.WeightingScheme, ...] = get_args(flow.WeightingScheme)


def even(count: int) -> Tensor:
    """Numbers spread evenly over (0, 1): what is drawn from them is a table of quantiles."""
    return (torch.arange(count, dtype=torch.float32) + 0.5) / count


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """clean and noise [5, 4, 3, 2], sigma [5]."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(5, 4, 3, 2, generator=generator, dtype=dtype)
    noise = torch.randn(5, 4, 3, 2, generator=generator, dtype=dtype)
    return clean, noise, torch.tensor([0.001, 0.2, 0.5, 0.8, 1.0], dtype=dtype)


# The path


def test_the_path_begins_at_the_picture_and_ends_in_noise() -> None:
    clean, noise, _ = example()
    assert torch.equal(flow.interpolate(clean, noise, torch.zeros(5)), clean)
    assert torch.equal(flow.interpolate(clean, noise, torch.ones(5)), noise)


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    clean, noise, sigma = example()
    h = 1e-4
    ahead = flow.interpolate(clean, noise, sigma + h)
    behind = flow.interpolate(clean, noise, sigma - h)
    torch.testing.assert_close((ahead - behind) / (2 * h), flow.velocity(clean, noise))


def test_velocity_leads_back_to_the_clean_latents() -> None:
    clean, noise, sigma = example()
    noisy = flow.interpolate(clean, noise, sigma)
    back = flow.clean_estimate(noisy, flow.velocity(clean, noise), sigma)
    torch.testing.assert_close(back, clean)


def test_every_sample_of_a_batch_has_its_own_sigma() -> None:
    clean, noise, sigma = example()
    together = flow.interpolate(clean, noise, sigma)
    for i in range(5):
        alone = flow.interpolate(clean[i : i + 1], noise[i : i + 1], sigma[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


# The shift


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.65, 3.0, 6.0])
def test_shift_adds_its_logarithm_to_the_logit(shift: float) -> None:
    sigma = even(99).double()
    shifted = flow.shift_sigma(sigma, shift)
    torch.testing.assert_close(shifted, torch.sigmoid(torch.logit(sigma) + math.log(shift)))


def test_shift_keeps_both_ends_of_the_path() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(flow.shift_sigma(ends, 3.0), ends)


def test_shifts_compose_by_multiplication() -> None:
    sigma = even(99).double()
    twice = flow.shift_sigma(flow.shift_sigma(sigma, 1.7), 3.0)
    torch.testing.assert_close(twice, flow.shift_sigma(sigma, 5.1))


# Densities


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.6)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_sigmas_have_a_normal_logit(mean: float, std: float, shift: float) -> None:
    uniform = even(999)
    sigma = flow.draw_sigma(uniform, "logit_normal", shift=shift, logit_mean=mean, logit_std=std)
    quantiles = stats.norm.cdf(special.logit(sigma.double()), mean + math.log(shift), std)
    np.testing.assert_allclose(quantiles, uniform, atol=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.6)])
def test_logit_normal_mean_and_median_are_those_of_its_density(mean: float, std: float) -> None:
    def density(t: float) -> float:  # Equation 19 of arXiv:2403.03206
        exponent = -((special.logit(t) - mean) ** 2) / (2 * std**2)
        return math.exp(exponent) / (std * math.sqrt(2 * math.pi) * t * (1 - t))

    sigma = flow.draw_sigma(even(100_001), "logit_normal", logit_mean=mean, logit_std=std)
    expected, _ = integrate.quad(lambda t: t * density(t), 1e-9, 1 - 1e-9)
    assert sigma.double().mean().item() == pytest.approx(expected, abs=1e-4)
    assert sigma.median().item() == pytest.approx(special.expit(mean), abs=1e-5)


def test_a_positive_logit_mean_means_more_noise() -> None:
    # diffusers' examples look a table up that runs the other way: 0.52 instead of 0.86.
    def mean(logit_mean: float) -> float:
        uniform = even(10_001)
        sigma = flow.draw_sigma(uniform, "logit_normal", shift=3.0, logit_mean=logit_mean)
        return sigma.mean().item()

    assert mean(-1.0) < mean(0.0) < mean(1.0)
    assert mean(1.0) == pytest.approx(0.86, abs=0.005)
    assert mean(-1.0) == pytest.approx(0.52, abs=0.01)


@pytest.mark.parametrize("scale", [-0.9, 0.5, 1.29, 1.7])
def test_mode_density_is_the_derivative_of_the_papers_inverse(scale: float) -> None:
    def f_mode(u: float) -> float:  # Equation 20 of arXiv:2403.03206
        return 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def inverse(t: float) -> float:
        root: Any = optimize.brentq(lambda u: f_mode(u) - t, 0.0, 1.0)
        return root

    edges = np.linspace(0.02, 0.98, 25)
    sigma = flow.draw_sigma(even(400_000), "mode", mode_scale=scale).double().numpy()
    counts, _ = np.histogram(sigma, edges)
    preimage = np.array([inverse(t) for t in edges])
    density = abs(np.diff(preimage)) / np.diff(edges)  # mean of |d f^-1 / dt| over each bin
    measured = counts / len(sigma) / np.diff(edges)
    np.testing.assert_allclose(measured, density, rtol=1e-3)


def test_mode_puts_its_weight_on_the_middle() -> None:
    def middle(scale: float) -> float:
        sigma = flow.draw_sigma(even(10_000), "mode", mode_scale=scale)
        return ((sigma > 0.4) & (sigma < 0.6)).float().mean().item()

    assert middle(-0.5) < middle(0.0) < middle(1.29)
    assert middle(0.0) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("scheme", ["cosmap", "sigma_sqrt", "none"])
def test_weighing_schemes_draw_uniformly(scheme: flow.WeightingScheme) -> None:
    uniform = even(1000)
    sigma = flow.draw_sigma(uniform, scheme)
    torch.testing.assert_close(sigma, uniform.clamp(min=flow.MIN_SIGMA))
    torch.testing.assert_close(
        flow.draw_sigma(uniform, scheme, shift=3.0), 3 * uniform / (1 + 2 * uniform)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sigmas_are_decided_by_the_uniform_numbers_alone(scheme: flow.WeightingScheme) -> None:
    uniform = even(64)
    torch.manual_seed(1)
    first = flow.draw_sigma(uniform, scheme, shift=3.0)
    torch.manual_seed(2)
    assert torch.equal(flow.draw_sigma(uniform, scheme, shift=3.0), first)
    order = torch.randperm(64)
    assert torch.equal(flow.draw_sigma(uniform[order], scheme, shift=3.0), first[order])
    assert len(first.unique()) == 64  # continuous: no table of 1000 levels, no bfloat16


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_sigmas_and_weights_stay_in_range_at_the_extremes(
    scheme: flow.WeightingScheme, shift: float
) -> None:
    # The smallest and the largest number that rng.uniform can give, and some between.
    uniform = torch.cat([torch.tensor([2.0**-24]), even(1000), torch.tensor([1.0])])
    sigma = flow.draw_sigma(uniform, scheme, shift=shift)
    assert sigma.dtype == torch.float32
    assert sigma.min() >= flow.MIN_SIGMA
    assert sigma.max() <= 1
    assert flow.loss_weight(sigma, scheme).isfinite().all()
    assert (flow.loss_weight(sigma, scheme) > 0).all()


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="lognorm"):
        flow.draw_sigma(even(4), "lognorm")  # pyright: ignore[reportArgumentType]


# Agreement with diffusers, where diffusers is right


def test_mode_equals_that_of_diffusers() -> None:
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    theirs = compute_density_for_timestep_sampling(
        "mode", 1000, mode_scale=1.29, generator=torch.Generator().manual_seed(0)
    )
    ours = flow.draw_sigma(uniform, "mode")
    torch.testing.assert_close(ours, theirs.clamp(min=flow.MIN_SIGMA))


def test_logit_normal_has_the_distribution_of_diffusers() -> None:
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 20_000, 0.4, 1.2, generator=torch.Generator().manual_seed(0)
    )
    ours = flow.draw_sigma(even(20_000), "logit_normal", logit_mean=0.4, logit_std=1.2)
    compared: Any = stats.ks_2samp(ours.numpy(), theirs.numpy())
    assert compared.pvalue > 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loss_weights_equal_those_of_diffusers(scheme: flow.WeightingScheme) -> None:
    sigma = even(1000)
    theirs = compute_loss_weighting_for_sd3(scheme, sigma)
    torch.testing.assert_close(flow.loss_weight(sigma, scheme), theirs)


# Losses


def test_cosmap_weight_has_mean_one_over_uniform_sigmas() -> None:
    def weight(sigma: float) -> float:
        return flow.loss_weight(torch.tensor([sigma], dtype=torch.float64), "cosmap").item()

    assert integrate.quad(weight, 0, 1)[0] == pytest.approx(1)
    assert weight(0.5) == pytest.approx(4 / math.pi)


def test_the_error_of_the_clean_estimate_is_sigma_squared_times_that_of_the_velocity() -> None:
    clean, noise, sigma = example()
    predicted = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).double()
    noisy = flow.interpolate(clean, noise, sigma)
    velocity_error = (predicted - flow.velocity(clean, noise)).square().flatten(1).mean(1)
    estimate = flow.clean_estimate(noisy, predicted, sigma)
    clean_error = (estimate - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(clean_error, sigma**2 * velocity_error)


def test_sigma_sqrt_on_clean_estimates_is_the_velocity_error() -> None:
    clean, noise, _ = example(torch.float32)
    sigma = flow.draw_sigma(even(5), "sigma_sqrt", shift=3.0)
    predicted = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    noisy = flow.interpolate(clean, noise, sigma)
    plain = flow.squared_error(predicted, flow.velocity(clean, noise))
    weighed = flow.loss_weight(sigma, "sigma_sqrt") * flow.squared_error(
        flow.clean_estimate(noisy, predicted, sigma), clean
    )
    torch.testing.assert_close(weighed, plain, rtol=1e-4, atol=0)


def test_the_loss_is_one_number_per_sample_and_zero_at_the_target() -> None:
    clean, noise, _ = example(torch.float32)
    target = flow.velocity(clean, noise)
    assert torch.equal(flow.squared_error(target, target), torch.zeros(5))
    off = target.clone()
    off[3] += 2
    torch.testing.assert_close(flow.squared_error(off, target), torch.tensor([0.0, 0, 0, 4, 0]))


def test_losses_and_mixtures_are_float32_whatever_comes_in() -> None:
    clean, noise, _ = example(torch.float32)
    low = clean.bfloat16()
    exact = flow.squared_error(low.float(), noise)
    assert flow.squared_error(low, noise).dtype == torch.float32
    assert torch.equal(flow.squared_error(low, noise), exact)
    sigma = flow.draw_sigma(even(5), "logit_normal", shift=3.0)
    assert flow.interpolate(low, noise.bfloat16(), sigma).dtype == torch.float32
    assert flow.clean_estimate(low, low, sigma).dtype == torch.float32
