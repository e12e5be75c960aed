"""torch's autocast on the meta device, which has none: the precisions that a GPU would compute in.

Activations are as large as their precision, and autocast decides it: a normalisation gives float32
in a run in bfloat16. The two lists are torch's own for CUDA (ATen/autocast_mode.h), as far as
networks here use them; a test compares them with the header that torch is installed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOWER = frozenset(
    (
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "addr", "addbmm", "baddbmm"),
        *("einsum", "prelu", "scaled_dot_product_attention"),
    )
)
"""Computed in the run's precision."""
FLOAT32 = frozenset(
    (
        *("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax"),
        *("exp", "expm1", "log", "log10", "log2", "log1p", "logsumexp", "softplus", "reciprocal"),
        *("rsqrt", "pow", "sinh", "cosh", "tan", "prod", "sum", "cumprod", "cumsum"),
        *("cosine_similarity", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "dist"),
        *("cdist", "upsample_nearest2d", "upsample_bilinear2d"),
    )
)
"""Computed in float32."""

# Names that Python has for some of them.
_ALIASES = {"__matmul__": "matmul", "__pow__": "pow", "interpolate": "upsample_nearest2d"}


class Autocast(TorchFunctionMode):
    """Casts what functions of tensors are given, as autocast on a GPU does.

    Args:
        dtype: of the run.
        cast_weight: is told the copy of a weight that is trained: autocast keeps one of each, which
            whoever counts may know of already. Of frozen weights it makes one at every use.
    """

    def __init__(self, dtype: torch.dtype, cast_weight: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.dtype, self.cast_weight = dtype, cast_weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        name = _ALIASES.get(name, name)
        kwargs = kwargs or {}
        wanted = self.dtype if name in LOWER else torch.float32 if name in FLOAT32 else None
        if wanted is None:
            return func(*args, **kwargs)
        args = [self.cast(value, wanted) for value in args]
        return func(*args, **{key: self.cast(value, wanted) for key, value in kwargs.items()})

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A tensor of floating-point numbers in a precision; anything else as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        made = value.to(dtype)
        if isinstance(value, nn.Parameter) and value.requires_grad:
            self.cast_weight(made)
        return made
