"""Compiled blocks of a network, and where what was compiled is kept: `--torch_compile`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dojo.files import user_caches

if TYPE_CHECKING:
    from torch import nn

    from dojo.models.facts import NetworkFacts

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own: a folder that a user names wins over ours
# Blocks of a kind share their code, of which torch keeps 8 forms and computes the rest uncompiled:
# a UNet has a form for every level's width, with and without gradients, with and without adapters.
FORMS = 64


def compile_blocks(network: nn.Module, facts: NetworkFacts) -> None:
    """Lets each transformer block be compiled at its first call: adapters may still be added.

    One graph serves all blocks of a form (regional compilation). What was compiled is kept in
    `cache_folder`, so that the next start reads it.
    """
    import torch._dynamo.config as dynamo
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch names its own place there while it is imported.
    if os.environ.get(VARIABLE) in (None, default_cache_dir()):
        os.environ[VARIABLE] = str(cache_folder())
    dynamo.recompile_limit = max(dynamo.recompile_limit, FORMS)
    for name, module in network.named_modules():
        if re.fullmatch(facts.block, name):
            module.compile()


def cache_folder() -> Path:
    """Where compiled blocks lie; torch's own place is emptied when the machine starts."""
    return user_caches() / "compiled"
