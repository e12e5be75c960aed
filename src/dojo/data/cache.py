"""Frozen work done once: pictures checked, autoencoder posteriors and text embeddings on disk."""

from __future__ import annotations

import gc
import itertools
import json
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from dojo.bars import Bar
from dojo.cli import UserError, option
from dojo.data.contents import write_json
from dojo.data.identity import identified
from dojo.data.images import READER, Seen, Size
from dojo.data.options import DataArgs
from dojo.data.samples import Latents, Pictures, Posterior
from dojo.data.shards import Aside, Shards, announce, cache_folder, describe, digest
from dojo.data.sources.captioned import BadReport, Captioned, judged, look, noted
from dojo.lazy import torch

S = TypeVar("S")
T = TypeVar("T")

_DECODERS = 4  # threads that read pictures


@dataclass(frozen=True, kw_only=True)
class TextCacheArgs:
    """Text encoders' work that is done before training and kept on disk."""

    latent_cache_dir: Path = option(Path("outputs/cache"), incidental=True)
    """folder of the caches of latents and text embeddings, shared by all runs"""
    no_cache_text_embeddings: bool = option(False, incidental=True)
    """keep the text encoders and encode the captions anew at every use"""


@dataclass(frozen=True, kw_only=True)
class CacheArgs(TextCacheArgs):
    """The autoencoder's too."""

    no_cache_latents: bool = option(False, incidental=True)
    """encode the pictures anew at every use; needed for --random_crop"""

    def check(self, data: DataArgs) -> None:
        """Refuses combinations that would train on something else than was asked for.

        Raises:
            UserError: random crops with cached latents: each picture would keep one crop for ever.
        """
        if data.random_crop and not self.no_cache_latents:
            raise UserError(_FROZEN_CROP)


_FROZEN_CROP = (
    "a latent cache would freeze one random crop of each picture: give --crop_variants N to cache "
    "N crops instead of --random_crop, or --no_cache_latents to encode every crop anew"
)


def checked(
    source: Captioned,
    root: Path,
    *,
    on_bad_sample: Literal["skip", "error"],
    num_threads: int,
    progress: bool,
) -> tuple[Captioned, list[BadReport]]:
    """`verify` of identified samples, remembered: what did not change is not decoded again.

    What was bad is looked at again every time: a disk may have come back, a decoder been installed.

    Returns:
        The good samples, which have whole ids and know their pictures' sizes, and reports on the
        others.
    """
    source = identified(source, root, num_threads=num_threads, progress=progress)
    words = ["pictures by place", str(READER), *source.ids, *source.problems]
    path = root / f"checked-{digest(words)}.json"
    found = _remembered(path, len(source))
    unknown = [index for index, one in enumerate(found) if isinstance(one, str)]
    if unknown:
        now = look(source.select(unknown), num_threads=num_threads, progress=progress)
        for index, one in zip(unknown, now, strict=True):
            found[index] = one
    good, bad, sizes = judged(source, found, on_bad_sample=on_bad_sample)
    if len(bad) < len(unknown):
        write_json(path, [None if isinstance(one, str) else one for one in found])
    return replace(source.select(good), sizes=sizes, notes=noted(found)), bad


def _remembered(path: Path, count: int) -> list[Seen | str]:
    """Pictures as they were found before, and "" for those not known to be good."""
    unknown: list[Seen | str] = [""] * count
    try:
        found = [_seen(one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return unknown
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        found = []
    if len(found) != count:
        print(f"{path} is damaged: the pictures are checked again", flush=True)
        return unknown
    return found


def _seen(kept: Any) -> Seen | str:
    if kept is None:
        return ""
    (height, width), notes = kept
    return (int(height), int(width)), tuple(str(note) for note in notes)


# ---------------------------------------------------------------------------------------------
# Latents


def encoded_at_a_time(size: Size) -> int:
    """Pictures of a size that are encoded at a time: about two megapixels, so eight pictures of
    512 px or two of 1024 px."""
    return max(1, 2**21 // (size[0] * size[1]))


def cache_latents(
    pictures: Pictures,
    needed: Mapping[Size, Sequence[int]],
    encode: Callable[[torch.Tensor], Posterior],
    root: Path,
    settings: Mapping[str, object],
    *,
    latent_channels: int,
    process: int = 0,
    num_processes: int = 1,
) -> Latents:
    """Encodes what is missing of this process's share and returns the data set that reads it.

    Each size has a folder of its own, and each sample in it all the views that a run may ask for:
    crops, mirrored or not. The caller lets all processes arrive before anyone reads.

    Args:
        needed: the samples that are seen at each size.
        encode: pixels [B, 3, H, W] to mean and std; the batches are cut within a shard, so that a
            sample's numbers do not depend on which shards were there before.
        settings: what the numbers depend on besides the pictures and their views: the autoencoder
            and its dtype.
        latent_channels: to estimate the room on the disk.

    Raises:
        UserError: the disk cannot hold it, or a sample is to be cropped anew at every use.
        ValueError: the samples are not `identified`.
    """
    source = pictures.source
    if any(one.endswith("|") for one in source.ids):
        raise ValueError("the samples are not `identified`: another picture would have their ids")
    if not pictures.is_still and any(
        source.recipe(index).random_crop for indices in needed.values() for index in indices
    ):
        raise UserError(_FROZEN_CROP)
    views = {size: pictures.num_views(indices) for size, indices in needed.items()}
    shards: dict[Size, Shards] = {}
    num_missing, num_bytes = 0, 0
    for size, indices in needed.items():
        crops, flips = views[size]
        here = {**settings, "size": size, "crops": crops, "flips": flips, "reader": READER}
        if source.has_masks:
            here["masks"] = pictures.latent_step
        folder = cache_folder(root, "latents", here)
        shards[size] = Shards(folder, [source.ids[i] for i in indices], views=views[size])
        if count := shards[size].num_missing():
            num_missing += count
            numbers = 2 * latent_channels + source.has_masks  # mean, std and mask, in float32
            places = size[0] // pictures.latent_step * (size[1] // pictures.latent_step)
            num_bytes += count * crops * flips * numbers * places * 4
            if process == 0:
                describe(folder, here)
    if num_missing and process == 0:
        announce(f"the latents of {num_missing:,} pictures", root, num_bytes)
    first = 0
    for size, indices in needed.items():
        shards[size].stream(
            partial(_encoded, pictures, encode, size, indices, views[size]),
            title=f"caching latents {size[0]} x {size[1]}",
            process=process,
            num_processes=num_processes,
            first=first,
        )
        first += len(shards[size].names)
    return Latents(
        pictures,
        {
            size: (shards[size], {index: row for row, index in enumerate(indices)})
            for size, indices in needed.items()
        },
    )


def encoded_views(
    pictures: Pictures,
    encode: Callable[[torch.Tensor], Posterior],
    size: Size,
    indices: Sequence[int],
) -> dict[str, torch.Tensor]:
    """Every view of some samples at one size: tensors [sample, crop, mirrored, C, h, w].

    Raises:
        UserError: the latents are not finite numbers.
    """
    views = pictures.num_views(indices)
    (found,) = _encoded(pictures, encode, size, indices, views, [range(len(indices))])
    return found


def _encoded(
    pictures: Pictures,
    encode: Callable[[torch.Tensor], Posterior],
    size: Size,
    indices: Sequence[int],
    views: tuple[int, int],
    lists: Sequence[Sequence[int]],
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each shard: [sample, crop, mirrored, C, h, w].

    Pictures are read ahead of the encoder, of the next shard too, and never more than one of its
    batches holds. An encoder on a CPU waits until they are read: its threads, which wait for each
    other at every layer, would share the cores with those that read, and lose more than is won.
    """
    crops, flips = views
    chunk = encoded_at_a_time(size)
    ahead = max(_DECODERS, chunk // (crops * flips))

    def render(member: int) -> list[dict[str, torch.Tensor]]:
        anchors = [pictures.anchor(indices[member], crop) for crop in range(crops)]
        framings = [(anchor, flip > 0) for anchor in anchors for flip in range(flips)]
        return pictures.render(indices[member], size, framings)

    running: deque[Future[list[dict[str, torch.Tensor]]]] = deque()
    on_cpu = False

    def alone(pixels: torch.Tensor) -> Posterior:
        nonlocal on_cpu
        if on_cpu:
            wait(running)
        mean, std = encode(pixels)
        on_cpu = mean.device.type == "cpu"
        return mean, std

    with ThreadPoolExecutor(_DECODERS) as pool:
        every = itertools.chain.from_iterable(lists)
        seen = itertools.chain.from_iterable(_ahead(pool, render, every, ahead, running))
        for members in lists:
            rows = itertools.islice(seen, len(members) * crops * flips)
            yield _shard(pictures, alone, indices, views, members, rows, chunk)


def _shard(
    pictures: Pictures,
    encode: Callable[[torch.Tensor], Posterior],
    indices: Sequence[int],
    views: tuple[int, int],
    members: Sequence[int],
    rows: Iterable[dict[str, torch.Tensor]],
    chunk: int,
) -> dict[str, torch.Tensor]:
    """The tensors of one shard, its rows encoded `chunk` at a time."""
    crops, flips = views
    columns: dict[str, list[torch.Tensor]] = {"mean": [], "std": [], "mask": []}
    seen = iter(rows)
    while some := list(itertools.islice(seen, chunk)):
        mean, std = encode(torch.stack([row["pixels"] for row in some]))
        columns["mean"].append(mean.float().cpu())
        columns["std"].append(std.float().cpu())
        columns["mask"] += [row["mask"][None] for row in some if "mask" in row]
    shape = (len(members), crops, flips)
    latents = {
        name: torch.cat(values).unflatten(0, shape) for name, values in columns.items() if values
    }
    _refuse_no_numbers(
        latents,
        lambda row: f"the autoencoder's latents of {pictures.source.names[indices[members[row]]]}",
        "give --vae_dtype another precision (no is float32), or mend the autoencoder",
    )
    return latents


def _refuse_no_numbers(
    tensors: Mapping[str, torch.Tensor], name: Callable[[int], str], advice: str
) -> None:
    """Keeps NaN and infinite numbers out of a cache.

    Args:
        tensors: whose first axis is the sample.
        name: of a sample, in words.
    Raises:
        UserError: there are some.
    """
    for values in tensors.values():
        good = values.reshape(len(values), -1).isfinite().all(1)
        if not good.all():
            first = int((~good).nonzero()[0])
            raise UserError(f"{name(first)} are not finite numbers: {advice}")


def _ahead(
    pool: Executor,
    work: Callable[[S], T],
    jobs: Iterable[S],
    ahead: int,
    running: deque[Future[T]],
) -> Iterator[T]:
    """Results in order; so many jobs run ahead and no more, so that results do not pile up.

    Args:
        running: holds those that run ahead.
    """
    for job in jobs:
        running.append(pool.submit(work, job))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


# ---------------------------------------------------------------------------------------------
# Text


class CachedText:
    """Looks embeddings of known captions up: captions [B] -> tensors [B, ...].

    Holds the captions and the names of files, so that data loader workers can have it too.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[list[str], Shards]] = []

    def add(self, captions: list[str], shards: Shards) -> None:
        """Learns where a sorted list of captions lies."""
        self.groups.append((captions, shards))

    def __call__(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """
        Raises:
            KeyError: a caption is not in the cache.
        """
        known = {caption: self.row(caption) for caption in dict.fromkeys(captions)}
        rows = [known[caption] for caption in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def row(self, caption: str) -> dict[str, torch.Tensor]:
        """The same of one caption: tensors [...].

        Raises:
            KeyError: it is not in the cache.
        """
        for captions, shards in self.groups:
            place = bisect_left(captions, caption)
            if place < len(captions) and captions[place] == caption:
                return shards.read(place)
        raise KeyError(f"the text cache does not hold {caption!r}")


Said: TypeAlias = "Mapping[str, torch.Tensor]"
LoadEncoder = Callable[[], Callable[[Sequence[str]], Said]]
"""Loads what turns captions into tensors, whose first axis is the caption."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Encoders that are asked before the last one, and what all of them said together.

    Each is loaded, says all that is missing, and is let go before the next one is loaded. What it
    said lies aside on the disk of the cache until the last one's is joined to it.
    """

    earlier: Sequence[tuple[str, LoadEncoder]] = ()
    """titles and encoders"""
    join: Callable[[Said], Said] = lambda said: said
    """the embeddings, of what all said; called while the last one is loaded"""
    let_go: Callable[[], object] = gc.collect
    """called when an encoder has no owner any more"""


def cache_text(
    groups: Sequence[Sequence[str]],
    load_encoder: LoadEncoder,
    root: Path,
    settings: Mapping[str, object],
    *,
    turns: Turns = Turns(),
    sample_bytes: int = 0,
    process: int = 0,
    num_processes: int = 1,
) -> CachedText:
    """Encodes each caption once and returns the look-up; loads the encoders only if one is new.

    Each group has shards of its own, so that another validation prompt does not disturb the data
    set's. The caller lets all processes arrive before anyone reads.

    Args:
        settings: what the numbers depend on besides the caption: the encoders, their dtype, the
            length that captions are padded to.
        turns: encoders before the one of `load_encoder`.
        sample_bytes: what one caption takes, to estimate the room on the disk.

    Raises:
        UserError: the disk cannot hold it.
    """
    share = {"process": process, "num_processes": num_processes}
    folder = cache_folder(root, "text", settings)
    lists = [sorted(set(group)) for group in groups]
    text = CachedText()
    for captions in lists:
        text.add(captions, Shards(folder, captions))
    missing = sum(shards.num_missing() for _, shards in text.groups)
    if missing and process == 0:
        describe(folder, settings)
        announce(f"the embeddings of {missing:,} captions", root, missing * sample_bytes)
    mine: dict[tuple[str, ...], None] = {}  # the captions of each shard that this process makes
    first = 0
    for captions, shards in text.groups:
        for k in shards.share(**share, first=first):
            mine[tuple(captions[i] for i in shards.members[k])] = None
        first += len(shards.names)
    aside = [_laid_aside(mine, *turn, folder, turns.let_go) for turn in turns.earlier if mine]
    encoder = cache(load_encoder)  # loaded at the first shard that is missing, once
    first = 0
    for captions, shards in text.groups:

        def make(
            members: Sequence[int], captions: list[str] = captions
        ) -> Mapping[str, torch.Tensor]:
            some = [captions[i] for i in members]
            said = dict(_say(encoder(), some))
            for one in aside:
                said |= one.get(tuple(some))
            return turns.join(said)

        shards.fill(make, title="caching text", **share, first=first)
        first += len(shards.names)
    return text


def _laid_aside(
    captions: Collection[tuple[str, ...]],
    title: str,
    load_encoder: LoadEncoder,
    folder: Path,
    let_go: Callable[[], object],
) -> Aside:
    """What an encoder says of lists of captions, each list under itself."""
    aside = Aside(folder)
    encoder = load_encoder()
    for some in Bar(captions, title, unit="shard", leave=False):
        aside.put(some, _say(encoder, some))
    del encoder
    let_go()
    return aside


def _say(encoder: Callable[[Sequence[str]], Said], captions: Sequence[str]) -> Said:
    """What an encoder says.

    Raises:
        UserError: some of it is no number.
    """
    said = encoder(captions)
    _refuse_no_numbers(
        said,
        lambda row: f"the text encoders' embeddings of {captions[row][:60]!r}",
        "give --mixed_precision bf16 or no, or mend the encoders",
    )
    return said
