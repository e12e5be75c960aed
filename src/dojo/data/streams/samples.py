"""Rows of a stream as training samples: the pictures of one shard at a time are at hand."""

from __future__ import annotations

from dataclasses import replace

from dojo.data.dataset import Dataset
from dojo.data.images import BadSample
from dojo.data.options import DataArgs
from dojo.data.order import Draw
from dojo.data.samples import Batch, Pictures
from dojo.data.sources.captions import CaptionArgs
from dojo.data.streams.stream import Stream

_SHOWN = 10  # rows that are left out, by each process that reads


class Streamed(Dataset[Batch]):
    """Captioned pictures of a stream as pixels; a row is what one of `Pictures` is.

    No row has been looked at before its turn. One that is bad stops the run or, under `skip`, gives
    its place to the next good one of the stream: which one hangs on the data alone.
    """

    def __init__(
        self,
        stream: Stream,
        data: DataArgs,
        captions: CaptionArgs,
        *,
        seed: int,
        latent_step: int = 8,
    ) -> None:
        self.stream = stream
        self.data = data
        self.captions = captions
        self.seed = seed
        self.latent_step = latent_step
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, draw: Draw) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        for step in range(len(self)):
            index = (draw.index + step) % len(self)
            if index in self._bad:
                continue
            try:
                return self._row(index, draw)
            except BadSample as error:
                if self.data.on_bad_sample == "error":
                    raise
                self._leave_out(index, error)
        raise BadSample(f"{self.stream.location}: no row can be used")

    def _row(self, index: int, draw: Draw) -> Batch:
        shard, row = self.stream.where(index)
        source = self.stream.part(shard, [row])
        picture = source.decode(0)
        size = picture.image.height, picture.image.width
        one = replace(source, decoded={row: picture}, sizes=[size])
        pictures = Pictures(
            one, self.data, self.captions, seed=self.seed, latent_step=self.latent_step
        )
        return pictures[Draw(0, draw.place, draw.size)]

    def _leave_out(self, index: int, error: BadSample) -> None:
        self._bad.add(index)
        if len(self._bad) <= _SHOWN:
            print(f"  left out: {error}; the next row takes its place", flush=True)
        elif len(self._bad) == _SHOWN + 1:
            print("  left out: more rows, which are not listed", flush=True)
