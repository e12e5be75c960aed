"""The losses of the forward process against their closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dojo.maths import forward

B, D = 5, 12
ADVANTAGES = torch.tensor([2.0, -2.0, 0.5, 0.0, -7.0], dtype=torch.float64)
SIGMA = torch.tensor([0.9, 0.5, 0.2, 0.7, 1.0], dtype=torch.float64)


def draw(seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, D // 3, generator=source, dtype=torch.float64)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses in float64: the mean square is computed in float32 elsewhere."""

    def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted - target).square().flatten(1).mean(1)

    monkeypatch.setattr(forward, "squared_error", squared_error)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    velocity = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(velocity).sum(), velocity)
    return found


def column(values: Tensor) -> Tensor:
    return values[:, None, None]


# -- NFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_nft_is_a_regression_on_the_old_policys_velocity_moved_by_the_advantage(
    beta: float,
) -> None:
    v, old, u = draw(1), draw(2), draw(3)
    a = ADVANTAGES.clamp(-5, 5)
    goal = old + column(a / (5 * beta)) * (u - old)

    def regression(velocity: Tensor) -> Tensor:
        return 5 * beta * SIGMA**2 * (velocity - goal).square().flatten(1).mean(1)

    def ours(velocity: Tensor) -> Tensor:
        return forward.nft(velocity, old, u, SIGMA, ADVANTAGES, beta=beta, adaptive=False)

    torch.testing.assert_close(gradient(ours, v), gradient(regression, v))
    apart = ours(v) - regression(v)
    torch.testing.assert_close(apart, ours(draw(4)) - regression(draw(4)))  # free of v


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nfts_first_gradient_does_not_hang_on_beta(beta: float) -> None:
    old, u = draw(2), draw(3)
    a = ADVANTAGES.clamp(-5, 5)
    plain = gradient(
        lambda v: forward.nft(v, old, u, SIGMA, ADVANTAGES, beta=beta, adaptive=False), old
    )
    torch.testing.assert_close(plain, column(2 * SIGMA**2 * a / D) * (old - u))
    weighted = gradient(lambda v: forward.nft(v, old, u, SIGMA, ADVANTAGES, beta=beta), old)
    error = SIGMA * (old - u).abs().flatten(1).mean(1)
    torch.testing.assert_close(weighted, plain / column(error))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_nft_teaches_nothing_where_nothing_was_better(beta: float, adaptive: bool) -> None:
    old, u = draw(2), draw(3)
    zero = torch.zeros(B, dtype=torch.float64)
    found = gradient(
        lambda v: forward.nft(v, old, u, SIGMA, zero, beta=beta, adaptive=adaptive), old
    )
    torch.testing.assert_close(found, torch.zeros_like(old))


def test_the_best_picture_is_plain_flow_matching_and_the_worst_its_mirror() -> None:
    v, old, u = draw(1), draw(2), draw(3)
    five = torch.full((B,), 5.0, dtype=torch.float64)
    best = forward.nft(v, old, u, SIGMA, five, adaptive=False)
    torch.testing.assert_close(best, 5 * SIGMA**2 * (v - u).square().flatten(1).mean(1))
    worst = forward.nft(v, old, u, SIGMA, -five, adaptive=False)
    mirrored = forward.nft(2 * old - v, old, u, SIGMA, five, adaptive=False)
    torch.testing.assert_close(worst, mirrored)


def test_a_beta_without_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="--nft_beta"):
        forward.nft(draw(1), draw(2), draw(3), SIGMA, ADVANTAGES, beta=0.0)


# -- RAM ----------------------------------------------------------------------------------------


def test_ram_is_still_where_nothing_was_better_and_the_policy_is_the_reference() -> None:
    reference, old, u = draw(1), draw(2), draw(3)
    zero = torch.zeros(B, dtype=torch.float64)
    found = gradient(lambda v: forward.ram(v, old, reference, u, zero, multiplier=100.0), reference)
    assert torch.equal(found, torch.zeros_like(reference))


def test_ram_and_nft_are_one_regression() -> None:
    v, old, u = draw(1), draw(2), draw(3)
    a = ADVANTAGES.clamp(-5, 5)
    beta = 0.4
    tied = gradient(lambda x: forward.ram(x, old, old, u, a, multiplier=1 / (5 * beta)), v)
    nft = gradient(lambda x: forward.nft(x, old, u, SIGMA, a, beta=beta, adaptive=False), v)
    torch.testing.assert_close(nft, column(5 * beta * SIGMA**2) * tied)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.8])
def test_rams_fixed_point_is_the_tilted_gaussian_for_a_linear_reward(sigma: float) -> None:
    # Pictures are N(s, 1) in one dimension. Reward m r(x) = m k x tilts N(0, 1) to N(m k, 1), and
    # E[v | x] of N(s, 1) is known; at s = m k the regression's mean has to be the policy itself.
    slope, m = 0.7, 2.0
    count = 200_000
    source = torch.Generator().manual_seed(0)
    x0 = m * slope + torch.randn(count, generator=source, dtype=torch.float64)
    eps = torch.randn(count, generator=source, dtype=torch.float64)
    x, u = (1 - sigma) * x0 + sigma * eps, eps - x0

    def velocity(mean: float, at: Tensor) -> Tensor:
        spread = (1 - sigma) ** 2 + sigma**2
        return -mean + (2 * sigma - 1) / spread * (at - (1 - sigma) * mean)

    old, reference = velocity(m * slope, x)[:, None], velocity(0.0, x)[:, None]
    advantages = slope * (x0 - x0.mean())
    pull = gradient(
        lambda v: forward.ram(v, old, reference, u[:, None], advantages, multiplier=m), old
    )[:, 0]
    # E[pull | x] must vanish: its mean and its slope in x.
    assert pull.mean().item() == pytest.approx(0, abs=0.06)
    assert (pull * (x - x.mean())).mean().item() == pytest.approx(0, abs=0.06)
    # It would not, were the policy not yet there.
    early = gradient(
        lambda v: forward.ram(v, old, reference, u[:, None], advantages, multiplier=m / 2), old
    )
    assert early.mean().abs().item() > 0.3


# -- AWM ----------------------------------------------------------------------------------------


def test_awm_of_the_best_picture_is_flow_matching() -> None:
    old, u = draw(2), draw(3)
    best = torch.full((B,), 5.0, dtype=torch.float64)
    ones = torch.ones(B, dtype=torch.float64)
    found = gradient(lambda v: forward.awm(v, old, u, ones, best, power=1.0), old)
    torch.testing.assert_close(found, 2 * (old - u) / D, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_awm_weighs_by_the_power_of_the_error(power: float) -> None:
    old, u = draw(2), draw(3)
    found = gradient(lambda v: forward.awm(v, old, u, SIGMA, ADVANTAGES, power=power), old)
    error = (old - u).square().flatten(1).mean(1)
    a = ADVANTAGES.clamp(-5, 5) / 5
    expected = column(a * SIGMA * error ** (power - 1)) * 2 * (old - u) / D
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_awms_clip_is_inert_on_policy_and_binds_off_it() -> None:
    old, u = draw(2), draw(3)
    near, far = old + 0.01 * (u - old), old + 0.9 * (u - old)
    best = torch.full((B,), 5.0, dtype=torch.float64)
    loss = forward.awm(old, old, u, SIGMA, best, clip_range=0.2)
    torch.testing.assert_close(loss, torch.full_like(loss, -1.0))
    assert gradient(lambda v: forward.awm(v, old, u, SIGMA, best, clip_range=0.2), near).any()
    held = gradient(lambda v: forward.awm(v, old, u, SIGMA, best, clip_range=0.02), far)
    assert not held.any()


# -- DGPO ---------------------------------------------------------------------------------------


def groups(seed: int, group: int) -> list[Tensor]:
    """Velocity, reference and target of two groups."""
    return [torch.cat([draw(seed + i), draw(seed + 9 + i)])[: 2 * group] for i in (0, 1, 2)]


def test_dgpo_is_dpos_loss_of_a_whole_group() -> None:
    v, reference, u = groups(1, 4)
    a, beta = torch.linspace(-2, 2, 8, dtype=torch.float64), 0.7

    def preferred(x: Tensor) -> Tensor:
        gained = forward.squared_error(x, u) - forward.squared_error(reference, u)
        pulls = (a * gained).unflatten(0, (2, 4)).mean(1)
        return -torch.nn.functional.logsigmoid(-beta * pulls)

    found = gradient(
        lambda x: forward.dgpo(x, v, reference, u, a, group=4, beta=beta, clip_range=9.0), v
    )
    # The mean over a group's pictures, times beta.
    torch.testing.assert_close(found * beta / 4, gradient(preferred, v))


def test_dgpo_of_a_pair_is_flow_dpo() -> None:
    v, reference, u = groups(1, 2)
    a = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)

    def pair(x: Tensor) -> Tensor:
        gained = forward.squared_error(x, u) - forward.squared_error(reference, u)
        return -torch.nn.functional.logsigmoid(-(0.7 / 2) * (gained[::2] - gained[1::2]))

    found = gradient(
        lambda x: forward.dgpo(x, v, reference, u, a, group=2, beta=0.7, clip_range=9.0), v
    )
    torch.testing.assert_close(found * 0.7 / 2, gradient(pair, v))


def test_dgpo_weighs_by_a_half_at_the_reference_and_lets_go_of_what_has_left_the_policy() -> None:
    _, reference, u = groups(1, 4)
    a = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    found = gradient(lambda x: forward.dgpo(x, x.detach(), reference, u, a, group=4), reference)
    torch.testing.assert_close(found, a[:, None, None] * (reference - u) / D)
    # Nearer to its picture than the policy that drew it was: the good ones have done enough.
    nearer = reference + 0.2 * (u - reference)
    held = gradient(lambda x: forward.dgpo(x, reference, reference, u, a, group=4), nearer)
    assert not held[a > 0].any()
    assert held[a < 0].flatten(1).any(1).all()
    farther = reference - 0.2 * (u - reference)
    held = gradient(lambda x: forward.dgpo(x, reference, reference, u, a, group=4), farther)
    assert not held[a < 0].any()
    assert held[a > 0].flatten(1).any(1).all()


def test_dgpo_refuses_parts_of_groups() -> None:
    with pytest.raises(ValueError, match="5 pictures are no whole groups of 2"):
        forward.dgpo(draw(1), draw(2), draw(2), draw(3), ADVANTAGES, group=2)


# -- norms --------------------------------------------------------------------------------------


def test_the_norm_guard_pulls_outgrown_velocities_back_and_leaves_the_others() -> None:
    reference = draw(1)
    scale = torch.tensor([0.5, 1.0, 1.2, 2.0, 0.99], dtype=torch.float64)
    rotated = draw(2)
    rotated = rotated / rotated.flatten(1).norm(dim=1)[:, None, None]
    v = column(scale * reference.flatten(1).norm(dim=1)) * rotated
    ratio = forward.norm_ratio(v, reference)
    torch.testing.assert_close(ratio, scale)  # a rotation does not count
    found = gradient(lambda x: forward.norm_excess(forward.norm_ratio(x, reference)), v)
    assert not found[[0, 4]].any()
    assert found[1].abs().max() < 1e-9
    for i in (2, 3):  # parallel to v, by 2 (ratio - 1) / |v_ref|
        expected = 2 * (scale[i] - 1) / reference[i].norm() * rotated[i]
        torch.testing.assert_close(found[i], expected)


def test_to_first_order_all_of_them_move_the_same_way() -> None:
    old, u = draw(2), draw(3)
    way = -column(ADVANTAGES.sign()) * (old - u)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "nft": lambda v: forward.nft(v, old, u, SIGMA, ADVANTAGES),
        "ram": lambda v: forward.ram(v, old, old, u, ADVANTAGES, multiplier=3.0),
        "awm": lambda v: forward.awm(v, old, u, SIGMA, ADVANTAGES),
        "dgpo": lambda v: forward.dgpo(v, old, old, u, ADVANTAGES, group=5),
    }
    for name, loss in losses.items():
        step = -gradient(loss, old)
        for i, advantage in enumerate(ADVANTAGES.tolist()):
            if advantage:
                cosine = torch.cosine_similarity(step[i].flatten(), way[i].flatten(), dim=0)
                assert cosine.item() == pytest.approx(1.0), (name, i)
            else:
                assert not step[i].any(), name
