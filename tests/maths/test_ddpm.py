"""The diffusion of Stable Diffusion 1, against diffusers' schedulers and closed forms."""

import math
from typing import Any, Literal, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from dojo import rng
from dojo.maths import ddpm, denoising
from dojo.pocket.models import DDPM

SCHEDULE = ddpm.Schedule.of(DDPM)
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
DARK = ddpm.Schedule.of(DDPM | ZERO)  # ends without signal
SHAPE = (4, 8, 8)


def draws(count: int, name: str) -> Tensor:
    return rng.normal(SHAPE, [(name, i) for i in range(count)])


def scheduler(kind: Any, steps: int, **more: Any) -> Any:
    known = {k: v for k, v in DDPM.items() if k != "skip_prk_steps"}
    known |= {"clip_sample": False, **more}
    if kind is DDPMScheduler:
        known.pop("set_alpha_to_one")
    made = kind(**known)
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_the_schedule_is_diffusers(kind: Literal["scaled_linear", "linear"]) -> None:
    config = {**DDPM, "beta_schedule": kind}
    theirs = DDPMScheduler(beta_schedule=kind, beta_start=0.00085, beta_end=0.012)
    ours = ddpm.Schedule.of(config).alphas_cumprod
    assert torch.allclose(ours.float(), theirs.alphas_cumprod, atol=1e-6)
    assert math.sqrt(ours[-1]) < 0.15


def test_stable_diffusions_schedule_has_its_known_ends() -> None:
    # abar of SD1.5 at t = 0 and 999, as published with the model.
    assert SCHEDULE.at(0) == pytest.approx(0.99915, abs=1e-6)
    assert SCHEDULE.at(999) == pytest.approx(0.00466, abs=1e-5)
    assert SCHEDULE.at(-1) == 1


@pytest.mark.parametrize("change", [{"beta_schedule": "cosine"}, {"trained_betas": [0.1]}])
def test_another_schedule_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="beta"):
        ddpm.Schedule.of({**DDPM, **change})


def test_numbers_that_do_not_fall_are_no_schedule() -> None:
    with pytest.raises(ValueError, match="fall"):
        ddpm.Schedule(torch.tensor([0.9, 0.95], dtype=torch.float64))


@pytest.mark.parametrize("steps", [10, 30, 40, 50, 1000])
def test_the_timesteps_are_diffusers(steps: int) -> None:
    for kind in (DDPMScheduler, DDIMScheduler):
        theirs = scheduler(kind, steps).timesteps.clamp(max=999).tolist()
        assert list(SCHEDULE.sampling_timesteps(steps)) == theirs


@pytest.mark.parametrize("steps", [0, 1001])
def test_there_are_no_more_steps_than_timesteps(steps: int) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        SCHEDULE.sampling_timesteps(steps)


def test_noising_is_diffusers_and_the_true_noise_gives_the_picture_back() -> None:
    clean, noise = draws(5, "clean"), draws(5, "noise")
    timestep = torch.tensor([0, 10, 400, 800, 999])
    noisy = ddpm.add_noise(clean, noise, timestep, SCHEDULE)
    theirs = scheduler(DDPMScheduler, 40).add_noise(clean, noise, timestep)
    assert torch.allclose(noisy, theirs, atol=2e-6)
    back = ddpm.clean_estimate(noisy, noise, timestep, SCHEDULE)
    assert torch.allclose(back, clean, atol=1e-5)


def test_noising_keeps_the_variance_of_unit_pictures() -> None:
    timestep = torch.full((400,), 500)
    noisy = ddpm.add_noise(draws(400, "a"), draws(400, "b"), timestep, SCHEDULE)
    assert noisy.var().item() == pytest.approx(1, abs=0.02)


def test_the_error_is_a_mean_per_sample() -> None:
    a, b = draws(3, "a"), draws(3, "b")
    expected = torch.stack([torch.nn.functional.mse_loss(x, y) for x, y in zip(a, b, strict=True)])
    assert torch.allclose(ddpm.squared_error(a, b), expected)


def test_the_ratio_of_signal_to_noise_falls() -> None:
    snr = SCHEDULE.snr(torch.arange(1000))
    assert (snr.diff() < 0).all()
    assert snr[0].item() == pytest.approx(0.99915 / 0.00085, rel=1e-3)


@pytest.mark.parametrize("steps", [10, 40])
def test_a_step_without_noise_is_diffusers_ddim(steps: int) -> None:
    theirs = scheduler(DDIMScheduler, steps)
    latents = draws(2, "latents")
    for timestep, previous in ddpm.pairwise(SCHEDULE.sampling_timesteps(steps))[:-1]:
        epsilon = draws(2, f"epsilon {timestep}")
        ours = ddpm.transition(latents, epsilon, timestep, previous, SCHEDULE, eta=0)
        expected = theirs.step(epsilon, timestep, latents).prev_sample
        assert ours.std == 0
        assert torch.allclose(ours.mean, expected, atol=3e-5)
        latents = ours.mean


@pytest.mark.parametrize("steps", [10, 40])
def test_a_step_with_noise_is_diffusers_ddpm(steps: int) -> None:
    theirs = scheduler(DDPMScheduler, steps)
    for timestep, previous in ddpm.pairwise(SCHEDULE.sampling_timesteps(steps)):
        latents, epsilon = draws(2, f"latents {timestep}"), draws(2, f"epsilon {timestep}")
        ours = ddpm.transition(latents, epsilon, timestep, previous, SCHEDULE, eta=1)
        generator = torch.Generator().manual_seed(0)
        drawn = theirs.step(epsilon, timestep, latents, generator=generator).prev_sample
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(ours.sample(noise), drawn, atol=3e-5)


def test_a_step_with_noise_draws_what_it_says() -> None:
    one = ddpm.transition(torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), 500, 475, SCHEDULE, 1)
    drawn = one.mean + one.std * draws(2000, "many")
    assert drawn.std().item() == pytest.approx(one.std, rel=0.01)


@pytest.mark.parametrize("pair", [(10, 10), (10, 20)])
def test_timesteps_have_to_fall(pair: tuple[int, int]) -> None:
    zeros = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="fall"):
        ddpm.transition(zeros, zeros, *pair, SCHEDULE, 0)


def test_latents_in_half_precision_are_refused() -> None:
    zeros = torch.zeros(1, *SHAPE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        ddpm.transition(zeros, zeros, 10, 5, SCHEDULE, 0)


# -- velocity, and schedules that end without signal ---------------------------------------------

EVERY = torch.tensor([0, 10, 400, 800, 999])


def test_the_last_timestep_of_a_rescaled_schedule_is_pure_noise() -> None:
    theirs = scheduler(DDIMScheduler, 10, **ZERO).alphas_cumprod
    assert torch.allclose(DARK.alphas_cumprod.float(), theirs, atol=1e-6)
    assert DARK.at(999) == 0
    assert DARK.at(0) == pytest.approx(SCHEDULE.at(0), rel=1e-12)
    assert DARK.ends_without_signal
    assert not SCHEDULE.ends_without_signal


def test_nothing_is_left_below_no_signal() -> None:
    with pytest.raises(ValueError, match="to 0 or above"):
        ddpm.Schedule(torch.tensor([0.9, 0.1, -0.1], dtype=torch.float64))


@pytest.mark.parametrize("spacing", get_args(ddpm.Spacing))
def test_the_timesteps_of_every_spacing_are_diffusers(spacing: ddpm.Spacing) -> None:
    for steps in (*range(1, 61), 100, 125, 200, 250, 500, 1000):
        theirs = scheduler(DDIMScheduler, steps, timestep_spacing=spacing).timesteps
        ours = SCHEDULE.sampling_timesteps(steps, spacing=spacing)
        assert list(ours) == theirs.clamp(max=999).tolist(), steps


@pytest.mark.parametrize("spacing", get_args(ddpm.Spacing))
def test_timesteps_of_every_spacing_fall_within_the_schedule(spacing: ddpm.Spacing) -> None:
    # diffusers' trailing has one too many, -1, at 61 steps among others: its table is a range of
    # floats, whose end hangs on rounding.
    for steps in range(1, 1001):
        ours = SCHEDULE.sampling_timesteps(steps, 0, spacing)
        assert len(ours) == steps
        assert 999 >= ours[0] >= ours[-1] >= 0
        assert all(before > after for before, after in ddpm.pairwise(ours))
        assert spacing != "trailing" or ours[0] == 999


@pytest.mark.parametrize("schedule", [SCHEDULE, DARK])
def test_velocity_and_noising_are_diffusers(schedule: ddpm.Schedule) -> None:
    more: dict[str, Any] = ZERO if schedule is DARK else {}
    theirs = scheduler(DDIMScheduler, 10, **more)
    clean, noise = draws(5, "clean"), draws(5, "noise")
    ours = ddpm.velocity(clean, noise, EVERY, schedule)
    assert torch.allclose(ours, theirs.get_velocity(clean, noise, EVERY), atol=1e-5)
    noisy = ddpm.add_noise(clean, noise, EVERY, schedule)
    assert torch.allclose(noisy, theirs.add_noise(clean, noise, EVERY), atol=1e-5)


@pytest.mark.parametrize("schedule", [SCHEDULE, DARK])
def test_the_true_velocity_gives_picture_and_noise_back(schedule: ddpm.Schedule) -> None:
    clean, noise = draws(5, "clean"), draws(5, "noise")
    noisy = ddpm.add_noise(clean, noise, EVERY, schedule)
    v = ddpm.velocity(clean, noise, EVERY, schedule)
    # Nothing is divided by the signal, so no digits are lost where it is weak.
    picture = ddpm.clean_estimate(noisy, v, EVERY, schedule, "v_prediction")
    assert torch.allclose(picture, clean, atol=2e-6)
    back = ddpm.noise_estimate(noisy, v, EVERY, schedule, "v_prediction")
    assert torch.allclose(back, noise, atol=2e-6)


def test_any_velocity_and_its_noise_point_to_one_picture() -> None:
    noisy, v = draws(5, "noisy"), draws(5, "any")
    epsilon = ddpm.noise_estimate(noisy, v, EVERY, SCHEDULE, "v_prediction")
    assert torch.equal(ddpm.noise_estimate(noisy, epsilon, EVERY, SCHEDULE), epsilon)
    one = ddpm.clean_estimate(noisy, v, EVERY, SCHEDULE, "v_prediction")
    other = ddpm.clean_estimate(noisy, epsilon, EVERY, SCHEDULE)
    assert torch.allclose(one, other, atol=2e-4)
    assert torch.allclose(ddpm.velocity(one, epsilon, EVERY, SCHEDULE), v, atol=2e-5)


def test_without_signal_the_velocity_is_the_picture_turned_over() -> None:
    clean, noise, last = draws(1, "clean"), draws(1, "noise"), torch.tensor([999])
    assert torch.equal(ddpm.add_noise(clean, noise, last, DARK), noise)
    v = ddpm.velocity(clean, noise, last, DARK)
    assert torch.equal(v, -clean)
    assert torch.equal(ddpm.clean_estimate(noise, v, last, DARK, "v_prediction"), clean)
    assert torch.equal(ddpm.noise_estimate(noise, v, last, DARK, "v_prediction"), noise)
    assert DARK.snr(last).item() == 0


@pytest.mark.parametrize("more", [{"prediction_type": "v_prediction"}, ZERO])
@pytest.mark.parametrize(("steps", "eta"), [(10, 0), (40, 0), (10, 0.9), (50, 0.9)])
def test_a_step_by_velocity_is_diffusers_ddim(more: dict[str, Any], steps: int, eta: float) -> None:
    # At eta 1 theirs is NaN where the signal ends: the root of what rounding left below zero.
    theirs = scheduler(
        DDIMScheduler, steps, **more, timestep_spacing="trailing", set_alpha_to_one=True
    )
    schedule = DARK if more is ZERO else SCHEDULE
    way = schedule.sampling_timesteps(steps, spacing="trailing")
    assert way[0] == 999
    latents = draws(2, "latents")
    for timestep, previous in ddpm.pairwise(way):
        v, noise = draws(2, f"v {timestep}"), draws(2, f"noise {timestep}")
        ours = ddpm.transition(latents, v, timestep, previous, schedule, eta, "v_prediction")
        expected = theirs.step(v, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        assert torch.allclose(ours.mean + ours.std * noise, expected, atol=3e-5)
        latents = expected


def test_predicted_noise_is_refused_where_the_signal_ends() -> None:
    zeros = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="v_prediction"):
        ddpm.clean_estimate(zeros, zeros, torch.tensor([5]), DARK)
    with pytest.raises(ValueError, match="v_prediction"):
        ddpm.transition(zeros, zeros, 999, 899, DARK, 0)


def test_offset_noise_moves_whole_channels() -> None:
    noise, drawn = draws(400, "noise"), rng.normal((4, 1, 1), [("offset", i) for i in range(400)])
    moved = ddpm.offset_noise(noise, drawn, 0.5)
    assert torch.equal(moved - noise, (noise + 0.5 * drawn) - noise)
    assert moved.mean((2, 3)).var().item() == pytest.approx(0.25 + 1 / 64, rel=0.1)
    assert torch.equal(ddpm.offset_noise(noise, drawn, 0), noise)


def test_a_schedule_loses_its_last_signal_once() -> None:
    dark = SCHEDULE.without_signal_at_its_end()
    assert torch.equal(dark.alphas_cumprod, DARK.alphas_cumprod)
    assert dark.without_signal_at_its_end() is dark


def test_the_limits_of_a_huber_loss_by_hand() -> None:
    # abar .8, .5, 0: sigma .5, 1, infinite.
    schedule = ddpm.Schedule(torch.tensor([0.8, 0.5, 0.0], dtype=torch.float64))
    every = torch.arange(3)

    def limit(kind: ddpm.HuberSchedule) -> list[float]:
        return ddpm.huber_limit(every, schedule, 0.1, kind).tolist()

    assert limit("constant") == pytest.approx([0.1] * 3)
    assert limit("exponential") == pytest.approx([1, 0.1 ** (1 / 3), 0.1 ** (2 / 3)])
    assert limit("snr") == pytest.approx([0.9 / 1.5**2 + 0.1, 0.9 / 4 + 0.1, 0.1])


@pytest.mark.parametrize("kind", get_args(ddpm.HuberSchedule))
def test_a_huber_losss_limit_never_rises_with_the_noise(kind: ddpm.HuberSchedule) -> None:
    limit = ddpm.huber_limit(torch.arange(1000), SCHEDULE, 0.1, kind)
    assert limit.dtype == torch.float32
    assert (limit.diff() <= 0).all()
    assert 0.1 - 1e-6 <= limit[-1] <= limit[0] <= 1


def test_a_huber_loss_keeps_the_digits_of_small_differences() -> None:
    small, zero = torch.full((1, 4, 8, 8), 1e-5), torch.zeros(1, 4, 8, 8)
    found = ddpm.pseudo_huber(small, zero, torch.ones(1))
    assert torch.allclose(found, torch.full_like(found, 1e-10), rtol=1e-5, atol=0)


# -- the whole way -------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """Predicts a multiple of the latents, and counts how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.9))
        self.graded: list[bool] = []
        self.timesteps: list[int] = []

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.dtype == torch.int64
        assert timestep.shape == latents.shape[:1]
        self.graded.append(torch.is_grad_enabled())
        self.timesteps.append(int(timestep[0]))
        return self.factor * latents


KEYS: list[tuple[rng.Key, ...]] = [("way", 0), ("way", 1)]


def test_the_whole_way_is_diffusers_ddim() -> None:
    # Stable Diffusion's own setting ends at abar_0 = 0.999, this way at the picture.
    network, theirs = Network(), scheduler(DDIMScheduler, 20, set_alpha_to_one=True)
    way = denoising.Way.of(SCHEDULE, 20, eta=0)
    ours = denoising.sample(network, draws(2, "noise"), way)
    latents = draws(2, "noise")
    with torch.no_grad():
        for timestep in theirs.timesteps:
            latents = theirs.step(network.factor * latents, timestep, latents).prev_sample
    assert torch.allclose(ours, latents, atol=2e-4)
    assert network.timesteps[-1] == 1


@pytest.mark.parametrize("eta", [0, 1])
def test_the_whole_way_by_velocity_from_pure_noise(eta: int) -> None:
    # A network that knows the one picture there is: every way leads to it.
    picture = draws(1, "picture")

    def network(latents: Tensor, timestep: Tensor) -> Tensor:
        signal, spread = DARK.roots(timestep, latents)
        return (signal * latents - picture) / spread

    steps = DARK.sampling_timesteps(8, spacing="trailing")
    way = denoising.Way(schedule=DARK, timesteps=steps, eta=eta, prediction="v_prediction")
    found = denoising.sample(network, draws(2, "noise"), way, KEYS)
    assert torch.allclose(found, picture.expand_as(found), atol=1e-5)
    early = denoising.estimate(network, draws(2, "noise"), way, KEYS, last=0)
    assert torch.allclose(early, picture.expand_as(early), atol=1e-5)


def test_a_way_begins_where_no_signal_is_left() -> None:
    way = denoising.Way.of(DARK, 8, eta=0, prediction="v_prediction")
    assert way.timesteps == DARK.sampling_timesteps(8, spacing="trailing")
    assert way.timesteps[0] == 999
    assert denoising.Way.of(SCHEDULE, 8, eta=0).timesteps == SCHEDULE.sampling_timesteps(8)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    way, noise = denoising.Way.of(SCHEDULE, 8, eta=1), draws(2, "noise")
    both = denoising.sample(Network(), noise, way, KEYS)
    alone = denoising.sample(Network(), noise[1:], way, KEYS[1:])
    assert torch.equal(both[1:], alone)
    assert not torch.equal(denoising.sample(Network(), noise[1:], way, KEYS[:1]), alone)


@pytest.mark.parametrize(("last", "grad_steps"), [(0, 1), (5, 1), (7, 1), (7, 3), (7, 8)])
def test_gradients_go_through_the_last_calls_alone(last: int, grad_steps: int) -> None:
    network, way = Network(), denoising.Way.of(SCHEDULE, 8, eta=1)
    clean = denoising.estimate(
        network, draws(2, "noise"), way, KEYS, last=last, grad_steps=grad_steps
    )
    assert network.graded == [False] * (last + 1 - grad_steps) + [True] * grad_steps
    assert network.timesteps == list(way.timesteps[: last + 1])
    clean.square().sum().backward()
    assert network.factor.grad is not None
    assert network.factor.grad.abs() > 0


def test_one_step_with_gradient_has_the_gradient_of_that_step() -> None:
    network, way = Network(), denoising.Way.of(SCHEDULE, 8, eta=1)
    clean = denoising.estimate(network, draws(2, "noise"), way, KEYS, last=6)
    clean.sum().backward()
    latents = draws(2, "noise")
    with torch.no_grad():
        for number in range(6):
            latents = way.step(network, latents, number, KEYS)
    signal, spread = SCHEDULE.roots(torch.tensor([way.timesteps[6]]), latents)
    # d/df of (x - s f x) / r, summed.
    expected = (-spread * latents / signal).sum()
    assert network.factor.grad is not None
    assert torch.allclose(network.factor.grad, expected, rtol=1e-4)


def test_the_gradient_of_a_chain_is_that_of_finite_differences() -> None:
    way, noise = denoising.Way.of(SCHEDULE, 6, eta=1), draws(2, "noise").double()

    def total(network: Network, **how: int) -> Tensor:
        return denoising.estimate(network, noise, way, KEYS, last=5, **how).sum()

    network = Network()
    total(network, grad_steps=6).backward()
    values = []
    for shift in (1e-2, -1e-2):
        moved = Network()
        moved.factor.data += shift
        values.append(total(moved).item())
    assert network.factor.grad is not None
    assert network.factor.grad.item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("wrong", [{"last": 8}, {"last": -1}, {"last": 2, "grad_steps": 4}])
def test_steps_that_there_are_not_are_refused(wrong: dict[str, int]) -> None:
    way = denoising.Way.of(SCHEDULE, 8, eta=1)
    with pytest.raises(ValueError, match="step"):
        denoising.estimate(Network(), draws(2, "noise"), way, KEYS, **wrong)
