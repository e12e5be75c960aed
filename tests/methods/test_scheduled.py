"""Scheduled sampling: its schedule and inputs in closed form, and nothing without its flag."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dojo.cli import UserError
from dojo.maths import flow
from dojo.methods import scheduled
from dojo.methods.scheduled import ScheduledArgs, led

SIGMA = torch.tensor([0.3, 0.6, 0.9, 0.05])
COUNTS = torch.tensor([0, 1, 2, 3])
TOTAL, SHIFT = 10, 3.0


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    clean, noise = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    return clean, noise


def lead(predict: Any, pair: tuple[Tensor, Tensor], counts: Tensor = COUNTS) -> Tensor:
    return led(predict, *pair, SIGMA, counts, total=TOTAL, shift=SHIFT)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_the_schedule_is_the_samplers(shift: float) -> None:
    even = torch.linspace(0, 1, TOTAL + 1)
    sigmas = flow.shift_sigma(even, shift)
    torch.testing.assert_close(flow.unshift_sigma(sigmas, shift), even)
    torch.testing.assert_close(flow.earlier_sigma(sigmas[:-3], 3, TOTAL, shift), sigmas[3:])
    assert flow.earlier_sigma(sigmas[-2:], 3, TOTAL, shift).tolist() == [1, 1], "nothing is noisier"


def test_a_network_that_is_right_stays_on_the_path(pair: tuple[Tensor, Tensor]) -> None:
    clean, noise = pair
    found = lead(lambda at, now, rows: flow.velocity(clean, noise)[rows], pair)
    torch.testing.assert_close(found, flow.interpolate(clean, noise, SIGMA))
    torch.testing.assert_close(
        flow.velocity_to(clean, found, SIGMA), flow.velocity(clean, noise), atol=1e-4, rtol=1e-4
    )


def test_a_constant_error_leads_off_by_the_way_that_was_gone(pair: tuple[Tensor, Tensor]) -> None:
    clean, noise = pair
    error = torch.full_like(clean, 0.5)
    found = lead(lambda at, now, rows: (flow.velocity(clean, noise) + error)[rows], pair)
    begins = torch.stack([flow.earlier_sigma(SIGMA, int(k), TOTAL, SHIFT)[i]
                          for i, k in enumerate(COUNTS)])  # fmt: skip
    gone = flow.along(SIGMA - begins, clean)  # negative: towards the picture
    expected = flow.interpolate(clean, noise, SIGMA) + gone * error
    torch.testing.assert_close(found, expected)
    # The target leads to the picture from there, in one step of Euler's.
    target = flow.velocity_to(clean, found, SIGMA)
    torch.testing.assert_close(flow.clean_estimate(found, target, SIGMA), clean)


def test_every_sample_takes_its_own_number_of_steps(pair: tuple[Tensor, Tensor]) -> None:
    asked: list[tuple[list[int], list[float]]] = []

    def predict(at: Tensor, now: Tensor, rows: Tensor) -> Tensor:
        asked.append((rows.tolist(), now.tolist()))
        return torch.zeros_like(at)

    found = lead(predict, pair)
    assert [rows for rows, _ in asked] == [[3], [2, 3], [1, 2, 3]]
    for rows, sigmas in asked:
        assert all(now > SIGMA[i] for i, now in zip(rows, sigmas, strict=True))
    assert torch.equal(found[0], flow.interpolate(*pair, SIGMA)[0]), "that one is as ever"


def test_steps_follow_one_another(pair: tuple[Tensor, Tensor]) -> None:
    # dz/dsigma = z / sigma multiplies z by sigma' / sigma in each of Euler's steps: exactly.
    found = lead(lambda at, now, rows: at / flow.along(now, at), pair)
    for i, k in enumerate(COUNTS.tolist()):
        begin = flow.earlier_sigma(SIGMA[i : i + 1], k, TOTAL, SHIFT)
        start = flow.interpolate(pair[0][i : i + 1], pair[1][i : i + 1], begin)
        torch.testing.assert_close(found[i : i + 1], start * (SIGMA[i] / begin))


def test_counts_are_even_within_the_share_and_the_share_rises() -> None:
    args = ScheduledArgs(
        scheduled_sampling=0.5, scheduled_sampling_steps=4, scheduled_sampling_ramp=100
    )
    uniform = torch.arange(1, 1001) / 1000
    assert torch.bincount(args.counts(uniform, 100), minlength=5).tolist() == [500, *[125] * 4]
    assert torch.bincount(args.counts(uniform, 40), minlength=5).tolist() == [800, *[50] * 4]
    assert not args.counts(uniform, 0).any()
    assert [args.share(step) for step in (0, 50, 100, 1000)] == [0, 0.25, 0.5, 0.5]
    assert ScheduledArgs(scheduled_sampling=1).counts(uniform, 0).tolist() == [1] * 1000
    assert not ScheduledArgs().counts(uniform, 9).any()


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"scheduled_sampling": 1.5}, "--scheduled_sampling"),
        ({"scheduled_sampling": -0.1}, "--scheduled_sampling"),
        ({"scheduled_sampling_steps": 0}, "--scheduled_sampling_steps"),
        ({"scheduled_sampling_of": 0}, "--scheduled_sampling_of"),
        ({"scheduled_sampling_ramp": -1}, "--scheduled_sampling_ramp"),
        ({"scheduled_sampling_steps": 9, "scheduled_sampling_of": 8}, "no more steps"),
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        ScheduledArgs(**wrong)


@pytest.mark.parametrize("owner", ["sharded", "owns_storage"])
def test_shared_weights_are_refused(owner: str) -> None:
    replicas = SimpleNamespace(sharded=False, owns_storage=False)
    run: Any = SimpleNamespace(replicas=replicas)
    ScheduledArgs(scheduled_sampling=0.5).check(run)
    setattr(replicas, owner, True)
    ScheduledArgs().check(run)
    with pytest.raises(UserError, match="--scheduled_sampling does not go with"):
        ScheduledArgs(scheduled_sampling=0.5).check(run)


class Asked(torch.nn.Module):
    """Says zero, and remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, at: Tensor) -> Tensor:
        self.asked.append((self.training, torch.is_grad_enabled()))
        return torch.zeros_like(at)


def loop(share: float) -> tuple[scheduled.Scheduled, Asked, dict[str, Tensor]]:
    from contextlib import nullcontext

    noted: dict[str, Tensor] = {}
    network = Asked().train()
    run: Any = SimpleNamespace(
        step=0,
        dtype=torch.float32,
        keys=lambda stream, places: [(0, stream, place) for place in places],
        average=noted.update,
        accelerator=SimpleNamespace(unwrap_model=lambda one: one),
        replicas=SimpleNamespace(sharded=False, owns_storage=False, autocast=nullcontext),
    )
    run.average = lambda **values: noted.update(values)
    model: Any = SimpleNamespace(predict=lambda network, at, *_: network(at))
    learner: Any = SimpleNamespace(network=network)
    return (
        scheduled.Scheduled(run, ScheduledArgs(scheduled_sampling=share), model, learner),
        network,
        noted,
    )


def test_without_a_share_nothing_is_asked_and_inputs_are_those_of_the_path(
    pair: tuple[Tensor, Tensor],
) -> None:
    step, network, noted = loop(0.0)
    noisy, target = step(SimpleNamespace(shift=SHIFT), *pair, SIGMA, {}, range(4))
    assert torch.equal(noisy, flow.interpolate(*pair, SIGMA))
    assert torch.equal(target, flow.velocity(*pair))
    assert not network.asked
    assert noted["scheduled_share"].tolist() == [0, 0, 0, 0]


def test_the_network_is_asked_without_gradient_and_dropout_and_left_as_it_was(
    pair: tuple[Tensor, Tensor],
) -> None:
    step, network, noted = loop(0.5)
    conditions = {"prompt_embeds": torch.zeros(4, 2)}
    noisy, target = step(SimpleNamespace(shift=SHIFT), *pair, SIGMA, conditions, range(0, 4))
    assert network.asked == [(False, False)]
    assert network.training
    picked = noted["scheduled_share"].bool()
    assert 0 < picked.sum() < 4
    plain = flow.interpolate(*pair, SIGMA)
    assert torch.equal(noisy[~picked], plain[~picked])
    assert torch.equal(target[~picked], flow.velocity(*pair)[~picked])
    assert not torch.isclose(noisy[picked], plain[picked]).all()
    expected = flow.velocity_to(pair[0], noisy, SIGMA)
    assert torch.equal(target[picked], expected[picked])


def test_nearer_to_the_picture_than_a_samplers_last_step_inputs_are_noised_as_ever(
    pair: tuple[Tensor, Tensor],
) -> None:
    # There is no step to come from, and the target's 1 / sigma would have no bound.
    step, network, noted = loop(1.0)
    last = float(flow.shift_sigma(torch.tensor(1 / ScheduledArgs().scheduled_sampling_of), SHIFT))
    near = torch.tensor([0.999 * last, 0.5 * last, 1e-3, 1e-6])
    noisy, target = step(SimpleNamespace(shift=SHIFT), *pair, near, {}, range(4))
    assert torch.equal(noisy, flow.interpolate(*pair, near))
    assert torch.equal(target, flow.velocity(*pair))
    assert not network.asked
    assert noted["scheduled_share"].tolist() == [0, 0, 0, 0]
    step(SimpleNamespace(shift=SHIFT), *pair, near.clamp(min=1.001 * last), {}, range(4))
    assert noted["scheduled_share"].tolist() == [1, 1, 1, 1]
