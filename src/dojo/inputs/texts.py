"""Captions and prompts as embeddings: made once and read from disk, or made at every use."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dojo import data
from dojo.models import sd3, sd15, truncation
from dojo.models.folder import Embeds
from dojo.run import checkpoint
from dojo.run.run import Run, arithmetic, used_memory_gib

Lookup = Callable[[Sequence[str]], Mapping[str, Tensor]]
EncoderT = TypeVar("EncoderT", bound=Lookup)


@dataclass
class Texts:
    """What the network reads in place of texts; made by `prepare` and `prepare_sd15`."""

    lookup: Lookup
    """the cache, or the encoders themselves"""
    device: torch.device

    def __call__(
        self, captions: Sequence[str], cached: Mapping[str, Tensor] | None = None
    ) -> Embeds:
        """The embeddings of captions, by the name of the network's argument, on the device.

        Args:
            cached: the cache's rows, where they have been read already.
        """
        cached = cached or self.lookup(captions)
        return {name: value.to(self.device) for name, value in cached.items()}


@dataclass
class Sd3Texts(Texts):
    """The same for SD3, where CLIP may be in training; the empty caption follows `--uncond`."""

    encoders: sd3.TextEncoders | None
    """the text encoders, where CLIP is in training"""
    args: sd3.TextArgs

    def __call__(
        self, captions: Sequence[str], cached: Mapping[str, Tensor] | None = None
    ) -> Embeds:
        """`prompt_embeds` and `pooled_prompt_embeds` of captions, on the device."""
        embeds = super().__call__(captions, cached)
        if self.encoders is not None:
            embeds = sd3.with_live_clip(embeds, *self.encoders.clip(captions))
        if self.args.uncond == "zeros" and "" in captions:
            there = torch.tensor([caption != "" for caption in captions], device=self.device)
            embeds = {
                name: value * there.view(-1, *[1] * (value.dim() - 1))
                for name, value in embeds.items()
            }
        return embeds


def prepare(
    run: Run,
    config: sd3.Config,
    model: sd3.ModelArgs,
    args: sd3.TextArgs,
    cache: data.TextCacheArgs,
    groups: Sequence[Sequence[str]],
    *,
    train_clip: bool = False,
) -> Sd3Texts:
    """Fills the cache, loading the text encoders only if something is missing, and frees them.

    Args:
        groups: texts that are cached together; the first group's shards do not hang on the second.
        train_clip: keep the two CLIPs, which will be trained; T5 is freed as ever.
    """

    def load(*, with_t5: bool = True) -> sd3.TextEncoders:
        return sd3.TextEncoders.load(config, model, args, run.dtype, run.device, with_t5=with_t5)

    once = _Once(load)
    settings = {
        "encoders": config.fingerprint(sd3.TEXT_FOLDERS),
        "dtype": str(run.dtype),
        "max_sequence_length": model.max_sequence_length,
        "t5_padding": args.t5_padding,
    }
    numbers = config.text_numbers(model.max_sequence_length)
    lookup = _fill(run, cache, groups, once, settings, numbers)
    _tell_cut(run, cache, groups, settings, partial(sd3.readers, config, model))
    live = None
    if train_clip:
        live = once.loaded or load(with_t5=False)
        if lookup is not live:
            live.free_t5()
    _free(run, once, lookup, "text encoders" if live is None else "T5")
    return Sd3Texts(lookup, run.device, live, args)


def prepare_sd15(
    run: Run,
    config: sd15.Config,
    model: sd15.ModelArgs,
    cache: data.TextCacheArgs,
    groups: Sequence[Sequence[str]],
) -> Texts:
    """`prepare` for Stable Diffusion 1: `prompt_embeds` alone, and "" for no caption."""
    once = _Once(lambda: sd15.load_text_encoder(config, model, run.dtype, run.device))
    settings = {"encoders": config.fingerprint(sd15.TEXT_FOLDERS), "dtype": str(run.dtype)}
    lookup = _fill(run, cache, groups, once, settings, config.text_numbers)
    _tell_cut(run, cache, groups, settings, partial(sd15.readers, config))
    _free(run, once, lookup, "text encoder")
    return Texts(lookup, run.device)


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


class _Once(Generic[EncoderT]):
    """Loads encoders at the first call."""

    def __init__(self, load: Callable[[], EncoderT]) -> None:
        self._load = load
        self.loaded: EncoderT | None = None

    def __call__(self) -> EncoderT:
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


def _free(run: Run, once: _Once[EncoderT], lookup: Lookup, what: str) -> None:
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
