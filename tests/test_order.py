"""Claims about the order of samples: whole epochs, any number of processes, exact continuation."""

import itertools

import pytest

from dojo.data import Batches, Draw


def take(batches: Batches, count: int) -> list[list[Draw]]:
    return list(itertools.islice(iter(batches), count))


def flat(batches: list[list[Draw]]) -> list[Draw]:
    return [draw for batch in batches for draw in batch]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12, 25])
def test_every_sample_comes_once_per_epoch(batch_size: int) -> None:
    # 12 samples; a batch may cross the border of epochs and even hold several of them.
    draws = flat(take(Batches(12, batch_size, seed=0), 60))
    for epoch in range(len(draws) // 12):
        indices = [draw.index for draw in draws[12 * epoch : 12 * epoch + 12]]
        assert sorted(indices) == list(range(12))


def test_places_count_all_draws_without_gaps() -> None:
    draws = flat(take(Batches(7, 3, seed=0), 10))
    assert [draw.place for draw in draws] == list(range(30))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_see_together_what_one_large_batch_sees(processes: int) -> None:
    alone = take(Batches(10, 4 * processes, seed=3), 8)
    shared = [
        take(Batches(10, 4, seed=3, process=p, num_processes=processes), 8)
        for p in range(processes)
    ]
    for step, batch in enumerate(alone):
        assert flat([shared[p][step] for p in range(processes)]) == batch


def test_accumulated_micro_batches_are_the_large_batch() -> None:
    small, large = take(Batches(10, 2, seed=3), 8), take(Batches(10, 4, seed=3), 4)
    assert [flat(small[2 * i : 2 * i + 2]) for i in range(4)] == large


@pytest.mark.parametrize("first", [1, 4, 5, 13])
@pytest.mark.parametrize("batch_size", [3, 11])
def test_a_resumed_stream_goes_on_exactly(first: int, batch_size: int) -> None:
    whole = take(Batches(10, batch_size, seed=1, process=1, num_processes=2), 20)
    rest = Batches(10, batch_size, seed=1, process=1, num_processes=2, first_batch=first)
    assert take(rest, 20 - first) == whole[first:]


def test_a_stream_can_be_read_again() -> None:
    batches = Batches(10, 3, seed=1)
    assert take(batches, 9) == take(batches, 9)


def test_seeds_and_epochs_differ_in_order() -> None:
    orders = [Batches(50, 1, seed=seed).permutation(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(50)) not in orders


def test_one_sample_is_enough() -> None:
    draws = flat(take(Batches(1, 4, seed=0, process=1, num_processes=2), 2))
    assert [draw.index for draw in draws] == [0] * 8
    assert [draw.place for draw in draws] == [4, 5, 6, 7, 12, 13, 14, 15]
