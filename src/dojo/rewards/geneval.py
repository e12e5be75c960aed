"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): are the objects of the prompt in the picture, in
their number, colours and positions? A detector finds the objects, CLIP names their colours.

A prompt's row holds what it asks for, as in GenEval's own evaluation_metadata.jsonl:

    {"prompt": "a photo of a cat left of a red bus", "tag": "position",
     "include": [{"class": "bus", "count": 1, "color": "red"},
                 {"class": "cat", "count": 1, "position": ["left of", 0]}],
     "exclude": [{"class": "cat", "count": 3}]}

The position is relative to the objects of the clause with that number. All of "include" must
hold: the `count` most certain objects of a class are looked at, more may be there. Of a class in
"exclude" fewer than `count` must be there.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.cli import UserError
from dojo.lazy import no_grad, torch
from dojo.rewards import weights
from dojo.rewards.clip import CLIP_L, HubClip, backbone
from dojo.rewards.mask2former import Found, Mask2Former
from dojo.rewards.scorer import Metadata, Place, Scorer, unread

if TYPE_CHECKING:
    from torch import Tensor

DETECTOR = "mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
THRESHOLD, COUNTING = 0.3, 0.9  # of a detection's score; the second where the tag is counting
MOST = 16  # objects of one class
SLACK = 0.1  # of the sizes of two objects: how far apart counts as the same place
BACKGROUND = 0x99 / 255  # around an object whose colour is asked for

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
RELATIONS = ("left of", "right of", "above", "below")
# The 80 classes of COCO in their order, by GenEval's names.
CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace(
        "\n    ", " "
    ).split(", ")
)

Box = tuple[float, float, float, float]
Colours = Callable[[Sequence[Found], str], Sequence[str]]
"""from objects of a class, and its name, to the names of their colours"""


# -- what a prompt asks for -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Clause:
    """One kind of object that a prompt asks for."""

    name: str
    """of its class"""
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """relation to the objects of an earlier clause, and that clause's number"""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a prompt asks for."""

    include: tuple[Clause, ...]
    exclude: Mapping[str, int]
    """by class, how many are too many"""
    threshold: float
    """of a detection's score"""


def wanted(row: Mapping[str, Any]) -> Wanted:
    """What a prompt's row asks for.

    Raises:
        ValueError: it is not of the form that is described above.
    """
    include = [_clause(entry, i) for i, entry in enumerate(_list(row, "include"))]
    exclude = [_clause(entry, 0) for entry in _list(row, "exclude")]
    if not include and not exclude:
        raise ValueError("its row has neither include nor exclude, as GenEval's metadata has them")
    return Wanted(
        include=tuple(include),
        exclude={one.name: one.count for one in exclude},
        threshold=COUNTING if row.get("tag") == "counting" else THRESHOLD,
    )


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    """A list in a row; tables without nested values hold it as JSON."""
    value = row.get(name) or []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{name} is no JSON") from None
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    return value


def _clause(entry: Any, number: int) -> Clause:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{entry!r} is no clause of GenEval's metadata")
    name, count, color = entry.get("class"), entry.get("count"), entry.get("color")
    if name not in CLASSES:
        raise ValueError(f"{name!r} is none of the 80 classes of COCO in GenEval's spelling")
    if not isinstance(count, int) or count is True or count < 1:
        raise ValueError(f"the count of {name} is {count!r}, not a number of objects")
    if color is not None and color not in COLORS:
        raise ValueError(f"{color!r} is none of the colours {', '.join(COLORS)}")
    position = entry.get("position")
    if position is None:
        return Clause(name=name, count=count, color=color)
    match position:
        case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < number:
            return Clause(name=name, count=count, color=color, position=(relation, target))
        case _:
            raise ValueError(
                f"the position of {name} is {position!r}, not one of {', '.join(RELATIONS)} and "
                "the number of an earlier clause"
            )


# -- is it there ------------------------------------------------------------------------------


def judge(wanted: Wanted, found: Sequence[Found], colours: Colours) -> tuple[bool, float]:
    """Whether everything holds, and how much of it.

    How much is the mean over clauses, each the mean of its parts: the share of the wanted number
    (or less by a share for every object too many, where the class is in "exclude"), the share of
    those objects with the right colour, and the share of pairs in the right position. It is 1
    exactly where everything holds.

    Args:
        found: all objects above the threshold, the most certain first.
    """
    objects = [
        [one for one in found if CLASSES[one.label] == clause.name][:MOST]
        for clause in wanted.include
    ]
    first = [some[: clause.count] for clause, some in zip(wanted.include, objects, strict=True)]
    clauses: list[list[float]] = []
    for clause, some, best in zip(wanted.include, objects, first, strict=True):
        parts = [_number(len(some), clause.count, wanted.exclude.get(clause.name))]
        if clause.color is not None:
            right = list(colours(best, clause.name)).count(clause.color) if best else 0
            parts.append(right / clause.count)
        if clause.position is not None:
            relation, target = clause.position
            pairs = [(a.box, b.box) for a in best for b in first[target]]
            right = sum(relation in relations(a, b) for a, b in pairs)
            parts.append(right / len(pairs) if pairs else 0.0)
        clauses.append(parts)
    for name in wanted.exclude.keys() - {clause.name for clause in wanted.include}:
        there = sum(CLASSES[one.label] == name for one in found)
        clauses.append([_number(min(there, MOST), 0, wanted.exclude[name])])
    holds = all(part == 1 for parts in clauses for part in parts)
    return holds, sum(sum(parts) / len(parts) for parts in clauses) / len(clauses)


def _number(there: int, count: int, too_many: int | None) -> float:
    """1 from `count` on and below `too_many`, and less by a share of `count` for each object that
    is missing or too many."""
    missing = max(0, count - there)
    excess = 0 if too_many is None else max(0, there - too_many + 1)
    return max(0.0, 1 - (missing + excess) / max(1, count))


def relations(a: Box, b: Box) -> set[str]:
    """Where box a is, seen from box b: none, one or two of RELATIONS.

    The distance of their middles, less a share of both sizes in each direction, must be more than
    half of the whole distance in a direction to count.
    """
    offset = torch.tensor([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]).double() / 2
    sizes = torch.tensor([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]]).double()
    beyond = (offset.abs() - SLACK * sizes).clamp(min=0) * offset.sign()
    if (beyond.abs() < 1e-3).all():
        return set()
    x, y = (beyond / offset.norm()).tolist()
    held = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, holds in zip(RELATIONS, held, strict=True) if holds}


# -- colours ----------------------------------------------------------------------------------


def cut_out(image: Tensor, one: Found) -> Tensor:
    """An object's box [1, 3, h, w] out of a picture [3, H, W], the rest of it grey."""
    left, top, right, bottom = one.box
    alone = torch.where(one.mask, image, BACKGROUND)
    return alone[None, :, top:bottom, left:right]


def name_colours(clip: HubClip, image: Tensor, some: Sequence[Found], name: str) -> list[str]:
    """The colour of each object of a class, by CLIP's words for it.

    Args:
        image: [3, H, W] in [0, 1].
    """
    texts = [template.format(color, name) for color in COLORS for template in TEMPLATES]
    words = clip.texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(dim=1)
    words = torch.nn.functional.normalize(words, dim=-1)
    named: list[str] = []
    for one in some:
        embed = clip.pictures(cut_out(image, one), "torchvision")
        named.append(COLORS[int((embed @ words.T).argmax())])
    return named


# -- the scorers ------------------------------------------------------------------------------


class _Judge:
    """Detector and CLIP at work; both scorers ask the same one, and about the same pictures."""

    def __init__(self, detector: Mask2Former, clip: HubClip) -> None:
        self.detector, self.clip = detector, clip
        self._last: tuple[weakref.ref[Tensor], list[Any], list[tuple[float, float]]] | None = None

    def __call__(
        self, images: Tensor, rows: Sequence[Mapping[str, Any]]
    ) -> list[tuple[float, float]]:
        """Whether everything holds (0 or 1) and how much, for each picture; NaN without a score."""
        last, asked = self._last, [dict(row) for row in rows]
        if last is not None and last[0]() is images and last[1] == asked:
            return last[2]
        # One picture after the other: what is found must not hang on the others.
        verdicts = [self._one(image, row) for image, row in zip(images, asked, strict=True)]
        self._last = (weakref.ref(images), asked, verdicts)
        return verdicts

    @no_grad
    def _one(self, image: Tensor, row: Mapping[str, Any]) -> tuple[float, float]:
        try:
            what = wanted(row)
        except ValueError:
            return torch.nan, torch.nan

        def colours(some: Sequence[Found], name: str) -> list[str]:
            return name_colours(self.clip, image, some, name)

        holds, share = judge(what, self.detector(image, what.threshold), colours)
        return float(holds), share


def _file(model: str) -> Path:
    """The detector's file.

    Raises:
        UserError: it is not there, with the way to get the usual one.
    """
    try:
        return weights.file(model)
    except UserError as error:
        if model != DETECTOR:
            raise
        fetch = "python -m dojo.download geneval-detector"
        raise UserError(f"{error}; fetch it with `{fetch}`") from error


class GenEval(Scorer):
    """1 where everything that the prompt asks for is there, else 0: the benchmark's own verdict.

    Options: `model` is the file with mmdetection's weights, `clip` the CLIP that names colours.
    """

    range = "0 or 1"
    checkpoint = f"{DETECTOR} and CLIP-L; never compared with mmdetection's own results"
    places = ("model", "clip")
    size = "0.3 and 1.7 GB"
    licence = "Apache-2.0; MIT (code of CLIP)"
    dense = False

    def __init__(self, place: Place, *, model: str = DETECTOR, clip: str = CLIP_L) -> None:
        super().__init__(place)
        file = str(_file(model))
        self.detector = place.share(("mask2former", file), lambda: Mask2Former(file, place))
        self.clip = backbone(clip, place)
        self.judge = place.share(
            ("geneval", file, weights.locate(clip)), lambda: _Judge(self.detector, self.clip)
        )

    def cannot_score(self, prompt: str, row: Mapping[str, Any]) -> str:
        return unread(wanted, row)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> list[float]:
        verdicts = self.judge(images, metadata or [{}] * len(prompts))
        return [verdict[self.dense] for verdict in verdicts]


class GenEvalDense(GenEval):
    """How much of it is there, for training; see `judge`."""

    range = "0 to 1"
    dense = True
