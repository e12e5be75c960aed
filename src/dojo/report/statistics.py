"""How sure a comparison is: win rates with Wilson's interval, means with the bootstrap's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
_CHUNK = 2**22  # numbers that the bootstrap draws at a time


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and the ends of its interval; NaN where nothing can be said."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the scores of something tuned compare with its base's, over pairs in clusters."""

    pairs: int
    """with both scores"""
    left_out: int
    """pairs without"""
    clusters: int
    """that the pairs fall into: what the intervals count"""
    wins: int
    """pairs in which the tuned one scores higher"""
    ties: int
    losses: int
    win_rate: Estimate
    """mean over clusters of the share of wins, a tie being half a win; Wilson's interval"""
    base: float
    """mean over clusters of the base's scores"""
    tuned: float
    """and of the tuned one's"""
    difference: Estimate
    """tuned - base; the bootstrap's interval"""

    @property
    def verdict(self) -> str:
        """What the win rate's interval says of the tuned one."""
        if not self.pairs:
            return "no pair has scores"
        if self.win_rate.low > 0.5:
            return "better"
        return "worse" if self.win_rate.high < 0.5 else "no difference shown"


def wilson(wins: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927, without continuity correction).

    Args:
        wins: out of `count`; need not be whole. A number in [0, 1] of mean p has at most the
            variance p (1 - p) of a yes or no, so for ties and for means the interval is at worst
            too wide.

    Returns:
        NaN of nothing at all.
    """
    if not count:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = wins / count, z * z / count
    center = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap(
    strata: Sequence[np.ndarray],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """The percentile bootstrap's interval of the mean of the strata's means.

    Args:
        strata: values [N] of each, all of equal weight; each is drawn from itself. For paired
            scores these are their differences.

    Returns:
        NaN where a stratum has a single value, which says nothing of its spread.
    """
    if any(len(values) < 2 for values in strata):
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    means = [_resampled(values, draw, resamples) for values in strata]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.mean(means, axis=0), [tail, 1 - tail])
    return float(low), float(high)


def _resampled(values: np.ndarray, draw: np.random.Generator, resamples: int) -> np.ndarray:
    """The means [resamples] of as many values drawn from the values with replacement."""
    size = len(values)
    rows = max(1, _CHUNK // size)
    starts = range(0, resamples, rows)
    return np.concatenate(
        [
            values[draw.integers(size, size=(min(rows, resamples - start), size))].mean(axis=1)
            for start in starts
        ]
    )


def compare(
    base: Sequence[float], tuned: Sequence[float], clusters: Sequence[str], *, seed: int = 0
) -> Comparison:
    """Compares paired scores, of which those of one cluster are not independent.

    Pictures of one prompt are alike in how hard it is: with many seeds and few prompts, pairs
    counted one by one would make intervals too narrow for what is asked, whether other prompts
    gain as well. So a cluster enters with its means over its pairs, each cluster weighs the same,
    Wilson's interval is over clusters, and the bootstrap draws clusters. With one pair per
    cluster this is the plain count of pairs.

    Args:
        base: N scores, higher is better; not finite where there is none.
        tuned: N scores under the same conditions.
        clusters: N names, such as the prompts.
        seed: of the bootstrap.
    """
    first, second = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    valid = np.isfinite(first) & np.isfinite(second)
    pairs = int(valid.sum())
    first, second = first[valid], second[valid]
    names, place = np.unique(np.asarray(clusters)[valid], return_inverse=True)
    sizes = np.bincount(place, minlength=len(names))
    signs = np.sign(second - first)
    count = len(names)

    def means(values: np.ndarray) -> np.ndarray:
        """[N] to [clusters]."""
        return np.bincount(place, values, minlength=count) / sizes

    won, gained = means((1 + signs) / 2), means(second - first)
    low, high = wilson(float(won.sum()), count)
    least, most = bootstrap([gained], seed=seed)
    return Comparison(
        pairs=pairs,
        left_out=len(valid) - pairs,
        clusters=count,
        wins=int((signs > 0).sum()),
        ties=int((signs == 0).sum()),
        losses=int((signs < 0).sum()),
        win_rate=Estimate(value=_mean(won), low=low, high=high),
        base=_mean(means(first)),
        tuned=_mean(means(second)),
        difference=Estimate(value=_mean(gained), low=least, high=most),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
