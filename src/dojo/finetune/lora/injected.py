"""Adapters inside a network, by peft's own functions: any module can have them.

Networks without the mixin by which diffusers and transformers hand these on, such as a
HunyuanDiT, are treated alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from dojo.cli import UserError
from dojo.lazy import late, peft

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners import tuners_utils
    from torch import Tensor, nn

    from dojo.models import quantised
else:
    tuners_utils = late("peft.tuners.tuners_utils")
    quantised = late("dojo.models.quantised")

ADAPTER = "default"

# diffusers' pipelines ask this of their parts before they scale, switch or unload adapters.
_HAS_ADAPTERS = "_hf_peft_config_loaded"


def inject(network: nn.Module, config: LoraConfig, adapter: str = ADAPTER) -> None:
    """Adds an adapter to a network, in the weights' own precision; it becomes the active one.

    What is random in it is drawn from torch's global generator.
    """
    if adapter in config_of(network):
        raise ValueError(f"there is an adapter {adapter} already")
    peft.inject_adapter_in_model(config, network, adapter)
    for layer in _layers(network):
        layer.set_adapter([adapter])
        if isinstance(layer.get_base_layer(), quantised.FrozenLinear):
            layer.merge = _refuse_merging  # peft would write into a copy: the update would be lost
    if hasattr(network, _HAS_ADAPTERS):
        setattr(network, _HAS_ADAPTERS, True)


def _refuse_merging(*_: object, **__: object) -> NoReturn:
    """
    Raises:
        UserError: always.
    """
    raise UserError(
        "adapters cannot be merged into a network that is quantised, or partly in CPU memory "
        "(--base_precision, --blocks_on_cpu): python -m dojo.lora merge writes them into the "
        "weights of the model's folder"
    )


def config_of(network: nn.Module) -> Mapping[str, LoraConfig]:
    """The configurations of a network's adapters by their names."""
    configs: Any = getattr(network, "peft_config", {})
    return configs


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """The base model for a while: the reference of KL terms and of before/after pictures."""
    layers = list(_layers(network))  # found once: a network has hundreds of modules
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, on the CPU."""
    tensors = peft.get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def set_state(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `state` gave, into an adapter of the same layers and rank."""
    peft.set_peft_model_state_dict(network, dict(tensors), adapter_name=ADAPTER)


def _layers(network: nn.Module) -> Iterator[tuners_utils.BaseTunerLayer]:
    kind = tuners_utils.BaseTunerLayer
    return (module for module in network.modules() if isinstance(module, kind))
