"""Frozen linear layers whose weights are stored in less than 16 bits and whole only while used.

int8 and fp8 have one scale for every row (an output of the layer), nf4 (Dettmers et al. 2023,
arXiv:2305.14314) one for every 64 weights. Only the weights are rounded: activations, products and
gradients have the run's precision, and a backward pass is the exact derivative of its forward pass.
The backward pass unpacks the weight a second time, so that no whole copy of it is kept.

Which layers: linear ones that whoever asks has chosen by their names, as are those of a trained
network's blocks (`finetune.offload.in_blocks`) and of text encoders (`models.int8.inside`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dojo.models.precisions import Precision

Packed = tuple[Tensor, ...]
"""A weight as it is stored: itself, or its codes and their scales."""

_BLOCK = 64  # weights of nf4 that share a scale
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
_AT_A_TIME = 2**20  # weights that are in float32 while they are packed


# ---- the formats ----


def pack(weight: Tensor, precision: Precision) -> Packed:
    """A finite weight [out, in] as it is stored.

    int8 and fp8: codes [out, in] and float32 scales [out, 1], weight = code * scale; fp8's codes
    are bytes, since processes send each other no float8 (gloo). nf4: two codes a byte, in a column,
    and a float32 scale for every 64 weights, row after row.
    """
    weight = weight.detach()
    if precision == "bf16":
        return (weight,)
    if precision == "nf4":
        return _pack_nf4(weight)
    kind = torch.int8 if precision == "int8" else torch.float8_e4m3fn
    codes = torch.empty(weight.shape, dtype=kind, device=weight.device)
    scales = torch.empty(len(weight), 1, device=weight.device)
    rows = max(1, _AT_A_TIME // weight.shape[1])
    for part, code, scale in zip(
        *(tensor.split(rows) for tensor in (weight, codes, scales)), strict=True
    ):
        numbers = part.float()
        largest = numbers.abs().amax(1, keepdim=True)
        # A row of zeros has codes of zero at any scale.
        scale.copy_((largest / _LARGEST[precision]).clamp(min=torch.finfo(torch.float32).tiny))
        numbers = numbers / scale
        code.copy_(numbers.round() if precision == "int8" else numbers)
    return codes if precision == "int8" else codes.view(torch.uint8), scales


def _pack_nf4(weight: Tensor) -> Packed:
    import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports]

    # So many rows at a time that no scale is of two parts.
    rows = _BLOCK * max(1, _AT_A_TIME // weight.shape[1] // _BLOCK)
    parts = [
        bnb.quantize_4bit(part.contiguous(), blocksize=_BLOCK, quant_type="nf4")
        for part in weight.split(rows)
    ]
    codes = torch.cat([code.view(-1, 1) for code, _ in parts])
    return codes, torch.cat([state.absmax for _, state in parts])


def unpack(packed: Packed, precision: Precision, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that a product is computed with; of one that is not packed itself."""
    if precision == "bf16":
        return packed[0].to(dtype)
    codes, scales = packed
    if precision == "fp8":
        # A code is exact in any of the precisions.
        return codes.view(torch.float8_e4m3fn).to(dtype).mul_(scales)
    if precision == "int8":
        whole = torch.empty(shape, dtype=dtype, device=codes.device)
        return torch.mul(codes, scales, out=whole)  # in float32, rounded once
    import bitsandbytes.functional as bnb  # pyright: ignore[reportMissingImports]

    form = {"shape": shape, "dtype": dtype, "blocksize": _BLOCK, "quant_type": "nf4"}
    return bnb.dequantize_4bit(codes, bnb.QuantState(scales, **form))


def packed_bytes(shape: torch.Size, precision: Precision, dtype: torch.dtype) -> int:
    """Bytes of a stored weight [out, in].

    Args:
        dtype: of one that is not packed.
    """
    count = math.prod(shape)
    if precision == "bf16":
        return dtype.itemsize * count
    if precision == "nf4":
        return -(-count // 2) + 4 * -(-count // _BLOCK)
    return count + 4 * shape[0]


# ---- the layer ----


class Elsewhere(Protocol):
    """Where packed weights lie when it is not in the layer."""

    def put(self, layer: FrozenLinear, packed: Packed) -> None:
        """Keeps a layer's weight from now on."""
        ...

    def fetch(self, layer: FrozenLinear, *, backward: bool) -> Packed:
        """It, on the device, for the product that is computed next and not for longer."""
        ...

    def look(self, layer: FrozenLinear) -> Packed:
        """A copy of it on the device, for anything else."""
        ...


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is stored packed, here or elsewhere, and never trained.

    Args:
        linear: the layer that it replaces; on the meta device it waits for `take`.
        elsewhere: where the weight lies; unset is the layer itself, on its device.
    """

    def __init__(
        self, linear: nn.Linear, precision: Precision, elsewhere: Elsewhere | None = None
    ) -> None:
        nn.Module.__init__(self)  # of nn.Linear all but the weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.precision: Precision = precision
        self.elsewhere = elsewhere
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        # Parameters and not buffers: DistributedDataParallel sends buffers round at every step.
        self.codes: nn.Parameter | None = None
        self.scales: nn.Parameter | None = None

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        return torch.Size((self.out_features, self.in_features))

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Packs a weight and puts it away."""
        packed = pack(weight.to(self.dtype), self.precision)
        if self.elsewhere is not None:
            self.elsewhere.put(self, packed)
            return
        frozen = [nn.Parameter(tensor, requires_grad=False) for tensor in packed]
        self.codes, self.scales = (*frozen, None)[:2]

    @property
    @torch.no_grad()
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A copy of the weight as products are computed with it: writing into it changes nothing.

        peft asks it for device and precision, and for the norms of a DoRA.
        """
        packed = self._own() if self.elsewhere is None else self.elsewhere.look(self)
        whole = unpack(packed, self.precision, self.shape, self.dtype)
        return whole.clone() if self.precision == "bf16" else whole

    def whole(self, dtype: torch.dtype, *, backward: bool = False) -> Tensor:
        """The weight [out, in] on the device, for the next product."""
        if self.elsewhere is None:
            packed = self._own()
        else:
            packed = self.elsewhere.fetch(self, backward=backward)
        return unpack(packed, self.precision, self.shape, dtype)

    def _own(self) -> Packed:
        return tuple(t.detach() for t in (self.codes, self.scales) if t is not None)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] to x W^T + b, in autocast's precision where there is one."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        product: Any = _Product.apply(input, bias, self)
        return product


class _Product(torch.autograd.Function):
    """x W^T + b with a weight that is made in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FrozenLinear) -> Tensor:  # pyright: ignore
        ctx.layer = layer
        return F.linear(x, layer.whole(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # pyright: ignore
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight = ctx.layer.whole(grad.dtype, backward=True)
        # As torch computes it of a linear layer, to the bit.
        flat = grad.reshape(-1, grad.shape[-1]).mm(weight)
        return flat.reshape(*grad.shape[:-1], weight.shape[1]), None, None


# ---- a network ----


def linears(network: nn.Module, chosen: Callable[[str], bool]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a network whose full names are chosen."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and chosen(name):
            yield name, module


@torch.no_grad()
def replace(
    network: nn.Module,
    name: str,
    precision: Precision,
    device: torch.device | None = None,
    elsewhere: Elsewhere | None = None,
) -> None:
    """Puts a `FrozenLinear` in the place of a linear layer, which is let go of.

    Args:
        device: where it is packed and, unless it lies elsewhere, stays; unset is where it is.
    """
    parent, _, leaf = name.rpartition(".")
    linear: Any = network.get_submodule(name)
    made = FrozenLinear(linear, precision, elsewhere)
    if not linear.weight.is_meta:
        made.take(linear.weight.to(device or linear.weight.device))
    setattr(network.get_submodule(parent), leaf, made)


def quantise(
    network: nn.Module,
    precision: Precision,
    chosen: Callable[[str], bool],
    device: torch.device | None = None,
) -> None:
    """Packs linear layers of a frozen network, one after another.

    Args:
        network: on the meta device its layers wait for their weights (`FrozenLinear.take`).
        chosen: by their full names.
        device: where they are packed and stay; unset is where they are.
    """
    for name, _ in linears(network, chosen):
        replace(network, name, precision, device)


def bytes_of(network: nn.Module, precision: Precision, chosen: Callable[[str], bool]) -> int:
    """Bytes of the frozen weights of a network, also on the meta device, as they would be stored.

    Args:
        network: as it is before it is packed, with or without adapters, which do not count.
        chosen: the linear layers that are packed, by their full names.
    """
    total = sum(param.nbytes for param in network.parameters() if not param.requires_grad)
    for _, linear in linears(network, chosen):
        weight = linear.weight
        if not weight.requires_grad:
            total += packed_bytes(weight.shape, precision, weight.dtype) - weight.nbytes
    return total
