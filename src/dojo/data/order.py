"""Which sample comes when: an endless stream of shuffled epochs, cut into batches.

The stream depends on the seed alone. Place p of it is sample `permutation(epoch)[p mod N]` with
epoch = p // N, so every sample comes once per epoch, a resumed run needs only its place, and W
processes with a batch of B see together what one process with a batch of W * B sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from dojo import rng


@dataclass(frozen=True)
class Draw:
    """One use of one sample: `place` counts all uses of a run over all processes."""

    index: int
    place: int


class Batches(Sampler[list[Draw]]):
    """Batches of one process, from `first_batch` on, without end.

    Aspect buckets will cut each epoch into batches of one bucket here; what follows sees batches.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        first_batch: int = 0,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.process = process
        self.num_processes = num_processes
        self.first_batch = first_batch

    def permutation(self, epoch: int) -> list[int]:
        """The order of an epoch."""
        generator = rng.generator(self.seed, "order", epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[Draw]]:
        batch, epoch, order = self.first_batch, -1, []
        while True:
            first = (batch * self.num_processes + self.process) * self.batch_size
            draws: list[Draw] = []
            for place in range(first, first + self.batch_size):
                if place // self.num_samples != epoch:
                    epoch = place // self.num_samples
                    order = self.permutation(epoch)
                draws.append(Draw(order[place % self.num_samples], place))
            yield draws
            batch += 1
