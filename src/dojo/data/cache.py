"""Frozen work done once: autoencoder posteriors and text embeddings in shards on disk.

A cache is a folder named by a fingerprint of everything its numbers depend on; a shard is a
safetensors file named by the samples in it. A shard appears under its name only when it is whole,
so a process that is killed loses at most the shard in its hands, and a sample that changed has
another id and thereby another shard. What stays the same is shared by later runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dojo import rng
from dojo.cli import UserError
from dojo.data.images import fit
from dojo.data.order import Draw
from dojo.data.sources import BadReport, Captioned, DataArgs, verify

SHARD_SIZE = 32  # samples; the most work that a kill can lose

Posterior = tuple[Tensor, Tensor]  # mean and std, each [B, C, h, w], unscaled
Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CacheArgs:
    """Frozen work that is done before training and kept on disk."""

    latent_cache_dir: Path = Path("outputs/cache")
    """folder of the caches of latents and text embeddings, shared by all runs"""
    no_cache_latents: bool = False
    """encode the pictures anew at every use; needed for --random_crop"""
    no_cache_text_embeddings: bool = False
    """keep the text encoders and encode the captions anew at every use"""
    caption_dropout: float = 0.0
    """share of the captions that are replaced by the empty one, for classifier-free guidance"""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError("--caption_dropout must lie between 0 and 1")

    def check(self, data: DataArgs) -> None:
        """Refuses combinations that would train on something else than was asked for.

        Raises:
            UserError: random crops with cached latents: each picture would keep one crop for ever.
        """
        if data.random_crop and not self.no_cache_latents:
            raise UserError(
                "--random_crop needs --no_cache_latents: a cache would freeze one random crop of "
                "each picture"
            )


class Shards:
    """The shards of one list of samples in one cache folder.

    Membership is fixed: shard k holds samples k * SHARD_SIZE onwards, and its name is a hash of
    their ids.
    """

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        self.folder = folder
        self.members = [
            range(start, min(start + SHARD_SIZE, len(ids)))
            for start in range(0, len(ids), SHARD_SIZE)
        ]
        self.paths = [folder / f"{_digest([ids[i] for i in m])}.safetensors" for m in self.members]

    def missing(self) -> list[int]:
        """Numbers of the shards that are not on disk yet."""
        return [k for k, path in enumerate(self.paths) if not path.is_file()]

    def fill(
        self,
        make: Callable[[Sequence[int]], Mapping[str, Tensor]],
        *,
        title: str,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Makes this process's share of the missing shards.

        Args:
            make: takes sample indices, returns tensors whose first axis is the sample.
        """
        mine = [k for k in self.missing() if k % num_processes == process]
        total = sum(len(self.members[k]) for k in mine)
        bar = tqdm(total=total, desc=title, disable=process != 0 or not mine, unit="sample")
        for k in mine:
            tensors = {name: value.contiguous() for name, value in make(self.members[k]).items()}
            _write_whole(self.paths[k], tensors)
            bar.update(len(self.members[k]))
        bar.close()

    def read(self, index: int) -> dict[str, Tensor]:
        """One sample's tensors; the file is mapped, so nothing else of it is read."""
        k, row = divmod(index, SHARD_SIZE)
        with safe_open(self.paths[k], framework="pt") as file:
            return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118


def _digest(words: list[str]) -> str:
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()


def _write_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes under another name, flushes, renames: a reader sees all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(tensors), temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def cache_folder(root: Path, kind: str, settings: Mapping[str, object]) -> Path:
    """The folder of the cache that was made with exactly these settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return root / f"{kind}-{_digest([text])}"


def describe(folder: Path, settings: Mapping[str, object]) -> None:
    """Writes beside the shards what they were made with, for a person who looks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(
        json.dumps(settings, indent=1, sort_keys=True, default=str)
    )


def check_disk(folder: Path, num_bytes: int) -> None:
    """Refuses a cache that the disk cannot hold.

    Raises:
        UserError: less is free than `num_bytes` and a margin of 5 %.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if num_bytes * 1.05 > free:
        raise UserError(
            f"the cache in {folder} needs {num_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "are free: choose another --latent_cache_dir, or --no_cache_latents and "
            "--no_cache_text_embeddings"
        )


# ---------------------------------------------------------------------------------------------
# Checking


def checked(
    source: Captioned,
    root: Path,
    *,
    on_bad_sample: Literal["skip", "error"],
    num_threads: int,
    progress: bool,
) -> tuple[list[int], list[BadReport]]:
    """`verify`, remembered by the samples' ids: files that did not change are not decoded again."""
    path = root / f"checked-{_digest([on_bad_sample, *source.ids, *source.problems])}.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        return kept["good"], [BadReport(**row) for row in kept["bad"]]
    good, bad = verify(
        source, on_bad_sample=on_bad_sample, num_threads=num_threads, progress=progress
    )
    root.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"good": good, "bad": [vars(row) for row in bad]}))
    temporary.replace(path)
    return good, bad


# ---------------------------------------------------------------------------------------------
# Pictures and latents


class Pictures(Dataset[Batch]):
    """Captioned pictures as pixels, cropped and mirrored anew at every use."""

    def __init__(self, source: Captioned, data: DataArgs, *, seed: int, caption_dropout: float):
        self.source = source
        self.height, self.width = data.size
        self.random_crop = data.random_crop
        self.random_flip = data.random_flip
        self.seed = seed
        self.caption_dropout = caption_dropout

    def __len__(self) -> int:
        return len(self.source)

    def pixels(self, index: int, *, anchor: tuple[float, float] = (0.5, 0.5), flip: bool) -> Tensor:
        """One picture: float32 [3, H, W] in [-1, 1]."""
        picture = self.source.read(index)
        return fit(picture, self.height, self.width, anchor=anchor, flip=flip)

    def mirrored(self, draw: Draw) -> bool:
        """Whether this use of a sample is mirrored."""
        return self.random_flip and self._uniform("flip", draw) < 0.5

    def caption(self, draw: Draw) -> str:
        """The caption of this use of a sample; empty where it is dropped."""
        dropped = self._uniform("caption", draw) <= self.caption_dropout and self.caption_dropout
        return "" if dropped else self.source.captions[draw.index]

    def __getitem__(self, draw: Draw) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        anchor = (0.5, 0.5)
        if self.random_crop:
            anchor = (self._uniform("top", draw), self._uniform("left", draw))
        pixels = self.pixels(draw.index, anchor=anchor, flip=self.mirrored(draw))
        return {"place": draw.place, "caption": self.caption(draw), "pixels": pixels}

    def _uniform(self, stream: str, draw: Draw) -> float:
        return rng.uniform([(self.seed, stream, draw.place)]).item()


class Latents(Dataset[Batch]):
    """The same samples with the autoencoder's posterior from a cache instead of pixels."""

    def __init__(self, pictures: Pictures, shards: Shards) -> None:
        self.pictures = pictures
        self.shards = shards

    def __len__(self) -> int:
        return len(self.pictures)

    def posterior(self, index: int, *, flip: bool = False) -> Posterior:
        """Mean and std of one picture, each [C, h, w]."""
        row = self.shards.read(index)
        return row["mean"][int(flip)], row["std"][int(flip)]

    def __getitem__(self, draw: Draw) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        mean, std = self.posterior(draw.index, flip=self.pictures.mirrored(draw))
        caption = self.pictures.caption(draw)
        return {"place": draw.place, "caption": caption, "mean": mean, "std": std}


def collate(rows: Sequence[Batch]) -> Batch:
    """Samples to a batch: tensors are stacked, the rest becomes lists."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: torch.stack(values) if isinstance(values[0], Tensor) else values
        for name, values in columns.items()
    }


def cache_latents(
    pictures: Pictures,
    encode: Callable[[Tensor], Posterior],
    root: Path,
    settings: Mapping[str, object],
    *,
    latent_shape: tuple[int, int, int],
    process: int = 0,
    num_processes: int = 1,
) -> Latents:
    """Encodes what is missing of this process's share and returns the data set that reads it.

    The caller lets all processes arrive before anyone reads.

    Args:
        encode: pixels [B, 3, H, W] to mean and std; the batches are cut within a shard, so that a
            sample's numbers do not depend on which shards were there before.
        settings: what the numbers depend on besides the picture: autoencoder, dtype.
        latent_shape: [C, h, w], to estimate the room on the disk.
    """
    flips = (False, True) if pictures.random_flip else (False,)
    size = [pictures.height, pictures.width]
    settings = {**settings, "size": size, "crop": "center", "flips": len(flips)}
    folder = cache_folder(root, "latents", settings)
    shards = Shards(folder, pictures.source.ids)

    # About two megapixels at a time: eight pictures of 512 px, two of 1024 px.
    chunk = max(1, 2**21 // (size[0] * size[1]))

    def make(indices: Sequence[int]) -> dict[str, Tensor]:
        views = [(index, flip) for index in indices for flip in flips]
        means, stds = [], []
        with ThreadPoolExecutor(4) as pool:  # decoding runs ahead of encoding
            pixels = pool.map(lambda view: pictures.pixels(view[0], flip=view[1]), views)
            for some in _chunks(pixels, chunk):
                mean, std = encode(torch.stack(some))
                means.append(mean.float().cpu())
                stds.append(std.float().cpu())
        shape = (len(indices), len(flips))  # [sample, flip, C, h, w]
        return {
            "mean": torch.cat(means).unflatten(0, shape),
            "std": torch.cat(stds).unflatten(0, shape),
        }

    missing = sum(len(shards.members[k]) for k in shards.missing())
    if missing and process == 0:
        describe(folder, settings)
        # Mean and std in float32.
        check_disk(folder, missing * len(flips) * 2 * 4 * math.prod(latent_shape))
    shards.fill(make, title="caching latents", process=process, num_processes=num_processes)
    return Latents(pictures, shards)


def _chunks(items: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of `size` items, the last one shorter (itertools.batched needs Python 3.12)."""
    while some := list(itertools.islice(items, size)):
        yield some


# ---------------------------------------------------------------------------------------------
# Text


class CachedText:
    """Looks embeddings of known captions up: captions [B] -> tensors [B, ...]."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[Shards, int]] = {}

    def add(self, captions: Sequence[str], shards: Shards) -> None:
        """Learns where a list of captions lies."""
        for i, caption in enumerate(captions):
            self.places[caption] = (shards, i)

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        rows = []
        for caption in captions:
            shards, index = self.places[caption]
            rows.append(shards.read(index))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def cache_text(
    groups: Sequence[Sequence[str]],
    load_encoder: Callable[[], Callable[[Sequence[str]], Mapping[str, Tensor]]],
    root: Path,
    settings: Mapping[str, object],
    *,
    sample_bytes: int = 0,
    process: int = 0,
    num_processes: int = 1,
) -> CachedText:
    """Encodes each caption once and returns the look-up; loads the encoders only if one is new.

    Each group has shards of its own, so that another validation prompt does not disturb the data
    set's.

    Args:
        sample_bytes: what one caption takes, to refuse a cache that the disk cannot hold.
    """
    folder = cache_folder(root, "text", settings)
    lists = [sorted(set(group)) for group in groups]
    all_shards = [Shards(folder, captions) for captions in lists]
    text = CachedText()
    encoder = None
    for captions, shards in zip(lists, all_shards, strict=True):
        text.add(captions, shards)
        if not any(k % num_processes == process for k in shards.missing()):
            continue
        describe(folder, settings)
        if process == 0:
            missing = sum(len(shards.members[k]) for k in shards.missing())
            check_disk(folder, missing * sample_bytes)
        encoder = encoder or load_encoder()
        encode = encoder

        def make(
            indices: Sequence[int],
            captions: Sequence[str] = captions,
            encode: Callable[[Sequence[str]], Mapping[str, Tensor]] = encode,
        ) -> dict[str, Tensor]:
            return dict(encode([captions[i] for i in indices]))

        shards.fill(make, title="caching text", process=process, num_processes=num_processes)
    return text
