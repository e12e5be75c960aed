"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on SD3 and SD1: added, saved, loaded.

peft computes them; this package decides which layers get one, keeps them in float32, and makes sure
that what is saved says its alpha and that what is loaded arrives, in three public formats.
"""

from dojo.lora.adapter import (
    ADAPTER,
    PRESETS,
    LoraArgs,
    add,
    add_text,
    disabled,
    state,
    target_layers,
)
from dojo.lora.files import WEIGHTS, export, find, load, restore, save, start_from

__all__ = [
    "ADAPTER",
    "PRESETS",
    "WEIGHTS",
    "LoraArgs",
    "add",
    "add_text",
    "disabled",
    "export",
    "find",
    "load",
    "restore",
    "save",
    "start_from",
    "state",
    "target_layers",
]
