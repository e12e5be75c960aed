"""What LoRA files call layers and families: the one place of this package that names any."""

from dojo.models.sd3.keys import (
    PREFIXES,
    diffusers_modules,
    is_swapped,
    original_module,
    original_modules,
    swap_halves,
)

# The module of sd-scripts and what it calls the base model.
KOHYA_MMDIT = ("networks.lora_sd3", "sd3")
KOHYA_UNET = ("networks.lora", "sd_v1")

__all__ = [
    "KOHYA_MMDIT",
    "KOHYA_UNET",
    "PREFIXES",
    "diffusers_modules",
    "is_swapped",
    "original_module",
    "original_modules",
    "swap_halves",
]
