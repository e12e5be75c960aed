"""Captioned pictures beside a reward: the loss that the model was trained with before.

ReFL's second term (Xu et al. 2023, arXiv:2304.05977, Equation 5). It keeps the model from leaving
what pictures look like for what the reward likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dojo import data
from dojo.cli import UserError, option, ranges
from dojo.inputs.pictures import latents_of, refuse_inside
from dojo.lazy import torch
from dojo.models.family import Model
from dojo.run.run import Run

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True, kw_only=True)
class PretrainArgs:
    """Captioned pictures whose noise is predicted beside the reward; without them there is none."""

    pretrain_data_dir: str | None = option(None, incidental=True, common=True)
    """local folder of captioned pictures (metadata.csv or .jsonl, .txt files, parquet)"""
    pretrain_dataset_name: str | None = option(None, incidental=True)
    """hub id or local folder, the same otherwise"""
    pretrain_caption_column: str | None = None
    """column of the captions; unset is the first of text, caption, prompt that there is"""
    pretrain_weight: float = 1.0
    """weight of that loss; --grad_scale is the reward's"""

    def __post_init__(self) -> None:
        if self.pretrain_weight < 0:
            raise ValueError("--pretrain_weight must not be negative")
        if self.pretrain_data_dir and self.pretrain_dataset_name:
            raise ValueError("--pretrain_data_dir and --pretrain_dataset_name: give one of them")
        if not self.location:
            names = "pretrain_caption_column pretrain_weight"
            ranges.check_unread(self, names, "without pictures (--pretrain_data_dir)")

    @property
    def location(self) -> str:
        """Where the pictures are; empty without any."""
        return self.pretrain_data_dir or self.pretrain_dataset_name or ""

    @property
    def used(self) -> bool:
        """Whether there is such a loss."""
        return bool(self.location) and self.pretrain_weight > 0


@dataclass
class Pretraining:
    """The pictures, opened and checked."""

    source: data.Captioned
    plan: data.Plan
    args: data.DataArgs
    rows: data.Pictures | data.Latents | None = field(default=None)

    @property
    def fingerprint(self) -> str:
        """Identifies the pictures and their captions; a run resumes only with the same."""
        return data.digest([*self.source.ids, *(some[0] for some in self.source.captions)])

    @property
    def texts(self) -> list[str]:
        """Every caption once."""
        return sorted({some[0] for some in self.source.captions})

    def prepare(
        self,
        run: Run,
        model: Model,
        vae: AutoencoderKL,
        cache: data.CacheArgs,
    ) -> None:
        """Fills the cache of latents, where the options allow it: a collective."""
        pictures = data.Pictures(
            *(self.source, self.args, data.CaptionArgs()),
            seed=run.seed,
            latent_step=model.pixels_per_latent,
        )
        with run.phase("cache"):
            self.rows = latents_of(run, pictures, self.plan, vae, model, cache)
            run.accelerator.wait_for_everyone()

    def batches(self, run: Run, batch_size: int) -> Iterator[data.Batch]:
        """Batches of this process from where the run stands, without end."""
        assert self.rows is not None, "prepare comes first"
        order = data.Batches(
            self.plan,
            batch_size,
            seed=run.seed,
            first_batch=run.samples // (batch_size * run.accelerator.num_processes),
            **run.share,
        )
        return iter(
            torch.utils.data.DataLoader(self.rows, batch_sampler=order, collate_fn=data.collate)
        )


def open_pictures(
    run: Run, model: Model, args: PretrainArgs, cache: data.CacheArgs, size: data.Size
) -> Pretraining | None:
    """Finds and checks the pictures; None where there is no such loss.

    Raises:
        UserError: they cannot be read, or there are none.
    """
    if not args.used:
        return None
    height, width = size
    options = data.DataArgs(
        dataset_name=args.location,
        caption_column=args.pretrain_caption_column,
        resolution=(height,),
        width=width if width != height else None,
    )
    with run.accelerator.main_process_first():
        try:
            source = data.open_training(options)
        except UserError as error:
            raise UserError(f"--pretrain_data_dir: {error}") from error
        source, _ = data.checked(
            source,
            cache.latent_cache_dir,
            on_bad_sample="error",
            num_threads=2,
            progress=run.main,
        )
    refuse_inside(run.output_dir, args.location, "output_dir")
    run.say(f"pre-training loss: {source.description}, {len(source)} pictures")
    for line in data.told_notes(source):
        run.say(line)
    return Pretraining(source, data.assign(source, options, model.pixel_step), options)
