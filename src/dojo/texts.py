"""Captions and prompts as embeddings: made once and read from disk, or made at every use."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dojo import data, sd3
from dojo.training import Run, used_memory_gib


@dataclass
class Texts:
    """What the transformer reads in place of texts; made by `prepare`."""

    lookup: Callable[[Sequence[str]], Mapping[str, Tensor]]
    """the cache, or the encoders themselves"""
    encoders: sd3.TextEncoders | None
    """the text encoders, where CLIP is in training"""
    args: sd3.TextArgs
    device: torch.device

    def __call__(
        self, captions: Sequence[str], cached: Mapping[str, Tensor] | None = None
    ) -> sd3.Embeds:
        """`prompt_embeds` and `pooled_prompt_embeds` of captions, on the device.

        The empty caption follows `--uncond`.

        Args:
            cached: the cache's rows, where they have been read already.
        """
        cached = cached or self.lookup(captions)
        embeds = {name: value.to(self.device) for name, value in cached.items()}
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
) -> Texts:
    """Fills the cache, loading the text encoders only if something is missing, and frees them.

    Args:
        groups: texts that are cached together; the first group's shards do not hang on the second.
        train_clip: keep the two CLIPs, which will be trained; T5 is freed as ever.
    """
    encoders: sd3.TextEncoders | None = None

    def load_encoders(*, with_t5: bool = True) -> sd3.TextEncoders:
        nonlocal encoders
        if encoders is None:
            encoders = sd3.TextEncoders.load(
                config, model, args, run.dtype, run.device, with_t5=with_t5
            )
        return encoders

    with run.phase("cache"):
        if cache.no_cache_text_embeddings:
            lookup = load_encoders()
        else:
            settings = {
                "encoders": config.fingerprint(sd3.TEXT_FOLDERS),
                "dtype": str(run.dtype),
                "max_sequence_length": model.max_sequence_length,
                "t5_padding": args.t5_padding,
            }
            lookup = data.cache_text(
                groups,
                load_encoders,
                cache.latent_cache_dir,
                settings,
                sample_bytes=config.text_numbers(model.max_sequence_length) * run.dtype.itemsize,
                **run.share,
            )
        run.accelerator.wait_for_everyone()
    live = load_encoders(with_t5=False) if train_clip else None
    if live is not None and lookup is not live:
        live.free_t5()
    before = used_memory_gib(run.device)
    was_loaded = encoders is not None
    encoders = None
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)  # the training's peak, not the encoders'
    if was_loaded and not isinstance(lookup, sd3.TextEncoders):
        after = used_memory_gib(run.device)
        kept = "T5" if live is not None else "text encoders"
        run.say(f"{kept} freed: {before:.2f} GiB of memory in use before, {after:.2f} GiB after")
    return Texts(lookup, live, args, run.device)
