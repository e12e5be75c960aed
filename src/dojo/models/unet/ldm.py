"""Two vocabularies for one model: diffusers' names and those of the original (LDM, sgm) files.

The original names are those of CompVis' and Stability's code, which single files, ComfyUI and
kohya's scripts speak. Besides spelling they differ in this: the UNet and the autoencoder count
their blocks in other ways, the autoencoder's attention is made of 1x1 convolutions, and OpenCLIP
has query, key and value in one matrix and its projection transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dojo.lazy import torch
from dojo.models import classic
from dojo.models.sd3 import keys

if TYPE_CHECKING:
    from torch import Tensor

# What the names of a part begin with, by family; what is written comes first.
PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {
        "unet": ("model.diffusion_model.",),
        "vae": ("first_stage_model.",),
        "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    },
    "sd2": {
        "unet": ("model.diffusion_model.",),
        "vae": ("first_stage_model.",),
        "text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    },
    "sdxl": {
        "unet": ("model.diffusion_model.",),
        "vae": ("first_stage_model.",),
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
}
_OPEN_CLIP = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}


@dataclass(frozen=True)
class Origin:
    """Which of diffusers' tensors an original one is made of."""

    names: tuple[str, ...]
    """diffusers' names; several are stacked along the first dimension"""
    form: Literal["same", "conv", "transposed"] = "same"
    """conv: a linear layer's matrix as a 1x1 convolution"""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """diffusers' tensors to the original one."""
        joined = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        if self.form == "conv":
            return joined[:, :, None, None]
        return joined.T if self.form == "transposed" else joined

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The original tensor to diffusers', by their names."""
        if self.form == "conv":
            tensor = tensor.reshape(tensor.shape[:2])  # some files have matrices already
        elif self.form == "transposed":
            tensor = tensor.T
        parts = tensor.chunk(len(self.names)) if len(self.names) > 1 else (tensor,)
        return dict(zip(self.names, parts, strict=True))


def origins(family: str, part: str, state: Mapping[str, Tensor]) -> dict[str, Origin]:
    """Original names, without the part's prefix, and what of a part's tensors they are made of.

    Args:
        family: sd1, sd2 or sdxl.
        part: unet, vae, text_encoder or text_encoder_2.
        state: the part's tensors under diffusers' or transformers' names; without memory will do.
    Raises:
        KeyError: a tensor that no UNet or CLIP of these families has.
    """
    if part == "unet":
        return {name: Origin((ours,)) for ours, name in unet_names(state).items()}
    if part == "vae":
        return _vae(state)
    # transformers writes `text_model.` or not, by its version; files have it.
    spelled = classic.rename({name: name for name in state})
    if (family, part) in _OPEN_CLIP:
        return _open_clip(spelled)
    return {name: Origin((ours,)) for name, ours in spelled.items()}


# ---- the UNet ----

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PLACE = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)"
    r"\.(\d+)\.(.+)"
)


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a UNet's tensors, all of them, to the original ones.

    Raises:
        KeyError: one is no name of a UNet of these families.
    """
    names = list(names)
    resnets = (re.match(r"down_blocks\.0\.resnets\.(\d+)", name) for name in names)
    layers = 1 + max(int(match[1]) for match in resnets if match)
    attended = {m[0] for n in names if (m := re.match(r"up_blocks\.\d+\.attentions", n))}
    return {name: _unet_name(name, layers, attended) for name in names}


def _unet_name(name: str, layers: int, attended: set[str]) -> str:
    match = _PLACE.fullmatch(name)
    if match is None:
        module, _, kind = name.rpartition(".")
        return f"{_TOP[module]}.{kind}"
    side, block, what, index, rest = match.groups()
    i, j = int(block or 0), int(index)
    if what == "resnets":
        module, _, kind = rest.rpartition(".")
        rest = f"{_RESNET[module]}.{kind}"
    if side is None:
        return f"middle_block.{2 * j if what == 'resnets' else 1 + 2 * j}.{rest}"
    if what == "downsamplers":
        return f"input_blocks.{(layers + 1) * (i + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if what == "upsamplers":  # behind the last ResNet, and its attention if there is one
        behind = 2 if f"up_blocks.{i}.attentions" in attended else 1
        return f"output_blocks.{(layers + 1) * i + layers}.{behind}.{rest}"
    place = f"input_blocks.{(layers + 1) * i + 1 + j}"
    if side == "up":
        place = f"output_blocks.{(layers + 1) * i + j}"
    return f"{place}.{int(what == 'attentions')}.{rest}"


# ---- the autoencoder ----


def _vae(state: Mapping[str, Tensor]) -> dict[str, Origin]:
    found: dict[str, Origin] = {}
    for (ours, tensor), (name, original) in zip(
        state.items(), keys.vae_to_original(state).items(), strict=True
    ):
        found[name] = Origin((ours,), "conv" if original.ndim > tensor.ndim else "same")
    return found


# ---- OpenCLIP ----

_OPEN_CLIP_TOP = {
    "text_model.embeddings.position_embedding.weight": Origin(("positional_embedding",)),
    "text_model.embeddings.token_embedding.weight": Origin(("token_embedding.weight",)),
    "text_model.final_layer_norm.weight": Origin(("ln_final.weight",)),
    "text_model.final_layer_norm.bias": Origin(("ln_final.bias",)),
    "text_projection.weight": Origin(("text_projection",), "transposed"),
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def _open_clip(spelled: Mapping[str, str]) -> dict[str, Origin]:
    """Args: spelled: the classic names, and what the encoder calls them."""
    found: dict[str, Origin] = {}
    for name, ours in spelled.items():
        if name in _OPEN_CLIP_TOP:
            entry = _OPEN_CLIP_TOP[name]
            found[entry.names[0]] = Origin((ours,), entry.form)
            continue
        match = _LAYER.fullmatch(name)
        if match is None:
            raise KeyError(name)
        layer, module, kind = match.groups()
        block = f"transformer.resblocks.{layer}"
        if module == "self_attn.q_proj":
            qkv = (name.replace("q_proj", f"{x}_proj") for x in "qkv")
            found[f"{block}.attn.in_proj_{kind}"] = Origin(tuple(spelled[x] for x in qkv))
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            found[f"{block}.{_OPEN_CLIP_LAYER[module]}.{kind}"] = Origin((ours,))
    return found
