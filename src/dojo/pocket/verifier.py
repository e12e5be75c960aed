"""Reads a pocket picture back and says how much of its caption holds.

`read` finds the background and the objects: foreground is what differs from the background, an
object is a connected patch of it, its colour that of its fullest pixels, and its shape the one
whose template (`scenes.mask`, same area, same centre of mass) covers it best. On that stand

    strict(picture, spec)   does everything hold? for evaluation, as in GenEval (arXiv:2310.11513)
    graded(picture, spec)   partial credit in [0, 1] without steps or plateaus, for rewards

and `score` and `task_scores` for batches. Lengths are pixels of the 64x64 canvas, x to the right
and y downwards, colours RGB in [0, 255].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dojo.lazy import late, torch
from dojo.pocket import scenes
from dojo.pocket.scenes import CANVAS, Part, Spec

if TYPE_CHECKING:
    from scipy import ndimage
else:
    ndimage = late("scipy.ndimage")

ALL_SHAPES = scenes.SHAPES + scenes.NOVEL_SHAPES

# What `read` takes for an object at all, and what `strict` counts as one.
MIN_AREA = 12.0  # px^2
MIN_CONTRAST = 18.0  # distance from the background, RGB in [0, 255]
DEFINITE_AREA = 40.0  # px^2; the smallest thing that is ever drawn has about 145
DEFINITE_CONTRAST = 45.0  # the smallest that is ever drawn is 95, purple on gray
DEFINITE_OVERLAP = 0.6  # template IoU below which a patch has no shape by name
COLOR_LIMIT = 90.0  # farther than this from every palette colour is no colour by name
NOVEL_MARGIN = 0.03  # a novel shape must beat the known ones by this much IoU

# Widths of the graded terms: at this deviation half of the term's credit is left.
COLOR_WIDTH = 40.0
SIZE_WIDTH = 2.0  # px of radius
PLACE_WIDTH = 10.0  # px
RELATION_WIDTH = 6.0  # px
SHAPE_TEMPERATURE = 0.05  # of the softmax over template IoUs

PARTS_WEIGHT, COUNT_WEIGHT = 4.0, 1.0  # of the graded terms

_PALETTE = np.array(list(scenes.COLORS.values()), dtype=np.float32)  # [color, 3]
_ROWS, _COLUMNS = np.mgrid[:CANVAS, :CANVAS].astype(np.float32) + 0.5  # pixel centres


@functools.cache
def _soften() -> np.ndarray:
    """A Gaussian blur of 1.2 px along one axis as a matrix: the softness of a good VAE's edges."""
    blur: np.ndarray = ndimage.gaussian_filter1d(np.eye(CANVAS, dtype=np.float32), 1.2, axis=0)
    return blur


@dataclass(frozen=True)
class Found:
    """One object as read from a picture.

    Attributes:
        shape: the shape whose template fits best.
        color: the palette colour nearest to the object's own.
        size: "large" or "small", whichever radius is nearer.
        x: centre in pixels, in the sense of `scenes.Thing`.
        y: likewise, downwards.
        shape_scores: IoU in [0, 1] with each shape's template, sharp or soft, whichever fits
            better; novel shapes included. This decides `shape`.
        outline_scores: IoU with the sharp templates alone, which falls when edges blur.
        color_scores: closeness in (0, 1] to each palette colour; 1 is the colour itself.
        area: covered area in square pixels, edge pixels counted by their coverage.
        centroid: centre of mass (x, y) in pixels; a triangle's lies below its centre.
        contrast: distance of its colour from the background's, RGB in [0, 255].
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    shape_scores: dict[str, float]
    outline_scores: dict[str, float]
    color_scores: dict[str, float]
    area: float
    centroid: tuple[float, float]
    contrast: float

    @property
    def definite(self) -> bool:
        """Whether a person would count this as an object, rather than as a speck or a shade."""
        return self.area >= DEFINITE_AREA and self.contrast >= DEFINITE_CONTRAST

    @property
    def presence(self) -> float:
        """How much of an object it is, in [0, 1]: the smooth form of `definite`."""
        visible = min(1.0, max(0.0, (self.contrast - 15) / 65))  # full at 80
        return visible * (1 - math.exp(-((self.area / DEFINITE_AREA) ** 2)))


# ---- Reading a picture ----


def read(picture: np.ndarray) -> tuple[str, list[Found]]:
    """Reads a uint8 [64, 64, 3] picture: its background's name and its objects, largest first.

    Faint and tiny objects are reported too; `Found.definite` tells them apart.

    Raises:
        ValueError: the picture has another shape.
    """
    background, _, found = look(picture)
    return background, found


def look(picture: np.ndarray) -> tuple[str, np.ndarray, list[Found]]:
    """The background's name, its colour as it is in the picture, and the objects."""
    if picture.shape != (CANVAS, CANVAS, 3):
        raise ValueError(f"a pocket picture is [{CANVAS}, {CANVAS}, 3], not {picture.shape}")
    pixels = picture.astype(np.float32)
    background, ground = _ground(pixels)
    return background, ground, _objects(pixels, ground)


def _ground(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """The background's name and its colour as it is in this picture."""
    border = np.ones((CANVAS, CANVAS), dtype=bool)
    border[2:-2, 2:-2] = False
    names = list(scenes.BACKGROUNDS)
    colors = np.array([scenes.BACKGROUNDS[name] for name in names], dtype=np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - colors, axis=-1)  # [row, column, name]
    near = (distances < 60) & (distances == distances.min(axis=-1, keepdims=True))
    votes = near.sum(axis=(0, 1)) + 4 * near[border].sum(axis=0)  # the border weighs five-fold
    winner = int(votes.argmax())
    if near[..., winner].sum() >= CANVAS * CANVAS / 8:
        return names[winner], np.median(pixels[near[..., winner]], axis=0)
    ground = np.median(pixels[border], axis=0)  # no background of ours: what the border shows
    return names[int(np.linalg.norm(colors - ground, axis=-1).argmin())], ground


def _objects(pixels: np.ndarray, ground: np.ndarray) -> list[Found]:
    cover, contrast, nearest = _cover(pixels, ground)
    # Half of what is reached nearby: soft and pale objects keep their outline.
    solid = (cover > 0.5 * ndimage.maximum_filter(cover, size=21)) & (contrast > MIN_CONTRAST)
    patches = [
        part
        for patch in _components(solid, MIN_AREA)
        for part in _split_colors(patch, nearest, pixels)
    ]
    found: list[Found] = []
    for patch, reach in zip(patches, _reaches(patches), strict=True):
        whole = _measure(patch, reach, pixels, cover, ground)
        found += _split_touching(whole, patch, reach, pixels, cover, ground) or [whole]
    return sorted((item for item in found if item.area >= MIN_AREA), key=lambda item: -item.area)


def _cover(pixels: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of each pixel is paint, and of which palette colour.

    An edge pixel is a mixture of background and paint, so it belongs to the colour whose line
    from the background passes nearest, not to the colour that is nearest itself: a half-covered
    pixel of one colour often has the hue of another.

    Returns:
        The share of paint in [0, 1], the same as a distance from the background, and the index
        of the colour; each [64, 64].
    """
    lines = _PALETTE - ground  # [color, 3]
    lengths = np.maximum(np.linalg.norm(lines, axis=1), 1)
    along = (pixels - ground) @ lines.T / lengths  # [row, column, color]
    share = np.clip(along / lengths, 0, 1)
    reached = share * lengths
    # |offset - share * line|^2 for every colour, without the |offset|^2 that all have in common.
    error = reached**2 - 2 * reached * along
    error = ndimage.gaussian_filter(error, sigma=(1, 1, 0), truncate=2)
    nearest = error.argmin(axis=-1)
    pick = nearest[..., None]
    return (
        np.take_along_axis(share, pick, axis=-1)[..., 0],
        np.take_along_axis(reached, pick, axis=-1)[..., 0],
        nearest,
    )


def _components(mask: np.ndarray, min_area: float) -> list[np.ndarray]:
    """The connected patches (4 neighbours) of at least `min_area` pixels, as masks."""
    labels, _ = ndimage.label(mask)  # pyright: ignore[reportGeneralTypeIssues]
    areas = np.bincount(labels.ravel())
    return [labels == i for i in range(1, len(areas)) if areas[i] >= min_area]


def _split_colors(patch: np.ndarray, nearest: np.ndarray, pixels: np.ndarray) -> list[np.ndarray]:
    """Splits a patch in which objects of different colours touch."""
    cores: list[np.ndarray] = []
    for color in np.unique(nearest[patch]):
        # Erosion drops the thin seams of a third hue that blurred edges have.
        core = ndimage.binary_erosion(patch & (nearest == color))
        if core.sum() >= 8:
            cores.append(core)
    means = [pixels[core].mean(axis=0) for core in cores]
    # One object that wavers between two palette colours is still one object.
    if all(np.linalg.norm(a - b) < 60 for a, b in itertools.combinations(means, 2)):
        return [patch]
    return [part for share in _nearest_core(patch, cores) for part in _components(share, MIN_AREA)]


def _nearest_core(patch: np.ndarray, cores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Deals the pixels of a patch out to the nearest of several cores."""
    owner = np.stack([_distance_to(core) for core in cores]).argmin(axis=0)
    return [patch & (owner == i) for i in range(len(cores))]


def _reaches(patches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each patch with the edge pixels around it: within 2 px, and nearer to it than to others."""
    if not patches:
        return []
    distance = np.stack([_distance_to(patch) for patch in patches])
    owner = distance.argmin(axis=0)
    return [(owner == i) & (distance[i] <= 2.3) for i in range(len(patches))]


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """Distance in pixels from every pixel to the nearest one of the mask."""
    distance = ndimage.distance_transform_edt(~mask)
    assert isinstance(distance, np.ndarray)  # one array where no indices are asked for
    return distance


def _measure(
    patch: np.ndarray,
    reach: np.ndarray,
    pixels: np.ndarray,
    cover: np.ndarray,
    ground: np.ndarray,
) -> Found:
    """Colour, area, place and shape of one patch."""
    color = pixels[patch & (cover >= np.quantile(cover[patch], 0.75))].mean(axis=0)
    line = color - ground
    contrast = float(np.linalg.norm(line))
    # Coverage by the object's own colour, which may be paler or darker than the palette's.
    alpha = np.clip((pixels - ground) @ (line / max(contrast**2, 1e-6)), 0, 1)
    alpha = np.where(reach & (alpha > 0.08), alpha, 0)
    area = max(float(alpha.sum()), 1e-6)
    centroid = (float((alpha * _COLUMNS).sum()) / area, float((alpha * _ROWS).sum()) / area)
    shape_scores, outline_scores = _overlaps(alpha, area, centroid)
    color_scores = {
        name: closeness(float(np.linalg.norm(color - np.array(value))), COLOR_WIDTH)
        for name, value in scenes.COLORS.items()
    }
    shape = max(ALL_SHAPES, key=lambda name: shape_scores[name] - _handicap(name))
    x, y = _centre(shape, area, centroid)
    return Found(
        shape=shape,
        color=max(color_scores, key=color_scores.__getitem__),
        size=_size(radius(shape, area)),
        x=x,
        y=y,
        shape_scores=shape_scores,
        outline_scores=outline_scores,
        color_scores=color_scores,
        area=area,
        centroid=centroid,
        contrast=contrast,
    )


def _split_touching(
    whole: Found,
    patch: np.ndarray,
    reach: np.ndarray,
    pixels: np.ndarray,
    cover: np.ndarray,
    ground: np.ndarray,
) -> list[Found] | None:
    """Tries whether a patch of no shape is several of one colour grown together."""
    best = max(whole.shape_scores.values())
    if best > 0.8 or whole.area < 4 * DEFINITE_AREA:
        return None
    depth = _distance_to(~np.pad(patch, 1))[1:-1, 1:-1]
    for share in (0.4, 0.6, 0.8, 0.9):
        cores = _components(depth > share * depth.max(), 3)
        if len(cores) > 1:
            parts = _nearest_core(patch, cores)
            reaches = _nearest_core(reach, cores)
            found = [
                _measure(part, reached, pixels, cover, ground)
                for part, reached in zip(parts, reaches, strict=True)
            ]
            if sum(max(item.shape_scores.values()) for item in found) > (best + 0.1) * len(found):
                return found
    return None


# ---- Templates ----


@functools.cache
def _unit(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centre of mass lies below its centre."""
    radius = 11.0  # as drawn: `scenes.mask` draws a fraction of a pixel more than the outline
    cover = scenes.mask(shape, CANVAS / 2, CANVAS / 2, radius)
    below = float((cover * _ROWS).sum() / cover.sum()) - CANVAS / 2
    return float(cover.sum()) / radius**2, below / radius


def radius(shape: str, area: float) -> float:
    """Radius in pixels (`scenes.SIZES`) at which `shape` has this area."""
    return math.sqrt(area / _unit(shape)[0])


def _centre(shape: str, area: float, centroid: tuple[float, float]) -> tuple[float, float]:
    """Where a `shape` of this area and centre of mass has its centre."""
    return centroid[0], centroid[1] - _unit(shape)[1] * radius(shape, area)


def _overlaps(
    alpha: np.ndarray, area: float, centroid: tuple[float, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """IoU of a coverage map with every shape's template of the same area and centre of mass.

    Returns:
        The better of the sharp and the soft template, and the sharp one alone, by shape.
    """
    sharp = np.stack(
        [
            scenes.mask(shape, *_centre(shape, area, centroid), radius(shape, area))
            for shape in ALL_SHAPES
        ]
    )
    soft = _soften() @ sharp @ _soften().T
    outline = _iou(alpha, sharp)
    best = np.maximum(outline, _iou(alpha, soft))
    return (
        dict(zip(ALL_SHAPES, best.tolist(), strict=True)),
        dict(zip(ALL_SHAPES, outline.tolist(), strict=True)),
    )


def _iou(alpha: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Soft intersection over union of [64, 64] with each of [template, 64, 64]."""
    shared = np.minimum(alpha, templates).sum(axis=(1, 2))
    return shared / np.maximum(alpha.sum() + templates.sum(axis=(1, 2)) - shared, 1e-6)


def _handicap(shape: str) -> float:
    return NOVEL_MARGIN if shape in scenes.NOVEL_SHAPES else 0.0


def _size(radius: float) -> str:
    return min(scenes.SIZES, key=lambda name: abs(scenes.SIZES[name] - radius))


# ---- Strict: everything holds ----


def strict(picture: np.ndarray, spec: Spec) -> bool:
    """Whether everything that the caption says holds in a uint8 [64, 64, 3] picture.

    The number of objects must be exact: "a star" is one star and nothing else. What the caption
    leaves open (colour, size, place, background) is not checked.
    """
    background, found = read(picture)
    things = [item for item in found if item.definite]
    if spec.background not in (None, background):
        return False
    if len(things) != spec.num_objects:
        return False
    return any(
        all(
            _holds(things[i], part)
            for part, group in zip(spec.parts, groups, strict=True)
            for i in group
        )
        and _layout_holds(spec, middles(spec, things, groups))
        for groups in assignments(len(things), spec)
    )


def _holds(item: Found, part: Part) -> bool:
    """Whether an object is what a noun phrase asks for."""
    near = closeness(COLOR_LIMIT, COLOR_WIDTH)
    return (
        item.shape == part.shape
        and item.shape_scores[part.shape] >= DEFINITE_OVERLAP
        and (
            part.color is None
            or (item.color == part.color and item.color_scores[part.color] >= near)
        )
        and part.size in (None, item.size)
    )


def _layout_holds(spec: Spec, middles: Sequence[tuple[float, float]]) -> bool:
    if spec.relation:
        along, across = _displacement(spec.relation, middles)
        return along > 8 and along > abs(across)
    if spec.position:
        return _position(middles[0]) == spec.position
    return True


def _position(place: tuple[float, float]) -> str:
    """The named position nearest to a place in pixels."""
    return min(scenes.POSITIONS, key=lambda name: _distance(place, name))


def _distance(place: tuple[float, float], position: str) -> float:
    x, y = scenes.POSITIONS[position]
    return math.hypot(place[0] - CANVAS * x, place[1] - CANVAS * y)


def _displacement(relation: str, middles: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """How far the first part lies in the relation's direction from the second, and across it."""
    u, v = scenes.RELATIONS[relation]
    dx, dy = middles[0][0] - middles[1][0], middles[0][1] - middles[1][1]
    return u * dx + v * dy, u * dy - v * dx


def assignments(num_found: int, spec: Spec) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to deal found objects out to the parts; too few leave places empty."""
    counts = [part.count for part in spec.parts]
    if len(counts) == 1:
        for group in itertools.combinations(range(num_found), min(counts[0], num_found)):
            yield (group,)
        return
    first, second = counts
    total = min(num_found, first + second)
    for size in range(max(0, total - second), min(first, total) + 1):
        for group in itertools.combinations(range(num_found), size):
            rest = [i for i in range(num_found) if i not in group]
            for other in itertools.combinations(rest, total - size):
                yield group, other


def middles(
    spec: Spec, things: Sequence[Found], groups: Sequence[Sequence[int]]
) -> list[tuple[float, float]]:
    """The mean centre in pixels of each part's objects, taken as the shape that the part names."""
    middles: list[tuple[float, float]] = []
    for part, group in zip(spec.parts, groups, strict=True):
        centres = [_centre(part.shape, things[i].area, things[i].centroid) for i in group]
        if centres:
            xs, ys = zip(*centres, strict=True)
            middles.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return middles


# ---- Graded: partial credit ----


def graded(picture: np.ndarray, spec: Spec) -> float:
    """How much of the caption holds in a uint8 [64, 64, 3] picture, in [0, 1].

    A weighted mean of two terms, for the best assignment: the objects (shape, colour and size
    each) and their number. A layout or a background that is named and wrong takes half of it. Every
    term moves with the pixels and has a slope wherever it is below its best, so that two nearly
    alike pictures of one prompt hardly ever score the same. The number counts by how much there is
    to be seen, so that an empty picture earns nothing.

    What `strict` counts alike costs about alike: an object too many is shared among, one too few is
    missed, and an object of the wrong colour is hardly the one that was asked for. Otherwise a
    policy learns first to draw more of everything, or everything on white.
    """
    _, ground, found = look(picture)
    things = found[:8]
    needed = spec.num_objects
    number = sum(item.presence for item in found)
    count = closeness(number - needed, 1.0)
    credit = [[_credit(item, part) for part in spec.parts] for item in things]

    best = 0.0
    for groups in assignments(len(things), spec):
        pairs = [(i, k) for k, group in enumerate(groups) for i in group]
        presence = sum(things[i].presence for i, _ in pairs)
        shown = presence / needed
        parts = sum(credit[i][k] for i, k in pairs) / (needed + number - presence)
        total = PARTS_WEIGHT * parts + COUNT_WEIGHT * shown * count
        if spec.relation or spec.position:
            total *= 0.5 + 0.5 * layout(spec, middles(spec, things, groups))
        if spec.background:
            target = np.array(scenes.BACKGROUNDS[spec.background])
            distance = float(np.linalg.norm(ground - target))
            total *= 0.5 + 0.5 * closeness(distance, COLOR_WIDTH)
        best = max(best, total / (PARTS_WEIGHT + COUNT_WEIGHT))
    return best


def _credit(item: Found, part: Part) -> float:
    """How well an object is what a noun phrase asks for, in [0, 1]: all its terms together."""
    credit = item.presence * shape_credit(item, part.shape)
    if part.color:
        credit *= item.color_scores[part.color]
    if part.size:
        deviation = radius(part.shape, item.area) - scenes.SIZES[part.size]
        credit *= 0.3 + 0.7 * closeness(deviation, SIZE_WIDTH)
    return credit


def shape_credit(item: Found, shape: str) -> float:
    """Half for filling the shape's outline, half for fitting it better than any other shape."""
    return 0.5 * item.outline_scores[shape] + 0.5 * likeness(item, shape)


def likeness(item: Found, shape: str) -> float:
    """How much better an object fits a shape than any other, in [0, 1]."""
    powers = {
        name: math.exp((score - _handicap(name)) / SHAPE_TEMPERATURE)
        for name, score in item.shape_scores.items()
    }
    return powers[shape] / sum(powers.values())


def layout(spec: Spec, middles: Sequence[tuple[float, float]]) -> float:
    """How well position or relation hold, in [0, 1]."""
    if len(middles) < len(spec.parts):
        return 0.0
    if spec.relation:
        along, across = _displacement(spec.relation, middles)
        margin = (along - abs(across)) / RELATION_WIDTH  # 0 where `strict` draws its line
        near = 0.5 + 0.5 * margin / math.sqrt(1 + margin**2)
        far = min(1.0, max(0.0, (along - abs(across) / 2 + 40) / 60))  # keeps a slope far away
        return 0.6 * near + 0.4 * far
    if spec.position:
        return closeness(_distance(middles[0], spec.position), PLACE_WIDTH)
    return 1.0


def closeness(deviation: float, width: float) -> float:
    """1 at no deviation, 1/2 at `width`, and never quite flat beyond."""
    return 1 / (1 + (deviation / width) ** 2)


# ---- Batches ----


def score(images: torch.Tensor, prompts: Sequence[str], *, strict: bool) -> torch.Tensor:
    """Scores pictures against their captions: float32 [batch] on the CPU.

    Args:
        images: [batch, 3, height, width] in [0, 1]; other sizes than 64x64 are resized.
        prompts: one caption of the pocket grammar per picture.
        strict: 1 or 0 for everything or not everything right, else partial credit in [0, 1].

    Raises:
        ValueError: a caption is outside the grammar (the message names it), or the numbers of
            pictures and captions differ.
    """
    specs = specs_of(images, prompts)
    judge = _strict if strict else graded
    scores = [
        float(judge(picture, spec)) for picture, spec in zip(pictures(images), specs, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float32)


def specs_of(images: torch.Tensor, prompts: Sequence[str]) -> list[Spec]:
    """What the captions of a batch say; see `score`."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(
            f"{len(prompts)} captions need images [{len(prompts)}, 3, height, width], "
            f"not {list(images.shape)}"
        )
    return [scenes.parse(prompt) for prompt in prompts]


_strict = strict  # `score` has an argument of that name


def pictures(images: torch.Tensor) -> np.ndarray:
    """[batch, 3, height, width] in [0, 1] as uint8 [batch, 64, 64, 3]."""
    images = images.detach().float().cpu().clamp(0, 1)
    if images.shape[-2:] != (CANVAS, CANVAS):
        images = torch.nn.functional.interpolate(
            images, size=(CANVAS, CANVAS), mode="bilinear", antialias=True
        )
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def task_scores(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """The strict score of each task of `scenes.TASKS`, and "overall".

    A task's score is the share of its captions of which everything holds. "overall" is the mean
    of the task scores, as in GenEval (arXiv:2310.11513), and not of the captions: every task
    weighs the same, however many captions it has. Tasks without a caption are left out.
    """
    scores = score(images, prompts, strict=True).tolist()
    by_task: dict[str, list[float]] = {task: [] for task in scenes.TASKS}
    for prompt, value in zip(prompts, scores, strict=True):
        by_task[scenes.parse(prompt).task].append(value)
    means = {task: sum(values) / len(values) for task, values in by_task.items() if values}
    if means:
        means["overall"] = sum(means.values()) / len(means)
    return means
