"""A curve of any length in a fixed room: neighbours are put together, their extremes are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROOM = 512  # records of a curve; half of them are there at least, once it is long

# The columns of a record, which stands for one or more neighbouring points.
COUNT, SUM, STEP, LOW, LOW_STEP, HIGH, HIGH_STEP = range(7)


class Thinned:
    """The points of one curve as they come, in at most `ROOM` records of equally many points.

    When the room is full, every two records become one. What is drawn shows every peak, and means
    and totals stay exact.
    """

    def __init__(self) -> None:
        self.size = 1  # points of a record
        self.first = self.last = float("nan")
        self._full = np.empty((0, 7))
        self._open = np.empty((0, 7))  # at most one, with fewer points

    def add(self, steps: Sequence[float], values: Sequence[float]) -> None:
        """Takes points in, in their order.

        Args:
            steps: N
            values: N finite numbers
        """
        if not len(values):
            return
        if self.first != self.first:
            self.first = values[0]
        self.last = values[-1]
        points = _points(np.asarray(steps, np.float64), np.asarray(values, np.float64))
        while len(points):
            points = self._take(points)

    def _take(self, points: np.ndarray) -> np.ndarray:
        """Fills one record, or as many as there is room for; returns the points that are left."""
        if len(self._open):
            missing = self.size - int(self._open[0, COUNT])
            merged = _merged(np.concatenate([self._open, points[:missing]])[None])
            points = points[missing:]
            whole = merged[0, COUNT] == self.size
            self._open = merged[:0] if whole else merged
            full = merged if whole else merged[:0]
        else:
            count = min(len(points) // self.size, ROOM - len(self._full))
            used = count * self.size
            full = _merged(points[:used].reshape(count, self.size, 7))
            points = points[used:]
            if not count:
                self._open, points = _merged(points[None]), points[:0]
        self._full = np.concatenate([self._full, full])
        if len(self._full) == ROOM:
            self._full = _merged(self._full.reshape(ROOM // 2, 2, 7))
            self.size *= 2
        return points

    @property
    def records(self) -> np.ndarray:
        """[records, 7]: see the columns' names."""
        return np.concatenate([self._full, self._open])

    @property
    def total(self) -> float:
        """The sum of all values."""
        return float(self.records[:, SUM].sum())

    def line(self, most: int) -> list[tuple[float, float]]:
        """About `most` points to draw: the lowest and the highest of each record, by step."""
        records = self.records
        points = len(records) * (1 if self.size == 1 else 2)
        while len(records) > 2 and points > most:
            half = len(records) // 2 * 2
            halves = _merged(records[:half].reshape(-1, 2, 7))
            records = np.concatenate([halves, records[half:]])
            points = 2 * len(records)
        drawn: list[tuple[float, float]] = []
        for record in records.tolist():
            low = (record[LOW_STEP], record[LOW])
            high = (record[HIGH_STEP], record[HIGH])
            drawn += [low] if low == high else sorted([low, high])
        return drawn

    def means(self) -> list[tuple[float, float]]:
        """A point for each record: its first step and its mean."""
        records = self.records
        means = records[:, SUM] / records[:, COUNT]
        return list(zip(records[:, STEP].tolist(), means.tolist(), strict=True))

    def extremes(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        records = self.records
        return float(records[:, LOW].min()), float(records[:, HIGH].max())

    def __len__(self) -> int:
        return int(self.records[:, COUNT].sum())


def _points(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[N] and [N] to records [N, 7] of one point each."""
    return np.stack([np.ones_like(steps), values, steps, values, steps, values, steps], axis=1)


def _merged(records: np.ndarray) -> np.ndarray:
    """[M, K, 7] to [M, 7]: each K neighbours as one."""
    if not records.shape[0]:
        return np.empty((0, 7))
    row = np.arange(len(records))
    low, high = records[..., LOW].argmin(1), records[..., HIGH].argmax(1)
    found = np.empty((len(records), 7))
    found[:, COUNT] = records[..., COUNT].sum(1)
    found[:, SUM] = records[..., SUM].sum(1)
    found[:, STEP] = records[:, 0, STEP]
    found[:, LOW], found[:, LOW_STEP] = records[row, low, LOW], records[row, low, LOW_STEP]
    found[:, HIGH], found[:, HIGH_STEP] = records[row, high, HIGH], records[row, high, HIGH_STEP]
    return found
