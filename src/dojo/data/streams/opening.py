"""Opens the shards that the options name, and refuses what shards cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dojo.cli import UserError
from dojo.data.options import DataArgs
from dojo.data.sources.captioned import Recipe
from dojo.data.sources.columns import one_line
from dojo.data.streams.disk import Disk
from dojo.data.streams.made import Made, is_made, open_made
from dojo.data.streams.packs import Columns
from dojo.data.streams.places import Place, files_at
from dojo.data.streams.rows import WINDOW
from dojo.data.streams.stream import Stream, open_stream

_CACHE = "python -m dojo.data cache"


def open_shards(args: DataArgs, *, to_cache: bool = False) -> Stream | Made:
    """The samples of `args.location`, which names shards; see `is_streamed`.

    Args:
        to_cache: every row is read once, to be encoded, and nothing is trained.

    Raises:
        UserError: they cannot be read, or an option asks for what cannot be done with them.
    """
    location = args.location
    window = args.shuffle_window or WINDOW
    disk = Disk(args.data_cache_dir, int(args.data_cache_limit * 1e9))
    made = is_made(location)
    for problem in _made_problems(args) if made else _problems(args, to_cache=to_cache):
        raise UserError(f"{location}: {problem}")
    if made:
        opened = open_made(location, disk, window, args.max_train_samples)
        if opened.is_remote:
            _check_room(opened.places_by_size, disk, window)
        return opened
    shards = files_at(location, args.dataset_split)
    if shards[0].is_remote or shards[0].name.endswith(".parquet"):
        _check_room([shards], disk, window)
    return open_stream(
        location,
        shards,
        _columns(args),
        disk,
        prompt=one_line(args.instance_prompt) if args.instance_prompt else None,
        recipe=Recipe.of(args),
        window=window,
        skip=args.on_bad_sample == "skip",
        limit=args.max_train_samples,
    )


def _columns(args: DataArgs) -> Columns:
    if args.instance_prompt:
        return Columns(args.image_column, None)
    return Columns(args.image_column, args.caption_column or "")


def _check_room(orders: Sequence[Sequence[Place]], disk: Disk, window: int) -> None:
    """Refuses a limit that the shards of two windows do not fit in.

    Args:
        orders: shards that are read beside each other, each in windows of their own.

    Raises:
        UserError: naming the limit that they do.
    """
    sizes = [sorted((place.size for place in shards), reverse=True) for shards in orders]
    largest = [size for some in sizes for size in some[: 2 * window]]
    if sum(largest) <= disk.limit:
        return
    fitting = int(disk.limit // (2 * sum(some[0] for some in sizes)))
    smaller = f", or --shuffle_window {fitting}" if fitting else ""
    raise UserError(
        f"the largest {len(largest)} shards take {sum(largest) / 1e9:.2f} GB, which is what two "
        f"windows of --shuffle_window {window} may need on the disk, and --data_cache_limit is "
        f"{disk.limit / 1e9:g}: give a larger one{smaller}"
    )


def _both(args: DataArgs) -> Iterator[str]:
    """What no kind of shards can do."""
    if args.eval_fraction:
        yield (
            "--eval_fraction would have to look at every row; name held-out pictures by "
            "--eval_data_dir"
        )
    if args.repeats > 1 or args.repeats_from_folder_names:
        name = "repeats" if args.repeats > 1 else "repeats_from_folder_names"
        yield f"--{name} does nothing for shards, whose rows come once each; --num_train_epochs N"
    if len(args.resolution) > 1:
        yield "shards are trained at one --resolution"
    if args.mask_dir:
        yield "--mask_dir needs pictures in files; --mask_from_alpha works"
    if args.dataset_config_name:
        yield "--dataset_config_name is for hub ids; the location names the files"
    if args.caption_strategy in ("filename", "folder"):
        yield f"--caption_strategy {args.caption_strategy} needs pictures in files"


def _problems(args: DataArgs, *, to_cache: bool) -> Iterator[str]:
    yield from _both(args)
    if to_cache:
        return
    if args.aspect_buckets:
        yield (
            "--aspect_buckets needs the sizes of all pictures beforehand, which shards do not "
            f"tell; {_CACHE} with the same options makes a folder that has them"
        )
    if args.max_upscale:
        yield (
            "--max_upscale needs the sizes of all pictures beforehand, which shards do not tell; "
            f"{_CACHE} --max_upscale {args.max_upscale:g} leaves such pictures out"
        )


def _made_problems(args: DataArgs) -> Iterator[str]:
    yield from _both(args)
    if args.random_crop:
        yield "--random_crop needs the pictures; --crop_variants N keeps N crops in the cache"
    if args.max_upscale:
        yield f"--max_upscale is for `{_CACHE}`, which has left out what it names"
    if args.dataset_split != "train":
        yield f"--dataset_split {args.dataset_split} is for `{_CACHE}`: the folder is of one split"
    if args.caption_strategy != "auto":
        yield f"--caption_strategy is for `{_CACHE}`, which wrote the captions into this folder"
    for name in ("image_column", "caption_column", "instance_prompt"):
        if getattr(args, name):
            yield f"--{name} is for `{_CACHE}`, which wrote this folder: its captions are settled"
