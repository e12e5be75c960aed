"""Precisions by the names that options have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dojo.lazy import torch

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "int8", "fp8", "nf4"]
"""What a frozen network's weights are stored in (`quantised` stores them so); bf16 stands for the
run's own precision: nothing is packed."""

DTYPES = {"no": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""torch's names of them; `no` is that of an accelerator without mixed precision"""


def dtype_of(name: str) -> torch.dtype:
    """The precision of numbers that an option names."""
    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


def name_of(dtype: torch.dtype) -> str:
    """What options call a precision of numbers: fp32, fp16 or bf16."""
    return next(name for name, one in DTYPES.items() if name != "no" and dtype == dtype_of(name))


def exact_float32() -> None:
    """Lets float32 be float32 on GPUs, as in a run without `--allow_tf32`.

    torch itself lets convolutions, of which an autoencoder is made, use TensorFloat-32.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
