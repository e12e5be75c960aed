"""Which sample comes when: an endless stream of batches, each of one bucket.

Each bucket has a stream of its own: its uses of an epoch in shuffled order, epoch after epoch,
without a seam. A batch takes the next samples of one bucket's stream, so no batch is short and no
sample is dropped or repeated: what an epoch leaves over begins a batch of the next. When epoch e
begins, bucket k has come to sample c_k(e) of its stream and has filled floor(c_k(e) / G) batches of
G samples; epoch e holds those that it adds to them, the buckets shuffled.

All of that follows from the seed and the number of the batch. A resumed run needs only its place,
and W processes with a batch of B see together what one process with a batch of W * B sees.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate

from dojo import rng
from dojo.data.buckets import Plan
from dojo.data.images import Size
from dojo.data.streams.rows import Rows
from dojo.lazy import torch


@dataclass(frozen=True)
class Draw:
    """One use of one sample: `place` counts all uses of a run over all processes."""

    index: int
    place: int
    size: Size


class Batches:
    """Batches of one process, from `first_batch` on, without end.

    A plan with partners gives batches twice as long: `batch_size` samples, then as many partners at
    the same size, from a shuffled stream of their own. Sample number p then has place 2 p and its
    partner 2 p + 1, so that places do not hang on the batch size.
    """

    def __init__(
        self,
        plan: Plan,
        batch_size: int,
        *,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        first_batch: int = 0,
    ) -> None:
        self.plan = plan
        self.batch_size = batch_size
        self.seed = seed
        self.first_sample = process * batch_size  # of this process, within a batch of all
        self.whole_batch = batch_size * num_processes
        self.first_batch = first_batch
        # Uses of a bucket before each round of a cycle; the last number is those of a whole cycle.
        self.uses = {
            size: [0, *accumulate(len(members.get(size, ())) for members in plan.rounds)]
            for size in plan.sizes
        }
        if not self.uses:
            raise ValueError("the plan uses no sample")
        # The epoch that each stream is in, and its order.
        self.orders: dict[tuple[rng.Key, ...], tuple[int, Sequence[int]]] = {}

    def again(self) -> Batches:
        """The same batches, for somebody else."""
        other = copy(self)
        other.orders = {}
        return other

    def filled(self, epoch: int) -> Counter[Size]:
        """Batches of each bucket before an epoch."""
        cycles, number = divmod(epoch, len(self.plan.rounds))
        return Counter(
            {
                size: (cycles * uses[-1] + uses[number]) // self.whole_batch
                for size, uses in self.uses.items()
            }
        )

    def epoch_of(self, batch: int) -> int:
        """The epoch that holds a batch."""
        # Enough cycles for the batch, and for the unfinished one of each bucket.
        per_cycle = sum(uses[-1] for uses in self.uses.values())
        cycles = (batch + 1 + len(self.uses)) * self.whole_batch // per_cycle + 1
        epochs = range(cycles * len(self.plan.rounds) + 1)
        return bisect_right(epochs, batch, key=lambda epoch: self.filled(epoch).total()) - 1

    def buckets(self, epoch: int) -> list[Size]:
        """The bucket of each batch of an epoch."""
        sizes = [*(self.filled(epoch + 1) - self.filled(epoch)).elements()]
        generator = rng.generator(self.seed, "batches", epoch)
        return [sizes[i] for i in torch.randperm(len(sizes), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[Draw]]:
        batch = self.first_batch
        while True:
            epoch = self.epoch_of(batch)
            buckets, filled = self.buckets(epoch), self.filled(epoch)
            past = batch - filled.total()
            filled.update(buckets[:past])
            for size in buckets[past:]:
                yield self._batch(batch, size, filled[size])
                filled[size] += 1
                batch += 1

    def _batch(self, batch: int, size: Size, number: int) -> list[Draw]:
        """This process's share of a batch, which is batch `number` of its bucket."""
        samples = range(self.first_sample, self.first_sample + self.batch_size)
        first, first_in_bucket = batch * self.whole_batch, number * self.whole_batch
        step = 2 if self.plan.partners else 1
        draws = [
            Draw(self._member(size, first_in_bucket + i), step * (first + i), size) for i in samples
        ]
        if self.plan.partners:
            draws += [Draw(self._partner(first + i), 2 * (first + i) + 1, size) for i in samples]
        return draws

    def _member(self, size: Size, number: int) -> int:
        """The sample at a place of a bucket's stream."""
        cycle, rest = divmod(number, self.uses[size][-1])
        this_round = bisect_right(self.uses[size], rest) - 1
        epoch = cycle * len(self.plan.rounds) + this_round
        # A bucket that is alone has no name: its order is the same at every size.
        stream = ("order", *size) if len(self.uses) > 1 else ("order",)
        order = self._order(stream, epoch, self.plan.rounds[this_round][size])
        return order[rest - self.uses[size][this_round]]

    def _partner(self, number: int) -> int:
        """The partner of a sample."""
        epoch, place = divmod(number, len(self.plan.partners))
        return self._order(("partners",), epoch, self.plan.partners)[place]

    def _order(
        self, stream: tuple[rng.Key, ...], epoch: int, members: Sequence[int]
    ) -> Sequence[int]:
        """One epoch of a stream; the last one asked for is kept."""
        kept_epoch, order = self.orders.get(stream, (-1, ()))
        if kept_epoch != epoch:
            order = self._shuffled(stream, epoch, members)
            self.orders[stream] = epoch, order
        return order

    def _shuffled(
        self, stream: tuple[rng.Key, ...], epoch: int, members: Sequence[int]
    ) -> Sequence[int]:
        if isinstance(members, Rows):
            return members.shuffled(self.seed, stream[0], epoch, *stream[1:])
        generator = rng.generator(self.seed, stream[0], epoch, *stream[1:])
        return [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
