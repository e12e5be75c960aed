"""The sizes that pictures are trained at, and which picture goes where.

A bucket is a size; a batch holds pictures of one bucket. Without aspect buckets every picture goes
to the fixed size of its resolution, and there is one bucket for each resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from dojo import tables
from dojo.cli import UserError
from dojo.data.images import Size
from dojo.data.options import DataArgs
from dojo.data.sources.captioned import Captioned, Recipe
from dojo.data.streams.rows import Rows

DEFAULT_STEP = 64
"""Step of the sides in pixels, from a resolution of 256 on; a smaller one would be mostly crops."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which samples are used at which size in which epoch.

    Epoch e is `rounds[e % len(rounds)]`. An index stands in a round as often as the sample is used
    in such an epoch.
    """

    rounds: tuple[dict[Size, Sequence[int]], ...]
    partners: tuple[int, ...] = ()
    """Regularisation samples that every batch is paired with (DreamBooth), at the batch's size."""
    left_out: tuple[tuple[int, str], ...] = ()
    """Samples that are used at no size, and why."""

    @property
    def sizes(self) -> list[Size]:
        """Every size that is used, sorted."""
        return sorted({size for one in self.rounds for size in one})

    @property
    def samples_per_epoch(self) -> int:
        """Uses of samples in an epoch, the same in all of them; partners do not count."""
        return sum(len(members) for members in self.rounds[0].values())

    def needed(self) -> dict[Size, list[int]]:
        """The samples that are seen at each size, each once, sorted."""
        seen = {size: set(self.partners) for size in self.sizes}
        for one in self.rounds:
            for size, members in one.items():
                seen[size].update(members)
        return {size: sorted(indices) for size, indices in seen.items()}

    def rows(self, batch_size: int) -> list[dict[str, float]]:
        """What `table` shows, one bucket a row.

        Args:
            batch_size: samples in a batch of one bucket, over all processes.
        """
        rows: list[dict[str, float]] = []
        for height, width in self.sizes:
            uses = [one.get((height, width), ()) for one in self.rounds]
            # Rows of shards come once each, and are too many to be listed.
            once = len(uses) == 1 and isinstance(uses[0], Rows)
            per_epoch = sum(map(len, uses)) / len(self.rounds)
            rows.append(
                {
                    "height": height,
                    "width": width,
                    "aspect": width / height,
                    "pictures": len(uses[0]) if once else len(set().union(*uses)),
                    "uses_per_epoch": per_epoch,
                    "batches_per_epoch": per_epoch / batch_size,
                }
            )
        return rows

    def table(self, batch_size: int) -> str:
        """The buckets for a person to read; see `rows`."""
        head = ("height", "width", "aspect", "pictures", "uses/epoch", "batches/epoch", "")
        cells: list[tuple[str, ...]] = []
        for row in self.rows(batch_size):
            batches, sides = row["batches_per_epoch"], (row["height"], row["width"])
            counts = (f"{row['aspect']:.2f}", str(row["pictures"]), f"{row['uses_per_epoch']:.1f}")
            rare = f"one batch in {1 / batches:.1f} epochs: its pictures always meet"
            told = rare if batches < 1 else ""
            cells.append((*map(str, sides), *counts, f"{batches:.2f}", told))
        lines = [tables.told(head, cells, right=range(6))]
        if self.partners:
            lines.append(f"beside each sample, one of {len(set(self.partners))} class pictures")
        if self.left_out:
            lines.append(f"{len(self.left_out)} pictures fit in no bucket and are left out")
        return "\n".join(lines)


def assign(
    source: Captioned, args: DataArgs, pixel_step: int, *, pair_regularisation: bool = False
) -> Plan:
    """Deals the samples of a source into buckets, as their recipes say.

    With R resolutions a picture is used at one of them in each epoch, sample i at number
    (i + epoch) mod R: an epoch stays as long as with one resolution and mixes all of them, and R
    epochs show every picture at each. A picture that a resolution would enlarge by more than
    `--max_upscale` takes turns among the others, or is left out if there is none.

    Args:
        source: verified, where aspects or `--max_upscale` matter: it must know its pictures' sizes.
        pixel_step: the sides that the model takes are multiples of it.
        pair_regularisation: regularisation samples do not stand in the rounds but are partners of
            the others; one that any size would enlarge too much is left out.

    Raises:
        UserError: a size is not a multiple of `pixel_step`, the limits leave no bucket, or all
            partners are left out.
        ValueError: the pictures' sizes are needed and not known.
    """
    ladders = [_ladder(recipe, args, pixel_step) for recipe in source.recipes]
    limit = args.max_upscale or math.inf
    if not source.sizes and (args.max_upscale or any(r.aspect_buckets for r in source.recipes)):
        raise ValueError("aspect buckets and --max_upscale need a source that was verified")
    pictures = source.sizes or [(1, 1)] * len(source)  # any size will do where none matters
    recipes = [source.recipe(index) for index in range(len(source))]
    paired = [pair_regularisation and recipe.is_regularisation for recipe in recipes]

    @cache  # pictures of one camera share their buckets
    def buckets_of(recipe: int, picture: Size) -> list[Size]:
        """The picture's bucket at each resolution."""
        return [nearest(picture, sizes) for sizes in ladders[recipe]]

    rounds: list[dict[Size, list[int]]] = [{} for _ in range(math.lcm(*map(len, ladders)))]
    left_out: list[tuple[int, str]] = []
    for index in (i for i in range(len(source)) if not paired[i]):
        picture = pictures[index]
        sizes = buckets_of(source.recipe_of[index], picture)
        fitting = [size for size in sizes if enlargement(picture, size) <= limit]
        if not fitting:
            least = min(enlargement(picture, size) for size in sizes)
            left_out.append((index, _too_small(picture, least, limit)))
            continue
        for epoch, members in enumerate(rounds):
            size = fitting[(index + epoch) % len(fitting)]
            members.setdefault(size, []).extend([index] * recipes[index].repeats)

    every_size = {size for members in rounds for size in members}
    partners: list[int] = []
    for index in (i for i in range(len(source)) if paired[i]):
        most = max((enlargement(pictures[index], size) for size in every_size), default=0.0)
        if most <= limit:
            partners += [index] * recipes[index].repeats
        else:
            left_out.append((index, _too_small(pictures[index], most, limit)))
    if any(paired) and not partners:
        raise UserError(
            f"no regularisation picture is large enough for --max_upscale {limit}: "
            f"{left_out[-1][1]}"
        )
    return Plan(
        rounds=tuple({size: tuple(some) for size, some in one.items()} for one in rounds),
        partners=tuple(partners),
        left_out=tuple(sorted(left_out)),
    )


def bucket_sizes(resolution: int, step: int, low: int, high: int) -> list[Size]:
    """The buckets of one resolution R, all of about R * R pixels.

    The square is the multiple of the step nearest to R. For every longer side L that is a multiple
    of the step, the short side is the multiple nearest to R * R / L; both orientations are taken,
    as long as the sides lie within [low, high]. So no bucket has more pixels than R * R and one
    strip as wide as the step along a side; all but the square keep to half a strip, up and down.

    Returns:
        Sizes sorted from the tallest to the widest; empty if the limits leave none.
    """
    middle = max(1, round(resolution / step)) * step
    found = {(middle, middle)}
    for long in range(middle + step, high + 1, step):
        short = round(resolution**2 / long / step) * step
        if short < long:
            found |= {(long, short), (short, long)}
    fitting = (size for size in found if low <= min(size) and max(size) <= high)
    return sorted(fitting, key=lambda size: (size[1] / size[0], size))


def nearest(picture: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect is nearest to the picture's on a logarithmic scale.

    Of sizes that are equally near the largest is taken, then the tallest.
    """
    height, width = picture

    def key(size: Size) -> tuple[float, int, int]:
        # |log a - log b| grows with the ratio of the larger to the smaller, and one division of
        # whole numbers rounds in the same way everywhere, which a logarithm does not.
        one, other = height * size[1], width * size[0]
        return max(one, other) / min(one, other), -size[0] * size[1], -size[0]

    return min(sizes, key=key)


def enlargement(picture: Size, size: Size) -> float:
    """The factor by which a picture is resized to cover a size; above 1 it is blown up."""
    return max(size[0] / picture[0], size[1] / picture[1])


def _ladder(recipe: Recipe, args: DataArgs, pixel_step: int) -> list[list[Size]]:
    """The sizes that a recipe's pictures may have at each of its resolutions."""
    if not recipe.aspect_buckets:
        sizes = [(recipe.height or r, recipe.width or r) for r in recipe.resolution]
        for height, width in sizes:
            check_multiple("--height" if recipe.height else "--resolution", height, pixel_step)
            check_multiple("--width" if recipe.width else "--resolution", width, pixel_step)
        return [[size] for size in sizes]
    return [_buckets(resolution, args, pixel_step) for resolution in recipe.resolution]


def _buckets(resolution: int, args: DataArgs, pixel_step: int) -> list[Size]:
    fine = resolution < 256 or DEFAULT_STEP % pixel_step
    step = args.bucket_step or (pixel_step if fine else DEFAULT_STEP)
    check_multiple("--bucket_step", step, pixel_step)
    low, high = args.bucket_min or resolution // 2, args.bucket_max or resolution * 2
    sizes = bucket_sizes(resolution, step, low, high)
    if not sizes:
        raise UserError(
            f"no bucket of resolution {resolution} has sides from {low} to {high} px in steps of "
            f"{step}: change --bucket_min, --bucket_max or --bucket_step"
        )
    return sizes


def check_multiple(flag: str, pixels: int, step: int) -> None:
    """Refuses a side that the model does not take.

    Raises:
        UserError: naming the flag and the nearest side that it takes.
    """
    if pixels % step:
        nearest_multiple = max(1, round(pixels / step)) * step
        raise UserError(
            f"{flag} {pixels} is not a multiple of {step}, the step of this model's sizes; the "
            f"nearest is {nearest_multiple}"
        )


def _too_small(picture: Size, scale: float, limit: float) -> str:
    height, width = picture
    return f"{width} x {height} px, to be enlarged {scale:.2f} times (--max_upscale {limit})"
