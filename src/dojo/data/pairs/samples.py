"""One use of one preference pair: both pictures, the winner first, as pixels or cached latents.

What is drawn for a use (crops, mirror, caption) hangs on the run's seed and the place of the use,
so it is the same with a cache and without, in any number of processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from dojo import rng
from dojo.data.buckets import Plan, assign
from dojo.data.cache import CacheArgs, cache_latents
from dojo.data.dataset import Dataset
from dojo.data.identity import identified
from dojo.data.order import Draw
from dojo.data.pairs.options import PairArgs
from dojo.data.pairs.pairs import Pairs
from dojo.data.samples import Batch, Framing, Latents, Pictures, Posterior
from dojo.data.shards import digest
from dojo.data.sources.captions import CaptionArgs, choose
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class PairSet(Dataset[Batch]):
    """Preference pairs to train on; `collate` makes batches of its rows.

    A row holds `place`, `caption`, `size` and, the winner first, either `mean` and `std` of the
    autoencoder's posterior (float32 [2, C, h, w], unscaled) or `pixels` (float32 [2, 3, H, W] in
    [-1, 1]); of pictures that were checked `original` and `crop` too, [2, 2]: see `Geometry`.
    """

    def __init__(
        self,
        pairs: Pairs,
        rows: Pictures | Latents,
        args: PairArgs,
        *,
        seed: int,
        still: bool = False,
    ) -> None:
        """
        Args:
            rows: the pairs' pictures, as they are or from a cache.
            still: centre crops, not mirrored, no caption dropped: for evaluation.
        """
        self.pairs = pairs
        self.rows = rows
        self.args = args
        self.seed = seed
        self.is_still = still

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def fingerprint(self) -> str:
        """Identifies what is trained on and how: the pairs in their order, and their views."""
        return pair_fingerprint(self.pairs, self.args)

    def still(self) -> PairSet:
        """The same pairs for evaluation, from the same cache."""
        other = copy(self)
        other.is_still = True
        return other

    def plan(self) -> Plan:
        """For `Batches`: every pair once per epoch, all of one size."""
        return Plan(rounds=({self.args.size: tuple(range(len(self)))},))

    def draws(self) -> list[Draw]:
        """Every pair once, in order, at a place equal to its index: for evaluation."""
        return [Draw(index, index, self.args.size) for index in range(len(self))]

    def texts(self) -> list[str]:
        """Every caption that a row may have, sorted."""
        empty = {""} if self._captions.caption_dropout and not self.is_still else set[str]()
        return sorted(empty.union(self.pairs.captions))

    def __getitem__(self, draw: Draw) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        pair = self.pairs.pairs[draw.index]
        both = [
            self._picture(index, draw, self._framing(draw, side))
            for side, index in enumerate((pair.winner, pair.loser))
        ]
        seen = {name: torch.stack([one[name] for one in both]) for name in both[0]}
        caption = pair.caption
        if not self.is_still:
            caption = choose([caption], self._captions, self.seed, draw.place)
        return {"place": draw.place, "caption": caption, "size": draw.size, **seen}

    @property
    def _captions(self) -> CaptionArgs:
        return CaptionArgs(caption_dropout=self.args.proportion_empty_prompts)

    def _framing(self, draw: Draw, side: int) -> Framing:
        """Where the crop of one of the two pictures lies, and whether it is mirrored."""
        if self.is_still:
            return (0.5, 0.5), False

        def uniform(stream: str, *key: int) -> float:
            return rng.uniform([(self.seed, stream, draw.place, *key)]).item()  # in (0, 1]

        own = (side,) if self.args.independent_flip else ()
        flip = not self.args.no_hflip and uniform("flip", *own) < 0.5
        if not self.args.random_crop:
            return (0.5, 0.5), flip
        return (uniform("top", side), uniform("left", side)), flip

    def _picture(self, index: int, draw: Draw, framing: Framing) -> dict[str, Tensor]:
        if isinstance(self.rows, Latents):
            geometry = self.rows.pictures.geometry(index, draw.size, framing)
            return {**geometry, **self.rows.stored(index, draw.size, flip=framing[1])}
        geometry = self.rows.geometry(index, draw.size, framing)
        return {**geometry, **self.rows.render(index, draw.size, [framing])[0]}


def pair_fingerprint(pairs: Pairs, args: PairArgs) -> str:
    """Identifies pairs, their order, and how they are used; a run resumes only with the same.

    It needs no cache, so that a run can be refused before the work begins.
    """
    how = (
        *(args.size, args.random_crop, args.no_hflip, args.independent_flip),
        args.proportion_empty_prompts,
    )
    return digest([pairs.fingerprint, *map(str, how)])


def prepare_pairs(
    pairs: Pairs,
    args: PairArgs,
    cache: CacheArgs,
    encode: Callable[[Tensor], Posterior],
    settings: Mapping[str, object],
    *,
    seed: int,
    latent_channels: int,
    pixel_step: int,
    latent_step: int = 8,
    still: bool = False,
    process: int = 0,
    num_processes: int = 1,
) -> PairSet:
    """Fills the latent cache with this process's share of the pictures, where the options allow it.

    Each picture is encoded once, mirrored too unless `--no_hflip`. The caller lets all processes
    arrive before anyone reads.

    Args:
        pairs: checked.
        encode: pixels [B, 3, H, W] in [-1, 1] to mean and std, each [B, C, h, w].
        settings: what the latents depend on besides the pictures: the autoencoder and its dtype.
        seed: of the run.
        latent_channels: to estimate the room on the disk.
        pixel_step: the sides that the model takes are multiples of it.
        latent_step: pixels per place of the latents along a side.
        still: for evaluation; mirrored views are not made.

    Raises:
        UserError: the size does not fit the model, the disk cannot hold the cache, or pictures are
            to be cropped anew at every use.
    """
    args.check(cache)
    whole = identified(pairs.pictures, cache.latent_cache_dir)  # nothing to do for checked ones
    pairs = replace(pairs, pictures=whole)
    plan = assign(pairs.pictures, args.pictures, pixel_step)
    rows: Pictures | Latents = Pictures(
        *(pairs.pictures, args.pictures, CaptionArgs()),
        seed=seed,
        still=still,
        latent_step=latent_step,
    )
    if not cache.no_cache_latents:
        rows = cache_latents(
            *(rows, plan.needed(), encode, cache.latent_cache_dir, settings),
            latent_channels=latent_channels,
            process=process,
            num_processes=num_processes,
        )
    return PairSet(pairs, rows, args, seed=seed, still=still)
