"""Preference pairs: two pictures for a caption, of which one is preferred.

    pairs = open_pairs(args)
    train, held_out = split_pairs(pairs, eval_fraction=0.02)
    train, left_out = check_pairs(train, cache_root, on_bad_sample="error", num_threads=2)

A picture that stands in several pairs is one sample of `pictures`, so that it is decoded, encoded
and cached once.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

from dojo import rng
from dojo.cli import UserError
from dojo.data.cache import checked
from dojo.data.identity import identified
from dojo.data.images import BadSample
from dojo.data.shards import digest
from dojo.data.sources.captioned import BadReport, Captioned, listing


class Pair(NamedTuple):
    """One preference."""

    winner: int
    """Index of the preferred picture."""
    loser: int
    """Index of the other."""
    caption: str
    """On one line."""
    name: str
    """What messages call the pair: its row."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Preference pairs and their pictures; holds no pixels, and pickles cheaply."""

    description: str
    """Where the pairs come from and what was dropped, for the screen."""
    pictures: Captioned
    """Each distinct picture once. The captions are the pairs', those here are empty."""
    pairs: tuple[Pair, ...]
    """In the order of the rows."""
    bad: list[BadReport] = field(default_factory=list[BadReport])
    """Rows that make no pair because something is wrong with them, for `check_pairs`."""
    num_ties: int = 0
    """Pairs dropped because neither picture is preferred."""
    num_same: int = 0
    """Pairs dropped because both pictures are the same one."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def captions(self) -> list[str]:
        """Every caption once, sorted."""
        return sorted({pair.caption for pair in self.pairs})

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the pairs, their pictures and captions, and their order."""
        ids = self.pictures.ids
        words = ((ids[pair.winner], ids[pair.loser], pair.caption) for pair in self.pairs)
        return digest([word for three in words for word in three])

    def with_pairs(self, pairs: Sequence[Pair]) -> Pairs:
        """These of the pairs, or others of the same pictures; pictures without a pair go."""
        used = sorted({index for pair in pairs for index in pair[:2]})
        place = {index: new for new, index in enumerate(used)}
        return replace(
            self,
            pictures=self.pictures.select(used),
            pairs=tuple(
                pair._replace(winner=place[pair.winner], loser=place[pair.loser]) for pair in pairs
            ),
        )


def split_pairs(
    pairs: Pairs, *, eval_fraction: float, max_train_samples: int | None = None
) -> tuple[Pairs, Pairs | None]:
    """Holds pairs out for evaluation, chosen by a hash of their captions.

    All pairs of a caption stay on the same side, so the share is met as nearly as whole captions
    allow. The choice depends neither on the order of the pairs nor on the run's seed. Rows that
    are bad stay with the training pairs.

    Args:
        eval_fraction: of the pairs to hold out, in [0, 1); more than 0 holds out a caption or more.
        max_train_samples: keep only the first so many of the rest for training.

    Returns:
        The training pairs and the held-out ones (None for a fraction of 0), both in order.

    Raises:
        UserError: there are fewer than two captions, and some are to be held out.
    """
    apart: set[str] = set()
    if eval_fraction > 0.0:
        counts = Counter(pair.caption for pair in pairs.pairs)
        if len(counts) < 2:
            raise UserError(f"--eval_fraction {eval_fraction} needs pairs of 2 captions or more")
        by_hash = sorted(counts, key=lambda caption: rng.seed_for("held-out pairs", caption))
        ends = list(accumulate(counts[caption] for caption in by_hash))
        wanted = bisect.bisect_left(ends, eval_fraction * len(pairs)) + 1
        apart.update(by_hash[: min(wanted, len(by_hash) - 1)])
    rest = [pair for pair in pairs.pairs if pair.caption not in apart]
    train = pairs.with_pairs(rest[:max_train_samples])
    if not apart:
        return train, None
    held_out = pairs.with_pairs([pair for pair in pairs.pairs if pair.caption in apart])
    return train, replace(held_out, bad=[], num_ties=0, num_same=0)


def check_pairs(
    pairs: Pairs,
    root: Path,
    *,
    on_bad_sample: Literal["skip", "error"],
    num_threads: int,
    progress: bool = True,
) -> tuple[Pairs, list[BadReport]]:
    """Decodes every picture once, and leaves out the pairs whose picture or row is bad.

    What was found is remembered by the pictures' ids: files that did not change are not decoded
    again.

    Args:
        root: folder of the caches.
        on_bad_sample: ``error`` raises if a row or a picture is bad, ``skip`` reports them.
        num_threads: that decode at a time, at least 1.
        progress: show a bar.

    Returns:
        The good pairs, whose pictures know their sizes, and a report on each of the others.

    Raises:
        BadSample: under ``error``, with the first bad pairs and their number.
        UserError: no pair is left.
    """
    pictures = identified(pairs.pictures, root, num_threads=num_threads, progress=progress)
    pairs = replace(pairs, pictures=pictures)
    good, faults = pictures, list[BadReport]()
    if len(good):
        good, faults = checked(
            *(pictures, root),
            on_bad_sample="skip",  # a bad picture is reported with its pairs
            num_threads=num_threads,
            progress=progress,
        )
    place = {sample: index for index, sample in enumerate(good.ids)}
    why = {fault.name: f"{fault.name}: {fault.reason}" for fault in faults}
    kept: list[Pair] = []
    bad = list(pairs.bad)
    for pair in pairs.pairs:
        winner, loser = (place.get(pairs.pictures.ids[index]) for index in pair[:2])
        if winner is not None and loser is not None:
            kept.append(pair._replace(winner=winner, loser=loser))
            continue
        missing = pair.loser if loser is None else pair.winner
        bad.append(BadReport(pair.name, why[pairs.pictures.names[missing]]))
    if bad and on_bad_sample == "error":
        raise BadSample(
            f"{len(bad)} of {len(pairs) + len(pairs.bad)} pairs cannot be used (--on_bad_sample "
            f"skip leaves them out):\n{listing(bad)}"
        )
    if not kept:
        raise UserError(f"no usable pair in {pairs.description}\n{listing(bad)}".rstrip())
    return replace(pairs, pictures=good, bad=[]).with_pairs(kept), bad
