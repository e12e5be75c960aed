"""Training data: captioned pictures found, checked, read, cached and put in order."""

from dojo.data.cache import (
    Batch,
    CacheArgs,
    CachedText,
    Latents,
    Pictures,
    Posterior,
    cache_latents,
    cache_text,
    checked,
    collate,
)
from dojo.data.images import BadSample, cover_box, fit, read_image
from dojo.data.order import Batches, Draw
from dojo.data.sources import BadReport, Captioned, DataArgs, open_source, split, verify

__all__ = [
    "BadReport",
    "BadSample",
    "Batch",
    "Batches",
    "CacheArgs",
    "CachedText",
    "Captioned",
    "DataArgs",
    "Draw",
    "Latents",
    "Pictures",
    "Posterior",
    "cache_latents",
    "cache_text",
    "checked",
    "collate",
    "cover_box",
    "fit",
    "open_source",
    "read_image",
    "split",
    "verify",
]
