"""What LoRA files of every family call layers: the door to their tables."""

from dojo.models.hunyuandit import keys as hunyuandit
from dojo.models.sd3 import keys as sd3
from dojo.models.sd3.keys import PREFIXES, is_swapped, swap_halves
from dojo.models.unet.sgm import Blocks

_TRANSFORMERS = (sd3, hunyuandit)  # what both call alike is the same layer under either


def original_module(name: str) -> tuple[str, int]:
    """The original module that holds diffusers' module `name`, and its place in a fused one.

    Raises:
        KeyError: no transformer has such a module.
    """
    for family in _TRANSFORMERS:
        try:
            return family.original_module(name)
        except KeyError:
            continue
    raise KeyError(name)


def diffusers_modules(name: str) -> tuple[str, ...]:
    """The modules of diffusers that make up the original module `name`, in their order.

    Raises:
        KeyError: no transformer has such a module.
    """
    for family in _TRANSFORMERS:
        try:
            return family.diffusers_modules(name)
        except KeyError:
            continue
    raise KeyError(name)


def original_modules(blocks: int) -> list[str]:
    """Every module that a transformer of so many blocks may have, under its original name."""
    return [name for family in _TRANSFORMERS for name in family.original_modules(blocks)]


__all__ = [
    "PREFIXES",
    "Blocks",
    "diffusers_modules",
    "is_swapped",
    "original_module",
    "original_modules",
    "swap_halves",
]
