"""The options of training data; what they contradict is refused here, before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dojo.cli import option
from dojo.data.images import Size

CaptionStrategy = Literal["auto", "column", "sidecar", "filename", "folder", "instance"]
CAPTION_STRATEGIES: tuple[str, ...] = get_args(CaptionStrategy)

_LOCATIONS = ("dataset_name", "train_data_dir", "instance_data_dir")
_BUCKETS = ("bucket_step", "bucket_min", "bucket_max")


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Pictures and captions to train on."""

    dataset_name: str | None = option(None, incidental=True, common=True)
    """Hub id or local folder: pictures with metadata.csv, .jsonl or .parquet (file_name, text),
    pictures with .txt files of the same name, parquet or arrow files, a save_to_disk folder; or
    shards, read as they are needed: s3://bucket/prefix, hf://datasets/owner/name, FOLDER/*.parquet,
    a folder of .tar files, a folder that python -m dojo.data cache wrote."""
    train_data_dir: str | None = option(None, incidental=True)
    """The same as dataset_name, under the name that other trainers use for local folders."""
    instance_data_dir: str | None = option(None, incidental=True)
    """The same as dataset_name, under the name that DreamBooth scripts use."""
    data_config: Path | None = option(None, incidental=True)
    """YAML or JSON file that lists several folders, each with options of its own; instead of
    dataset_name."""
    dataset_config_name: str | None = None
    """Configuration of a data set that has several."""
    dataset_split: str = "train"
    """Split of the data set, or sub-folder of a local folder (the folder itself if there is no
    sub-folder train)."""
    image_column: str | None = None
    """Column of the pictures. Default: image (in metadata files: file_name)."""
    caption_column: str | None = None
    """Column of the captions. Default: the first of text, caption, prompt that there is. A list
    of strings in it means several captions."""
    caption_strategy: CaptionStrategy = "auto"
    """Where captions come from: a column, sidecar .txt or .caption files (a line each), the names
    of files or of their folders, or instance_prompt. auto: instance_prompt if given, else a
    column, else sidecars."""
    instance_prompt: str | None = option(None, common=True)
    """One caption for all pictures."""
    cache_dir: str | None = option(None, incidental=True)
    """Where downloaded data sets are kept. Default: the datasets library's own place."""
    data_cache_dir: Path = option(Path("outputs/cache/shards"), incidental=True)
    """Where shards are kept that are being read, shared by all runs."""
    data_cache_limit: float = option(50.0, incidental=True)
    """Most that they take there, in GB; the longest unused go first."""
    shuffle_window: int | None = None
    """Shards whose rows are shuffled among each other, and which the disk has to hold twice over.
    Default: 16."""
    max_train_samples: int | None = option(None, incidental=True)
    """Train on the first N samples only; regularisation pictures do not count."""
    resolution: tuple[int, ...] = option((512,), common=True)
    """Height and width in pixels that pictures are resized and cropped to. Several take turns
    from epoch to epoch."""
    height: int | None = None
    """Height in pixels, where it differs from resolution."""
    width: int | None = None
    """Width in pixels, where it differs from resolution."""
    center_crop: bool = False
    """Crop at the centre. This is the default; the flag is there for familiar command lines."""
    random_crop: bool = False
    """Crop at a random place instead of the centre."""
    random_flip: bool = False
    """Mirror pictures left to right at random."""
    no_hflip: bool = False
    """Never mirror pictures. This is the default; the flag is there for familiar command lines."""
    crop_variants: int = 1
    """Crops of each picture that the latent cache holds: the centre one and N - 1 random ones."""
    aspect_buckets: bool = False
    """Crop each picture to the nearest of several shapes of about resolution^2 pixels, instead of
    one shape for all."""
    bucket_step: int | None = None
    """Sides of buckets are multiples of it, in pixels. Default: 64, or the model's own step below
    a resolution of 256."""
    bucket_min: int | None = None
    """Shortest side of a bucket in pixels. Default: half the resolution."""
    bucket_max: int | None = None
    """Longest side of a bucket in pixels. Default: twice the resolution."""
    max_upscale: float | None = None
    """Leave out pictures that would be enlarged by more than this factor. Default: no limit."""
    repeats: int = 1
    """Uses of each picture per epoch."""
    repeats_from_folder_names: bool = False
    """Multiply them by the number that the names of sub-folders begin with, as in kohya's
    10_sks dog."""
    mask_dir: str | None = None
    """Folder of masks named like the pictures: white is trained on, black is not."""
    mask_from_alpha: bool = False
    """Take each picture's alpha channel for its mask: opaque is trained on."""
    masked_loss_weight: float = 0.0
    """Weight of the loss where the mask is black, in [0, 1]."""
    dataloader_num_workers: int = option(0, incidental=True)
    """Processes that read pictures. 0: the main process reads them."""
    on_bad_sample: Literal["skip", "error"] = option("error", incidental=True)
    """What to do about unreadable pictures and missing captions: stop, or leave them out and
    report them."""
    eval_fraction: float = option(0.0, incidental=True)
    """Fraction of the samples held out for the eval loss, in [0, 1)."""
    eval_data_dir: str | None = option(None, incidental=True)
    """Folder or hub id of samples for the eval loss, instead of eval_fraction."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        yield from self._location_problems()
        yield from self._caption_problems()
        yield from self._size_problems()
        yield from self._mask_problems()
        for name in ("max_train_samples", "repeats", "shuffle_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} must be at least 1, got {value}"
        if not self.data_cache_limit > 0:
            yield f"--data_cache_limit must be above 0, got {self.data_cache_limit}"
        if self.dataloader_num_workers < 0:
            yield f"--dataloader_num_workers must be 0 or more, got {self.dataloader_num_workers}"
        if self.on_bad_sample not in ("skip", "error"):
            yield f"--on_bad_sample must be skip or error, got {self.on_bad_sample!r}"
        if not 0.0 <= self.eval_fraction < 1.0:
            yield f"--eval_fraction must lie in [0, 1), got {self.eval_fraction}"
        if self.eval_fraction > 0.0 and self.eval_data_dir:
            yield "--eval_fraction and --eval_data_dir both hold out samples: give one of them"

    def _location_problems(self) -> Iterator[str]:
        given = [name for name in _LOCATIONS if getattr(self, name)]
        if self.data_config and given:
            yield f"--data_config names the data, and so does --{given[0]}: give one of them"
        if not self.data_config and not given:
            yield "give --dataset_name, --train_data_dir, --instance_data_dir or --data_config"
        for other in given[1:]:
            if getattr(self, other) != getattr(self, given[0]):
                yield f"--{given[0]} and --{other} mean the same thing: give one of them"
        if not self.dataset_split:
            yield "--dataset_split must not be empty"

    def _caption_problems(self) -> Iterator[str]:
        strategy = self.caption_strategy
        if strategy not in CAPTION_STRATEGIES:
            yield (
                f"--caption_strategy must be one of {', '.join(CAPTION_STRATEGIES)}, "
                f"got {strategy!r}"
            )
        if self.instance_prompt is not None and not self.instance_prompt.strip():
            yield "--instance_prompt must not be empty"
        if strategy == "instance" and not self.instance_prompt:
            yield "--caption_strategy instance needs --instance_prompt"
        if self.instance_prompt and strategy not in ("auto", "instance"):
            yield f"--caption_strategy {strategy} contradicts --instance_prompt"
        if self.caption_column and self.instance_prompt:
            yield "--caption_column contradicts --instance_prompt: give one of them"
        if self.caption_column and strategy not in ("auto", "column"):
            yield f"--caption_strategy {strategy} contradicts --caption_column"

    def _size_problems(self) -> Iterator[str]:
        if not self.resolution:
            yield "--resolution needs a number of pixels"
        for name in ("height", "width", "crop_variants", *_BUCKETS):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} must be at least 1, got {value}"
        if any(resolution < 1 for resolution in self.resolution):
            yield f"--resolution must be at least 1, got {min(self.resolution)}"
        if len(set(self.resolution)) < len(self.resolution):
            yield "--resolution names the same number twice"
        for name in ("height", "width"):
            if getattr(self, name) and len(self.resolution) > 1:
                yield f"--{name} contradicts several resolutions (--resolution)"
            if getattr(self, name) and self.aspect_buckets:
                yield f"--{name} contradicts --aspect_buckets"
        # With --data_config the folders say for themselves whether they use buckets.
        if not self.aspect_buckets and not self.data_config:
            for name in _BUCKETS:
                if getattr(self, name) is not None:
                    yield f"--{name} needs --aspect_buckets"
        if self.bucket_min and self.bucket_max and self.bucket_min > self.bucket_max:
            yield f"--bucket_min {self.bucket_min} exceeds --bucket_max {self.bucket_max}"
        if self.max_upscale is not None and not self.max_upscale >= 1.0:
            yield f"--max_upscale must be at least 1, got {self.max_upscale}"
        if self.center_crop and self.random_crop:
            yield "--center_crop contradicts --random_crop"
        if self.random_crop and self.crop_variants > 1:
            yield f"--random_crop contradicts --crop_variants {self.crop_variants}"
        if self.center_crop and self.crop_variants > 1:
            yield f"--center_crop contradicts --crop_variants {self.crop_variants}"
        if self.random_flip and self.no_hflip:
            yield "--random_flip contradicts --no_hflip"

    def _mask_problems(self) -> Iterator[str]:
        if self.mask_dir and self.mask_from_alpha:
            yield "--mask_dir contradicts --mask_from_alpha: give one of them"
        if not 0.0 <= self.masked_loss_weight <= 1.0:
            yield f"--masked_loss_weight must lie in [0, 1], got {self.masked_loss_weight}"
        masked = self.mask_dir or self.mask_from_alpha or self.data_config
        if self.masked_loss_weight > 0.0 and not masked:
            yield "--masked_loss_weight needs --mask_dir or --mask_from_alpha"

    @property
    def location(self) -> str:
        """What is trained on, whichever flag named it: a folder, a hub id, or data_config."""
        given = (getattr(self, name) for name in (*_LOCATIONS, "data_config"))
        return str(next(filter(None, given), ""))

    @property
    def size(self) -> Size:
        """(height, width) of training pictures at the first resolution, in pixels."""
        return self.height or self.resolution[0], self.width or self.resolution[0]
