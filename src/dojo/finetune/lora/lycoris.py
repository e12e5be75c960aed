"""LoHa and LoKr, the updates of LyCORIS that are no product of two factors: read, held, written.

peft's own classes compute them. LyCORIS applies alpha / rank once while it trains, and that is what
an update means here; its own merge (`get_diff_weight` of 4.1.3) applies it a second time. alpha is
ignored, and the scale is 1, where both factors of a LoKr are whole matrices. LyCORIS always writes
alpha, so a file without it is broken: peft and ComfyUI would take it for full strength.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dojo.cli import UserError
from dojo.finetune.lora.injected import ADAPTER, inject
from dojo.finetune.lora.patterns import any_of, by_value
from dojo.lazy import nn, peft, torch

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["LoHa", "LoKr"]
# By method: what a layer's tensors may be, as sets of names of which exactly one has to be there.
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_FORMS: dict[str, tuple[frozenset[str], ...]] = {
    "LoHa": (frozenset(_HADA), frozenset((*_HADA, "hada_t1", "hada_t2"))),
    "LoKr": tuple(
        frozenset((*first, *second))
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (
            ("lokr_w2",),
            ("lokr_w2_a", "lokr_w2_b"),
            ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    ),
}
_CORED = "ijkl,ip,jr->prkl"  # a Tucker core [r, r, h, w] with its two matrices [r, out], [r, in]


class Unreadable(ValueError):
    """A layer that cannot be read as it was meant; the message goes on from "N layers are"."""


@dataclass(frozen=True)
class Update:
    """One layer's update by LoHa or LoKr."""

    method: Method
    parts: Mapping[str, Tensor] = field(repr=False)
    """by LyCORIS' names"""
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """What is added to the layer's weight, of as many numbers, out x in x height x width."""
        parts = {name: tensor.float() for name, tensor in self.parts.items()}
        if self.method == "LoHa":
            product = _half(parts, "hada_w1", "hada_t1") * _half(parts, "hada_w2", "hada_t2")
            return self.scale * product
        first, second = _half(parts, "lokr_w1"), _half(parts, "lokr_w2", "lokr_t2")
        if second.ndim == 4:
            first = first[:, :, None, None]
        return self.scale * torch.kron(first, second.contiguous())  # else it cannot be viewed


def _half(parts: Mapping[str, Tensor], name: str, core: str = "") -> Tensor:
    """A matrix that is whole, a product of two, or a core between two."""
    if name in parts:
        return parts[name]
    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    return torch.einsum(_CORED, parts[core], first, second) if core in parts else first @ second


Updates = dict[str, dict[str, Update]]
"""By part, then by diffusers' layer name, as `layers.Lora`."""


def read(method: Method, parts: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> Update:
    """A layer's update from its tensors.

    Args:
        rest: what else the file has of this layer: alpha, and what belongs to other methods.

    Raises:
        Unreadable: something is missing, too much, or of another size.
    """
    if frozenset(parts) not in _FORMS[method]:
        known = set().union(*_FORMS[method])
        strange = sorted(set(parts) - known)
        raise Unreadable(
            f"a {method} with {strange[0]}, which peft has not" if strange else f"half a {method}"
        )
    if "dora_scale" in rest:
        raise Unreadable(f"a {method} with a DoRA's norms (dora_scale), which peft has not")
    if rest.keys() - {"alpha"}:
        raise Unreadable(f"a {method} and a LoRA at once")
    if not all(tensor.float().isfinite().all() for tensor in parts.values()):
        raise Unreadable("not finite")
    if "alpha" in rest and rest["alpha"].numel() != 1:
        raise Unreadable("of more than one alpha")
    ranks = {_rank(name, tensor) for name, tensor in parts.items()} - {None}
    whole = not ranks
    if len(ranks) > 1 or 0 in ranks or any(tensor.ndim < 2 for tensor in parts.values()):
        raise Unreadable("of shapes that do not belong together")
    if not whole and "alpha" not in rest:
        raise Unreadable(f"a {method} without its alpha, which LyCORIS always writes")
    rank = 1 if whole else int(ranks.pop() or 1)
    alpha = 1.0 if whole else float(rest["alpha"])
    update = Update(method, dict(parts), rank, alpha or float(rank))  # LyCORIS: 0 means the rank
    try:
        update.delta()
    except RuntimeError as error:
        raise Unreadable("of shapes that do not belong together") from error
    return update


def _rank(name: str, tensor: Tensor) -> int | None:
    """The rank that a tensor shows; None of a whole matrix."""
    if name.endswith("_b") or "_t" in name:
        return len(tensor) if tensor.ndim else 0
    return None


def fit(update: Update, base: nn.Linear | nn.Conv2d, where: str) -> Update:
    """The update, if it is as large as the layer.

    Raises:
        UserError: it is not.
    """
    delta, weight = update.delta(), base.weight
    if delta.shape[0] != weight.shape[0] or delta.numel() != weight.numel():
        raise UserError(
            f"{where} has another size in this model ({list(weight.shape)}, not "
            f"{list(delta.shape)})"
        )
    return update


def add(model: nn.Module, layers: Mapping[str, Update], adapter: str = ADAPTER) -> None:
    """Adds an adapter of these layers, by peft's class for them, in the model's own precision.

    Raises:
        UserError: they are of both methods, which one adapter cannot be.
    """
    methods = {update.method for update in layers.values()}
    if len(methods) > 1:
        raise UserError("LoHa and LoKr layers in one model: peft cannot do both in one adapter")
    kind: Any = peft.LoHaConfig if methods == {"LoHa"} else peft.LoKrConfig
    first = next(iter(layers.values()))
    config = kind(
        r=first.rank,
        alpha=first.alpha,
        target_modules=any_of(layers),
        rank_pattern=by_value({name: update.rank for name, update in layers.items()}),
        alpha_pattern=by_value({name: update.alpha for name, update in layers.items()}),
    )
    with torch.random.fork_rng():  # peft fills what is overwritten below with random numbers
        inject(model, config, adapter)
    for name, update in layers.items():
        module: Any = model.get_submodule(name)
        like = module.get_base_layer().weight
        for kind_ in module.adapter_layer_names:  # peft made them by its own rule of sizes
            there = getattr(module, kind_)
            if adapter in there:
                del there[adapter]
            if kind_ in update.parts:
                there[adapter] = nn.Parameter(update.parts[kind_].to(like).clone())


def is_adapted(module: nn.Module) -> bool:
    """Whether a module carries an adapter of one of the two methods."""
    return any(hasattr(module, name) for name in ("hada_w1_a", "lokr_w1"))


def of_model(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Update]:
    """The updates that a model's adapter holds, by its own names of layers, on the CPU."""
    found: dict[str, Update] = {}
    for name, module in model.named_modules():
        if not is_adapted(module):
            continue
        layer: Any = module
        parts = {
            kind: getattr(layer, kind)[adapter].detach().cpu().contiguous()
            for kind in layer.adapter_layer_names
            if adapter in getattr(layer, kind)
        }
        method: Method = "LoHa" if "hada_w1_a" in parts else "LoKr"
        found[name] = Update(method, parts, layer.r[adapter], float(layer.alpha[adapter]))
    return found


def put(model: nn.Module, layers: Mapping[str, Update], adapter: str = ADAPTER) -> None:
    """Puts values into an adapter that has the same tensors."""
    for name, update in layers.items():
        module: Any = model.get_submodule(name)
        for kind, tensor in update.parts.items():
            with torch.no_grad():
                getattr(module, kind)[adapter].copy_(tensor)
