"""LoRA files written in three public formats; `reading` reads these and others.

diffusers writes factors as .lora_A.weight and .lora_B.weight and alpha into the header, the other
two .lora_down.weight, .lora_up.weight and .alpha. A UNet's file of the other two is the same one,
which ComfyUI reads too: SD1's and Kolors' layers have diffusers' names in it, SDXL's those of the
original code, as kohya's scripts train that one. A HunyuanDiT's file for ComfyUI is peft's, as its
authors write it. For names see `names`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dojo.cli import UserError
from dojo.files import outputs, tensors
from dojo.finetune.lora import bases
from dojo.finetune.lora.layers import is_dora, to_original
from dojo.finetune.lora.reading import METADATA, PEFT_CONFIG, PEFT_WEIGHTS
from dojo.lazy import torch
from dojo.models import keys
from dojo.models.folders import TRANSFORMER, UNET

if TYPE_CHECKING:
    from dojo.finetune.lora import lycoris
    from dojo.finetune.lora.bases import Base
    from dojo.finetune.lora.layers import Factors, Layers, Lora

Format = Literal["diffusers", "kohya", "comfyui"]
PARTS = (TRANSFORMER, "text_encoder", "text_encoder_2")  # of SD3

_KOHYA = {
    TRANSFORMER: "lora_unet_",
    UNET: "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
_KOHYA_SD1 = {UNET: "lora_unet_", "text_encoder": "lora_te_"}
_COMFYUI = {
    TRANSFORMER: "diffusion_model.",
    "text_encoder": keys.PREFIXES["text_encoder"],
    "text_encoder_2": keys.PREFIXES["text_encoder_2"],
}


def write(path: Path, lora: Lora, form: Format, base: Base | None = None) -> None:
    """Writes a LoRA in one of the three formats; equal updates give equal bytes.

    Args:
        base: the model it is for; unset, it is guessed from the layers.

    Raises:
        UserError: it has no form in that format (DoRA, a second text encoder where the base has
            one).
    """
    if form == "diffusers":
        _write_diffusers(path, lora)
        return
    if any(map(is_dora, lora.values())):
        raise UserError(f"--lora_format: a DoRA has no form in {form}'s format here")
    base = base or bases.guess(lora)[0]
    if form == "comfyui" and base.adapters_are_pefts:
        _write_peft(path, lora)
        return
    prefixes = _COMFYUI if form == "comfyui" and TRANSFORMER in lora else kohya_prefixes(base)
    if extra := lora.keys() - prefixes.keys():
        raise UserError(f"--lora_format: {base.family} has no {min(extra)} in {form}'s format")
    state = {}
    for part, layers in lora.items():
        for name, factors in original_layers(part, layers, base).items():
            key = prefixes[part] + (name if prefixes is _COMFYUI else name.replace(".", "_"))
            state[f"{key}.lora_down.weight"] = factors.down
            state[f"{key}.lora_up.weight"] = factors.up
            state[f"{key}.alpha"] = torch.tensor(factors.alpha)
    tensors.save(path, state, _metadata(path, lora, base))


def _write_diffusers(path: Path, lora: Lora) -> None:
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


def _write_peft(path: Path, lora: Lora) -> None:
    """Writes a transformer's layers as peft does, under their original names.

    The alphas are the ranks, since some readers of such files know no others. A file that has
    peft's own name gets peft's configuration beside it.

    Raises:
        UserError: it adapts more than the transformer.
    """
    if extra := lora.keys() - {TRANSFORMER}:
        raise UserError(f"--lora_format: there is no {min(extra)} in comfyui's format of this base")
    layers = to_original(lora[TRANSFORMER])
    state: dict[str, torch.Tensor] = {}
    for name, factors in layers.items():
        up = factors.up if factors.scale == 1 else factors.up * factors.scale
        state[f"base_model.model.{name}.lora_A.weight"] = factors.down
        state[f"base_model.model.{name}.lora_B.weight"] = up
    tensors.save(path, state, {"format": "pt"})
    if path.name == PEFT_WEIGHTS:
        ranks = {name: factors.rank for name, factors in layers.items()}
        text = json.dumps(_peft_file(ranks), indent=2, sort_keys=True)
        outputs.own(path.with_name(PEFT_CONFIG)).write_text(text + "\n", encoding="utf-8")


def _peft_file(ranks: Mapping[str, int]) -> dict[str, Any]:
    """peft's adapter_config.json of layers whose alphas are their ranks."""
    # Older releases of peft find a layer's own rank by the end of its name alone.
    short = {name: name.split(".", 2)[-1] for name in ranks}
    alike = len({*zip(short.values(), ranks.values(), strict=True)}) == len({*short.values()})
    own = {short[name] if alike else name: rank for name, rank in ranks.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in own.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
    }


def write_lycoris(path: Path, updates: lycoris.Updates, base: Base | None = None) -> None:
    """Writes layers by LoHa and LoKr in LyCORIS' format; equal updates give equal bytes.

    Args:
        base: the model they are for; unset, UNets have diffusers' names, which every reader knows.
    """
    prefixes = kohya_prefixes(base) if base else _KOHYA
    state: dict[str, torch.Tensor] = {}
    for part, layers in updates.items():
        for name, update in layers.items():
            own = original_name(part, name, base) if base else name
            key = prefixes[part] + own.replace(".", "_")
            state |= {f"{key}.{kind}": tensor for kind, tensor in update.parts.items()}
            state[f"{key}.alpha"] = torch.tensor(update.alpha)
    methods = {update.method.lower() for layers in updates.values() for update in layers.values()}
    one = next(update for layers in updates.values() for update in layers.values())
    metadata = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": min(methods)}),
        "ss_network_dim": str(one.rank),
        "ss_network_alpha": str(one.alpha),
    }
    tensors.save(path, state, metadata | (header(path, base) if base else {}))


def kohya_prefixes(base: Base) -> dict[str, str]:
    """What the names of a part begin with in kohya's format."""
    return _KOHYA_SD1 if base.family in ("sd1", "sd2") else _KOHYA


def original_layers(part: str, layers: Layers, base: Base) -> Layers:
    """A part's layers under the names that kohya's format has for them, with dots.

    Raises:
        UserError: one has no such name.
    """
    if part == TRANSFORMER:
        return to_original(layers)
    return {original_name(part, name, base): factors for name, factors in layers.items()}


def original_name(part: str, name: str, base: Base) -> str:
    """The same for one layer of a UNet or a text encoder.

    Raises:
        UserError: it has none.
    """
    if part != UNET or not base.has_original_names:
        return name
    try:
        return base.blocks.original(name)
    except KeyError as error:
        raise UserError(f"--lora_format: no UNet has a layer {name}") from error


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


def _metadata(path: Path, lora: Lora, base: Base) -> dict[str, str]:
    """What sd-scripts and the programs that list LoRA files look for in a header."""
    layers = lora.get(UNET) or lora.get(TRANSFORMER) or next(iter(lora.values()))
    linear = {name: f for name, f in layers.items() if not _is_spatial(f)}
    config = peft_config(linear or layers)
    found = {
        "ss_network_module": base.kohya_module,
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha"]),
        **header(path, base),
    }
    if not base.has_unet:
        architecture = base.architecture_of(lora.get(TRANSFORMER, {}))
        found["modelspec.architecture"] = f"{architecture}/lora"
    if linear and len(linear) < len(layers):
        conv = peft_config({n: f for n, f in layers.items() if n not in linear})
        settings = {"conv_dim": str(conv["r"]), "conv_alpha": str(conv["lora_alpha"])}
        found["ss_network_args"] = json.dumps(settings)
    return found


def _is_spatial(factors: Factors) -> bool:
    """Whether it is a convolution that sees neighbours: what sd-scripts' conv_dim is for."""
    return factors.down.shape[2:].numel() > 1


def header(path: Path, base: Base) -> dict[str, str]:
    """What a file's header says of the base that it is for."""
    found = {
        "ss_base_model_version": base.version,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/kohya-ss/sd-scripts",
        "modelspec.title": path.stem,
    }
    if not base.has_unet:
        return found
    return found | {
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.prediction_type": "v" if base.predicts_v else "epsilon",
        "ss_v2": str(base.family == "sd2"),
        "ss_v_parameterization": str(base.predicts_v),
    }
