"""What LoRA files of every family call layers: the door to their tables."""

from dojo.models.sd3.keys import (
    PREFIXES,
    diffusers_modules,
    is_swapped,
    original_module,
    original_modules,
    swap_halves,
)
from dojo.models.unet.sgm import Blocks

__all__ = [
    "PREFIXES",
    "Blocks",
    "diffusers_modules",
    "is_swapped",
    "original_module",
    "original_modules",
    "swap_halves",
]
