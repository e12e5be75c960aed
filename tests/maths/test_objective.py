"""Claims about the two objectives: the flow's as today's scripts call it, and the diffusion's."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dojo import rng
from dojo.maths import ddpm, flow
from dojo.maths.objective import Diffusion, Flow, Objective
from dojo.pocket.models import DDPM

SCHEDULE = ddpm.Schedule.of(DDPM)
DARK = ddpm.Schedule.of(DDPM | {"rescale_betas_zero_snr": True})
KINDS: list[Diffusion] = [
    Diffusion(schedule=SCHEDULE),
    Diffusion(schedule=SCHEDULE, prediction_type="v_prediction"),
    Diffusion(schedule=DARK, prediction_type="v_prediction"),
]
EVERY: list[Objective] = [Flow(shift=3.0), Flow(precondition_outputs=True), *KINDS]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """clean, noise and a prediction, each [16, 4, 8, 8], and uniform numbers [16]."""
    shape = (4, 8, 8)
    clean, noise, predicted = (
        rng.normal(shape, [(name, i) for i in range(16)])
        for name in ("clean", "noise", "predicted")
    )
    return clean, noise, predicted, rng.uniform([("level", i) for i in range(16)])


# -- any objective


@pytest.mark.parametrize("objective", EVERY)
def test_the_target_is_without_error_and_points_to_the_picture(objective: Objective) -> None:
    clean, noise, _, uniform = batch()
    level = objective.level(uniform)
    noisy = objective.noisy(clean, noise, level)
    target = objective.target(clean, noise, level)
    assert torch.allclose(objective.clean_estimate(noisy, target, level), clean, atol=2e-5)
    errors = objective.errors(target, noisy, level, clean=clean, noise=noise)
    assert errors.shape == (16,)
    assert errors.max() < 1e-10
    weight = objective.weight(level)
    assert (weight.shape, weight.dtype) == ((16,), torch.float32)


@pytest.mark.parametrize("objective", EVERY)
def test_what_the_area_leaves_out_does_not_count(objective: Objective) -> None:
    clean, noise, predicted, uniform = batch()
    level = objective.level(uniform)
    noisy = objective.noisy(clean, noise, level)
    area = torch.zeros(16, 1, 8, 8)
    area[..., :3] = 1
    whole = objective.errors(predicted, noisy, level, clean=clean, noise=noise)
    part = objective.errors(predicted, noisy, level, clean=clean, noise=noise, area=area)
    alone = objective.errors(
        *(predicted[..., :3], noisy[..., :3], level), clean=clean[..., :3], noise=noise[..., :3]
    )
    assert torch.allclose(part, alone, rtol=1e-5)
    assert not torch.allclose(part, whole, rtol=1e-3)


# -- the flow


@pytest.mark.parametrize("scheme", get_args(flow.WeightingScheme))
@pytest.mark.parametrize("precondition", [False, True])
def test_the_flow_is_to_the_bit_what_its_calls_are(
    scheme: flow.WeightingScheme, precondition: bool
) -> None:
    own: dict[str, Any] = {"logit_mean": 0.3, "logit_std": 0.8, "mode_scale": -0.5}
    objective = Flow(shift=2.5, weighting_scheme=scheme, precondition_outputs=precondition, **own)
    clean, noise, predicted, uniform = batch()
    sigma = flow.draw_sigma(uniform, scheme, shift=2.5, **own)
    noisy = flow.interpolate(clean, noise, sigma)
    said, target = predicted, flow.velocity(clean, noise)
    assert torch.equal(objective.level(uniform), sigma)
    assert torch.equal(objective.noisy(clean, noise, sigma), noisy)
    assert torch.equal(objective.target(clean, noise, sigma), target)
    assert torch.equal(objective.weight(sigma), flow.loss_weight(sigma, scheme))
    if precondition:
        said, target = flow.clean_estimate(noisy, predicted, sigma), clean
    area = torch.rand(16, 1, 8, 8, generator=rng.generator("area"))
    for where in (None, area):
        errors = objective.errors(predicted, noisy, sigma, clean=clean, noise=noise, area=where)
        assert torch.equal(errors, flow.squared_error(said, target, where))


def test_the_flow_draws_what_the_options_say() -> None:
    uniform = batch()[3]
    ours = Flow(shift=1.7).level(uniform)
    assert torch.equal(ours, flow.draw_sigma(uniform, "logit_normal", shift=1.7))


def test_a_flows_timestep_is_a_thousand_sigmas_to_the_bit() -> None:
    timestep = torch.rand(1000, generator=rng.generator("timesteps")) * 1000  # float32
    sigma = Flow().of_timestep(timestep)
    assert sigma.dtype == torch.float64
    assert torch.equal((sigma * 1000).float(), timestep)


# -- the diffusion


def test_the_timesteps_are_those_that_uniform_numbers_gave_so_far() -> None:
    keys: list[tuple[rng.Key, ...]] = [("key", i) for i in range(500)]
    uniform = rng.uniform([(*key, "timestep") for key in keys])
    ours = Diffusion(schedule=SCHEDULE).level(uniform)
    assert torch.equal(ours, ((1 - uniform) * 1000).long())
    assert ours.dtype == torch.int64
    assert torch.equal(Diffusion(schedule=SCHEDULE).of_timestep(ours), ours)


@pytest.mark.parametrize("count", [1000, 1100])
def test_the_timesteps_are_all_equally_likely(count: int) -> None:
    schedule = ddpm.Schedule.of({**DDPM, "num_train_timesteps": count})
    objective = Diffusion(schedule=schedule)
    even = (torch.arange(count * 8, dtype=torch.float64) + 0.5) / (count * 8)
    assert (objective.level(even).bincount(minlength=count) == 8).all()
    ends = torch.tensor([2.0**-24, 1.0])  # the smallest and the largest that are drawn
    assert objective.level(ends).tolist() == [count - 1, 0]


@pytest.mark.parametrize("objective", KINDS)
def test_the_diffusions_error_is_that_of_the_named_target(objective: Diffusion) -> None:
    clean, noise, predicted, uniform = batch()
    level = objective.level(uniform)
    noisy = objective.noisy(clean, noise, level)
    signal, spread = objective.schedule.roots(level, clean)
    is_v = objective.prediction_type == "v_prediction"
    target = signal * noise - spread * clean if is_v else noise
    errors = objective.errors(predicted, noisy, level, clean=clean, noise=noise)
    assert torch.equal(noisy, ddpm.add_noise(clean, noise, level, objective.schedule))
    assert torch.equal(errors, ddpm.squared_error(predicted, target))


@pytest.mark.parametrize("kind", get_args(ddpm.Prediction))
def test_min_snr_weights_of_stable_diffusion(kind: ddpm.Prediction) -> None:
    objective = Diffusion(schedule=SCHEDULE, prediction_type=kind, snr_gamma=5)
    weight = objective.weight(torch.arange(1000))
    mean = {"epsilon": 0.917, "v_prediction": 0.294}[kind]
    assert weight.mean().item() == pytest.approx(mean, abs=5e-4)
    snr = SCHEDULE.snr(torch.arange(1000))
    # As weights on the error of x0 both are min(SNR, 5): eps has SNR times that error, v SNR + 1.
    factor = {"epsilon": snr, "v_prediction": snr + 1}[kind]
    assert torch.allclose(weight * factor, snr.clamp_max(5), rtol=1e-5)


def test_min_snr_weights_by_hand() -> None:
    # abar .9, .5, .1: SNR 9, 1, 1/9.
    schedule = ddpm.Schedule(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    level = torch.arange(3)
    eps = Diffusion(schedule=schedule, snr_gamma=5).weight(level)
    assert torch.allclose(eps, torch.tensor([5 / 9, 1.0, 1.0]))
    v = Diffusion(schedule=schedule, prediction_type="v_prediction", snr_gamma=5).weight(level)
    assert torch.allclose(v, torch.tensor([0.5, 0.5, 0.1]))


def test_debiased_weights_by_hand() -> None:
    # SNR 9999, 1, 1/9; the first counts as 1000, as in sd-scripts.
    schedule = ddpm.Schedule(torch.tensor([0.9999, 0.5, 0.1], dtype=torch.float64))
    level = torch.arange(3)
    eps = Diffusion(schedule=schedule, debiased_estimation=True).weight(level)
    assert torch.allclose(eps, torch.tensor([1000**-0.5, 1.0, 3.0]))
    v = Diffusion(schedule=schedule, prediction_type="v_prediction", debiased_estimation=True)
    assert torch.allclose(v.weight(level), torch.tensor([1 / 1001, 0.5, 0.9]))
    dark = Diffusion(schedule=DARK, prediction_type="v_prediction", debiased_estimation=True)
    assert dark.weight(torch.tensor([999])) == 1


@pytest.mark.parametrize(("first", "end"), [(0, 1000), (0, 1), (200, 700), (999, None)])
def test_the_chosen_timesteps_are_all_equally_likely_and_the_only_ones(
    first: int, end: int | None
) -> None:
    objective = Diffusion(schedule=SCHEDULE, min_timestep=first, max_timestep=end)
    count = (end or 1000) - first
    even = (torch.arange(count * 8, dtype=torch.float64) + 0.5) / (count * 8)
    found = objective.level(even).bincount(minlength=1000)
    assert (found[first : first + count] == 8).all()
    assert found.sum() == 8 * count
    ends = torch.tensor([2.0**-24, 1.0])  # the smallest and the largest that are drawn
    assert objective.level(ends).tolist() == [first + count - 1, first]


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_a_huber_loss_is_squares_near_zero_and_sizes_far_away(kind: Any) -> None:
    objective = Diffusion(schedule=SCHEDULE, loss_type=kind, huber_c=0.2, huber_schedule="constant")
    level, noise = torch.tensor([3, 800, 999]), torch.zeros(3, 4, 8, 8)
    over = 0.2 if kind == "smooth_l1" else 1.0

    def error(size: float) -> Tensor:
        predicted = torch.full_like(noise, size)
        return objective.errors(predicted, noise, level, clean=noise, noise=noise) * over

    assert torch.allclose(error(1e-4), torch.full((3,), 1e-8), rtol=1e-4)
    assert torch.allclose(error(1e4), torch.full((3,), 2 * 0.2 * 1e4), rtol=1e-3)
    by_hand = 2 * 0.2 * ((0.3**2 + 0.2**2) ** 0.5 - 0.2)
    assert torch.allclose(error(-0.3), torch.full((3,), by_hand))


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_a_large_difference_pulls_less_by_a_huber_loss(kind: Any) -> None:
    objective = Diffusion(schedule=SCHEDULE, loss_type=kind)
    clean, noise, _, uniform = batch()
    predicted = (noise + torch.linspace(0.01, 30, 8)).requires_grad_()
    level = objective.level(uniform)
    errors = objective.errors(predicted, noise, level, clean=clean, noise=noise)
    (pull,) = torch.autograd.grad(errors.sum(), predicted)
    squared = Diffusion(schedule=SCHEDULE).errors(predicted, noise, level, clean=clean, noise=noise)
    (plain,) = torch.autograd.grad(squared.sum(), predicted)
    share = (pull / plain).mean((0, 1, 2))
    assert (share.diff() < 0).all()
    assert pull.isfinite().all()


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_schedule_without_signal_at_its_end_gives_numbers_everywhere(
    gamma: float | None,
) -> None:
    objective = Diffusion(schedule=DARK, prediction_type="v_prediction", snr_gamma=gamma)
    level = torch.arange(984, 1000)
    clean, noise, predicted, _ = batch()
    noisy = objective.noisy(clean, noise, level)
    for values in (
        noisy,
        objective.target(clean, noise, level),
        objective.clean_estimate(noisy, predicted, level),
        objective.errors(predicted, noisy, level, clean=clean, noise=noise),
        objective.weight(level),
    ):
        assert values.isfinite().all()
    assert objective.weight(level)[-1] == (1 if gamma is None else 0)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"prediction_type": "sample"}, "'sample' is not known here"),
        ({"schedule": DARK}, "has to predict v"),
        ({"snr_gamma": 0.0}, "snr_gamma has to be positive"),
        ({"snr_gamma": 5.0, "debiased_estimation": True}, "two weights"),
        ({"min_timestep": 300, "max_timestep": 300}, "in this order"),
        ({"min_timestep": -1}, "min_timestep -1"),
        ({"max_timestep": 1001}, "in 0 .. 1000"),
        ({"huber_c": 0.0}, "huber_c has to lie above 0"),
    ],
)
def test_an_objective_that_teaches_nothing_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Diffusion(**{"schedule": SCHEDULE, **wrong})
