"""Two vocabularies for one network: diffusers' names and those of Tencent's own code.

Beside spelling they differ in four ways: query, key and value of the self-attention are one matrix,
key and value of the cross-attention another; the second and the third norm of a block change
places; the final modulation gives shift before scale, where diffusers gives scale before shift; and
Tencent's table of styles has rows that nothing was trained with, of which diffusers keeps one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_TIME, _POOLER = "time_extra_emb", "time_extra_emb.pooler"
# Tencent's name: diffusers' names, stacked along the first dimension.
_MODULES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": (f"{_TIME}.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": (f"{_TIME}.timestep_embedder.linear_2",),
    "extra_embedder.0": (f"{_TIME}.extra_embedder.linear_1",),
    "extra_embedder.2": (f"{_TIME}.extra_embedder.linear_2",),
    "style_embedder": (f"{_TIME}.style_embedder",),
    **{f"pooler.{one}_proj": (f"{_POOLER}.{one}_proj",) for one in "qkvc"},
    "mlp_t5.0": ("text_embedder.linear_1",),
    "mlp_t5.2": ("text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
# The same below blocks.N, which both call so.
_BLOCK_MODULES: dict[str, tuple[str, ...]] = {
    "default_modulation.1": ("norm1.linear",),
    "norm1": ("norm1.norm",),
    "norm2": ("norm3",),
    "norm3": ("norm2",),
    "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn2.q_proj": ("attn2.to_q",),
    "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"),
    **{f"attn{i}.{one}_norm": (f"attn{i}.norm_{one}",) for i in (1, 2) for one in "qk"},
    **{f"attn{i}.out_proj": (f"attn{i}.to_out.0",) for i in (1, 2)},
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "skip_norm": ("skip_norm",),
    "skip_linear": ("skip_linear",),
}
# Weights outside of modules.
_WEIGHTS = {
    "pooler.positional_embedding": f"{_POOLER}.positional_embedding",
    "text_embedding_padding": "text_embedding_padding",
}
_ORIGINAL = {
    part: (original, i)
    for table in (_MODULES, _BLOCK_MODULES)
    for original, parts in table.items()
    for i, part in enumerate(parts)
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_SWAPPED = "final_layer.adaLN_modulation.1"


def original_module(name: str) -> tuple[str, int]:
    """Tencent's module that holds diffusers' module `name`, and its place in a fused one.

    Raises:
        KeyError: the network has no such module.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _ORIGINAL[name]
    module, place = _ORIGINAL[match[2]]
    return f"blocks.{match[1]}.{module}", place


def diffusers_modules(name: str) -> tuple[str, ...]:
    """The modules of diffusers that make up Tencent's module `name`, in their order.

    Raises:
        KeyError: the network has no such module.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _MODULES[name]
    return tuple(f"blocks.{match[1]}.{part}" for part in _BLOCK_MODULES[match[2]])


def original_modules(blocks: int) -> list[str]:
    """Every module that a network of so many blocks may have, under Tencent's name."""
    inside = [f"blocks.{i}.{name}" for i in range(blocks) for name in _BLOCK_MODULES]
    return [*_MODULES, *inside]


def from_original(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tencent's weights under diffusers' names, and the names that the network does not have.

    Pieces of a fused matrix are views of it.
    """
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in _WEIGHTS:
            found[_WEIGHTS[name]] = tensor
            continue
        try:
            parts = diffusers_modules(module)
        except KeyError:
            unknown.append(name)
            continue
        if module == _SWAPPED:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        elif module == "style_embedder":
            tensor = tensor[:1]
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            found[f"{part}.{kind}"] = piece
    return found, unknown


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' weights under Tencent's names; the table of styles has its one row."""
    own = {ours: name for name, ours in _WEIGHTS.items()}
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in own:
            pieces[own[name]] = {0: tensor}
            continue
        original, place = original_module(module)
        pieces.setdefault(f"{original}.{kind}", {})[place] = tensor
    joined = {name: torch.cat([some[i] for i in sorted(some)]) for name, some in pieces.items()}
    for name in joined.keys() & {f"{_SWAPPED}.weight", f"{_SWAPPED}.bias"}:
        joined[name] = torch.cat(joined[name].chunk(2)[::-1])
    return joined


def is_whole(names: Iterable[str]) -> bool:
    """Whether weights with these names, of either vocabulary, are of a Hunyuan-DiT."""
    return {"text_embedding_padding", "blocks.0.attn1.q_norm.weight"} <= set(names)
