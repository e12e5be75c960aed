"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on networks: added, saved, loaded.

peft computes them; this package decides which layers get one, keeps them in float32, and makes sure
that what is saved says its alpha, in three public formats, and that what is loaded, from any public
trainer, arrives at the strength that it was made with.
"""

from dojo.finetune.lora.adapter import LoraArgs, add, add_text, target_layers
from dojo.finetune.lora.bases import Base
from dojo.finetune.lora.files import (
    WEIGHTS,
    add_lycoris,
    export,
    find,
    load,
    lycoris_start,
    restore,
    save,
    start_from,
)
from dojo.finetune.lora.injected import ADAPTER, disabled, state
from dojo.finetune.lora.reading import PEFT_WEIGHTS, PICKLES, is_lora

__all__ = [
    "ADAPTER",
    "PEFT_WEIGHTS",
    "PICKLES",
    "WEIGHTS",
    "Base",
    "LoraArgs",
    "add",
    "add_lycoris",
    "add_text",
    "disabled",
    "export",
    "find",
    "is_lora",
    "load",
    "lycoris_start",
    "restore",
    "save",
    "start_from",
    "state",
    "target_layers",
]
