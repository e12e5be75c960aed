"""Captions and prompts as embeddings: made once and read from disk, or made at every use."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeAlias

from dojo import data
from dojo.lazy import no_grad, torch
from dojo.models import truncation
from dojo.models.family import Model, TextEncoders
from dojo.models.folders import Embeds
from dojo.run import checkpoint
from dojo.run.machine import arithmetic, on_threads, threads_beside, used_memory_gib
from dojo.run.run import Run

Lookup: TypeAlias = "Callable[[Sequence[str]], Mapping[str, torch.Tensor]]"


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
        self, captions: Sequence[str], cached: Mapping[str, torch.Tensor] | None = None
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
    device = device_of(run.device, model)
    settings = {
        "encoders": model.fingerprint(model.text_folders),
        "dtype": str(run.dtype),
        **precision_of(model),
        **model.text_settings,
    }
    live: TextEncoders | None = None
    with run.phase("cache"):
        if cache.no_cache_text_embeddings:
            live = model.load_text(run.dtype, device)
            lookup = _on_threads(threads_beside(run.device, device), live)
        else:
            run.check_shared(cache.latent_cache_dir, "--latent_cache_dir")
            lookup = _fill(run, model, device, cache, groups, settings)
        run.accelerator.wait_for_everyone()
    _tell_cut(run, cache, groups, settings, model.readers)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)  # the training's peak, not the encoders'
    if not trained:
        return Texts(lookup, run.device, model)
    live = live or model.load_text(run.dtype, device, whole=False)
    return Texts(lookup, run.device, model, live)


def live(model: Model, cache: data.TextCacheArgs) -> list[str]:
    """The text encoders that are on the device in training: all of them, or with a cache none."""
    return list(model.text_encoders) if cache.no_cache_text_embeddings else []


def encoded(
    run: Run, model: Model, dtype: torch.dtype, groups: Sequence[Sequence[str]]
) -> list[Embeds]:
    """The embeddings of some batches of texts, on the CPU, without a cache.

    As for a cache the encoders come one after another, where and in what `--text_encoder_device`
    and `--text_encoder_precision` say, and are freed.
    """
    loader = Loader(model, dtype, run.device, alone=False)
    said: list[Embeds] = [{} for _ in groups]
    for part in model.text_encoders:
        say = loader(part)
        said = [{**one, **say(texts)} for one, texts in zip(said, groups, strict=True)]
        del say
        let_go(run.device)
    made = [loader.join(one) for one in said]
    loader.joiner = None
    let_go(run.device)
    return [model.no_caption(one, texts) for one, texts in zip(made, groups, strict=True)]


def device_of(device: torch.device, model: Model) -> torch.device:
    """Where frozen text encoders compute, in a run on a device."""
    return torch.device("cpu") if model.args.text_encoder_device == "cpu" else device


def one_by_one(device: torch.device) -> bool:
    """Whether encoders on a device read captions by themselves.

    A batch rounds otherwise than a caption alone, which is what a pipeline encodes: on a CPU they
    come one by one, and a validation draws what demo.py draws to the pixel.
    """
    return device.type != "cuda"


def precision_of(model: Model) -> dict[str, str]:
    """What the settings of a cache say of `--text_encoder_precision`: nothing of the run's.

    Not the word alone, which meant LLM.int8's product once: those caches have other numbers.
    """
    precision = model.args.text_encoder_precision
    return {} if precision == "auto" else {"precision": f"{precision} weights"}


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


def _fill(
    run: Run,
    model: Model,
    device: torch.device,
    cache: data.TextCacheArgs,
    groups: Sequence[Sequence[str]],
    settings: Mapping[str, object],
) -> Lookup:
    """The cache, whole; the encoders come one after another, and the peak is the largest one.

    Args:
        settings: what the embeddings depend on.
    """
    alone = one_by_one(device)
    loader = Loader(model, run.dtype, run.device, alone=alone)
    threads = arithmetic(device, loader.threads)
    *earlier, last = model.text_encoders
    lookup = data.cache_text(
        groups,
        partial(loader, last),
        cache.latent_cache_dir,
        {**settings, **threads, **({"captions": "alone"} if alone else {})},
        turns=data.Turns(
            earlier=[(f"caching text: {part}", partial(loader, part)) for part in earlier],
            join=loader.join,
            let_go=partial(let_go, run.device),
        ),
        sample_bytes=model.text_numbers * run.dtype.itemsize,
        **run.share,
    )
    _free(run, loader, "text encoders" if earlier else "text encoder")
    return lookup


def _free(run: Run, loader: Loader, what: str) -> None:
    """Lets go of the encoder that was loaded last, and says what of the memory came back."""
    loaded, before = loader.joiner is not None, used_memory_gib(run.device)
    loader.joiner = None
    let_go(run.device)
    if loaded:
        after = used_memory_gib(run.device)
        run.say(f"{what} freed: {before:.2f} GiB of memory in use before, {after:.2f} GiB after")


class Loader:
    """Loads one encoder at a time; the last one of a model joins what all of them said.

    Args:
        device: where all else computes.
        alone: captions are read one by one.

    Attributes:
        threads: those of the CPU that the encoders compute on; None is as many as there are.
    """

    def __init__(
        self, model: Model, dtype: torch.dtype, device: torch.device, *, alone: bool
    ) -> None:
        own = device_of(device, model)
        self.threads = threads_beside(device, own)
        self._load = partial(model.load_text, dtype, own)
        self._last = model.text_encoders[-1]
        self._alone = alone
        self.joiner: TextEncoders | None = None

    def __call__(self, part: str) -> Lookup:
        """What the encoder of a folder says of captions, on the CPU."""
        encoders = self._load(only=part)
        if part == self._last:
            self.joiner = encoders

        @no_grad
        def say(captions: Sequence[str]) -> Embeds:
            return {name: one.cpu() for name, one in encoders.said(captions).items()}

        return _on_threads(self.threads, _one_by_one(say) if self._alone else say)

    def join(self, said: Mapping[str, torch.Tensor]) -> Embeds:
        """The embeddings, of what every encoder said."""
        assert self.joiner is not None, "the last encoder is loaded when all have spoken"
        with on_threads(self.threads):
            return self.joiner.joined(said)


def _on_threads(number: int | None, lookup: Lookup) -> Lookup:
    """The same embeddings, computed on so many threads of the CPU."""

    def threaded(captions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        with on_threads(number):
            return lookup(captions)

    return lookup if number is None else threaded


def _one_by_one(lookup: Lookup) -> Lookup:
    """The same embeddings, of which none has been computed beside another."""

    def each(captions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        rows = [lookup([caption]) for caption in captions]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    return each


def let_go(device: torch.device) -> None:
    """Gives memory back that nobody owns any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
