"""What computes attention in the trained network: `--attention_backend`.

diffusers has a dispatcher for kernels of attention. The networks of the families here do not ask
it (their processors call torch's scaled dot product themselves), so that its own
`set_attention_backend` changes nothing in them and says nothing. Here every processor hands that
one call to the dispatcher, also where activations are recomputed in the backward pass: one way for
UNets and transformers alike. Without a name no processor is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Literal

from dojo.cli import UserError
from dojo.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

Backend = Literal[
    "native",
    "_native_math",
    "_native_efficient",
    "_native_flash",
    "_native_cudnn",
    "xformers",
    "flash",
    "flash_varlen",
    "_flash_3",
    "_flash_varlen_3",
    "flash_hub",
    "flash_varlen_hub",
    "_flash_3_hub",
    "_flash_3_varlen_hub",
    "flash_4_hub",
    "aiter_fa2_hub",
    "sage",
    "sage_varlen",
    "sage_hub",
    "sage_blackwell_hub",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
]
"""by diffusers' names; those with _hub are fetched from the hub by the package kernels. Not among
them: flex, which is slow unless it is compiled, and those of NPUs and XLA"""

FLAG, DRAWING_FLAG = "--attention_backend", "--validation_attention_backend"


def check_trains(name: str | None) -> None:
    """Refuses what computes no gradients.

    Raises:
        ValueError: naming what it is for.
    """
    if name is not None and "sage" in name:
        raise ValueError(
            f"{FLAG} {name} computes no gradients, so nothing can be trained with it: "
            f"{DRAWING_FLAG} takes it"
        )


def check(
    name: str | None, flag: str, device: torch.device, dtype: torch.dtype, *, trains: bool
) -> None:
    """Refuses what is not installed, or does not compute on this device in this precision.

    Args:
        flag: what named it.
        trains: whether gradients are needed.
    Raises:
        UserError: naming the reason.
    """
    if name is None:
        return
    if trains:
        try:
            check_trains(name)
        except ValueError as error:
            raise UserError(str(error)) from None
    from diffusers.models.attention_dispatch import attention_backend

    # Two heads of 64, as most of these networks have; no generator is asked.
    numbers = torch.linspace(-1, 1, 2 * 128 * 64, device=device, dtype=torch.float32)
    query = numbers.view(1, 2, 128, 64).to(dtype).requires_grad_(trains)
    try:
        # Its own door is asked first: it knows what is missing, and fetches kernels.
        with attention_backend(name), torch.set_grad_enabled(trains):
            found: Tensor = dispatch(name, query, query, query)
        if trains:
            found.float().sum().backward()
    except Exception as error:  # every kernel has kinds of its own
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{flag} {name} does not compute here ({device.type}, {str(dtype)[6:]}): {words[0]}"
        ) from error
    wrong = not bool(found.isfinite().all()) or (trains and query.grad is None)
    if wrong:
        raise UserError(f"{flag} {name} gives no numbers on this {device.type}, or no gradients")


def check_run(args: Any, device: torch.device, dtype: torch.dtype) -> None:
    """The same of all options of a script.

    Raises:
        UserError: see `check`, or a network is compiled, whose attention is fixed.
    """
    groups = list(vars(args).values())
    drawing = [getattr(group, DRAWING_FLAG[2:], None) for group in groups]
    drawn_with = next(filter(None, drawing), None)
    trained_with = args.model.attention_backend
    if args.model.torch_compile and (trained_with or drawn_with):
        flag = FLAG if trained_with else DRAWING_FLAG
        raise UserError(f"{flag} does not go with --torch_compile, which chooses for itself")
    check(trained_with, FLAG, device, dtype, trains=True)
    check(drawn_with, DRAWING_FLAG, device, dtype, trains=False)


def install(network: nn.Module, name: str | None) -> None:
    """From now on the network's attention is computed by `name`; None leaves it as it is."""
    if name is not None:
        for module in _attending(network):
            module.set_processor(_dispatching(module.processor, name))


def while_drawing(network: nn.Module, name: str | None) -> AbstractContextManager[None]:
    """The same for a while."""
    return nullcontext() if name is None else _for_a_while(network, name)


@contextmanager
def _for_a_while(network: nn.Module, name: str) -> Iterator[None]:
    before = [(module, module.processor) for module in _attending(network)]
    install(network, name)
    try:
        yield
    finally:
        for module, processor in before:
            module.set_processor(processor)


def dispatch(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's `scaled_dot_product_attention`, computed by `name`: [B, heads, tokens, width].

    Within autocast in its precision, as torch's own.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (one.to(dtype) for one in (query, key, value))
    found: Any = dispatch_attention_fn(
        *(one.transpose(1, 2) for one in (query, key, value)),  # it takes [B, tokens, heads, width]
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        backend=AttentionBackendName(name),
    )
    return found.transpose(1, 2)


def _attending(network: nn.Module) -> list[Any]:
    """The layers of a network whose attention a processor computes."""
    return [module for module in network.modules() if hasattr(module, "set_processor")]


def _dispatching(processor: Any, name: str) -> Any:
    """A processor like another one, whose attention the dispatcher computes."""
    plain: Any = getattr(processor, "plain", processor)
    kind = type(plain)

    @wraps(kind.__call__)  # diffusers reads the signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _routed()(name):
            return kind.__call__(self, *args, **kwargs)

    made = copy(plain)
    made.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    made.plain = plain
    return made


@cache
def _routed() -> Callable[[str], AbstractContextManager[Any]]:
    """A class of contexts in which torch's attention is computed by a name."""
    from torch.overrides import TorchFunctionMode

    attention = F.scaled_dot_product_attention

    class Routed(TorchFunctionMode):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is attention:
                return dispatch(self.name, *args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    return Routed
