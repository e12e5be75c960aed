"""Training data: captioned pictures found, checked, read, cached and put in order."""

from dojo.data.buckets import Plan, assign
from dojo.data.cache import (
    CacheArgs,
    CachedText,
    TextCacheArgs,
    Turns,
    cache_latents,
    cache_text,
    checked,
    encoded_at_a_time,
    encoded_views,
)
from dojo.data.contents import file_hashes, write_json
from dojo.data.geometry import Geometry
from dojo.data.identity import identified
from dojo.data.images import BadSample, Size, cover_box, fit, fit_mask, read_image
from dojo.data.options import DataArgs
from dojo.data.order import Batches, Draw
from dojo.data.pairs.choice import Choice, Score, relabel
from dojo.data.pairs.opening import open_pairs
from dojo.data.pairs.options import CHOICE_MODELS, PairArgs
from dojo.data.pairs.pairs import Pair, Pairs, check_pairs, split_pairs
from dojo.data.pairs.samples import PairSet, pair_fingerprint, prepare_pairs
from dojo.data.samples import Batch, Latents, Pictures, Posterior, collate
from dojo.data.shards import digest
from dojo.data.sources.captioned import (
    BadReport,
    Captioned,
    Recipe,
    join,
    judged,
    look,
    nothing,
    seen,
    split,
    told_notes,
    verify,
)
from dojo.data.sources.captions import CaptionArgs
from dojo.data.sources.config import args_for
from dojo.data.sources.folders import Folder, scan
from dojo.data.sources.opening import open_evaluation, open_source, open_training
from dojo.data.streams.ahead import Ahead
from dojo.data.streams.made import Made, MadeRows, MadeTexts, differences
from dojo.data.streams.opening import open_shards
from dojo.data.streams.places import is_streamed
from dojo.data.streams.rows import Rows
from dojo.data.streams.samples import Streamed
from dojo.data.streams.stream import Stream

__all__ = [
    "CHOICE_MODELS",
    "Ahead",
    "BadReport",
    "BadSample",
    "Batch",
    "Batches",
    "CacheArgs",
    "CachedText",
    "CaptionArgs",
    "Captioned",
    "Choice",
    "DataArgs",
    "Draw",
    "Folder",
    "Geometry",
    "Latents",
    "Made",
    "MadeRows",
    "MadeTexts",
    "Pair",
    "PairArgs",
    "PairSet",
    "Pairs",
    "Pictures",
    "Plan",
    "Posterior",
    "Recipe",
    "Rows",
    "Score",
    "Size",
    "Stream",
    "Streamed",
    "TextCacheArgs",
    "Turns",
    "args_for",
    "assign",
    "cache_latents",
    "cache_text",
    "check_pairs",
    "checked",
    "collate",
    "cover_box",
    "differences",
    "digest",
    "encoded_at_a_time",
    "encoded_views",
    "file_hashes",
    "fit",
    "fit_mask",
    "identified",
    "is_streamed",
    "join",
    "judged",
    "look",
    "nothing",
    "open_evaluation",
    "open_pairs",
    "open_shards",
    "open_source",
    "open_training",
    "pair_fingerprint",
    "prepare_pairs",
    "read_image",
    "relabel",
    "scan",
    "seen",
    "split",
    "split_pairs",
    "told_notes",
    "verify",
    "write_json",
]
