"""Claims about random numbers that hang on names and places alone."""

import pytest
import torch

from dojo import rng


def test_seeds_do_not_drift_between_versions() -> None:
    # A resumed run of an older version must draw what it would have drawn.
    assert rng.seed_for(0) == GOLDEN_ZERO
    assert rng.seed_for(1234, "noise", 17) == GOLDEN_NOISE


GOLDEN_ZERO = 6711488920161924273
GOLDEN_NOISE = 1287276490441814937


def test_seeds_fit_torch() -> None:
    seeds = [rng.seed_for(i, "order", j) for i in range(50) for j in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_equal_keys_give_equal_numbers() -> None:
    assert torch.equal(rng.normal((4,), [(7, "noise", 3)]), rng.normal((4,), [(7, "noise", 3)]))
    assert torch.equal(rng.uniform([(7, "sigma", 3)]), rng.uniform([(7, "sigma", 3)]))


def test_keys_that_differ_in_anything_give_other_seeds() -> None:
    keys: list[tuple[rng.Key, ...]] = [
        ("a", 1, 11),
        ("a", 11, 1),
        ("a", 111),
        ("a1", 11),
        ("a", "1", 11),
        ("a", 1, "11"),
        (1,),
        ("1",),
        ("int:1",),
        (1, ""),
        ("", 1),
        (-1,),
    ]
    assert len({rng.seed_for(*key) for key in keys}) == len(keys)


def test_a_sample_draws_the_same_in_any_batch() -> None:
    keys: list[tuple[rng.Key, ...]] = [(5, "noise", place) for place in range(6)]
    together = rng.normal((3, 2), keys)
    assert together.shape == (6, 3, 2)
    assert torch.equal(torch.cat([rng.normal((3, 2), [key]) for key in keys]), together)
    assert torch.equal(rng.normal((3, 2), keys[::-1]), together.flip(0))
    assert torch.equal(rng.uniform(keys[2:4]), rng.uniform(keys)[2:4])


def test_draws_ignore_the_global_generator_and_leave_it_alone() -> None:
    torch.manual_seed(1)
    first = rng.normal((4,), [(0, "noise")]), rng.uniform([(0, "sigma")])
    untouched = torch.rand(3)
    torch.manual_seed(2)
    second = rng.normal((4,), [(0, "noise")]), rng.uniform([(0, "sigma")])
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), untouched)


def test_uniform_numbers_are_uniform_and_never_zero() -> None:
    numbers = rng.uniform([(0, "sigma", place) for place in range(4000)])
    assert numbers.dtype == torch.float32
    assert numbers.min() > 0
    assert numbers.max() <= 1
    assert abs(numbers.mean().item() - 0.5) < 0.02
    assert torch.allclose(torch.histc(numbers, 10, 0, 1) / 4000, torch.full((10,), 0.1), atol=0.02)


def test_noise_is_standard_normal() -> None:
    noise = rng.normal((100,), [(0, "noise", place) for place in range(200)])
    assert noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.03
    assert abs(noise.std().item() - 1) < 0.03
    # Neighbouring places have nothing in common.
    assert abs((noise[1:] * noise[:-1]).mean().item()) < 0.03


@pytest.mark.parametrize("is_there", [False, True])
def test_the_global_seed_is_torchs_on_all_devices_that_are_there(
    monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    torch.manual_seed(rng.seed_for(3, "dropout", 5))
    expected = torch.rand(4)
    asked: list[int] = []
    seed_all = torch.manual_seed
    monkeypatch.setattr("torch.accelerator.is_available", lambda: is_there)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: [asked.append(seed), seed_all(seed)])
    rng.seed_global(3, "dropout", 5)
    assert torch.equal(torch.rand(4), expected)
    assert asked == [rng.seed_for(3, "dropout", 5)] * is_there


def test_the_global_seed_makes_dropout_repeatable() -> None:
    def masks() -> list[torch.Tensor]:
        found = []
        for step in (1, 2):
            rng.seed_global(0, "dropout", step)
            found.append(torch.nn.functional.dropout(torch.ones(64)))
        return found

    first, second = masks(), masks()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
