"""Two vocabularies for one model: diffusers' names and those of the original SD3 files.

The original names are those of Stability's reference code, which single-file checkpoints, ComfyUI
and sd-scripts speak. They differ in three ways besides spelling: query, key and value are one
fused matrix; the last block's text modulation and the final one give shift before scale, where
diffusers gives scale before shift; the autoencoder's attention is made of 1x1 convolutions and its
decoder counts blocks from the other end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dojo.files.tensors import Source
from dojo.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}

# Original name: diffusers' names, stacked along the first dimension.
_MODULES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
# The same below joint_blocks.N (original) and transformer_blocks.N (diffusers).
_BLOCK_MODULES: dict[str, tuple[str, ...]] = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
_ORIGINAL = {
    part: (original, i)
    for table in (_MODULES, _BLOCK_MODULES)
    for original, parts in table.items()
    for i, part in enumerate(parts)
}
_BLOCK = re.compile(r"(transformer|joint)_blocks\.(\d+)\.(.+)")


def original_module(name: str) -> tuple[str, int]:
    """The original module that holds diffusers' module `name`, and its place in a fused one.

    Raises:
        KeyError: the MMDiT has no such module.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _ORIGINAL[name]
    module, place = _ORIGINAL[match[3]]
    return f"joint_blocks.{match[2]}.{module}", place


def diffusers_modules(name: str) -> tuple[str, ...]:
    """The modules of diffusers that make up the original module `name`, in their order.

    Raises:
        KeyError: the MMDiT has no such module.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _MODULES[name]
    return tuple(f"transformer_blocks.{match[2]}.{part}" for part in _BLOCK_MODULES[match[3]])


def original_modules(blocks: int) -> list[str]:
    """Every module that an MMDiT of so many blocks may have, under its original name."""
    inside = [f"joint_blocks.{i}.{name}" for i in range(blocks) for name in _BLOCK_MODULES]
    return [*_MODULES, *inside]


def is_swapped(name: str, rows: int, width: int) -> bool:
    """Whether the two halves of an original module's rows change places in diffusers.

    The last block's text modulation is told from the others by its size: it has no gates, so
    2 x width rows where the others have 6.
    """
    last = name.endswith("context_block.adaLN_modulation.1") and rows == 2 * width
    return last or name == "final_layer.adaLN_modulation.1"


def swap_halves(rows: Tensor) -> Tensor:
    """Scale and shift, or shift and scale, in the other order."""
    return torch.cat(rows.chunk(2)[::-1])


def architecture(names: Iterable[str]) -> str:
    """modelspec's name of an MMDiT with these tensors, in either vocabulary."""
    words = " ".join(names)
    if "attn2." in words:
        return "stable-diffusion-3.5-medium"
    return f"stable-diffusion-3{'.5-large' if 'norm_q' in words or 'ln_q' in words else '-medium'}"


def transformer_to_original(state: Mapping[str, Tensor]) -> dict[str, Source]:
    """The MMDiT's tensors under their original names, each made on a device when asked for."""
    width = state["pos_embed.proj.weight"].shape[0]
    sources: dict[str, list[str]] = {}
    for name in state:
        if name == "pos_embed.pos_embed":
            sources["pos_embed"] = [name]
            continue
        module, _, kind = name.rpartition(".")
        original, place = original_module(module)
        parts = sources.setdefault(f"{original}.{kind}", [""] * len(diffusers_modules(original)))
        parts[place] = name

    def make(original: str, device: str) -> Tensor:
        parts = [state[name].to(device) for name in sources[original]]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        if is_swapped(original.rpartition(".")[0], len(joined), width):
            return swap_halves(joined)
        return joined

    return {name: lambda device, name=name: make(name, device) for name in sources}


# What changes in the autoencoder's names, in this order.
_VAE_RENAMES = (
    (r"conv_norm_out", "norm_out"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm", r"\1.mid.attn_1.norm"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])", r"\1.mid.attn_1.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0", r"\1.mid.attn_1.proj_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
)


def vae_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's tensors under their original names."""
    ups = 1 + max(int(m[1]) for name in state if (m := re.search(r"up_blocks\.(\d+)", name)))
    renamed = {}
    for name, tensor in state.items():
        original = name
        for pattern, replacement in _VAE_RENAMES:
            original = re.sub(pattern, replacement, original)
        original = re.sub(r"(?<=\.up\.)\d+", lambda m: str(ups - 1 - int(m[0])), original)
        if ".mid.attn_1." in original and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a linear layer is a 1x1 convolution
        renamed[original] = tensor
    return renamed
