"""From a layer's name in a LoRA file to the part of the pipeline and the layer in it.

A layer of the transformer (here SD3's; a HunyuanDiT's is blocks.0.attn1.to_q in diffusers, and in
Tencent's names blocks.0.attn1.Wqkv), one of CLIP-L (CLIP-G: text_encoder_2, te2, clip_g), and one
of a UNet, as they are called by
    diffusers   transformer.transformer_blocks.0.attn.to_q
                text_encoder.text_model.encoder.layers.0.self_attn.q_proj
                unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q
    kohya       lora_unet_joint_blocks_0_x_block_attn_qkv          (kohya-ss/sd-scripts)
                lora_te1_text_model_encoder_layers_0_self_attn_q_proj     (SD1: lora_te_)
                lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q
    ComfyUI     diffusion_model.joint_blocks.0.x_block.attn.qkv
                text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj
    OneTrainer  lora_transformer_transformer_blocks_0_attn_to_q
    LyCORIS     lycoris_transformer_blocks_0_attn_to_q
    peft        base_model.model.transformer_blocks.0.attn.to_q
and SDXL's UNet as kohya's scripts and LyCORIS call it, by the original code's names:
    lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k

Any prefix is read before any of the vocabularies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dojo.models import keys
from dojo.models.folders import TRANSFORMER, UNET

_NETWORK = ""  # unet or transformer: the rest of the name tells
_PREFIXES = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.": "text_encoder_3",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "text_model.": "text_encoder",
    "encoder.layers.": "text_encoder",
    "unet.": _NETWORK,
    "transformer.": _NETWORK,
    "model.diffusion_model.": _NETWORK,
    "diffusion_model.": _NETWORK,
    "lora_unet_": _NETWORK,
    "lora_transformer_": _NETWORK,
    "lycoris_": _NETWORK,
}

_BARE = ("text_model.", "encoder.layers.")  # beginnings that belong to the name
# What wrappers put between a name's parts: peft's model, and a compiled module.
_WRAPPERS = re.compile(r"base_model\.model\.|_orig_mod[._]")
# How diffusers wrote an attention's layers once.
_PROCESSOR = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora$")
_CLIP = re.compile(
    r"(?:text_model[._])?encoder[._]layers[._](\d+)[._](self_attn|mlp)[._](\w+_proj|fc[12])"
)
_UNET_ROOT = re.compile(
    r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)(?![a-z])"
)
_ORIGINAL_ROOT = re.compile(
    r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb)(?![a-z])|out[._]2$"
)
# The words of a UNet's names that have an underscore of their own; any other is a dot.
_UNET_WORD = re.compile(
    r"(?:down|up|transformer)_blocks|mid_block|time_emb_proj|conv_(?:shortcut|in|out)|"
    r"(?:time|add)_embedding|linear_\d|proj_(?:in|out)|to_(?:q|k|v|out)|"
    r"(?:in|out)put_blocks|middle_block|(?:in|out|emb)_layers|skip_connection|time_embed|label_emb|"
    r"[a-z0-9]+"
)
_BLOCK = re.compile(r"((?:(?:joint|transformer)_)?blocks)[._](\d+)[._](.+)")


def _flat_names() -> tuple[dict[str, str], dict[str, str]]:
    """Transformers' names by their spelling with underscores for dots: in a block, and outside."""
    inside: dict[str, str] = {}
    outside: dict[str, str] = {}
    for original in keys.original_modules(1):
        for name in (original, *keys.diffusers_modules(original)):
            match = _BLOCK.fullmatch(name)
            if match:
                inside[_flat(match)] = match[3]
            else:
                outside[name.replace(".", "_")] = name
    return inside, outside


def _flat(match: re.Match[str]) -> str:
    """A name in a block without its number; a HunyuanDiT's blocks have other layers than SD3's."""
    kind = "blocks" if match[1] == "blocks" else "x_blocks"
    return f"{kind}_{match[3].replace('.', '_')}"


_FLAT_IN_BLOCK, _FLAT = _flat_names()

# Names that only other models have, searched for with dots as underscores.
_FAMILIES = {
    "FLUX": r"single_transformer_blocks_\d|(double|single)_blocks_\d",
    "Qwen-Image": r"transformer_blocks_\d+_(img|txt)_(mlp|mod)",
    "AuraFlow": r"joint_transformer_blocks_\d",
    "Wan": r"blocks_\d+_(self|cross)_attn",
    "Z-Image or Lumina": r"layers_\d+_(attention|feed_forward)_",
    "Stable Cascade": r"lora_prior_",
    "a language model": r"model_layers_\d",
}


def clean(layer: str) -> str:
    """A layer's name without what peft and `torch.compile` wrap around it, in today's spelling."""
    name = _WRAPPERS.sub("", layer)
    if match := _PROCESSOR.search(name):
        kind = match[1]
        clip = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
        network = {"out": "to_out.0"}.get(kind, f"to_{kind}")
        name = name[: match.start()] + "." + (clip[kind] if "self_attn" in name else network)
    return name


def family(layers: Iterable[str]) -> tuple[str, str] | None:
    """Another model that a file is for, by one of its layers' names; None if none shows."""
    for layer in layers:
        flat = layer.replace(".", "_")
        for title, pattern in _FAMILIES.items():
            if re.search(pattern, flat):
                return title, layer
    return None


def resolve(layer: str, blocks: keys.Blocks) -> tuple[str, str] | None:
    """The part (unet, transformer, text_encoder, text_encoder_2) and the layer's name in it.

    A transformer's layer keeps the vocabulary it is written in, diffusers' or the original; a
    UNet's gets diffusers' name. None if no Stable Diffusion has such a layer.

    Args:
        blocks: how the UNet is built, for names of the original code.
    """
    part, inside = _of_part(layer)
    if part == "text_encoder_3":
        return None  # T5: neither diffusers nor the trainers here adapt it
    if part != _NETWORK:
        name = text_layer(inside)
        return (part, name) if name else None
    if name := _transformer_layer(inside):
        return TRANSFORMER, name
    if _UNET_ROOT.match(inside):
        name = _dotted(inside)
        return (UNET, name) if name else None
    name = blocks.ours(original) if (original := _original_layer(inside)) else None
    return (UNET, name) if name else None


def originals(layers: Iterable[str]) -> list[str]:
    """The names, with dots, of the layers that are called as in the UNet's original code."""
    return [name for layer in layers if (name := _original_layer(_of_part(layer)[1]))]


def _of_part(layer: str) -> tuple[str, str]:
    """The part that a prefix names, and the rest of the name."""
    prefix = next((start for start in _PREFIXES if layer.startswith(start)), "")
    inside = layer if prefix in _BARE else layer.removeprefix(prefix)
    return _PREFIXES.get(prefix, _NETWORK), inside


def _original_layer(inside: str) -> str | None:
    return _dotted(inside) if _ORIGINAL_ROOT.match(inside) else None


def _dotted(inside: str) -> str | None:
    """A UNet's layer with its dots; None if there is a word in it that no UNet has."""
    name = inside if "." in inside else ".".join(_UNET_WORD.findall(inside))
    return name if name.replace(".", "_") == inside.replace(".", "_") else None


def text_layer(name: str) -> str | None:
    """A CLIP layer's name as every file has it, from any spelling; None if it is none."""
    if match := _CLIP.fullmatch(name):
        return f"text_model.encoder.layers.{match[1]}.{match[2]}.{match[3]}"
    return "text_projection" if name == "text_projection" else None


def of_network(layer: str) -> bool:
    """Whether a layer's name is not that of a text encoder."""
    return not layer.startswith(("text_", "lora_te"))


def _transformer_layer(name: str) -> str | None:
    if match := _BLOCK.fullmatch(name):
        inside = _FLAT_IN_BLOCK.get(_flat(match))
        return f"{match[1]}.{match[2]}.{inside}" if inside else None
    return _FLAT.get(name.replace(".", "_"))
