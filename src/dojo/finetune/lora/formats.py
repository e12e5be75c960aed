"""LoRA files of SD3 and SD1 written in three public formats; `reading` reads these and others.

diffusers writes factors as .lora_A.weight and .lora_B.weight and alpha into the header, the other
two .lora_down.weight, .lora_up.weight and .alpha. SD1's UNet has diffusers' names in all of them,
and ComfyUI reads kohya's file. For names see `names`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch

from dojo.cli import UserError
from dojo.files import tensors
from dojo.finetune.lora import keys
from dojo.finetune.lora.layers import Factors, Layers, Lora, is_dora, to_original
from dojo.finetune.lora.reading import METADATA
from dojo.models.folders import TRANSFORMER, UNET

Format = Literal["diffusers", "kohya", "comfyui"]
PARTS = (TRANSFORMER, "text_encoder", "text_encoder_2")  # of SD3; SD1 has unet and text_encoder

_KOHYA = {TRANSFORMER: "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_KOHYA_SD1 = {UNET: "lora_unet_", "text_encoder": "lora_te_"}
_COMFYUI = {
    TRANSFORMER: "diffusion_model.",
    "text_encoder": keys.PREFIXES["text_encoder"],
    "text_encoder_2": keys.PREFIXES["text_encoder_2"],
}


def write(path: Path, lora: Lora, form: Format) -> None:
    """Writes a LoRA in one of the three formats; equal updates give equal bytes.

    Raises:
        UserError: it has no form in that format (DoRA, SDXL).
    """
    if form == "diffusers":
        state = {
            f"{part}.{name}.{key}": tensor
            for part, layers in lora.items()
            for name, factors in layers.items()
            for key, tensor in _peft_tensors(factors).items()
        }
        config = {
            f"{part}.{name}": value
            for part, layers in lora.items()
            for name, value in peft_config(layers).items()
        }
        tensors.save(path, state, {METADATA: json.dumps(config, indent=2, sort_keys=True)})
        return
    if any(map(is_dora, lora.values())):
        raise UserError(f"--lora_format: a DoRA has no form in {form}'s format here")
    kohya = _KOHYA_SD1 if UNET in lora else _KOHYA
    if not lora.keys() <= kohya.keys():
        raise UserError(
            "--lora_format: a UNet with two text encoders is Stable Diffusion XL, and here are "
            "Stable Diffusion 3 and 1"
        )
    state = {}
    for part, layers in lora.items():
        original = to_original(layers) if part == TRANSFORMER else layers
        for name, factors in original.items():
            if form == "kohya" or UNET in lora:
                key = kohya[part] + name.replace(".", "_")
            else:
                key = _COMFYUI[part] + name
            state[f"{key}.lora_down.weight"] = factors.down
            state[f"{key}.lora_up.weight"] = factors.up
            state[f"{key}.alpha"] = torch.tensor(factors.alpha)
    tensors.save(path, state, _metadata(path, lora))


def _peft_tensors(factors: Factors) -> dict[str, torch.Tensor]:
    """A layer's tensors by peft's names and in its shapes."""
    found = {"lora_A.weight": factors.down, "lora_B.weight": factors.up}
    if factors.magnitude is not None:
        shape = (1, -1, 1, 1) if factors.down.ndim == 4 else (-1,)
        found["lora_magnitude_vector"] = factors.magnitude.reshape(shape)
    return found


def peft_config(layers: Layers) -> dict[str, Any]:
    """The arguments of peft's LoraConfig for layers of any ranks and alphas."""
    rank = Counter(factors.rank for factors in layers.values()).most_common(1)[0][0]
    alpha = Counter(factors.alpha for factors in layers.values()).most_common(1)[0][0]
    names = {name: any_release(name) for name in layers}
    # The mark of the beginning keeps a name from matching the end of a longer one.
    marked = {name: f"^{name}" if short == name else short for name, short in names.items()}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {marked[n]: f.rank for n, f in layers.items() if f.rank != rank},
        "alpha_pattern": {marked[n]: f.alpha for n, f in layers.items() if f.alpha != alpha},
        "target_modules": sorted(names.values()),
        **({"use_dora": True} if is_dora(layers) else {}),
    }


def any_release(name: str) -> str:
    """A text encoder's layer as peft finds it with and without text_model in the model's names."""
    return name.removeprefix("text_model.")


def _metadata(path: Path, lora: Lora) -> dict[str, str]:
    """What sd-scripts and the programs that list LoRA files look for in a header."""
    layers = lora.get(TRANSFORMER, {})
    config = peft_config(lora.get(UNET) or layers or next(iter(lora.values())))
    widths = {f.down.shape[1] for name, f in layers.items() if ".attn.to_" in name}
    architecture = "stable-diffusion-3"  # Medium of 3 or 3.5: the layers do not always tell
    if any(".attn2." in name for name in layers):
        architecture = "stable-diffusion-3.5-medium"
    elif 2432 in widths:
        architecture = "stable-diffusion-3.5-large"
    module, base = keys.KOHYA_MMDIT
    if UNET in lora:
        (module, base), architecture = keys.KOHYA_UNET, "stable-diffusion-v1"
    return {
        "ss_network_module": module,
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha"]),
        "ss_base_model_version": base,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/kohya-ss/sd-scripts",
        "modelspec.title": path.stem,
    }
