"""Claims about advantages and the clipped surrogate, and the mistakes of others as regressions."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dojo.maths import advantages as policy
from dojo.maths.advantages import GROUP_FLOOR, PromptBuffer, check_sizes
from dojo.maths.flow import squared_error
from dojo.maths.gaussian import Gaussian
from dojo.maths.surrogate import (
    Ratio,
    clipped_surrogate,
    log_ratio,
    masked_surrogate,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def epoch(prompts: int = 3, group: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of prompts that lie far apart, ids in mixed order, all valid."""
    ids = torch.arange(prompts).repeat(group) * 7 + 5
    return draw(prompts * group) + ids, ids, torch.ones(prompts * group, dtype=torch.bool)


# Groups


@pytest.mark.parametrize("spread", ["group", "global"])
def test_an_advantage_is_the_distance_from_the_groups_mean_in_stds(spread: policy.Spread) -> None:
    scores, ids, valid = epoch()
    ours = policy.group_advantages(scores, ids, valid, spread)
    for i, score in enumerate(scores.tolist()):
        group = scores[ids == ids[i]].tolist()
        std = statistics.pstdev(group if spread == "group" else scores.tolist())
        expected = (score - statistics.fmean(group)) / (std * (1 + GROUP_FLOOR))
        assert ours.values[i].item() == pytest.approx(expected, rel=1e-4)
    assert (ours.groups, ours.flat_groups, ours.invalid) == (3, 0, 0)
    assert torch.equal(ours.weights, torch.ones(12))


def test_what_a_prompt_yields_on_average_teaches_nothing() -> None:
    # The predecessor took the raw score for the advantage, so easy prompts pushed everything.
    scores, ids, valid = epoch()
    ours = policy.group_advantages(scores, ids, valid)
    easier = policy.group_advantages(scores + 100 * (ids == 5), ids, valid)
    torch.testing.assert_close(ours.values, easier.values, rtol=1e-4, atol=1e-5)
    for prompt in ids.unique():
        assert ours.values[ids == prompt].sum().item() == pytest.approx(0, abs=1e-5)


def test_a_group_that_spans_processes_is_one_group_to_the_bit() -> None:
    scores, ids, valid = epoch(prompts=5, group=6)
    scores = scores.double()
    # Sums whose rounding shows in the result, if it depends on the order.
    scores[5:20] += torch.tensor([1e16, -1e16, 0.0], dtype=torch.float64).repeat(5)
    valid[7] = False
    buffers = PromptBuffer(8, 2), PromptBuffer(8, 2)
    for seed in range(3):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        for spread in ("group", "global"):
            one = policy.group_advantages(scores, ids, valid, spread)
            mixed = policy.group_advantages(scores[order], ids[order], valid[order], spread)
            assert torch.equal(one.values[order], mixed.values)
        rewards, weights = torch.stack([scores, draw(30)], 1), torch.tensor([0.3, 2.0])
        one = policy.decoupled_advantages(rewards, weights, ids, valid)
        mixed = policy.decoupled_advantages(rewards[order], weights, ids[order], valid[order])
        assert torch.equal(one.values[order], mixed.values)
        one = buffers[0].advantages(scores, ids, valid)
        mixed = buffers[1].advantages(scores[order], ids[order], valid[order])
        if seed == 0:  # later the order decides which scores are forgotten
            assert torch.equal(one.values[order], mixed.values)


@pytest.mark.parametrize("spread", ["group", "global"])
@pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 26.3])
def test_a_group_without_variance_weighs_exactly_zero_and_is_counted(
    spread: policy.Spread, score: float
) -> None:
    scores, ids, valid = epoch(group=7)
    scores[ids == 12] = score  # whose mean in floating point need not be the score itself
    ours = policy.group_advantages(scores, ids, valid, spread)
    assert ours.flat_groups == 1
    assert torch.equal(ours.weights, (ids != 12).float())
    assert torch.equal(ours.values == 0, ids == 12)


def test_if_no_group_varies_everything_weighs_zero() -> None:
    _, ids, valid = epoch()
    ours = policy.group_advantages(ids.float(), ids, valid)
    assert ours.flat_groups == ours.groups == 3
    assert not ours.values.any()
    assert not ours.weights.any()


def test_an_invalid_score_leaves_the_statistics() -> None:
    scores, ids, valid = epoch()
    valid[4] = False
    for nonsense in (math.nan, math.inf, 1e9):
        scores[4] = nonsense
        ours = policy.group_advantages(scores, ids, valid, "global")
        rest = policy.group_advantages(scores[valid], ids[valid], valid[valid], "global")
        assert torch.equal(ours.values[valid], rest.values)
        assert (ours.values[4], ours.weights[4], ours.invalid) == (0, 0, 1)


def test_a_group_with_one_valid_score_is_flat() -> None:
    scores, ids, valid = epoch()
    valid[(ids == 5).nonzero()[1:]] = False
    valid[ids == 12] = False
    ours = policy.group_advantages(scores, ids, valid)
    assert (ours.flat_groups, ours.invalid) == (2, 7)
    assert torch.equal(ours.weights, (ids == 19).float())
    nothing = policy.group_advantages(scores, ids, torch.zeros_like(valid), "global")
    assert not nothing.values.any()


def test_a_score_that_is_not_finite_yet_valid_is_refused() -> None:
    scores, ids, valid = epoch()
    scores[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        policy.group_advantages(scores, ids, valid)
    with pytest.raises(ValueError, match="not finite"):
        PromptBuffer().advantages(scores, ids, valid)


def test_a_group_of_one_is_refused() -> None:
    scores, ids, valid = epoch()
    ids[0] = 99
    with pytest.raises(ValueError, match="prompt 99 has one sample"):
        policy.group_advantages(scores, ids, valid)


# Several rewards


def test_decoupled_rewards_count_by_weight_and_not_by_scale() -> None:
    scores, ids, valid = epoch(prompts=4, group=8)
    rewards = torch.stack([scores, 1000 * draw(32, seed=1)], 1)
    weights = torch.tensor([1.0, 1.0])
    ours = policy.decoupled_advantages(rewards, weights, ids, valid).values
    alone = [policy.group_advantages(one, ids, valid).values for one in rewards.T]
    total = alone[0] + alone[1]
    torch.testing.assert_close(ours, total / total.std(correction=0), rtol=1e-3, atol=1e-3)
    summed = policy.group_advantages(rewards.sum(1), ids, valid).values
    torch.testing.assert_close(summed, alone[1], rtol=0.02, atol=0.02)  # the large scale won


def test_decoupled_rewards_keep_apart_what_a_sum_confuses() -> None:
    ids, valid = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    # The sums are alike: a filter on them would drop the group.
    rewards = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.5, 1.5], [0.0, 3.0]])
    assert policy.group_advantages(rewards.sum(1), ids, valid).flat_groups == 1
    ours = policy.decoupled_advantages(rewards, torch.tensor([1.0, 0.5]), ids, valid)
    assert ours.flat_groups == 0
    assert len(ours.values.unique()) == 4


def test_one_reward_without_variance_leaves_the_others() -> None:
    scores, ids, valid = epoch()
    rewards = torch.stack([scores, torch.full((12,), 0.1)], 1)
    ours = policy.decoupled_advantages(rewards, torch.tensor([1.0, 5.0]), ids, valid)
    alone = policy.group_advantages(scores, ids, valid).values
    torch.testing.assert_close(ours.values, alone, rtol=1e-3, atol=1e-3)


# Any scale


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 2.0**-10, 1e6, 1e20])
def test_advantages_do_not_hang_on_the_scale_of_a_reward(scale: float) -> None:
    # std + 1e-4 shrinks rewards at 1e-4 of their scale to a fraction, down to nothing.
    scores, ids, valid = epoch()
    rewards = torch.stack([scores, draw(12, seed=5) + 3], 1).double()
    weights = torch.tensor([1.0, 0.7])
    scaled = rewards * torch.tensor([scale, 1.0], dtype=torch.float64)
    whole = policy.decoupled_advantages(rewards, weights, ids, valid)
    torch.testing.assert_close(
        policy.decoupled_advantages(scaled, weights, ids, valid).values, whole.values
    )
    torch.testing.assert_close(
        policy.decoupled_advantages(rewards, weights * scale, ids, valid).values, whole.values
    )
    for spread in ("group", "global"):
        one = policy.group_advantages(rewards[:, 0], ids, valid, spread).values
        other = policy.group_advantages(rewards[:, 0] * scale, ids, valid, spread).values
        torch.testing.assert_close(one, other)
    one, other = (
        PromptBuffer(8, 2).advantages(rewards[:, 0] * factor, ids, valid).values
        for factor in (1, scale)
    )
    torch.testing.assert_close(one, other)


def test_what_float32_cannot_tell_apart_is_not_blown_up() -> None:
    _, ids, valid = epoch()
    scores = 0.5 + draw(12).sign() * 2.0**-24  # a reward that is constant but for its rounding
    ours = policy.group_advantages(scores, ids, valid)
    real = policy.group_advantages(0.5 + draw(12).sign() * 2.0**-10, ids, valid)
    assert ours.values.abs().max() < 0.75 * real.values.abs().max()
    opposed = torch.stack([draw(12), -draw(12)], 1)
    none = policy.decoupled_advantages(opposed, torch.tensor([1.0, 1.0]), ids, valid)
    assert none.values.abs().max() < 1e-6


def test_columns_of_zeros_stay_zero() -> None:
    scores, ids, valid = epoch()
    rewards = torch.stack([scores, torch.zeros(12)], 1)
    ours = policy.decoupled_advantages(rewards, torch.tensor([1.0, 1.0]), ids, valid)
    assert ours.values.isfinite().all()
    nothing = policy.decoupled_advantages(rewards, torch.zeros(2), ids, valid)
    assert not nothing.values.any()


def test_scores_that_float32_can_hardly_hold_are_told() -> None:
    scores, ids, valid = epoch()
    flat = torch.full((12,), 0.3)
    table = torch.stack([scores, scores + 1e8, flat, flat * 0 + 1e8, scores * 1e8, flat * 0], 1)
    assert policy.coarse(table, ids, valid) == [1, 3]
    assert policy.coarse(table, torch.arange(12), valid) == [1, 3]
    assert policy.coarse(table, ids, torch.zeros_like(valid)) == []


# The buffer of DDPO


def test_the_buffer_judges_by_the_latest_scores_of_a_prompt() -> None:
    buffer, ids, valid = PromptBuffer(size=6, min_count=4), torch.tensor([1, 1, 2]), torch.ones(3)
    valid = valid.bool()
    seen: list[float] = []
    for n in range(5):
        scores = draw(3, seed=n)
        ours = buffer.advantages(scores, ids, valid).values
        seen = [*seen, *scores[:2].tolist()][-6:]
        peers = seen if len(seen) >= 4 else scores.tolist()  # all at hand, until there are enough
        for i in range(2):
            expected = (scores[i].item() - statistics.fmean(peers)) / statistics.pstdev(peers)
            assert ours[i].item() == pytest.approx(expected, rel=1e-4)
    assert buffer.state_dict()["counts"].tolist() == [6, 5]


def test_a_prompt_drawn_once_still_gets_an_advantage_from_the_buffer() -> None:
    buffer, valid = PromptBuffer(8, 2), torch.ones(1, dtype=torch.bool)
    values = [
        buffer.advantages(torch.tensor([score]), torch.tensor([3]), valid).values.item()
        for score in (1.0, 2.0, 1.0, 5.0)
    ]
    assert values[0] == 0  # nothing to compare with
    assert values[1] > 0 > values[2]
    assert values[3] > 1


def test_the_buffer_takes_in_no_invalid_score() -> None:
    buffer, valid = PromptBuffer(8, 2), torch.tensor([True, False, True])
    scores = torch.tensor([1.0, math.nan, 2.0])
    ours = buffer.advantages(scores, torch.tensor([3, 3, 3]), valid)
    assert buffer.state_dict()["scores"].tolist() == [1, 2]
    assert (ours.values[1], ours.weights[1], ours.invalid) == (0, 0, 1)


def test_a_run_goes_on_from_the_saved_buffer_to_the_bit(tmp_path: Path) -> None:
    once, first, second = (PromptBuffer(6, 3) for _ in range(3))
    for n in range(6):
        scores, ids, valid = draw(8, seed=n), torch.arange(8) % 3 + 10**9, draw(8, seed=-n) > -1
        expected = once.advantages(scores, ids, valid)
        if n == 3:
            save_file(first.state_dict(), tmp_path / "buffer.safetensors")
            second.load_state_dict(load_file(tmp_path / "buffer.safetensors"))
        ours = (first if n < 3 else second).advantages(scores, ids, valid)
        assert torch.equal(ours.values, expected.values)
    assert second.state_dict().keys() == once.state_dict().keys()
    for name, value in once.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_a_buffer_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="cannot wait"):
        PromptBuffer(8, 9)
    with pytest.raises(ValueError, match="holds 8"):
        PromptBuffer(9, 2).load_state_dict(PromptBuffer(8, 2).state_dict())


# Sizes


@pytest.mark.parametrize(
    ("prompts", "group", "batch", "processes", "advice"),
    [
        (7, 4, 8, 1, "take 6 or 8 prompts"),
        (48, 24, 9, 24, "take 45 or 54 prompts"),
        (1, 2, 8, 2, "take 8 prompts"),
        (0, 2, 8, 2, "take 8 prompts"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(
    prompts: int, group: int, batch: int, processes: int, advice: str
) -> None:
    with pytest.raises(ValueError, match=advice) as refusal:
        check_sizes(prompts, group, batch, processes)
    for word in str(refusal.value).split("take ")[1].split():
        if word.isdigit():  # what is advised is accepted
            assert check_sizes(int(word), group, batch, processes) > 0


def test_sizes_that_divide_give_the_batches_of_a_process() -> None:
    assert check_sizes(48, 24, 9, 32) == 4
    assert check_sizes(16, 1, 8, 2, min_group=1) == 1


def test_groups_of_one_are_refused_where_groups_are_compared() -> None:
    with pytest.raises(ValueError, match="--group_size must be at least 2"):
        check_sizes(8, 1, 8, 1)


# The surrogate


@pytest.mark.parametrize("clip_range", [0.2, 1e-4])
def test_the_surrogate_is_ppos(clip_range: float) -> None:
    steps = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    ratio = (1 + steps * clip_range).repeat(2)
    advantages = torch.tensor([2.0, -2.0], dtype=torch.float64).repeat_interleave(5)
    ours = clipped_surrogate(ratio.log(), advantages, clip_range)
    for i in range(10):
        r, a = ratio[i].item(), advantages[i].item()
        bounded = min(max(r, 1 - clip_range), 1 + clip_range)
        assert ours.loss[i].item() == pytest.approx(-min(a * r, a * bounded), rel=1e-12)
    assert ours.clipped_high.nonzero().flatten().tolist() == [4]
    assert ours.clipped_low.nonzero().flatten().tolist() == [5]
    torch.testing.assert_close(ours.ratio, ratio)
    torch.testing.assert_close(ours.approx_kl, ratio.log().square() / 2)


def test_the_surrogate_pulls_within_the_clip_range_and_not_beyond() -> None:
    # The predecessor clamped the logarithm to [20, 20]: no sample ever had a gradient.
    ratio = torch.tensor([1.0, 1.0, 1.1, 0.9, 1.3, 1.3, 0.7, 0.7])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    log_ratio = ratio.log().requires_grad_()
    clipped_surrogate(log_ratio, advantages, 0.2).loss.sum().backward()
    expected = -advantages * ratio
    expected[[4, 7]] = 0  # good and likelier already, bad and less likely already
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, expected)


def test_the_first_gradient_is_that_of_the_policy() -> None:
    mean = draw(3, 8).requires_grad_()
    old, new = Gaussian(mean.detach(), 0.5), Gaussian(mean, 0.5)
    x, advantages = old.sample(draw(3, 8, seed=1)), torch.tensor([1.5, -0.5, 0.0])
    ratio = log_ratio(new, old, x)
    assert torch.equal(ratio, torch.zeros(3))
    clipped_surrogate(ratio, advantages, 1e-5).loss.sum().backward()
    # -A grad log p: a good sample draws the mean towards itself
    expected = -advantages[:, None] * (x - mean.detach()) / (0.5**2 * 8)
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, expected)


@pytest.mark.parametrize("clip_range", [0.0, -1.0])
def test_a_clip_range_without_width_is_refused(clip_range: float) -> None:
    with pytest.raises(ValueError, match="--clip_range"):
        clipped_surrogate(torch.zeros(2), torch.ones(2), clip_range)


# The divergence mask


def test_the_mask_leaves_out_what_leads_further_away_and_nothing_else() -> None:
    ratio = torch.tensor([1.1, 1.1, 0.9, 0.9, 1.1, 0.9, 1.0])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0])
    divergence = torch.tensor([2e-5, 2e-5, 2e-5, 2e-5, 0.9e-5, 0.9e-5, 2e-5])
    log_ratio = ratio.log().requires_grad_()
    found = masked_surrogate(log_ratio, advantages, divergence, 1e-5)
    assert found.clipped_high.nonzero().flatten().tolist() == [0]
    assert found.clipped_low.nonzero().flatten().tolist() == [3]
    found.loss.sum().backward()
    expected = -advantages * ratio
    expected[[0, 3]] = 0
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, expected)
    torch.testing.assert_close(found.loss.detach(), expected)


def test_before_the_first_update_the_mask_leaves_nothing_out() -> None:
    mean = draw(3, 8).requires_grad_()
    old, new = Gaussian(mean.detach(), 0.5), Gaussian(mean, 0.5)
    x, advantages = old.sample(draw(3, 8, seed=1)), torch.tensor([1.5, -0.5, 0.0])
    found = masked_surrogate(log_ratio(new, old, x), advantages, new.kl(old), 1e-12)
    assert found.divergence is not None
    assert torch.equal(found.divergence, torch.zeros(3))
    assert not (found.clipped_high | found.clipped_low).any()
    found.loss.sum().backward()
    expected = -advantages[:, None] * (x - mean.detach()) / (0.5**2 * 8)  # -A grad log p
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, expected)


@pytest.mark.parametrize("std", [0.1, 0.8])
@pytest.mark.parametrize("size", [64, 4096])
def test_the_threshold_is_one_shift_of_the_mean_at_every_size_and_noise(
    size: int, std: float
) -> None:
    # 1e-5 = d^2 / 2 for a shift by d = 0.00447 std per dimension; a clip range shrinks with sqrt(D)
    old = Gaussian(draw(400, size).double(), std)
    x = old.sample(draw(400, size, seed=1).double())
    for shift, beyond in ((0.0045, True), (0.0044, False)):
        new = Gaussian(old.mean + shift * std, std)
        moved = log_ratio(new, old, x)
        found = masked_surrogate(moved, moved.sign(), new.kl(old), 1e-5)
        assert (found.clipped_high | found.clipped_low).all().item() is beyond
        assert (found.clipped_high | found.clipped_low).any().item() is beyond
        assert moved.std().item() == pytest.approx(shift / math.sqrt(size), rel=0.2)


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_without_room_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="--kl_mask_threshold"):
        masked_surrogate(torch.zeros(2), torch.ones(2), torch.zeros(2), threshold)


# How far the policy has moved


def moved(share: float, std: float = 0.3, count: int = 500) -> tuple[Gaussian, Gaussian, Tensor]:
    """The new policy, the old one and draws from the old; means lie `share` stds apart."""
    old = Gaussian(draw(count, 64), std)
    new = Gaussian(old.mean + share * std * draw(count, 64, seed=1), std)
    return new, old, old.sample(draw(count, 64, seed=2))


def test_the_ratio_is_that_of_the_densities() -> None:
    new, old, x = moved(0.1)
    densities = [torch.distributions.Normal(one.mean, one.std).log_prob(x) for one in (new, old)]
    expected = (densities[0] - densities[1]).mean(1)
    torch.testing.assert_close(log_ratio(new, old, x), expected, rtol=1e-3, atol=1e-6)
    unscaled = log_ratio(new, old, x, "unscaled")
    torch.testing.assert_close(unscaled, 2 * 0.3**2 * expected, rtol=1e-3, atol=1e-6)


def test_the_guarded_ratio_is_that_of_grpo_guard() -> None:
    new, old, x = moved(0.1)
    exact = log_ratio(new, old, x)
    k = old.std  # sqrt(-dt) s
    theirs = exact * k + (new.mean - old.mean).square().mean(1) / (2 * k)
    ours = log_ratio(new, old, x, "guard")
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_guarded_ratio_is_centred_and_of_one_scale_in_all_steps() -> None:
    step = 0.05  # the same move of the mean, whatever the noise
    spreads: list[float] = []
    for std in (0.1, 0.8):
        new, old, x = moved(step / std, std)
        exact, guard = (log_ratio(new, old, x, kind) for kind in ("exact", "guard"))
        assert abs(guard.mean().item()) < 4 * guard.std().item() / math.sqrt(500)
        spreads.append(guard.std().item())
        if std == 0.1:  # E[log ratio] = -|difference|^2 / (2 std^2)
            assert exact.mean().item() == pytest.approx(-0.5 * (step / std) ** 2, rel=0.2)
    assert spreads[0] == pytest.approx(spreads[1], rel=0.01)


@pytest.mark.parametrize("kind", ["exact", "unscaled", "guard"])
def test_a_ratio_of_steps_without_noise_is_refused(kind: Ratio) -> None:
    still = Gaussian(draw(2, 3), 0.0)
    with pytest.raises(ValueError, match="cannot be trained"):
        log_ratio(still, still, still.mean, kind)


def test_the_velocitys_divergence_is_the_transitions_up_to_a_factor_of_the_step() -> None:
    from dojo.maths.transitions import transition

    x, v, reference = draw(3, 16), draw(3, 16, seed=1), draw(3, 16, seed=2)
    ours = squared_error(v, reference)
    torch.testing.assert_close(ours, (v - reference).square().mean(1))
    for sigma, after in ((0.9, 0.8), (0.5, 0.3)):
        here, there = (transition("cps", x, u, sigma, after, 0.8) for u in (v, reference))
        factor = here.kl(there) / ours
        torch.testing.assert_close(factor, factor[:1].expand(3), rtol=1e-4, atol=0)
    assert squared_error(v.bfloat16(), reference).dtype == torch.float32
