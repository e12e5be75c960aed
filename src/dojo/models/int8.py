"""Frozen text encoders in int8: the linear layers of their blocks, stored as `quantised` does it.

Embeddings, norms and projections stay as they are, and so does T5's `wo`, which transformers too
keeps out of every quantisation.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, TypeVar

from dojo.lazy import late, nn
from dojo.run import phases

if TYPE_CHECKING:
    import torch

    from dojo.models import quantised
else:
    quantised = late("dojo.models.quantised")

Encoder = TypeVar("Encoder", bound="nn.Module")

_INSIDE = re.compile(r"(.*\.)?(layers?|block)\.\d+\.(?!.*\bwo$).*")  # CLIP's blocks, BERT's, T5's


def inside(name: str) -> bool:
    """Whether a linear layer of a text encoder, by its full name, lies in a block and is packed."""
    return _INSIDE.fullmatch(name) is not None


def as_asked(encoder: Encoder, precision: Literal["auto", "int8"]) -> Encoder:
    """The frozen encoder in `--text_encoder_precision`; to be moved to its device afterwards."""
    if precision == "int8":
        quantised.quantise(encoder, "int8", inside)
    return encoder


def bytes_of(encoder: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of an encoder's weights in int8.

    Args:
        encoder: as it is before it is packed, also on the meta device.
        dtype: of what is not packed.
    """
    total = phases.encoder_bytes(encoder, dtype)
    for _, linear in quantised.linears(encoder, inside):
        shape = linear.weight.shape
        total += quantised.packed_bytes(shape, "int8", dtype) - dtype.itemsize * shape.numel()
    return total
