"""Claims about the transition's Gaussian: against torch.distributions, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dojo.maths.gaussian import Gaussian


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("std", [3.0, 0.7, 0.006])
def test_the_log_probability_is_the_mean_of_that_of_torch(std: float) -> None:
    gaussian = Gaussian(draw(3, 4, 5, 5), std)
    x = gaussian.sample(draw(3, 4, 5, 5, seed=1))
    theirs = Normal(gaussian.mean, std).log_prob(x).flatten(1).mean(1)
    assert gaussian.log_prob(x).dtype == torch.float32
    torch.testing.assert_close(gaussian.log_prob(x), theirs)


def test_the_unscaled_log_probability_keeps_the_square_only() -> None:
    gaussian = Gaussian(draw(3, 8), 0.3)
    x = draw(3, 8, seed=1)
    ours = gaussian.log_prob(x, scaled=False)
    torch.testing.assert_close(ours, -(x - gaussian.mean).square().mean(1))
    # and is the exact one up to the constants that it drops
    constant = math.log(0.3) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian.log_prob(x), ours / (2 * 0.3**2) - constant)


@pytest.mark.parametrize(("std", "other_std"), [(0.5, 0.5), (0.2, 0.9), (0.9, 0.2)])
def test_the_divergence_is_the_mean_of_that_of_torch(std: float, other_std: float) -> None:
    ours, other = Gaussian(draw(3, 4, 5), std), Gaussian(draw(3, 4, 5, seed=1), other_std)
    theirs = kl_divergence(Normal(ours.mean, std), Normal(other.mean, other_std))
    torch.testing.assert_close(ours.kl(other), theirs.flatten(1).mean(1))
    assert torch.equal(ours.kl(ours), torch.zeros(3))


def test_the_divergence_is_the_mean_difference_of_log_probabilities() -> None:
    ours, other = Gaussian(draw(1, 4), 0.5), Gaussian(draw(1, 4, seed=1), 0.8)
    many = Gaussian(ours.mean.expand(100_000, 4), 0.5)
    x = many.sample(draw(100_000, 4, seed=2))
    difference = many.log_prob(x) - Gaussian(other.mean.expand(100_000, 4), 0.8).log_prob(x)
    error = difference.std().item() / math.sqrt(100_000)
    assert abs(difference.mean().item() - ours.kl(other).item()) < 4 * error


def test_draws_have_the_mean_and_the_std() -> None:
    gaussian = Gaussian(torch.tensor([[1.0, -2.0]]).expand(100_000, 2), 0.3)
    x = gaussian.sample(draw(100_000, 2))
    error = 4 / math.sqrt(100_000)
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, -2.0]), atol=0.3 * error, rtol=0)
    torch.testing.assert_close(x.std(0), torch.tensor([0.3, 0.3]), atol=0.3 * error, rtol=0)


def test_the_noise_of_a_draw_comes_back() -> None:
    gaussian, noise = Gaussian(draw(3, 8), 0.3), draw(3, 8, seed=1)
    torch.testing.assert_close(gaussian.noise(gaussian.sample(noise)), noise)


def test_the_gradient_is_that_of_finite_differences() -> None:
    mean = draw(2, 3, dtype=torch.float64).requires_grad_()
    x = draw(2, 3, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: Gaussian(m, 0.4).log_prob(x), mean)
    assert torch.autograd.gradcheck(lambda m: Gaussian(m, 0.4).kl(Gaussian(x, 0.7)), mean)


def test_every_sample_has_its_own_log_probability() -> None:
    x, mean = draw(3, 8), draw(3, 8, seed=1)
    moved = x.clone()
    moved[1] += 1
    changed = Gaussian(mean, 0.5).log_prob(moved) != Gaussian(mean, 0.5).log_prob(x)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("dimensions", [64, 4096])
def test_the_clip_range_that_fits_shrinks_with_the_root_of_the_dimensions(dimensions: int) -> None:
    share = 0.05  # how far the mean has moved, in stds
    old = Gaussian(torch.zeros(200, dimensions), 0.8)
    new = Gaussian(old.mean + share * 0.8, 0.8)
    x = old.sample(draw(200, dimensions))
    spread = (new.log_prob(x) - old.log_prob(x)).std().item()
    assert spread == pytest.approx(share / math.sqrt(dimensions), rel=0.15)


def test_a_step_without_noise_has_no_density() -> None:
    # The last step of the predecessor's sampler had a std of zero, and its loss was not a number.
    still, noisy = Gaussian(draw(2, 3), 0.0), Gaussian(draw(2, 3), 0.1)
    assert torch.equal(still.sample(draw(2, 3, seed=1)), still.mean)
    for question in (
        lambda: still.log_prob(still.mean),
        lambda: still.log_prob(still.mean, scaled=False),
        lambda: still.noise(still.mean),
        lambda: still.kl(noisy),
        lambda: noisy.kl(still),
    ):
        with pytest.raises(ValueError, match="cannot be trained"):
            question()


@pytest.mark.parametrize("std", [-0.1, math.nan, math.inf])
def test_an_impossible_std_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        Gaussian(draw(2, 3), std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_because_its_rounding_is_above_a_clip_range(
    dtype: torch.dtype,
) -> None:
    gaussian = Gaussian(draw(2, 1000), 0.02)
    x = gaussian.sample(draw(2, 1000, seed=1))
    rounded = gaussian.log_prob(x.to(dtype).float()) - gaussian.log_prob(x)
    assert rounded.abs().max() > 1e-5
    with pytest.raises(ValueError, match="float32"):
        gaussian.log_prob(x.to(dtype))
    with pytest.raises(ValueError, match="float32"):
        Gaussian(x.to(dtype), 0.02)
