"""Claims about the order of samples: whole epochs, any number of processes, exact continuation."""

import itertools
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from dojo import rng
from dojo.data import Batches, Draw, Plan, Size

SQUARE, TALL, WIDE = (512, 512), (704, 384), (384, 704)


def single(count: int) -> Plan:
    """One bucket of so many samples."""
    return Plan(rounds=({SQUARE: tuple(range(count))},))


# Three buckets, one of them smaller than any batch below; a sample that is used twice an epoch;
# and a cycle of two rounds, in which samples change their buckets.
BUCKETS = Plan(
    rounds=(
        {SQUARE: tuple(range(9)), TALL: (9, 10, 11, 12, 12), WIDE: (13,)},
        {SQUARE: (0, 1, 2, 12, 12), TALL: (3, 4, 5, 6, 7, 8, 9), WIDE: (10, 11, 13)},
    )
)
PAIRED = replace(BUCKETS, partners=(20, 21, 22))
PLANS = pytest.mark.parametrize("plan", [single(10), BUCKETS, PAIRED], ids=["one", "many", "pairs"])


def take(batches: Batches, count: int) -> list[list[Draw]]:
    return list(itertools.islice(iter(batches), count))


def flat(batches: list[list[Draw]]) -> list[Draw]:
    return [draw for batch in batches for draw in batch]


# One bucket


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12, 25])
def test_every_sample_comes_once_per_epoch(batch_size: int) -> None:
    # 12 samples; a batch may cross the border of epochs and even hold several of them.
    draws = flat(take(Batches(single(12), batch_size, seed=0), 60))
    for epoch in range(len(draws) // 12):
        indices = [draw.index for draw in draws[12 * epoch : 12 * epoch + 12]]
        assert sorted(indices) == list(range(12))


@pytest.mark.parametrize("size", [SQUARE, TALL])
def test_one_bucket_is_the_permutations_of_the_epochs_one_after_the_other(size: Size) -> None:
    expected: list[int] = []
    for epoch in range(6):
        generator = rng.generator(7, "order", epoch)
        expected += torch.randperm(10, generator=generator).tolist()
    plan = Plan(rounds=({size: tuple(range(10))},))
    draws = flat(take(Batches(plan, 4, seed=7), 15))
    assert draws == [Draw(index, place, size) for place, index in enumerate(expected)]


def test_seeds_and_epochs_differ_in_order() -> None:
    orders = set()
    for seed in (0, 1):
        draws = flat(take(Batches(single(50), 50, seed=seed), 2))
        orders |= {tuple(draw.index for draw in draws[i : i + 50]) for i in (0, 50)}
    assert len(orders) == 4
    assert tuple(range(50)) not in orders


def test_one_sample_is_enough() -> None:
    draws = flat(take(Batches(single(1), 4, seed=0, process=1, num_processes=2), 2))
    assert [draw.index for draw in draws] == [0] * 8
    assert [draw.place for draw in draws] == [4, 5, 6, 7, 12, 13, 14, 15]


def test_accumulated_micro_batches_of_one_bucket_are_the_large_batch() -> None:
    small, large = take(Batches(single(10), 2, seed=3), 8), take(Batches(single(10), 4, seed=3), 4)
    assert [flat(small[2 * i : 2 * i + 2]) for i in range(4)] == large


# Several buckets


@PLANS
def test_a_batch_holds_one_bucket(plan: Plan) -> None:
    needed = plan.needed()
    seen = set()
    for batch in take(Batches(plan, 4, seed=0), 60):
        (size,) = {draw.size for draw in batch}
        assert all(draw.index in needed[size] for draw in batch)
        seen.add(size)
    assert seen == set(plan.sizes)


@pytest.mark.parametrize("whole_batch", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("epochs", [1, 2, 5, 8])
def test_every_sample_is_used_in_every_epoch_up_to_the_unfinished_batches(
    whole_batch: int, epochs: int
) -> None:
    batches = Batches(BUCKETS, whole_batch, seed=0)
    # What each bucket's stream holds after so many epochs, epoch by epoch.
    streams: dict[Size, list[Counter[int]]] = {size: [] for size in BUCKETS.sizes}
    for epoch in range(epochs):
        for size, members in BUCKETS.rounds[epoch % 2].items():
            streams[size].append(Counter(members))
    lengths = {size: sum(sum(c.values()) for c in some) for size, some in streams.items()}
    count = sum(length // whole_batch for length in lengths.values())
    assert batches.filled(epochs).total() == count
    drawn = flat(take(batches, count))
    for size, epochs_of_size in streams.items():
        used = [draw.index for draw in drawn if draw.size == size]
        assert len(used) == lengths[size] - lengths[size] % whole_batch
        for expected in epochs_of_size:  # whole epochs, then the beginning of one
            head, used = used[: expected.total()], used[expected.total() :]
            assert Counter(head) <= expected
            assert Counter(head) == expected or not used


def test_batches_of_buckets_are_mixed_within_an_epoch() -> None:
    plan = Plan(rounds=({SQUARE: tuple(range(40)), TALL: tuple(range(40, 80))},))
    batches = Batches(plan, 4, seed=0)
    orders = [tuple(batches.buckets(epoch)) for epoch in range(3)]
    assert [Counter(order) for order in orders] == [Counter({SQUARE: 10, TALL: 10})] * 3
    assert len(set(orders)) == 3
    assert all(sum(a != b for a, b in itertools.pairwise(order)) >= 4 for order in orders)
    drawn = take(batches, 60)
    assert [batch[0].size for batch in drawn] == [size for order in orders for size in order]


def test_equally_large_buckets_are_shuffled_independently() -> None:
    plan = Plan(rounds=({SQUARE: tuple(range(40)), TALL: tuple(range(40, 80))},))
    drawn = flat(take(Batches(plan, 4, seed=0), 20))
    first, second = ([d.index % 40 for d in drawn if d.size == size] for size in (SQUARE, TALL))
    assert sorted(first) == sorted(second) == list(range(40))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 8


# Any plan


@PLANS
def test_places_count_all_draws_without_gaps(plan: Plan) -> None:
    draws = flat(take(Batches(plan, 3, seed=0), 10))
    assert sorted(draw.place for draw in draws) == list(range(len(draws)))
    if not plan.partners:
        assert [draw.place for draw in draws] == list(range(30))


@PLANS
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_see_together_what_one_large_batch_sees(plan: Plan, processes: int) -> None:
    def key(draw: Draw) -> int:
        return draw.place

    alone = take(Batches(plan, 4 * processes, seed=3), 20)
    shared = [
        take(Batches(plan, 4, seed=3, process=p, num_processes=processes), 20)
        for p in range(processes)
    ]
    for step, batch in enumerate(alone):
        together = flat([shared[p][step] for p in range(processes)])
        assert sorted(together, key=key) == sorted(batch, key=key)
        if not plan.partners:
            assert together == batch


@PLANS
@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 11, "num_processes": 2}])
def test_a_stream_goes_on_exactly_from_any_batch(plan: Plan, options: dict[str, Any]) -> None:
    process = options.get("num_processes", 1) - 1
    whole = take(Batches(plan, **options, seed=1, process=process), 40)
    for first in range(40):
        rest = Batches(plan, **options, seed=1, process=process, first_batch=first)
        assert take(rest, 40 - first) == whole[first:]


@PLANS
def test_a_stream_can_be_read_again(plan: Plan) -> None:
    batches = Batches(plan, 3, seed=1)
    assert take(batches, 30) == take(batches, 30)


def test_the_millionth_batch_is_as_near_as_the_first() -> None:
    sizes = [(512 + 64 * i, 512) for i in range(40)]
    plan = Plan(
        rounds=({size: tuple(range(500 * i, 500 * i + 500)) for i, size in enumerate(sizes)},)
    )
    start = time.perf_counter()
    (batch,) = take(Batches(plan, 4, seed=0, num_processes=8, first_batch=10**6), 1)
    assert time.perf_counter() - start < 1  # a millisecond on an idle core
    assert batch[0].place == 32 * 10**6
    # A bucket smaller than the batch holds hundreds of epochs in one.
    tiny = Plan(rounds=({SQUARE: (0,), TALL: (1, 2)},))
    start = time.perf_counter()
    take(Batches(tiny, 512, seed=0, first_batch=10**6), 1)
    assert time.perf_counter() - start < 1


def test_a_plan_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="no sample"):
        Batches(Plan(rounds=({},)), 4, seed=0)


# Partners


def test_each_sample_has_a_partner_of_its_size_at_the_next_place() -> None:
    drawn = take(Batches(PAIRED, 4, seed=0), 30)
    alone = take(Batches(BUCKETS, 4, seed=0), 30)
    for batch, mains in zip(drawn, alone, strict=True):
        assert batch[:4] == [replace(draw, place=2 * draw.place) for draw in mains]
        partners = batch[4:]
        assert [draw.place for draw in partners] == [draw.place + 1 for draw in batch[:4]]
        assert {draw.size for draw in partners} == {mains[0].size}
        assert {draw.index for draw in partners} <= {20, 21, 22}


def test_partners_come_in_shuffled_epochs_of_their_own() -> None:
    drawn = flat(take(Batches(PAIRED, 4, seed=0), 30))
    partners = [draw.index for draw in sorted(drawn, key=lambda d: d.place) if draw.place % 2]
    epochs = [tuple(partners[i : i + 3]) for i in range(0, 120, 3)]
    assert all(sorted(epoch) == [20, 21, 22] for epoch in epochs)
    assert len(set(epochs)) > 3
