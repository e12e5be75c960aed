"""The options of preference pairs; what they contradict is refused before anything is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from dojo.cli import UserError, option
from dojo.data.cache import CacheArgs
from dojo.data.images import Size
from dojo.data.options import DataArgs

CHOICE_MODELS: Mapping[str, str] = {"hps": "hpsv2.1", "aesthetics": "aesthetic"}
"""Familiar names of --choice_model (Diffusion-DPO's) that are spelled otherwise as rewards."""


@dataclass(frozen=True, kw_only=True)
class PairArgs:
    """Pairs of pictures for a caption, of which people or a model prefer one."""

    dataset_name: str | None = option(None, incidental=True, common=True)
    """Hub id or local folder: Pick-a-Pic's columns (jpg_0, jpg_1, label_0, caption) as parquet or
    save_to_disk, or pictures with metadata.csv, .jsonl or .parquet: image_0, image_1 and label_0 (1
    where image_0 is preferred, 0 where image_1 is, 0.5 for a tie), or images (a list, the best
    first), or images and scores (numbers, higher is better), and caption."""
    train_data_dir: str | None = option(None, incidental=True)
    """The same as dataset_name, under the name that other trainers use for local folders."""
    dataset_config_name: str | None = None
    """Configuration of a data set that has several."""
    dataset_split: str = "train"
    """Split of the data set, or sub-folder of a local folder (the folder itself if there is no
    sub-folder train)."""
    cache_dir: str | None = option(None, incidental=True)
    """Where downloaded data sets are kept. Default: the datasets library's own place."""
    caption_column: str | None = None
    """Column of the captions. Default: the first of caption, prompt, text that there is."""
    ranked_pairs: Literal["all", "best_worst"] = "all"
    """Pairs that a ranked list of pictures makes: all of different rank, or the best with the
    worst."""
    choice_model: str | None = None
    """Reward that chooses instead of the labels: aesthetic, clip, pickscore, hps, imagereward (in
    any case), or any that --list_rewards shows. Ties of the labels are then pairs like the others,
    and labels may be missing."""
    max_train_samples: int | None = option(None, incidental=True)
    """Train on the first N pairs only."""
    resolution: int = option(512, common=True)
    """Height and width in pixels that pictures are resized and cropped to."""
    height: int | None = None
    """Height in pixels, where it differs from resolution."""
    width: int | None = None
    """Width in pixels, where it differs from resolution."""
    random_crop: bool = False
    """Crop each picture at a random place instead of the centre."""
    no_hflip: bool = False
    """Never mirror pictures; without it half of the pairs are mirrored at random."""
    independent_flip: bool = False
    """Mirror the two pictures of a pair independently of each other, as Diffusion-DPO's code does,
    instead of both alike."""
    proportion_empty_prompts: float = 0.0
    """Share of the captions that are replaced by the empty one."""
    dataloader_num_workers: int = option(0, incidental=True)
    """Processes that read pictures. 0: the main process reads them."""
    on_bad_sample: Literal["skip", "error"] = option("error", incidental=True)
    """What to do about unreadable pictures, wrong labels and missing captions: stop, or leave
    their pairs out and report them."""
    eval_fraction: float = option(0.0, incidental=True)
    """Fraction of the pairs held out for evaluation, in [0, 1); no caption is in both parts."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)
        _ = self.pictures  # refuses what is wrong with the rest

    def _problems(self) -> Iterator[str]:
        if not (self.dataset_name or self.train_data_dir):
            yield "give --dataset_name or --train_data_dir"
        if self.ranked_pairs not in ("all", "best_worst"):
            yield f"--ranked_pairs must be all or best_worst, got {self.ranked_pairs!r}"
        if self.choice_model is not None and not self.choice_model.strip():
            yield "--choice_model must not be empty"
        if self.no_hflip and self.independent_flip:
            yield "--independent_flip contradicts --no_hflip"
        if not 0.0 <= self.proportion_empty_prompts <= 1.0:
            yield (
                "--proportion_empty_prompts must lie in [0, 1], got "
                f"{self.proportion_empty_prompts}"
            )

    @property
    def location(self) -> str:
        """What is trained on, whichever flag named it: a folder or a hub id."""
        return self.dataset_name or self.train_data_dir or ""

    @property
    def size(self) -> Size:
        """(height, width) of training pictures in pixels."""
        return self.height or self.resolution, self.width or self.resolution

    @property
    def pictures(self) -> DataArgs:
        """The options of the pictures by themselves."""
        return DataArgs(
            dataset_name=self.dataset_name,
            train_data_dir=self.train_data_dir,
            dataset_config_name=self.dataset_config_name,
            dataset_split=self.dataset_split,
            cache_dir=self.cache_dir,
            max_train_samples=self.max_train_samples,
            resolution=(self.resolution,),
            height=self.height,
            width=self.width,
            random_crop=self.random_crop,
            random_flip=not self.no_hflip,
            dataloader_num_workers=self.dataloader_num_workers,
            on_bad_sample=self.on_bad_sample,
            eval_fraction=self.eval_fraction,
        )

    @property
    def choice_spec(self) -> str | None:
        """``--choice_model`` as the rewards spell it; None where the labels choose.

        A name is known in any case of its letters; a file or function keeps its own.
        """
        name = self.choice_model
        if name is None or not re.fullmatch(r"[\w.]+", name.strip()):
            return name
        return CHOICE_MODELS.get(name.strip().lower(), name.strip().lower())

    def check(self, cache: CacheArgs) -> None:
        """Refuses random crops with cached latents: each picture would keep one crop for ever.

        Raises:
            UserError: both are asked for.
        """
        if self.random_crop and not cache.no_cache_latents:
            raise UserError(
                "a latent cache would freeze one random crop of each picture: leave out "
                "--random_crop, or give --no_cache_latents to encode every crop anew"
            )
