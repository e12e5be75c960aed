"""Training data: captioned pictures found, checked, read, cached and put in order."""

from dojo.data.buckets import Plan, assign
from dojo.data.cache import (
    CacheArgs,
    CachedText,
    TextCacheArgs,
    cache_latents,
    cache_text,
    checked,
)
from dojo.data.captions import CaptionArgs
from dojo.data.config import args_for
from dojo.data.folders import scan
from dojo.data.images import BadSample, Size, cover_box, fit, fit_mask, read_image
from dojo.data.opening import open_evaluation, open_source, open_training
from dojo.data.options import DataArgs
from dojo.data.order import Batches, Draw
from dojo.data.samples import Batch, Latents, Pictures, Posterior, collate
from dojo.data.sources import BadReport, Captioned, Recipe, join, split, verify

__all__ = [
    "BadReport",
    "BadSample",
    "Batch",
    "Batches",
    "CacheArgs",
    "CachedText",
    "CaptionArgs",
    "Captioned",
    "DataArgs",
    "Draw",
    "Latents",
    "Pictures",
    "Plan",
    "Posterior",
    "Recipe",
    "Size",
    "TextCacheArgs",
    "args_for",
    "assign",
    "cache_latents",
    "cache_text",
    "checked",
    "collate",
    "cover_box",
    "fit",
    "fit_mask",
    "join",
    "open_evaluation",
    "open_source",
    "open_training",
    "read_image",
    "scan",
    "split",
    "verify",
]
