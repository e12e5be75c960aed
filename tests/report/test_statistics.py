"""Win rates and their intervals, against closed forms and against scipy."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from dojo.report import statistics
from dojo.report.statistics import bootstrap, compare, wilson

Z = 1.959963984540054  # of 95 %


def test_wilsons_interval_is_its_formula_at_both_ends_and_in_the_middle() -> None:
    # p = 0: the center and its half width are both z^2 / (2 (n + z^2)).
    end = Z * Z / (10 + Z * Z)
    assert wilson(0, 10) == (0.0, pytest.approx(end, abs=1e-12))
    assert wilson(10, 10) == (pytest.approx(1 - end, abs=1e-12), 1.0)
    # p = 1/2: the center is 1/2, half the width z / (2 sqrt(n + z^2)).
    half = Z / (2 * math.sqrt(10 + Z * Z))
    assert wilson(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (5, 10), (10, 10), (3, 7), (612, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilsons_interval_is_scipys(wins: int, count: int, confidence: float) -> None:
    other = binomtest(wins, count).proportion_ci(confidence, method="wilson")
    expected = (float(other.low), float(other.high))
    assert wilson(wins, count, confidence) == pytest.approx(expected, abs=1e-12)


def test_nothing_has_no_interval() -> None:
    assert all(math.isnan(end) for end in wilson(0, 0))
    assert all(math.isnan(end) for end in bootstrap([np.ones(1)]))
    assert all(math.isnan(end) for end in bootstrap([np.ones(0)]))


def test_the_bootstraps_interval_covers_a_known_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for k in range(200):
        low, high = bootstrap([draw.normal(2.0, 1.0, size=60)], seed=k, resamples=1000)
        covered += low <= 2.0 <= high
    assert 180 <= covered <= 199  # 190 expected, with a standard error of 3


def test_the_bootstrap_of_yes_and_no_is_the_binomials() -> None:
    # The mean of a resample of 40 ones and 60 zeros is Binomial(100, 0.4) / 100.
    low, high = bootstrap([np.repeat([1.0, 0.0], [40, 60])], resamples=40_000)
    assert (low, high) == pytest.approx((0.31, 0.50), abs=0.01)


def test_strata_weigh_the_same_and_are_drawn_from_themselves() -> None:
    # Strata that are constant within have nothing to vary, however far apart they lie.
    assert bootstrap([np.zeros(3), np.full(30, 4.0)]) == (2.0, 2.0)


def test_the_bootstrap_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=37)
    whole = bootstrap([values], seed=5)
    assert whole == bootstrap([values], seed=5)
    assert whole != bootstrap([values], seed=6)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    assert whole == bootstrap([values], seed=5)


def test_pairs_are_counted_and_ties_are_half_a_win() -> None:
    found = compare([1, 2, 3, 4], [2, 2, 1, 9], list("abcd"))
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert (found.pairs, found.left_out, found.clusters) == (4, 0, 4)
    assert found.win_rate.value == 2.5 / 4
    assert (found.win_rate.low, found.win_rate.high) == wilson(2.5, 4)
    assert (found.base, found.tuned, found.difference.value) == (2.5, 3.5, 1.0)
    gains = np.array([1.0, 0.0, -2.0, 5.0])
    assert (found.difference.low, found.difference.high) == bootstrap([gains])


def test_pairs_without_scores_are_left_out_and_counted() -> None:
    nan, inf = math.nan, math.inf
    found = compare([1, nan, 3, inf, nan], [2, 2, nan, 4, nan], list("abcde"))
    assert (found.pairs, found.left_out, found.wins) == (1, 4, 1)
    assert found.base == 1
    assert math.isnan(found.difference.low)  # a single pair says nothing of the spread
    nothing = compare([nan], [1], ["a"])
    assert (nothing.pairs, nothing.left_out, nothing.clusters) == (0, 1, 0)
    assert math.isnan(nothing.win_rate.value)
    assert nothing.verdict == "no pair has scores"


def test_the_pairs_of_a_cluster_count_as_one() -> None:
    # Three prompts with 100 pictures each are three cases, not 300.
    gains = np.repeat([1.0, 1.0, -1.0], 100)
    found = compare(np.zeros(300).tolist(), gains.tolist(), ["a"] * 100 + ["b"] * 100 + ["c"] * 100)
    assert (found.pairs, found.clusters, found.wins, found.losses) == (300, 3, 200, 100)
    assert (found.win_rate.low, found.win_rate.high) == wilson(2, 3)
    assert (found.difference.low, found.difference.high) == bootstrap([np.array([1.0, 1.0, -1.0])])
    # A cluster weighs the same with fewer pairs, wherever its pairs stand.
    few = compare([0, 0, 0], [1, -1, 1], ["b", "a", "b"])
    assert few.win_rate.value == 0.5
    assert few.difference.value == 0.0


def test_a_clustered_interval_covers_where_counting_pairs_would_not() -> None:
    draw = np.random.default_rng(2)
    names = [str(i) for i in range(30) for _ in range(20)]
    hits = {"clusters": 0, "pairs": 0}
    for _ in range(60):
        # The prompts differ in their gain far more than the pictures of one do; the mean is 0.
        gains = np.repeat(draw.normal(size=30), 20) + draw.normal(0, 0.1, size=600)
        zeros = [0.0] * 600
        for kind, clusters in (("clusters", names), ("pairs", [str(i) for i in range(600)])):
            found = compare(zeros, gains.tolist(), clusters)
            hits[kind] += found.win_rate.low <= 0.5 <= found.win_rate.high
    assert hits["clusters"] >= 52
    assert hits["pairs"] <= 35


@pytest.mark.parametrize(
    ("wins", "losses", "words"),
    [(10, 0, "better"), (0, 10, "worse"), (6, 4, "no difference shown"), (60, 40, "better")],
)
def test_the_verdict_follows_the_win_rates_interval(wins: int, losses: int, words: str) -> None:
    tuned = [1.0] * wins + [-1.0] * losses
    found = compare([0.0] * len(tuned), tuned, [str(i) for i in range(len(tuned))])
    assert found.verdict == words
