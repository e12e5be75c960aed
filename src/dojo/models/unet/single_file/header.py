"""What a single file is, from its header alone: its family, what it predicts, what it lacks.

Which tensors mean what was read in the code of the programs that write and read such files:
ComfyUI (supported_models.py, model_detection.py), kohya's sd-scripts (sai_model_spec.py,
sdxl_model_util.py) and diffusers (single_file_utils.py).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dojo.cli import UserError
from dojo.lazy import torch
from dojo.models.folders import FLAG
from dojo.models.unet.ldm import PREFIXES
from dojo.models.unet.single_file import reading
from dojo.models.unet.single_file.reading import Contents

Prediction = Literal["epsilon", "v_prediction"]
FAMILIES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}

_UNET = "model.diffusion_model."
_BARE = re.compile(r"(in|out)put_blocks\.|middle_block\.|time_embed\.|label_emb\.|out\.")
_FIRST = "input_blocks.0.0.weight"
_LABEL = "label_emb.0.0.weight"
_SAMPLE = 65_536  # bytes read of each tensor for a fingerprint
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
# A layer whose bias spreads in models that predict v, and hardly in those that predict noise: the
# only trace in the weights of SD2. Rule and limit are those of ComfyUI (supported_models.SD20).
_SPREADING = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD = 0.09
_CHANNELS = {
    5: "a depth model (5 channels into its first layer, 1 of them depth)",
    7: "an upscaler (7 channels into its first layer, 3 of them a small picture)",
    8: "an instruct-pix2pix (8 channels into its first layer, 4 of them a picture to be edited)",
    9: "an inpainting model (9 channels into its first layer, 5 of them a mask and what it covers)",
}
# What a file without a UNet of ours is, by a name in it.
_OTHERS = (
    (
        r"lora_|.*\.lora|.*\blora_|.*\.(hada|lokr)_",
        "is a LoRA; name its base model here (demo.py takes it as --lora_weights_path, training "
        "as --init_lora_weights_path)",
    ),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "is a Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "is a Flux or a model of its kind"),
    (r"control_model\.|.*zero_convs\.|controlnet_", "is a ControlNet"),
    (r"string_to_param|emb_params|clip_[lg]$", "is a learned embedding (textual inversion)"),
    (
        r"down_blocks\.|mid_block\.",
        "is a bare UNet under diffusers' names: put it into the unet/ of the model's folder as "
        "diffusion_pytorch_model.safetensors, and name that folder",
    ),
    (
        r"(first_stage_model\.)?(decoder|encoder)\.conv_in\.",
        "is an autoencoder alone: name the model here, and this file as "
        "--pretrained_vae_model_name_or_path",
    ),
)


@dataclass(frozen=True)
class SingleFile:
    """A single file of a model that is trained here, without its weights."""

    path: Path
    contents: Contents = field(repr=False)
    family: str
    """sd1, sd2 or sdxl"""
    prediction_type: Prediction
    """what the network predicts, by the file's marks"""
    prediction_known: bool
    """whether a mark says so, or the family's usual kind was taken"""
    zero_snr: bool
    """whether it was trained down to no signal at all (zero terminal SNR)"""
    has_ema: bool
    """whether there is a second, averaged UNet in it; the plain one is taken"""

    def __contains__(self, part: str) -> bool:
        """Whether the file has this part (`vae`, `text_encoder_2`, ...) of the pipeline."""
        return part in PREFIXES[self.family] and bool(self.names(part))

    def has(self, part: str) -> bool:
        """The same."""
        return part in self

    def prefix(self, part: str) -> str:
        """What the names of a part begin with; a UNet alone may go without."""
        known = PREFIXES[self.family][part]
        there = [one for one in known if any(n.startswith(one) for n in self.contents.entries)]
        if part == "unet" and not there:
            return ""
        return (there or known)[0]

    def names(self, part: str) -> list[str]:
        """The file's names that belong to a part, sorted."""
        return list(self._names[part])

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        found = {}
        for part in PREFIXES[self.family]:
            prefix = self.prefix(part)
            names = sorted(name for name in self.contents.entries if name.startswith(prefix))
            if not prefix:
                names = [name for name in names if _BARE.match(name)]
            found[part] = names
        return found

    def shape(self, part: str, name: str) -> tuple[int, ...] | None:
        """Of a tensor, by its name behind the part's prefix; None if it is not there."""
        entry = self.contents.entries.get(self.prefix(part) + name)
        return entry.shape if entry else None

    def dtype(self, part: str) -> torch.dtype:
        """The precision that holds a part's tensors exactly; bfloat16 for 8-bit ones."""
        kinds = {self.contents.entries[name].dtype for name in self.names(part)} - {None}
        if torch.float32 in kinds or torch.float64 in kinds:
            return torch.float32
        if {torch.float16, torch.bfloat16} <= kinds:
            return torch.float32
        return torch.float16 if torch.float16 in kinds else torch.bfloat16

    def fingerprint(self, part: str) -> str:
        """Identifies a part's tensors by names, types, sizes and their first 64 KiB each."""
        digest, names = hashlib.blake2b(digest_size=16), self.names(part)
        for name, some in zip(names, self.contents.beginnings(names, _SAMPLE), strict=True):
            entry = self.contents.entries[name]
            digest.update(f"{name}:{entry.dtype}:{entry.shape}".encode() + some)
        return digest.hexdigest()

    @property
    def remarks(self) -> list[str]:
        """What a user should know of the file, a sentence each."""
        said: list[str] = []
        if self.has_ema:
            said.append(
                f"{self.path.name} holds the UNet twice; the plain one is taken, not the averaged "
                "one (model_ema)"
            )
        if self.family == "sd2" and not self.prediction_known:
            kind = "v" if self.prediction_type == "v_prediction" else "noise"
            said.append(
                f"{self.path.name} does not say whether it predicts noise or v: its weights look "
                f"like {kind}; if that is wrong, name a folder with the right scheduler as "
                "--single_file_config"
            )
        return said


def inspect(path: Path, flag: str = FLAG) -> SingleFile:
    """Reads the header of a single file.

    Args:
        flag: what the user named it with.
    Raises:
        UserError: the file is missing or broken, or holds another kind of model, by name.
    """
    return identify(reading.read(path, flag), flag)


def identify(contents: Contents, flag: str = FLAG) -> SingleFile:
    """What `inspect` says of a file that is read.

    Raises:
        UserError: it holds another kind of model, by name.
    """
    path, names = contents.path, contents.entries
    prefix = _UNET if _UNET + _FIRST in names else ""
    if prefix + _FIRST not in names or _is_control(contents):
        raise UserError(f"{flag}: {path} {_what_else(contents)}")
    wrong = _foreign(contents, prefix)
    if wrong:
        raise UserError(
            f"{flag}: {path} is {wrong}, which is not trained here: known are "
            f"{', '.join(FAMILIES.values())}"
        )
    family = _family(contents, prefix)
    prediction, known = _prediction(contents, family, prefix)
    return SingleFile(
        path=path,
        contents=contents,
        family=family,
        prediction_type=prediction,
        prediction_known=known,
        zero_snr="ztsnr" in names or _true(contents.metadata.get("ss_zero_terminal_snr")),
        has_ema=sum(name.startswith("model_ema.") for name in names) > 100,
    )


def _is_control(contents: Contents) -> bool:
    return any(re.match(r"control_model\.|zero_convs\.", name) for name in contents.entries)


def _what_else(contents: Contents) -> str:
    """What a file is that has no UNet with the original names, in words."""
    names = contents.entries
    for pattern, words in _OTHERS:
        if any(re.match(pattern, name) for name in names):
            return words
    first = min(names, default="")
    return f"holds no Stable Diffusion (its tensors begin with {first!r})"


def _width(contents: Contents, prefix: str) -> int | None:
    """Numbers per token that the UNet reads."""
    for name, entry in contents.entries.items():
        if name.startswith(prefix) and name.endswith("attn2.to_k.weight"):
            return entry.shape[1]
    return None


def _foreign(contents: Contents, prefix: str) -> str | None:
    """The kind of a UNet with the original names that is none of ours, in words."""
    names = contents.entries
    if "edm_mean" in names or "edm_std" in names:
        return "trained with EDM's noise levels (edm_mean, edm_std), as Playground 2.5 is"
    if any(name.startswith("edm_vpred.") for name in names):
        return "trained with EDM's noise levels and v (edm_vpred), as CosXL is"
    if any(name.startswith(f"{prefix}encoder_hid_proj.") for name in names):
        return "a Kolors (encoder_hid_proj)"
    if any(name.endswith((".scale_weight", "scaled_fp8", ".weight_scale")) for name in names):
        return "quantised with scales (scaled fp8)"
    shape = names[prefix + _FIRST].shape
    if len(shape) != 4 or shape[1] != 4:
        channels = shape[1] if len(shape) > 1 else 0
        return _CHANNELS.get(channels, f"a model with {channels} channels into its first layer")
    label, width = names.get(prefix + _LABEL), _width(contents, prefix)
    if label is None:
        return None
    if label.shape[1] == 5632:
        return "a Kolors (5,632 numbers beside the timestep)"
    if label.shape[1] == 2560 or width == 1280:
        return "the refiner of SDXL"
    if width == 1024 or any(name.startswith("noise_augmentor.") for name in names):
        return "an unCLIP (pictures beside the timestep)"
    return None


def _family(contents: Contents, prefix: str) -> str:
    """By what the UNet reads; sizes that no public model has are told by the text encoders."""
    if prefix + _LABEL in contents.entries:
        return "sdxl"
    family = _WIDTHS.get(_width(contents, prefix) or 0)
    if family in ("sd1", "sd2"):
        return family
    open_clip = PREFIXES["sd2"]["text_encoder"]
    return "sd2" if any(name.startswith(open_clip) for name in contents.entries) else "sd1"


def _prediction(contents: Contents, family: str, prefix: str) -> tuple[Prediction, bool]:
    """What the UNet predicts, and whether a mark says so."""
    if "v_pred" in contents.entries:
        return "v_prediction", True
    said = contents.metadata
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        word = str(said.get(key, "")).lower()
        if word in ("v", "v_prediction", "v-prediction", "v_pred"):
            return "v_prediction", True
        if word in ("epsilon", "eps"):
            return "epsilon", True
    if _true(said.get("ss_v_parameterization")) or _ends(said, "modelspec.architecture", "-768-v"):
        return "v_prediction", True
    if _ends(said, "ss_base_model_version", "_v"):
        return "v_prediction", True
    name = prefix + _SPREADING
    if family == "sd2" and name in contents.entries:
        with contents.opened() as get:
            spread = get(name).double().std(correction=0).item()
        return ("v_prediction" if spread > _SPREAD else "epsilon"), False
    return "epsilon", False


def _ends(said: Any, key: str, word: str) -> bool:
    return str(said.get(key, "")).endswith(word)


def _true(word: str | None) -> bool:
    return str(word).lower() in ("true", "1")
