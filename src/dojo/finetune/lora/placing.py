"""A LoRA's layers put into models: each where it belongs, at its own strength, or counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from dojo.cli import UserError
from dojo.finetune.lora import formats, lycoris, names
from dojo.finetune.lora.injected import inject
from dojo.finetune.lora.patterns import any_of, by_value
from dojo.lazy import nn, peft, torch

if TYPE_CHECKING:
    from torch import Tensor

    from dojo.finetune.lora.layers import Factors, Layers, Lora

TEXT_MODEL = "text_model."
_T = TypeVar("_T")


def in_file(part: str, name: str) -> str:
    """A name in a text encoder as every file has it: some releases of transformers drop the head.

    Other parts' names stay as they are.
    """
    bare = part.startswith("text_encoder") and name.startswith("encoder.layers.")
    return TEXT_MODEL + name if bare else name


def fit(lora: Lora, models: Mapping[str, nn.Module], where: str) -> tuple[Lora, list[str]]:
    """The layers under the models' own names, in the shapes of their weights; names of the others.

    Args:
        models: by part; a part without one loses its layers.
        where: what error messages call the file.

    Raises:
        UserError: a layer has another size in its model.
    """
    found: Lora = {}
    lost: list[str] = []
    for part, name, own, base, factors in _places(lora, models, lost):
        found.setdefault(part, {})[own] = _shaped(factors, base, f"{where}: {part}.{name}")
    return found, lost


def fit_lycoris(
    updates: lycoris.Updates, models: Mapping[str, nn.Module], where: str
) -> tuple[lycoris.Updates, list[str]]:
    """The same for LoHa and LoKr.

    Raises:
        UserError: a layer has another size in its model.
    """
    found: lycoris.Updates = {}
    lost: list[str] = []
    for part, name, own, base, update in _places(updates, models, lost):
        found.setdefault(part, {})[own] = lycoris.fit(update, base, f"{where}: {part}.{name}")
    return found, lost


def _places(
    layers_by_part: Mapping[str, Mapping[str, _T]],
    models: Mapping[str, nn.Module],
    lost: list[str],
) -> Iterator[tuple[str, str, str, nn.Linear | nn.Conv2d, _T]]:
    """Part, name in the file, name in the model, layer and update; names without go to `lost`."""
    for part, layers in layers_by_part.items():
        modules = dict(models[part].named_modules()) if part in models else {}
        for name, update in layers.items():
            own = next((n for n in (name, name.removeprefix(TEXT_MODEL)) if n in modules), None)
            base = None if own is None else base_layer(modules[own])
            if own is None or not isinstance(base, nn.Linear | nn.Conv2d):
                lost.append(f"{part}.{name}")
            else:
                yield part, name, own, base, update


def base_layer(module: nn.Module) -> nn.Module:
    """A module without the adapters around it."""
    inside = getattr(module, "base_layer", module)
    return inside if isinstance(inside, nn.Module) else module


def check_lost(found: Mapping[str, Mapping[str, Any]], lost: Sequence[str], where: str) -> None:
    """Refuses a file of which nothing, or less than half of the network's layers, has a place.

    Raises:
        UserError: naming one of the layers.
    """
    if not any(found.values()):
        raise UserError(f"{where}: not one layer fits this model, such as {lost[0]}")
    placed = sum(len(layers) for part, layers in found.items() if names.of_network(part))
    gone = [name for name in lost if names.of_network(name)]
    if len(gone) > placed:
        raise UserError(
            f"{where}: {len(gone)} of {placed + len(gone)} layers have no place in this model's "
            f"network, such as {gone[0]}"
        )


def _shaped(factors: Factors, base: nn.Linear | nn.Conv2d, where: str) -> Factors:
    """The factors as peft has them for this layer: 1x1 kernels come and go.

    Raises:
        UserError: it has another size.
    """
    kernel = base.weight.shape[2:]
    down, up = factors.down, factors.up
    if kernel.numel() == 1 and down.shape[2:].numel() == 1:
        down = down.reshape(*down.shape[:2], *kernel)
    up = up.reshape(*up.shape[:2], *(1 for _ in kernel))
    if down.shape[1:] != base.weight.shape[1:] or up.shape[0] != base.weight.shape[0]:
        file = [up.shape[0], *down.shape[1:]]
        raise UserError(
            f"{where} has another size in this model ({list(base.weight.shape)}, not {file})"
        )
    return replace(factors, down=down, up=up)


def add_loaded(model: nn.Module, layers: Layers, adapter: str) -> None:
    """Adds an adapter of these layers, in the model's own precision; it becomes the active one."""
    config = formats.peft_config({name: replace(f, magnitude=None) for name, f in layers.items()})
    config |= {
        "target_modules": any_of(layers),
        "rank_pattern": by_value({name: factors.rank for name, factors in layers.items()}),
        "alpha_pattern": by_value({name: factors.alpha for name, factors in layers.items()}),
        "use_dora": any(factors.magnitude is not None for factors in layers.values()),
    }
    with torch.random.fork_rng():  # peft fills what is overwritten below with random numbers
        inject(model, peft.LoraConfig(**config), adapter)
    for name, factors in layers.items():
        module: Any = model.get_submodule(name)
        _set(module.lora_A[adapter].weight, factors.down)
        _set(module.lora_B[adapter].weight, factors.up)
        if factors.magnitude is not None:
            _set(module.lora_magnitude_vector[adapter].weight, factors.magnitude)


def _set(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value.reshape(parameter.shape))
