"""Shards that are fetched before their turn comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

from dojo.data.order import Batches, Draw
from dojo.data.streams.rows import Rows


class Shelf(Protocol):
    """Samples in shards."""

    @property
    def window(self) -> int:
        """Shards that are in use at a time."""
        ...

    def where(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its row there."""
        ...

    def bring(self, shard: int) -> None:
        """Sees to it that a shard is on the disk."""
        ...


class Ahead:
    """The same batches, while a thread fetches the shards of those that follow.

    The order is arithmetic, so the thread computes what comes and asks nobody. It keeps within one
    window of what has been handed out: this window and the next are what the disk has to hold.
    """

    def __init__(self, batches: Batches, shelf: Shelf) -> None:
        self.batches = batches
        self.shelf = shelf

    def __iter__(self) -> Iterator[list[Draw]]:
        walk = _Walk(
            self.batches.again(), self.shelf
        )  # begins here: workers have been forked by now
        try:
            for batch in self.batches:
                walk.handed_out(batch)
                yield batch
        finally:
            walk.stop()


class _Walk:
    """The thread, and how far it may go."""

    def __init__(self, scout: Batches, shelf: Shelf) -> None:
        self._scout = scout
        self._shelf = shelf
        self._changed = threading.Condition()
        self._waiting: dict[int, None] = {}  # shards that were met and are not in use yet
        self._batch = 0  # of the scout
        self._handed = 0
        self._stopped = False
        rows = [some for some in scout.plan.rounds[0].values() if isinstance(some, Rows)]
        in_windows = sum(min(len(some), some.window * max(some.counts)) for some in rows)
        self._far = 2 * in_windows // scout.whole_batch + 16  # batches: more than two windows
        self._thread = threading.Thread(target=self._run, daemon=True, name="read ahead")
        self._thread.start()

    def handed_out(self, batch: list[Draw]) -> None:
        """Tells of a batch that goes to the workers."""
        with self._changed:
            self._handed += 1
            for draw in batch:
                self._waiting.pop(self._shelf.where(draw.index)[0], None)
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after the shard in its hands."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        recent: dict[int, None] = {}  # shards that need no second look
        for batch in self._scout:
            for shard in dict.fromkeys(self._shelf.where(draw.index)[0] for draw in batch):
                if shard in recent:
                    continue
                if not self._may_go_on(shard):
                    return
                with suppress(Exception):  # whoever reads the shard will say so
                    self._shelf.bring(shard)
                recent[shard] = None
                while len(recent) > 2 * self._shelf.window:
                    recent.pop(next(iter(recent)))
            self._batch += 1
            with self._changed:  # few shards come round for ever, and are all there
                while self._batch > self._handed + self._far and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return

    def _may_go_on(self, shard: int) -> bool:
        """Waits until a shard more is within the window; False at the end."""
        with self._changed:
            while len(self._waiting) >= self._shelf.window and not self._stopped:
                self._changed.wait()
            if self._batch >= self._handed:
                self._waiting[shard] = None
            return not self._stopped
