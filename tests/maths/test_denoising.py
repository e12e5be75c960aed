"""The way along a rectified flow: its sigmas, and what a reward's gradient teaches along it.

That of diffusion is in `test_ddpm.py`.
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from dojo import rng
from dojo.maths import denoising
from dojo.maths.denoising import FlowWay, Solver


def draws(count: int, name: str) -> Tensor:
    return rng.normal((2, 3), [(name, i) for i in range(count)], "cpu")


class Linear(nn.Module):
    """v = a z, and how it was asked."""

    def __init__(self, factor: float = 0.9) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.graded: list[bool] = []
        self.sigmas: list[float] = []

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.dtype == torch.float32
        assert sigma.shape == latents.shape[:1]
        self.graded.append(torch.is_grad_enabled())
        self.sigmas.append(sigma[0].item())
        return self.factor * latents


class Curved(nn.Module):
    """A small network that is linear in nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(0.4 * draws(6, "inner").reshape(6, 6))
        self.outer = nn.Parameter(0.4 * draws(6, "outer").reshape(6, 6))

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        hidden = torch.tanh(latents.flatten(1) @ self.inner + sigma[:, None])
        return (hidden @ self.outer).view_as(latents)


# -- the sigmas ----------------------------------------------------------------------------------


def test_the_even_grid_is_that_of_short_ways_and_keeps_its_last_step() -> None:
    assert FlowWay.of(4, 3.0).sigmas == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert FlowWay.of(4, 1.0).sigmas == pytest.approx((1, 0.75, 0.5, 0.25, 0))
    assert FlowWay.of(1, 3.0).sigmas == (1, 0)
    for steps in (4, 10, 28, 40):
        last = FlowWay.of(steps, 3.0).sigmas[-2]
        assert last == pytest.approx(3 / (steps + 2))


@pytest.mark.parametrize("steps", [2, 4, 10, 28, 40])
def test_the_pipelines_grid_is_diffusers_and_ends_near_nothing(steps: int) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sigmas = FlowWay.of(steps, 3.0, "pipeline").sigmas
    assert sigmas == pytest.approx(scheduler.sigmas.tolist(), abs=1e-7)
    assert sigmas[-2] == pytest.approx(0.0089, abs=1e-4)


@pytest.mark.parametrize("sigmas", [(1.0, 0.5), (0.9, 0.0), (1.0, 0.5, 0.5, 0.0), (0.0, 1.0)])
def test_sigmas_that_do_not_fall_from_1_to_0_are_refused(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="fall from 1 to 0"):
        FlowWay(sigmas=sigmas)


def test_the_whole_way_is_diffusers_euler() -> None:
    network = Curved()
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    ours = denoising.sample(network, draws(2, "noise"), FlowWay.of(10, 3.0, "pipeline"))
    latents = draws(2, "noise")
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            velocity = network(latents, timestep.expand(2) / 1000)
            latents = scheduler.step(velocity, timestep, latents).prev_sample
    assert torch.allclose(ours, latents, atol=1e-5)


def test_a_network_that_knows_the_picture_points_to_it_from_every_step() -> None:
    picture, way = draws(1, "picture"), FlowWay.of(8, 3.0)

    def network(latents: Tensor, sigma: Tensor) -> Tensor:
        return (latents - picture) / sigma.view(-1, 1, 1)

    for last in range(8):
        clean = denoising.estimate(network, draws(2, "noise"), way, (), last=last)
        assert torch.allclose(clean, picture.expand_as(clean), atol=1e-5)


# -- the solvers ---------------------------------------------------------------------------------

SOLVERS: tuple[Solver, ...] = get_args(Solver)


def gaussian(latents: Tensor, sigma: Tensor) -> Tensor:
    """The exact velocity where pictures are normal with mean 0.7 and std 0.5: E[eps - x0 | z]."""
    s = sigma.double().view(-1, 1, 1)
    score = (latents.double() - (1 - s) * 0.7) / ((1 - s) ** 2 * 0.25 + s**2)
    return (s - (1 - s) * 0.25) * score - 0.7


def error(solver: Solver, steps: int) -> float:
    """How far the end is from where the ODE leads: noise n comes to 0.7 + 0.5 n."""
    even = tuple(1 - number / steps for number in range(steps + 1))
    noise = draws(4, "noise").double()
    found = denoising.sample(gaussian, noise, FlowWay(sigmas=even, solver=solver))
    return (found - (0.7 + 0.5 * noise.float())).abs().max().item()


@pytest.mark.parametrize("solver", SOLVERS)
def test_twice_the_steps_make_half_or_a_quarter_of_the_error(solver: Solver) -> None:
    # Its first two steps and the last are Euler's, which dpm2m makes up for slowly.
    some = (64, 128) if solver == "dpm2m" else (16, 32)
    orders = [math.log2(error(solver, steps) / error(solver, 2 * steps)) for steps in some]
    order = {"euler": (0.9, 1.1), "dpm2m": (1.6, 2.2)}.get(solver, (1.9, 2.3))
    assert all(order[0] < found < order[1] for found in orders), orders


def test_few_steps_of_second_order_come_nearer_than_as_many_predictions_of_eulers() -> None:
    for solver in ("ab2", "dpm2m"):
        assert error(solver, 8) < 0.5 * error("euler", 8)
    assert error("heun", 8) < 0.5 * error("euler", FlowWay.of(8, 1.0, solver="heun").predictions)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_network_that_knows_the_picture_comes_to_it_with_every_solver(solver: Solver) -> None:
    picture, way = draws(1, "picture"), FlowWay.of(5, 3.0, solver=solver)

    def network(latents: Tensor, sigma: Tensor) -> Tensor:
        return (latents - picture) / sigma.view(-1, 1, 1)

    found = denoising.sample(network, draws(2, "noise"), way)
    assert torch.allclose(found, picture.expand_as(found), atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_asks_as_often_as_it_says_and_a_second_way_begins_anew(solver: Solver) -> None:
    network, way = Linear(), FlowWay.of(5, 3.0, solver=solver)
    first = denoising.sample(network, draws(2, "noise"), way)
    assert len(network.sigmas) == way.predictions == (9 if solver == "heun" else 5)
    assert torch.equal(first, denoising.sample(network, draws(2, "noise"), way))


def test_dpm2m_is_diffusers_where_lambda_has_a_number() -> None:
    # Its first step begins at 0.999 of noise, where diffusers' table begins at shift 1.
    scheduler: Any = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
    )
    scheduler.set_timesteps(8)
    sigmas: list[float] = scheduler.sigmas.tolist()
    network, latents = Curved(), draws(2, "noise")
    way = FlowWay(sigmas=(1.0, *sigmas), solver="dpm2m")
    move, ours = way.mover(network, ()), latents
    with torch.no_grad():
        for number, timestep in enumerate(scheduler.timesteps):
            level = torch.full((2,), sigmas[number])
            latents = scheduler.step(network(latents, level), timestep, latents).prev_sample
            ours = move(ours, number + 1)
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)


# -- the gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "grad_steps"), [(0, 1), (5, 1), (7, 1), (7, 3), (7, 8)])
def test_gradients_go_through_the_last_calls_alone(last: int, grad_steps: int) -> None:
    network, way = Linear(), FlowWay.of(8, 3.0)
    clean = denoising.estimate(
        network, draws(2, "noise"), way, (), last=last, grad_steps=grad_steps
    )
    assert network.graded == [False] * (last + 1 - grad_steps) + [True] * grad_steps
    assert network.sigmas == pytest.approx(way.sigmas[: last + 1])
    clean.square().sum().backward()
    assert network.factor.grad is not None
    assert network.factor.grad.abs() > 0


def way_there(network: nn.Module, way: FlowWay, last: int) -> Tensor:
    """The latents that step `last` begins with."""
    latents = draws(2, "noise")
    move = way.mover(network, ())
    with torch.no_grad():
        for number in range(last):
            latents = move(latents, number)
    return latents


@pytest.mark.parametrize("last", [0, 4, 7])
def test_refls_gradient_is_the_rewards_times_minus_sigma_at_the_velocity(last: int) -> None:
    network, way = Curved(), FlowWay.of(8, 3.0)

    def reward(clean: Tensor) -> Tensor:
        return torch.sin(2 * clean).sum() + (clean[0] * clean[1]).sum()

    clean = denoising.estimate(network, draws(2, "noise"), way, (), last=last)
    found = torch.autograd.grad(reward(clean), [network.inner, network.outer])

    sigma = way.sigmas[last]
    velocity = network(way_there(network, way, last), torch.full((2,), sigma))
    (pull,) = torch.autograd.grad(reward(leaf := clean.detach().requires_grad_()), leaf)
    expected = torch.autograd.grad(velocity, [network.inner, network.outer], -sigma * pull)
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("last", "grad_steps"), [(5, 1), (7, 1), (7, 2), (7, 8), (4, 3)])
def test_a_linear_networks_gradient_in_closed_form(last: int, grad_steps: int) -> None:
    # z' = (1 + a d) z with d = sigma' - sigma, and x0 = (1 - a sigma) z at the last step: every
    # call that is learned through adds d / (1 + a d) to the logarithm's derivative.
    network, way, target = Linear(), FlowWay.of(8, 3.0), draws(2, "target")
    a, noise = network.factor.item(), draws(2, "noise").double()
    moves = [way.sigmas[i + 1] - way.sigmas[i] for i in range(last)] + [-way.sigmas[last]]
    whole = math.prod(1 + a * move for move in moves)
    slope = whole * sum(move / (1 + a * move) for move in moves[last + 1 - grad_steps :])

    clean = denoising.estimate(
        network, draws(2, "noise"), way, (), last=last, grad_steps=grad_steps
    )
    torch.testing.assert_close(clean, (whole * noise).float(), rtol=1e-5, atol=1e-6)
    (-(clean - target).square().sum() / 2).backward()
    expected = -((whole * noise - target) * slope * noise).sum()
    assert network.factor.grad is not None
    assert network.factor.grad.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("grad_steps", [1, 2, 4])
def test_the_gradient_of_a_chain_is_that_of_finite_differences(grad_steps: int) -> None:
    # DRaFT-K: what was taken without gradients stays where it is.
    network, way, steps = Curved(), FlowWay.of(6, 3.0), 6
    begin = steps - grad_steps
    reached = way_there(network, way, begin)
    clean = denoising.estimate(
        network, draws(2, "noise"), way, (), last=steps - 1, grad_steps=grad_steps
    )
    clean.cos().sum().backward()

    def score(moves: Sequence[tuple[nn.Parameter, Tensor]], size: float) -> float:
        other = Curved()
        with torch.no_grad():
            for (param, move), own in zip(moves, other.parameters(), strict=True):
                own.copy_(param + size * move)
            latents, move = reached, way.mover(other, ())
            for number in range(begin, steps - 1):
                latents = move(latents, number)
            return way.clean(other, latents, steps - 1).double().cos().sum().item()

    for i in range(3):
        moves = [(p, draws(6, f"move {i}").reshape(6, 6)) for p in network.parameters()]
        expected = (score(moves, 1e-2) - score(moves, -1e-2)) / 2e-2
        along = sum((p.grad * move).sum().item() for p, move in moves if p.grad is not None)
        assert along == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_the_chains_end_teaches_as_much_as_its_last_sigma() -> None:
    # What the pipeline's last step would teach by itself is next to nothing.
    found = {}
    for grid in ("even", "pipeline"):
        network, way = Linear(), FlowWay.of(20, 3.0, grid)
        clean = denoising.estimate(network, draws(2, "noise"), way, (), last=19)
        clean.square().sum().backward()
        assert network.factor.grad is not None
        there = way_there(network, way, 19)
        found[grid] = network.factor.grad.item() / (clean.detach() * there).sum().item()
    assert found["even"] == pytest.approx(-2 * 3 / 22, rel=1e-4)
    assert found["pipeline"] == pytest.approx(-2 * 0.0089, rel=1e-2)


def test_one_picture_does_not_depend_on_the_others() -> None:
    way, network = FlowWay.of(8, 3.0), Curved()
    both = denoising.sample(network, draws(2, "noise"), way)
    alone = denoising.sample(network, draws(2, "noise")[1:], way)
    torch.testing.assert_close(both[1:], alone)
