"""Preference pairs labelled anew by a model: the picture with the higher score wins (AI feedback).

The model comes as a callable, so that nothing here knows rewards. Scores lie in the cache in shards
(see `shards`), by picture and caption: a run that is killed goes on where it was, and other runs
with the same model find what was scored.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dojo import files
from dojo.cli import UserError
from dojo.data.images import READER, Size
from dojo.data.pairs.pairs import Pair, Pairs
from dojo.data.shards import Shards, cache_folder, describe
from dojo.lazy import safetensors_torch, torch

_DECODERS = 4  # threads that read pictures

Score: TypeAlias = "Callable[[torch.Tensor, Sequence[str]], tuple[torch.Tensor, torch.Tensor]]"
"""Whole pictures of one size (float32 [B, 3, H, W] in [0, 1]) and their captions to scores (float32
[B]) and whether they are valid (bool [B])."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the model chose."""

    pairs: Pairs
    """Those with a preference, the winner being the model's choice."""
    num_flipped: int
    """Pairs of which the model prefers the picture that came second in its row."""
    num_equal: int
    """Pairs dropped because both pictures have the same score."""
    num_invalid: int
    """Pairs dropped because a picture has no valid score."""

    @property
    def description(self) -> str:
        """For the screen."""
        return (
            f"{len(self.pairs):,} pairs chosen by the model, {self.num_flipped:,} of them against "
            f"the order of their row; dropped: {self.num_equal:,} of equal scores, "
            f"{self.num_invalid:,} without a valid score"
        )


def relabel(
    pairs: Pairs,
    load_score: Callable[[], Score],
    path: Path,
    root: Path,
    settings: Mapping[str, object],
    *,
    process: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Choice:
    """Lets a model choose the winner of every pair; each picture is scored once for each caption.

    The processes share the work, and all return the same.

    Args:
        pairs: checked.
        load_score: makes the model; called only if a score is missing.
        path: of a table of the choices, written whole: image_0 (the first of its row), image_1,
            caption, score_0, score_1, label_0 (1 where image_0 wins, 0 where image_1 does, 0.5
            where the scores are equal, empty where one is not valid).
        root: folder of the caches.
        settings: what the scores depend on besides pictures and captions: the model.
        wait: returns when all processes have called it.

    Raises:
        UserError: no pair is left.
    """
    found = _scores(pairs, load_score, root, settings, process, num_processes, wait)
    kept: list[Pair] = []
    rows: list[tuple[str, ...]] = []
    num_flipped = num_equal = num_invalid = 0
    for pair in pairs.pairs:
        first, second = (found[index, pair.caption] for index in pair[:2])
        if first is None or second is None:
            label = ""
            num_invalid += 1
        elif first == second:
            label = "0.5"
            num_equal += 1
        elif first > second:
            label = "1"
            kept.append(pair)
        else:
            label = "0"
            num_flipped += 1
            kept.append(pair._replace(winner=pair.loser, loser=pair.winner))
        names = (pairs.pictures.names[index] for index in pair[:2])
        # Nine digits tell any two numbers of float32 apart.
        scores = ("" if score is None else f"{score:.9g}" for score in (first, second))
        rows.append((*names, pair.caption, *scores, label))
    if process == 0:
        _write(path, rows)
    if not kept:
        raise UserError(
            f"--choice_model prefers no picture of {len(pairs):,} pairs: {num_equal:,} have equal "
            f"scores, {num_invalid:,} no valid score; see {path}"
        )
    return Choice(
        pairs=pairs.with_pairs(kept),
        num_flipped=num_flipped,
        num_equal=num_equal,
        num_invalid=num_invalid,
    )


def _scores(
    pairs: Pairs,
    load_score: Callable[[], Score],
    root: Path,
    settings: Mapping[str, object],
    process: int,
    num_processes: int,
    wait: Callable[[], None],
) -> dict[tuple[int, str], float | None]:
    """The score of each picture for each caption that it stands with; None where none is valid."""
    uses = list(dict.fromkeys((index, pair.caption) for pair in pairs.pairs for index in pair[:2]))
    settings = {**settings, "reader": READER}
    folder = cache_folder(root, "choice", settings)
    ids = [json.dumps([pairs.pictures.ids[index], caption]) for index, caption in uses]
    shards = Shards(folder, ids)
    if process == 0 and shards.missing():
        describe(folder, settings)
    score = cache(load_score)

    def make(members: Sequence[int]) -> dict[str, torch.Tensor]:
        return _scored(pairs, score(), [uses[member] for member in members])

    shards.fill(make, title="choosing", process=process, num_processes=num_processes)
    wait()
    found: dict[tuple[int, str], float | None] = {}
    for shard, members in enumerate(shards.members):
        stored = safetensors_torch.load_file(shards.path(shard))
        numbers, valid = stored["score"].tolist(), stored["valid"].tolist()
        for member, number, good in zip(members, numbers, valid, strict=True):
            found[uses[member]] = number if good else None
    return found


def _scored(pairs: Pairs, score: Score, uses: Sequence[tuple[int, str]]) -> dict[str, torch.Tensor]:
    """The tensors of one shard; pictures of the same size are scored together."""
    with ThreadPoolExecutor(_DECODERS) as pool:
        pictures = list(pool.map(pairs.pictures.read, [index for index, _ in uses]))
    by_size: dict[Size, list[int]] = {}
    for place, picture in enumerate(pictures):
        by_size.setdefault((picture.height, picture.width), []).append(place)
    scores, valid = torch.zeros(len(uses)), torch.zeros(len(uses), dtype=torch.bool)
    for (height, width), places in by_size.items():
        # About eight megapixels at a time: 32 pictures of 512 px, 8 of 1024 px.
        chunk = max(1, 2**23 // (height * width))
        for start in range(0, len(places), chunk):
            some = places[start : start + chunk]
            pixels = torch.stack(
                [torch.from_numpy(np.array(pictures[place])).permute(2, 0, 1) for place in some]
            )
            numbers, good = score(pixels.float() / 255, [uses[place][1] for place in some])
            numbers, good = numbers.detach().float().cpu(), good.cpu()
            scores[some], valid[some] = numbers, good & numbers.isfinite()
    return {"score": scores, "valid": valid}


def _write(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with files.whole(path) as binary:
        # Names that are not UTF-8 and halves of characters, which JSON may hold, show their bytes.
        text = io.TextIOWrapper(binary, "utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text)
        writer.writerow(["image_0", "image_1", "caption", "score_0", "score_1", "label_0"])
        writer.writerows(rows)
        text.detach()
