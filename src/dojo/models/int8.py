"""Frozen text encoders in int8: their blocks' linear layers by bitsandbytes (LLM.int8()).

A weight is stored as int8 with a scale per row (Dettmers et al. 2022, arXiv:2208.07339); columns of
the input with outliers are multiplied in the run's precision. Embeddings, norms and projections
stay as they are, and so does T5's `wo`, which transformers too keeps out of every quantisation.
"""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from typing import Any

from torch import nn

from dojo.cli import UserError
from dojo.models.family import ModelArgs

_INSIDE = re.compile(r"(.*\.)?(layers|block)\.\d+\.(?!.*\bwo$).*")  # CLIP's blocks, T5's
_OUTLIER = 6.0  # the paper's; inputs above it are not quantised


def as_asked(encoder: Any, args: ModelArgs) -> Any:
    """The encoder in `--text_encoder_precision`; to be moved to its device afterwards."""
    return quantised(encoder) if args.text_encoder_precision == "int8" else encoder


def is_quantised(name: str, module: nn.Module) -> bool:
    """Whether a module of a text encoder becomes int8: the linear layers inside its blocks."""
    return isinstance(module, nn.Linear) and _INSIDE.fullmatch(name) is not None


def quantised(encoder: nn.Module) -> nn.Module:
    """Puts int8 layers in the place of those that `is_quantised` names.

    On a GPU the weights are quantised when they arrive there, one by one; on a CPU, where they
    come from, at once.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "--text_encoder_precision int8 needs bitsandbytes: pip install -e '.[bitsandbytes]'"
        )
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    # It says of every bfloat16 input that it is rounded to float16 before it is quantised.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    library: Any = bitsandbytes.nn
    names = [name for name, module in encoder.named_modules() if is_quantised(name, module)]
    for name in names:
        plain: Any = encoder.get_submodule(name)
        made = library.Linear8bitLt(
            plain.in_features,
            plain.out_features,
            plain.bias is not None,
            has_fp16_weights=False,
            threshold=_OUTLIER,
            device="meta",
        )
        made.weight = library.Int8Params(
            plain.weight.data, requires_grad=False, has_fp16_weights=False
        )
        made.bias = plain.bias
        parent, _, own = name.rpartition(".")
        setattr(encoder.get_submodule(parent), own, made)
    return encoder
