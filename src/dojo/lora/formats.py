"""Three public formats of LoRA files of SD3 and SD1, and the exact ways between them.

A layer of the transformer, and one of CLIP-L (CLIP-G: text_encoder_2, te2, clip_g):
    diffusers   transformer.transformer_blocks.0.attn.to_q
                text_encoder.text_model.encoder.layers.0.self_attn.q_proj
    kohya       lora_unet_joint_blocks_0_x_block_attn_qkv          (kohya-ss/sd-scripts)
                lora_te1_text_model_encoder_layers_0_self_attn_q_proj
    comfyui     diffusion_model.joint_blocks.0.x_block.attn.qkv
                text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj

diffusers writes factors as .lora_A.weight and .lora_B.weight and alpha into the header, the other
two .lora_down.weight, .lora_up.weight and .alpha; any mixture is read. An update is
(alpha / rank) up @ down. The two original formats adapt query, key and value as one layer: three
adapters become one by stacking the downs and laying the ups on a block diagonal; one becomes three
that share the down, each without the ranks that its rows of up do not use.

SD1's UNet has diffusers' names in all of them, and ComfyUI reads kohya's file:
    diffusers   unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q
    kohya       lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q
                lora_te_text_model_encoder_layers_0_self_attn_q_proj
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from dojo import tensors
from dojo.cli import UserError
from dojo.pipelines import TRANSFORMER, UNET
from dojo.sd3 import keys

Format = Literal["diffusers", "kohya", "comfyui"]
METADATA = "lora_adapter_metadata"  # where diffusers looks for the adapters' configurations
PARTS = (TRANSFORMER, "text_encoder", "text_encoder_2")  # of SD3; SD1 has unet and text_encoder
_PREFIXES = {part: f"{part}." for part in (*PARTS, UNET)}

_KOHYA = {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_KOHYA_SD1 = {UNET: "lora_unet_", "text_encoder": "lora_te_"}
_COMFYUI = {
    "transformer": "diffusion_model.",
    "text_encoder": keys.PREFIXES["text_encoder"],
    "text_encoder_2": keys.PREFIXES["text_encoder_2"],
}
_DOTTED = {**_COMFYUI, UNET: _PREFIXES[UNET]}
_KOHYA_UNET = tuple(f"lora_unet_{part}_" for part in ("down_blocks", "mid_block", "up_blocks"))
# The words of a UNet's names that have an underscore of their own; any other is a dot.
_UNET_WORDS = re.compile(
    r"(?:down|up|transformer)_blocks|mid_block|time_emb_proj|conv_shortcut|proj_(?:in|out)|"
    r"to_(?:q|k|v|out)|[a-z0-9]+"
)
_FACTOR = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))"
    r"(?:\.default)?\.weight|(?P<scaled>.+)\.alpha"
)


@dataclass(frozen=True)
class Factors:
    """One layer's update: (alpha / rank) up @ down."""

    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[out, rank]"""
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of the up-projection."""
        return self.up.shape[1]

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank


Layers = dict[str, Factors]
Lora = dict[str, Layers]
"""By part (transformer or unet, text_encoder, text_encoder_2), then by diffusers' layer name."""


def detect(names: Iterable[str]) -> Format | None:
    """The format of a file with these tensors; None if it is no LoRA that we know."""
    names = list(names)
    prefixes: dict[Format, tuple[str, ...]] = {
        "kohya": ("lora_unet_joint_blocks_", *_KOHYA_UNET, "lora_te_", "lora_te1_", "lora_te2_"),
        "comfyui": ("diffusion_model.joint_blocks.", "text_encoders.clip_"),
        "diffusers": tuple(_PREFIXES.values()),
    }
    for name, starts in prefixes.items():
        if any(key.startswith(starts) for key in names):
            return name
    return None


def read(path: Path) -> tuple[Lora, list[str]]:
    """A LoRA file of any of the three formats, and the tensors in it that have no place.

    Raises:
        UserError: the file is broken, in another format, or a DoRA in another than diffusers'.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    found = detect(state)
    if found is None:
        raise UserError(
            f"{path} is no LoRA for Stable Diffusion 3 or 1 in the format of diffusers, kohya "
            f"or ComfyUI (its names begin with {min(state, default='')!r})"
        )
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in state):
        raise UserError(f"{path} is a DoRA, which the other formats have no form for")
    layers, left = _pair(state)
    if found == "diffusers":
        lora, lost = _by_part(layers, _PREFIXES)
        lora = {part: _with_alpha(part, there, metadata) for part, there in lora.items()}
    else:
        lora, lost = _by_part(_unflattened(layers) if found == "kohya" else layers, _DOTTED)
        lora, wrong = _from_original(lora)
        lost += wrong
    return lora, [*left, *lost]


def write(path: Path, lora: Lora, form: Format) -> None:
    """Writes a LoRA in one of the three formats; equal updates give equal bytes."""
    if form == "diffusers":
        state = {
            f"{part}.{name}.{factor}.weight": getattr(factors, attribute)
            for part, layers in lora.items()
            for name, factors in layers.items()
            for factor, attribute in (("lora_A", "down"), ("lora_B", "up"))
        }
        config = {
            f"{part}.{name}": value
            for part, layers in lora.items()
            for name, value in peft_config(layers).items()
        }
        tensors.save(path, state, {METADATA: json.dumps(config, indent=2, sort_keys=True)})
        return
    state = {}
    kohya = _KOHYA_SD1 if UNET in lora else _KOHYA
    for part, layers in lora.items():
        original = _to_original(layers) if part == TRANSFORMER else layers
        for name, factors in original.items():
            if form == "kohya" or UNET in lora:
                key = kohya[part] + name.replace(".", "_")
            else:
                key = _COMFYUI[part] + name
            state[f"{key}.lora_down.weight"] = factors.down
            state[f"{key}.lora_up.weight"] = factors.up
            state[f"{key}.alpha"] = torch.tensor(factors.alpha)
    tensors.save(path, state, _metadata(path, lora))


def peft_config(layers: Layers) -> dict[str, Any]:
    """The arguments of peft's LoraConfig for layers of any ranks and alphas."""
    rank = Counter(factors.rank for factors in layers.values()).most_common(1)[0][0]
    alpha = Counter(factors.alpha for factors in layers.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        # The mark of the beginning keeps a name from matching the end of a longer one.
        "rank_pattern": {f"^{n}": f.rank for n, f in layers.items() if f.rank != rank},
        "alpha_pattern": {f"^{n}": f.alpha for n, f in layers.items() if f.alpha != alpha},
        "target_modules": sorted(layers),
    }


def _pair(state: Mapping[str, Tensor]) -> tuple[Layers, list[str]]:
    """Downs, ups and alphas brought together by the layers' names as they stand in the file.

    A file without alphas means the rank; what is no half of a pair is given back by name.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if match := _FACTOR.fullmatch(name):
            kind = "down" if match["down"] else "up" if match["up"] else "alpha"
            halves.setdefault(match["layer"] or match["scaled"], {})[kind] = tensor
    layers = {
        name: Factors(there["down"], there["up"], float(there.get("alpha", there["up"].shape[1])))
        for name, there in halves.items()
        if "down" in there and "up" in there
    }
    used = [m["layer"] or m["scaled"] for name in state if (m := _FACTOR.fullmatch(name))]
    left = [name for name in state if not _FACTOR.fullmatch(name)]
    return layers, [*left, *(name for name in dict.fromkeys(used) if name not in layers)]


def _by_part(layers: Layers, prefixes: Mapping[str, str]) -> tuple[Lora, list[str]]:
    """Layers sorted by the beginnings of their names, and the names that begin otherwise."""
    lora: Lora = {}
    left = []
    for name, factors in layers.items():
        for part, prefix in prefixes.items():
            if name.startswith(prefix):
                lora.setdefault(part, {})[name.removeprefix(prefix)] = factors
                break
        else:
            left.append(name)
    return lora, left


def _with_alpha(part: str, layers: Layers, metadata: Mapping[str, str]) -> Layers:
    """Diffusers' layers with the alphas of the file's header."""
    config: dict[str, Any] = {
        name.removeprefix(f"{part}."): value
        for name, value in json.loads(metadata.get(METADATA, "{}")).items()
        if name.startswith(f"{part}.")
    }
    if "lora_alpha" not in config:
        return layers

    def alpha(name: str, rank: int) -> float:
        factor = rank**0.5 if config.get("use_rslora") else 1
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", name):
                return value * factor
        return config["lora_alpha"] * factor

    return {
        name: replace(factors, alpha=alpha(name, factors.rank)) for name, factors in layers.items()
    }


def _unflattened(layers: Layers) -> Layers:
    """kohya's names with their dots back, as `_DOTTED`: the underscores alone do not say where."""
    blocks = [int(m[1]) for name in layers if (m := re.search(r"joint_blocks_(\d+)_", name))]
    table = {
        _KOHYA["transformer"] + name.replace(".", "_"): _COMFYUI["transformer"] + name
        for name in keys.original_modules(1 + max(blocks, default=0))
    }
    clip = re.compile(r"(lora_te[12]?_)text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)")
    parts = {
        prefix: _DOTTED[part]
        for prefixes in (_KOHYA, _KOHYA_SD1)
        for part, prefix in prefixes.items()
    }

    def dotted(name: str) -> str:
        if match := clip.fullmatch(name):
            inside = f"text_model.encoder.layers.{match[2]}.{match[3]}.{match[4]}"
            return parts[match[1]] + inside
        if name.startswith(_KOHYA_UNET):
            words = _UNET_WORDS.findall(name.removeprefix(_KOHYA_SD1[UNET]))
            return _DOTTED[UNET] + ".".join(words)
        return table.get(name, name)

    return {dotted(name): factors for name, factors in layers.items()}


def _from_original(lora: Lora) -> tuple[Lora, list[str]]:
    """The transformer's layers under diffusers' names: qkv split, swapped halves put right."""
    found: Lora = {part: layers for part, layers in lora.items() if part != "transformer"}
    left = []
    for name, factors in lora.get("transformer", {}).items():
        try:
            parts = keys.diffusers_modules(name)
        except KeyError:
            left.append(name)
            continue
        up = factors.up
        if keys.is_swapped(name, up.shape[0], factors.down.shape[1]):
            up = keys.swap_halves(up)
        pieces = zip(parts, up.chunk(len(parts)), strict=True)
        for part, piece in pieces:
            used = piece.flatten(1).any(0) if len(parts) > 1 else torch.ones(factors.rank).bool()
            if used.any():
                found.setdefault("transformer", {})[part] = Factors(
                    factors.down[used].clone(),
                    piece[:, used].clone(),
                    factors.scale * int(used.sum()),
                )
    return found, left


def _to_original(layers: Layers) -> Layers:
    """The transformer's layers under their original names: qkv joined, halves swapped back."""
    groups: dict[str, dict[int, Factors]] = {}
    for name, factors in layers.items():
        try:
            original, place = keys.original_module(name)
        except KeyError as error:
            raise UserError(f"the layer {name} has no original name") from error
        groups.setdefault(original, {})[place] = factors
    joined: Layers = {}
    for name, group in groups.items():
        count = len(keys.diffusers_modules(name))
        factors = group[0] if count == 1 else _joined(group, count)
        if keys.is_swapped(name, factors.up.shape[0], factors.down.shape[1]):
            factors = replace(factors, up=keys.swap_halves(factors.up))
        joined[name] = factors
    return joined


def _joined(group: Mapping[int, Factors], count: int) -> Factors:
    """One adapter that does what up to `count` do side by side, exactly; absent ones are zero."""
    first = next(iter(group.values()))
    rows, rank = first.up.shape[0], sum(factors.rank for factors in group.values())
    up = first.up.new_zeros(count * rows, rank)
    column = 0
    for place in sorted(group):
        factors = group[place]
        # All have one scale in practice; where not, the difference goes into the numbers.
        ratio = factors.scale / first.scale
        block = factors.up if ratio == 1 else factors.up * ratio
        up[place * rows : (place + 1) * rows, column : column + factors.rank] = block
        column += factors.rank
    down = torch.cat([group[place].down for place in sorted(group)])
    return Factors(down, up, first.scale * rank)


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
    module, base = "networks.lora_sd3", "sd3"
    if UNET in lora:
        module, base, architecture = "networks.lora", "sd_v1", "stable-diffusion-v1"
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
