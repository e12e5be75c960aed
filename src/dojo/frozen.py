"""What does not train: pictures to latents and captions to embeddings, once or at every use.

`prepare` does the frozen work before training where the options allow it, and frees the encoders;
the loop then asks `latents(batch)` and `text(captions)` without knowing which way was taken.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader

from dojo import checkpoint, data, sd3
from dojo.cli import UserError
from dojo.training import Run


@dataclass
class Sources:
    """The samples to train on, those held out, and what was left out when they were checked."""

    train: data.Captioned
    held_out: data.Captioned | None
    left_out: tuple[data.BadReport, ...] = ()

    def fingerprint(self, size: tuple[int, int]) -> str:
        """Identifies what is trained on: samples, captions, order, size."""
        words = [str(size), *self.train.ids, *self.train.captions]
        return hashlib.blake2b("\n".join(words).encode(), digest_size=8).hexdigest()

    def report(self) -> str:
        """The content of data_report.json."""
        counts = {"train": len(self.train), "held_out": len(self.held_out or ())}
        return json.dumps({**counts, "left_out": [asdict(row) for row in self.left_out]}, indent=1)


@dataclass
class Frozen:
    """The data sets and the frozen models' outputs for them."""

    train: data.Pictures | data.Latents
    held_out: data.Pictures | data.Latents | None
    vae: AutoencoderKL
    lookup: Callable[[Sequence[str]], Mapping[str, Tensor]]
    device: torch.device

    def latents(self, batch: data.Batch) -> data.Posterior:
        """Mean and std of a batch's posterior: float32 [B, C, h, w], unscaled, on the device."""
        mean, std = (
            (batch["mean"], batch["std"])
            if "mean" in batch
            else sd3.posterior(self.vae, batch["pixels"])
        )
        return mean.to(self.device).float(), std.to(self.device).float()

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` and `pooled_prompt_embeds` of captions, on the device."""
        return {name: value.to(self.device) for name, value in self.lookup(captions).items()}

    def loader(self, run: Run, batch_size: int, num_workers: int) -> DataLoader[data.Batch]:
        """Batches of this process from where the run stands, without end."""
        batches = data.Batches(
            len(self.train),
            batch_size,
            seed=run.seed,
            first_batch=run.samples // (batch_size * run.accelerator.num_processes),
            **run.share,
        )
        return DataLoader(
            self.train,
            batch_sampler=batches,
            collate_fn=data.collate,
            num_workers=num_workers,
            pin_memory=run.device.type == "cuda",
        )


def open_sources(run: Run, args: data.DataArgs, cache: data.CacheArgs) -> Sources:
    """Finds the samples and their captions; reads no picture. Rank 0 goes first (downloads)."""
    cache.check(args)
    with run.accelerator.main_process_first():
        source = data.open_source(args.location, args)
        train, held_out = data.split(
            source,
            eval_fraction=args.eval_fraction,
            seed=0,  # not the run's: runs with other seeds keep the same held-out pictures
            max_train_samples=args.max_train_samples,
        )
        if args.eval_data_dir:
            held_out = data.open_source(args.eval_data_dir, args)
    run.say(source.description)
    return Sources(train, held_out)


def check_samples(
    run: Run, sources: Sources, args: data.DataArgs, cache: data.CacheArgs
) -> Sources:
    """Decodes every picture once; bad ones stop the run or are left out, counted and reported."""
    root = cache.latent_cache_dir

    def check(source: data.Captioned) -> tuple[data.Captioned, list[data.BadReport]]:
        with run.accelerator.main_process_first():
            good, bad = data.checked(
                source,
                root,
                on_bad_sample=args.on_bad_sample,
                num_threads=max(2, args.dataloader_num_workers),
                progress=run.main,
            )
        return source.select(good), bad

    train, bad = check(sources.train)
    held_out = None
    if sources.held_out is not None:
        held_out, more = check(sources.held_out)
        bad = bad + more
    counts = f"{len(train)} to train on, {len(held_out or ())} held out"
    run.say(f"pictures: {counts}, {len(bad)} left out")
    for row in bad[:10]:
        run.say(f"  left out: {row.name}: {row.reason}")
    return Sources(train, held_out, tuple(bad))


def prepare(
    run: Run,
    sources: Sources,
    config: sd3.Config,
    model: sd3.ModelArgs,
    args: data.DataArgs,
    cache: data.CacheArgs,
    texts: Sequence[str],
) -> Frozen:
    """Fills the caches, loading the text encoders only if something is missing, and frees them.

    Args:
        texts: captions that are needed besides the samples': validation and negative prompts.
    """
    if run.main:
        checkpoint.write_file(run.output_dir / "data_report.json", sources.report())
    vae = sd3.load_vae(config, model, run.device)
    train = data.Pictures(sources.train, args, seed=run.seed, caption_dropout=cache.caption_dropout)
    # The held-out pictures are seen as they are.
    still = replace(args, random_flip=False, random_crop=False)
    held_out = (
        data.Pictures(sources.held_out, still, seed=run.seed, caption_dropout=0.0)
        if sources.held_out is not None
        else None
    )

    def cached(pictures: data.Pictures) -> data.Pictures | data.Latents:
        if cache.no_cache_latents:
            return pictures
        return data.cache_latents(
            pictures,
            lambda pixels: sd3.posterior(vae, pixels),
            cache.latent_cache_dir,
            {"vae": sd3.fingerprint(config.folder, ["vae"]), "dtype": model.vae_dtype},
            latent_shape=config.latent_shape(*args.size),
            **run.share,
        )

    def load_encoders() -> sd3.TextEncoders:
        return sd3.TextEncoders(config, model, run.dtype, run.device)

    with run.phase("cache"):
        train, held_out = cached(train), cached(held_out) if held_out else None
        captions = [*sources.train.captions, ""]
        others = [*texts, *(sources.held_out.captions if sources.held_out else [])]
        if cache.no_cache_text_embeddings:
            lookup = load_encoders()
        else:
            settings = {
                "encoders": sd3.fingerprint(config.folder, sd3.TEXT_FOLDERS),
                "dtype": str(run.dtype),
                "max_sequence_length": model.max_sequence_length,
            }
            lookup = data.cache_text(
                [captions, others],
                load_encoders,
                cache.latent_cache_dir,
                settings,
                sample_bytes=config.text_numbers(model.max_sequence_length) * run.dtype.itemsize,
                **run.share,
            )
        run.accelerator.wait_for_everyone()
    gc.collect()  # the encoders, if they were needed
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)  # the training's peak, not the encoders'
    if not len(train):
        raise UserError("there is nothing to train on")
    return Frozen(train, held_out, vae, lookup, run.device)
