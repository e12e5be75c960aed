"""The order of rows that lie in shards: arithmetic in the seed and the place, nothing kept.

Shards come in an order that is drawn for every epoch, and are taken in windows of a few at a time;
the rows of a window are shuffled among each other. So a process that reads in this order has to
have a window's shards on its disk and the next one's on their way, and never more. The row at a
place follows from the seed, the epoch and the place: a resumed run computes it, and saves nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import overload

from dojo import rng
from dojo.lazy import torch

WINDOW = 16  # shards, where nobody says otherwise
_KEPT = 2  # shuffled windows: a batch may lie across the border of two


class _Numbers(Sequence[int]):
    """A list whose numbers are computed one by one."""

    def _at(self, place: int) -> int:
        """The number at a place that there is."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._at(place)


@dataclass(frozen=True)
class Rows(_Numbers):
    """Rows in shards, by their numbers over all shards; holds a number or two for each shard."""

    starts: tuple[int, ...]
    """The number of each shard's first row."""
    counts: tuple[int, ...]
    """Rows of each shard, at least 1."""
    window: int = WINDOW
    """Shards whose rows are shuffled among each other."""

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """How many rows there are up to the end of each shard."""
        return tuple(accumulate(self.counts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _at(self, place: int) -> int:
        """The row at a place of the unshuffled list."""
        shard = bisect_right(self.ends, place)
        return self.starts[shard] + place - (self.ends[shard] - self.counts[shard])

    def shuffled(self, seed: int, name: rng.Key, epoch: int, *more: rng.Key) -> Shuffled:
        """One epoch's order.

        Args:
            seed, name, epoch, more: what the order is drawn from.
        """
        return Shuffled(self, (seed, name, epoch, *more), first=epoch == 0)


class Shuffled(_Numbers):
    """The rows in one epoch's order; a window is drawn when it is asked for.

    The windows of a run's first epoch have 1, 2, 4, ... shards until they are whole: training
    begins when one shard is there.
    """

    def __init__(self, rows: Rows, keys: tuple[rng.Key, ...], *, first: bool) -> None:
        self._rows = rows
        self._keys = keys
        count = len(rows.counts)
        self._shards = _permuted(count, (*keys, "shards")) if count > 1 else list(range(count))
        self._borders = _borders(count, rows.window, growing=first)
        ends = [0, *accumulate(rows.counts[shard] for shard in self._shards)]
        self._places = [ends[border] for border in self._borders]
        self._kept: OrderedDict[int, list[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, place: int) -> int:
        window = bisect_right(self._places, place) - 1
        return self._window(window)[place - self._places[window]]

    def _window(self, number: int) -> list[int]:
        if number not in self._kept:
            some = self._shards[self._borders[number] : self._borders[number + 1]]
            rows = [
                self._rows.starts[shard] + row
                for shard in some
                for row in range(self._rows.counts[shard])
            ]
            self._kept[number] = [
                rows[i] for i in _permuted(len(rows), (*self._keys, "window", number))
            ]
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]


def _borders(count: int, window: int, *, growing: bool) -> list[int]:
    """Where windows begin, and the end of the last one."""
    borders, size = [0], 1 if growing else window
    while borders[-1] < count:
        borders.append(min(count, borders[-1] + min(size, window)))
        size *= 2
    return borders


def _permuted(count: int, keys: tuple[rng.Key, ...]) -> list[int]:
    return torch.randperm(count, generator=rng.generator(*keys)).tolist()
