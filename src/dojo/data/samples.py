"""One use of one sample, as pixels or as a cached posterior of the autoencoder.

What is drawn for a use (crop, mirror, caption) hangs on the run's seed and the place of the use,
so it is the same with a cache and without, in any number of processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, TypeAlias

from dojo import rng
from dojo.data.dataset import Dataset
from dojo.data.geometry import framed
from dojo.data.images import Size, fit, fit_mask
from dojo.data.options import DataArgs
from dojo.data.order import Draw
from dojo.data.shards import Shards, digest
from dojo.data.sources.captioned import Captioned
from dojo.data.sources.captions import CaptionArgs, choose, every
from dojo.lazy import torch

Posterior: TypeAlias = (
    "tuple[torch.Tensor, torch.Tensor]"  # mean and std, each [B, C, h, w], unscaled
)
Batch = dict[str, Any]
Anchor = tuple[float, float]  # place of a crop, (vertical, horizontal) in [0, 1]
Framing = tuple[Anchor, bool]  # where a crop lies, and whether it is mirrored


class Pictures(Dataset[Batch]):
    """Captioned pictures as pixels, read from their files at every use.

    A row holds `place`, `caption`, `size`, `weight` (of its loss), `regularisation`, `pixels`
    (float32 [3, H, W] in [-1, 1]) and, if the source has masks, `mask` (float32 [1, h, w]). Of a
    source that was verified it holds `original` and `crop` too: see `Geometry`.
    """

    def __init__(
        self,
        source: Captioned,
        data: DataArgs,
        captions: CaptionArgs,
        *,
        seed: int,
        still: bool = False,
        latent_step: int = 8,
    ) -> None:
        """
        Args:
            still: the centre crop, not mirrored, with the first caption: for evaluation.
            latent_step: pixels per place of the latents along a side, at which masks are given.
        """
        self.source = source
        self.caption_args = captions
        self.seed = seed
        self.is_still = still
        self.latent_step = latent_step
        self.crop_variants = data.crop_variants

    def __len__(self) -> int:
        return len(self.source)

    def still(self) -> Pictures:
        """The same samples for evaluation."""
        other = copy(self)
        other.is_still = True
        return other

    def texts(self) -> list[str]:
        """Every caption that a row may have, sorted."""
        if self.is_still:
            return sorted({some[0] for some in self.source.captions if some})
        found = {text for some in self.source.captions for text in every(some, self.caption_args)}
        return sorted(found | {""} if self.caption_args.caption_dropout else found)

    def view(self, draw: Draw) -> tuple[int, bool]:
        """The crop of this use, by its number, and whether it is mirrored."""
        if self.is_still:
            return 0, False
        crop = 0
        if self.crop_variants > 1:
            crop = int((1 - self._uniform("crop", draw)) * self.crop_variants)
        flip = self.source.recipe(draw.index).random_flip and self._uniform("flip", draw) < 0.5
        return crop, flip

    def num_views(self, indices: Sequence[int]) -> tuple[int, int]:
        """How many crops and how many mirrorings `view` may name for these samples."""
        if self.is_still:
            return 1, 1
        mirrored = any(self.source.recipe(index).random_flip for index in indices)
        return self.crop_variants, 1 + mirrored

    def anchor(self, index: int, crop: int) -> Anchor:
        """Where a numbered crop lies: the first at the centre, the others at random places.

        They hang on the sample alone, not on the run's seed, so that runs share what was encoded.
        """
        if crop == 0:
            return 0.5, 0.5
        key = ("crop", digest([self.source.ids[index]]), crop)
        top, left = rng.uniform([(*key, "top"), (*key, "left")]).tolist()
        return top, left

    def render(
        self, index: int, size: Size, framings: Sequence[Framing]
    ) -> list[dict[str, torch.Tensor]]:
        """One picture, read once, in each framing: `pixels` and, if the source has masks, `mask`.

        Raises:
            BadSample: the picture or its mask cannot be read.
        """
        height, width = size
        picture = self.source.read(index)
        seen = [
            {"pixels": fit(picture, height, width, anchor=anchor, flip=flip)}
            for anchor, flip in framings
        ]
        if not self.source.has_masks:
            return seen
        mask = self.source.read_mask(index, (picture.height, picture.width))
        step = self.latent_step
        for row, (anchor, flip) in zip(seen, framings, strict=True):
            row["mask"] = (
                torch.ones(1, height // step, width // step)
                if mask is None
                else fit_mask(mask, height, width, step, anchor=anchor, flip=flip)
            )
        return seen

    def framing(self, draw: Draw) -> Framing:
        """Where the crop of this use lies, and whether it is mirrored."""
        crop, flip = self.view(draw)
        if self.source.recipe(draw.index).random_crop and not self.is_still:
            return (self._uniform("top", draw), self._uniform("left", draw)), flip
        return self.anchor(draw.index, crop), flip

    def geometry(self, index: int, size: Size, framing: Framing) -> dict[str, torch.Tensor]:
        """`original` and `crop` of one sample, without reading it; {} before `verify`."""
        sizes = self.source.sizes
        return framed(sizes[index], size, *framing) if sizes else {}

    def row(self, draw: Draw) -> Batch:
        """What a row holds besides the picture and its geometry."""
        recipe = self.source.recipe(draw.index)
        alternatives = self.source.captions[draw.index]
        caption = (
            alternatives[0]
            if self.is_still
            else choose(alternatives, self.caption_args, self.seed, draw.place)
        )
        return {
            "place": draw.place,
            "caption": caption,
            "size": draw.size,
            "weight": torch.tensor(recipe.weight),
            "regularisation": torch.tensor(recipe.is_regularisation),
        }

    def __getitem__(self, draw: Draw) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        framing = self.framing(draw)
        return {
            **self.row(draw),
            **self.geometry(draw.index, draw.size, framing),
            **self.render(draw.index, draw.size, [framing])[0],
        }

    def _uniform(self, stream: str, draw: Draw) -> float:
        return rng.uniform([(self.seed, stream, draw.place)]).item()  # in (0, 1]


class Latents(Dataset[Batch]):
    """The same samples with the autoencoder's posterior from a cache instead of pixels.

    A row holds `mean` and `std` (float32 [C, h, w]) in place of `pixels`.
    """

    def __init__(
        self, pictures: Pictures, stores: Mapping[Size, tuple[Shards, Mapping[int, int]]]
    ) -> None:
        """
        Args:
            stores: for each size the shards, tensors [sample, crop, mirrored, ...], and where in
                them the samples lie.
        """
        self.pictures = pictures
        self.stores = stores

    def __len__(self) -> int:
        return len(self.pictures)

    def still(self) -> Latents:
        """The same samples for evaluation, from the same cache."""
        return Latents(self.pictures.still(), self.stores)

    def stored(
        self, index: int, size: Size, *, crop: int = 0, flip: bool = False
    ) -> dict[str, torch.Tensor]:
        """One view of one sample: `mean`, `std` and, if the source has masks, `mask`.

        Raises:
            KeyError: the cache does not hold the sample at this size.
        """
        shards, rows = self.stores[size]
        return shards.read(rows[index], crop, int(flip))

    def __getitem__(self, draw: Draw) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        pictures = self.pictures
        crop, flip = pictures.view(draw)
        framing = pictures.anchor(draw.index, crop), flip
        return {
            **pictures.row(draw),
            **pictures.geometry(draw.index, draw.size, framing),
            **self.stored(draw.index, draw.size, crop=crop, flip=flip),
        }


def collate(rows: Sequence[Batch]) -> Batch:
    """Samples to a batch: tensors are stacked, the rest becomes lists."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: torch.stack(values) if isinstance(values[0], torch.Tensor) else values
        for name, values in columns.items()
    }
