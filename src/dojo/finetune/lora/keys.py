"""What LoRA files call layers and families: the one place of this package that names any."""

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
