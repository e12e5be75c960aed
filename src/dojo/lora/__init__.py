"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on an MMDiT: adding, saving, loading.

peft computes them; this file decides which layers get one, keeps them in float32, and makes sure
that what is saved says its alpha and that what is loaded arrives.
"""

from dojo.lora.adapter import ADAPTER, PRESETS, LoraArgs, add, disabled, state, target_layers
from dojo.lora.files import WEIGHTS, load, restore, save

__all__ = [
    "ADAPTER",
    "PRESETS",
    "WEIGHTS",
    "LoraArgs",
    "add",
    "disabled",
    "load",
    "restore",
    "save",
    "state",
    "target_layers",
]
