"""The model that a LoRA is for, as far as the writer of a file has to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dojo.cli import UserError
from dojo.models.family import ModelArgs
from dojo.models.folders import TRANSFORMER, UNET
from dojo.models.keys import Blocks
from dojo.models.opening import open_model

if TYPE_CHECKING:
    from dojo.finetune.lora.layers import Layers, Lora

Family = Literal["sd1", "sd2", "sdxl", "kolors", "sd3", "hunyuandit"]

_TITLES: dict[str, Family] = {
    "Stable Diffusion 1": "sd1",
    "Stable Diffusion 2": "sd2",
    "Stable Diffusion XL": "sdxl",
    "Stable Diffusion 3": "sd3",
    "Kolors": "kolors",
    "Hunyuan-DiT": "hunyuandit",
}
_TRANSFORMERS: tuple[Family, ...] = ("sd3", "hunyuandit")
# The numbers of a token that the cross-attentions of the real models read.
_WIDTHS: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_ARCHITECTURES: dict[str, Family] = {
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2": "sd2",
    "stable-diffusion-xl-v1": "sdxl",
    "stable-diffusion-3": "sd3",
    "kolors": "kolors",
    "hunyuandit": "hunyuandit",
    "sd_v1": "sd1",
    "sd_v2": "sd2",
    "sdxl_": "sdxl",
    "sd3": "sd3",
}
# What sd-scripts calls them in a header, and modelspec.
_VERSIONS: dict[Family, str] = {
    "sd1": "sd_v1",
    "sd2": "sd_v2",
    "sdxl": "sdxl_base_v1-0",
    "kolors": "kolors",
    "sd3": "sd3",
    "hunyuandit": "hunyuandit",
}
_MODELSPEC: dict[Family, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "kolors": "kolors",
    "sd3": "stable-diffusion-3",
    "hunyuandit": "hunyuandit",
}


@dataclass(frozen=True, kw_only=True)
class Base:
    """What of a model decides a file's names and the marks in its header."""

    family: Family
    predicts_v: bool = False
    """it predicts v, not the noise"""
    blocks: Blocks = field(default_factory=Blocks)
    """how its UNet is built"""

    @property
    def has_unet(self) -> bool:
        """Whether it is of those whose files say what they predict."""
        return self.family not in _TRANSFORMERS

    @property
    def has_original_names(self) -> bool:
        """Whether sd-scripts calls the UNet's layers by the names of the original code."""
        return self.family == "sdxl"

    @property
    def adapters_are_pefts(self) -> bool:
        """Whether its own authors, and ComfyUI, read peft's files with the authors' names."""
        return self.family == "hunyuandit"

    @property
    def title(self) -> str:
        """The family's name, as messages call it."""
        return next(title for title, family in _TITLES.items() if family == self.family)

    @property
    def kohya_module(self) -> str:
        """The module of sd-scripts that trains such a LoRA."""
        return "networks.lora_sd3" if self.family == "sd3" else "networks.lora"

    @property
    def version(self) -> str:
        """What sd-scripts calls it in a header."""
        behind = "_v" if self.predicts_v and self.family in ("sd1", "sd2") else ""
        return _VERSIONS[self.family] + behind

    @property
    def architecture(self) -> str:
        """What modelspec calls it; of SD3 the layers tell more."""
        if self.family == "sd2" and self.predicts_v:
            return "stable-diffusion-v2-768-v"
        return _MODELSPEC[self.family]

    def architecture_of(self, layers: Layers) -> str:
        """What modelspec calls it, by the layers of its network where these tell more."""
        return mmdit_architecture(layers) if self.family == "sd3" else self.architecture

    @classmethod
    def of(cls, model: Any, objective: Any = None) -> Base:
        """Of an opened model, and of the objective it was trained with, if it was."""
        unet: Mapping[str, Any] = getattr(model, UNET, {}) or {}
        family = _TITLES.get(model.name, "sd1" if unet else "sd3")
        if family == "sd1" and unet.get("cross_attention_dim") == 1024:
            family = "sd2"
        own = getattr(model, "scheduler", {}).get("prediction_type", "epsilon")
        trained = getattr(objective, "prediction_type", own)
        return cls(
            family=family,
            predicts_v=trained == "v_prediction",
            blocks=Blocks.of(unet) if unet else Blocks(),
        )

    @classmethod
    def told(cls, name: str, lora: Lora, metadata: Mapping[str, str]) -> Base:
        """Of the family that the user names; the rest by the file.

        Raises:
            UserError: there is no such family, or the file is not for it.
        """
        if name not in get_args(Family):
            raise UserError(f"--base {name}: known are {', '.join(get_args(Family))}")
        family: Family = name  # pyright: ignore[reportAssignmentType]
        if lora and (TRANSFORMER in lora) != (family in _TRANSFORMERS):
            part = TRANSFORMER if TRANSFORMER in lora else next(iter(lora))
            raise UserError(f"--base {name} does not fit: the file adapts {part}")
        return cls(family=family, predicts_v=_is_v(metadata), blocks=_blocks(lora))


def guess(lora: Lora, metadata: Mapping[str, str] | None = None) -> tuple[Base, str]:
    """The base of a file that comes without a model, and by what it was told.

    The header's marks count first, then the text encoders, then the widths and the blocks.
    """
    metadata = metadata or {}
    family, reason = _family(lora, metadata)
    return Base(family=family, predicts_v=_is_v(metadata), blocks=_blocks(lora)), reason


def chosen(name: str | None, lora: Lora, metadata: Mapping[str, str]) -> tuple[Base, str]:
    """The base that `--base` names, by family or by folder, or else the file; and by what.

    Raises:
        UserError: there is no such base, or the file is not for it.
    """
    if name is None:
        return guess(lora, metadata)
    if name not in get_args(Family) and Path(name).is_dir():
        model = open_model(ModelArgs(pretrained_model_name_or_path=name))
        return Base.of(model), f"--base {name}"
    return Base.told(name, lora, metadata), f"--base {name}"


def _family(lora: Lora, metadata: Mapping[str, str]) -> tuple[Family, str]:
    if TRANSFORMER in lora:
        if any(name.startswith("blocks.") for name in lora[TRANSFORMER]):
            return "hunyuandit", "it adapts a transformer with Hunyuan-DiT's blocks"
        return "sd3", "it adapts a transformer"
    for key in ("ss_base_model_version", "modelspec.architecture"):
        for start, family in _ARCHITECTURES.items():
            if metadata.get(key, "").startswith(start):
                return family, f"its header says {key} {metadata[key]}"
    if "text_encoder_2" in lora:
        return ("sdxl" if UNET in lora else "sd3"), "it adapts two text encoders"
    layers = lora.get(UNET, {})
    widths = {
        f.columns for name, f in layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    for width in widths & _WIDTHS.keys():
        return _WIDTHS[width], f"its cross-attentions read {width} numbers"
    if any(".transformer_blocks.1." in name or "add_embedding" in name for name in layers):
        return "sdxl", "its blocks are deeper than one attention pair"
    return "sd1", "nothing in it says another"


def mmdit_architecture(layers: Layers) -> str:
    """What modelspec calls the MMDiT that layers, by diffusers' names, are of."""
    if any(".attn2." in name for name in layers):
        return "stable-diffusion-3.5-medium"
    if any(f.columns == 2432 for name, f in layers.items() if ".attn.to_" in name):
        return "stable-diffusion-3.5-large"
    return "stable-diffusion-3"  # Medium of 3 or 3.5: the layers do not always tell


def _is_v(metadata: Mapping[str, str]) -> bool:
    said = str(metadata.get("ss_v_parameterization", "")).lower() == "true"
    return said or metadata.get("modelspec.prediction_type") in ("v", "v_prediction")


def _blocks(lora: Lora) -> Blocks:
    """A shallow UNet's by its layers, else SDXL's."""
    found = Blocks.among(lora.get(UNET, {}))
    return found if found is not None and found.layers != 2 else Blocks()
