"""Captions and prompts as embeddings: made once and read from disk, or made at every use."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from dojo import data
from dojo.models import truncation
from dojo.models.family import Model, TextEncoders
from dojo.models.folders import Embeds
from dojo.run import checkpoint
from dojo.run.machine import arithmetic, used_memory_gib
from dojo.run.run import Run

Lookup = Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass
class Texts:
    """What the network reads in place of texts; made by `prepare`."""

    lookup: Lookup
    """the cache, or the encoders themselves"""
    device: torch.device
    model: Model
    encoders: TextEncoders | None = None
    """the text encoders, where some of them are in training"""

    def __call__(
        self, captions: Sequence[str], cached: Mapping[str, Tensor] | None = None
    ) -> Embeds:
        """The embeddings of captions, by the model's `embed_names`, on the device.

        Args:
            cached: the cache's rows, where they have been read already.
        """
        cached = cached or self.lookup(captions)
        embeds = {name: value.to(self.device) for name, value in cached.items()}
        if self.encoders is not None:
            embeds = self.encoders.refresh(embeds, captions)
        return self.model.no_caption(embeds, captions)


def prepare(
    run: Run,
    model: Model,
    cache: data.TextCacheArgs,
    groups: Sequence[Sequence[str]],
    *,
    trained: bool = False,
) -> Texts:
    """Fills the cache, loading the text encoders only if something is missing, and frees them.

    Args:
        groups: texts that are cached together; the first group's shards do not hang on the second.
        trained: keep the encoders that can be trained; the others are freed as ever.
    """
    once = _Once(partial(model.load_text, run.dtype, run.device))
    settings = {
        "encoders": model.fingerprint(model.text_folders),
        "dtype": str(run.dtype),
        **model.text_settings,
    }
    lookup = _fill(run, cache, groups, once, settings, model.text_numbers)
    _tell_cut(run, cache, groups, settings, model.readers)
    live: TextEncoders | None = None
    if trained:
        live = once.loaded or model.load_text(run.dtype, run.device, whole=False)
        if lookup is not live:
            live.free_others()
    what = "text encoders" if len(model.text_encoders) > 1 else "text encoder"
    _free(run, once, lookup, what if live is None else f"{what} that do not train")
    return Texts(lookup, run.device, model, live)


def _tell_cut(
    run: Run,
    cache: data.TextCacheArgs,
    groups: Sequence[Sequence[str]],
    settings: Mapping[str, object],
    load_readers: Callable[[], Sequence[truncation.Reader]],
) -> None:
    """Says which texts are longer than their encoders read, on the screen and in data_report.json.

    What was found is kept among the caches: to read a hundred thousand captions takes a while.

    Args:
        settings: what the tokens depend on, and more.
        load_readers: loads the tokenizers, without the encoders.
    """
    if not run.main:
        return
    texts = sorted({text for group in groups for text in group})
    words = [json.dumps(settings, sort_keys=True, default=str), *texts]
    kept = cache.latent_cache_dir / f"cut-{data.digest(words)}.json"
    try:
        found = truncation.Cut(**json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):  # none there, or damaged
        found = truncation.find_cut(texts, load_readers())
        data.write_json(kept, asdict(found))
    for line in found.told:
        run.say(line)
    path = run.output_dir / "data_report.json"
    report: dict[str, object] = {}
    with suppress(OSError, ValueError):  # reinforcement learning has none, and it may be damaged
        report = dict(json.loads(path.read_text(encoding="utf-8")))
    report |= found.report
    checkpoint.write_file(path, json.dumps(report, indent=1, ensure_ascii=False))


class _Once:
    """Loads encoders at the first call."""

    def __init__(self, load: Callable[[], TextEncoders]) -> None:
        self._load = load
        self.loaded: TextEncoders | None = None

    def __call__(self) -> TextEncoders:
        if self.loaded is None:
            self.loaded = self._load()
        return self.loaded


def _fill(
    run: Run,
    cache: data.TextCacheArgs,
    groups: Sequence[Sequence[str]],
    load: Callable[[], Lookup],
    settings: Mapping[str, object],
    numbers: int,
) -> Lookup:
    """The cache, whole, or the encoders where none is wanted.

    Args:
        settings: what the embeddings depend on.
        numbers: in the embeddings of one caption.
    """
    with run.phase("cache"):
        if cache.no_cache_text_embeddings:
            lookup = load()
        else:
            # A batch rounds otherwise than a caption alone, which is what a pipeline encodes: on a
            # CPU they come one by one, and a validation draws what demo.py draws to the pixel.
            alone = run.device.type != "cuda"
            lookup = data.cache_text(
                groups,
                (lambda: _one_by_one(load())) if alone else load,
                cache.latent_cache_dir,
                {**settings, **arithmetic(run.device), **({"captions": "alone"} if alone else {})},
                sample_bytes=numbers * run.dtype.itemsize,
                **run.share,
            )
        run.accelerator.wait_for_everyone()
    return lookup


def _one_by_one(lookup: Lookup) -> Lookup:
    """The same embeddings, of which none has been computed beside another."""

    def each(captions: Sequence[str]) -> Mapping[str, Tensor]:
        rows = [lookup([caption]) for caption in captions]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    return each


def _free(run: Run, once: _Once, lookup: Lookup, what: str) -> None:
    """Lets go of encoders that `lookup` does not need, and says what of the memory came back."""
    before = used_memory_gib(run.device)
    idle = once.loaded is not None and once.loaded is not lookup
    once.loaded = None
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)  # the training's peak, not the encoders'
    if idle:
        after = used_memory_gib(run.device)
        run.say(f"{what} freed: {before:.2f} GiB of memory in use before, {after:.2f} GiB after")
