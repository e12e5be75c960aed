"""Samples' ids: each one's name within its source, and what its picture and its mask contain.

Nothing of an id hangs on a time, an inode or the place of a folder, so a copied folder is the same
data: it trains to the same bits and finds what the caches hold.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from dojo.data.contents import Content, Remembered, file_origin, hashes
from dojo.data.sources.captioned import Captioned


def identified(
    source: Captioned, root: Path | None, *, num_threads: int = 2, progress: bool = False
) -> Captioned:
    """The same samples with whole ids: ``<name>|<hash of the content>``.

    Ids that are whole already stay. Of samples that are alike in all, from two sources or two rows,
    the later ones get a number, so that what one folder's cache holds is found again.

    Args:
        source: as it was opened; its ids may still end with the bar.
        root: folder of the caches, where hashes of files that do not change are remembered; None
            reads every file.
        num_threads: that read at a time.
        progress: show a bar while files are read.
    """
    places = [place for place, one in enumerate(source.ids) if one.endswith("|")]
    if not places:
        return source
    masked = [place for place in places if source.masks and source.masks[place]]
    jobs = [_picture(source, place) for place in places]
    jobs += [_mask(source.masks[place]) for place in masked]
    found = hashes(jobs, root, num_threads=num_threads, progress=progress)
    version = dict(zip(places, found[: len(places)], strict=True))
    for place, mask in zip(masked, found[len(places) :], strict=True):
        version[place] += f"+{mask}"
    ids: list[str] = []
    seen: Counter[str] = Counter()
    for place, one in enumerate(source.ids):
        alpha = "+alpha" if place in version and source.recipe(place).mask_from_alpha else ""
        whole = f"{one}{version.get(place, '')}{alpha}"
        seen[whole] += 1
        ids.append(whole if seen[whole] == 1 else f"{whole}#{seen[whole]}")
    return replace(source, ids=ids)


def _picture(source: Captioned, place: int) -> Content:
    store, row = source.store, source.rows[place]
    origin = store.origin(row) if isinstance(store, Remembered) else None
    return Content(origin, partial(store, row))


def _mask(path: str) -> Content:
    folder, name = str(Path(path).parent), Path(path).name
    return Content(file_origin(folder, name), partial(Path, path))
