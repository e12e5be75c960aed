"""A model as one file under the original names, with the marks that say what it predicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.files import tensors
from dojo.lazy import torch
from dojo.models.unet.ldm import PREFIXES, Origin, origins
from dojo.models.unet.single_file.header import Prediction

if TYPE_CHECKING:
    from torch import Tensor

_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
# OpenCLIP-H has 24 layers, of which SD2 reads 23 and its folders hold 23. Readers of the original
# names expect all of them; the last is a copy, as in kohya's files, and nothing comes of it.
_LAST_READ, _LAST = "transformer.resblocks.22.", "transformer.resblocks.23."


def save(
    path: Path,
    parts: Any,
    *,
    family: str,
    dtype: torch.dtype | None = None,
    prediction_type: Prediction = "epsilon",
    zero_snr: bool = False,
    title: str | None = None,
    resolution: tuple[int, int] | None = None,
) -> None:
    """Writes one .safetensors file, tensor by tensor and whole or not at all.

    Equal weights give equal bytes.

    Args:
        parts: a pipeline, or state dicts by part (`unet`, `vae`, `text_encoder`,
            `text_encoder_2`) of which some may be missing.
        family: sd1, sd2 or sdxl.
        dtype: precision in the file; None keeps each tensor's own.
        prediction_type: what the UNet predicts; v is marked by an empty tensor `v_pred`.
        zero_snr: trained with zero terminal SNR, which an empty tensor `ztsnr` marks.
        title: `modelspec.title`; the file's name if unset.
        resolution: (height, width) for `modelspec.resolution`.
    """
    if not isinstance(parts, Mapping):
        modules = {part: getattr(parts, part, None) for part in PREFIXES[family]}
        parts = {part: module.state_dict() for part, module in modules.items() if module}
    entries: dict[str, tensors.Source] = {}
    for part, state in parts.items():
        prefix = PREFIXES[family][part][0]
        for name, origin in origins(family, part, state).items():
            entries[prefix + name] = _source(origin, state, dtype)
    if family == "sd2":
        entries |= _last_layer(entries)
    for mark, wanted in (("v_pred", prediction_type == "v_prediction"), ("ztsnr", zero_snr)):
        if wanted:
            entries[mark] = lambda device: torch.zeros(0, device=device)
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(family, prediction_type),
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": title or path.stem,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
    }
    if resolution:
        height, width = resolution
        metadata["modelspec.resolution"] = f"{width}x{height}"
    tensors.save(path, entries, metadata)


def architecture(family: str, prediction_type: Prediction) -> str:
    """modelspec's name of a model."""
    if family == "sd2":
        suffix = "768-v" if prediction_type == "v_prediction" else "512"
        return f"stable-diffusion-v2-{suffix}"
    return {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}[family]


def _source(
    origin: Origin, state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tensors.Source:
    def make(device: str) -> Tensor:
        made = origin.join([state[name].to(device) for name in origin.names])
        return made.to(dtype) if dtype and made.is_floating_point() else made

    return make


def _last_layer(entries: Mapping[str, tensors.Source]) -> dict[str, tensors.Source]:
    """The layer of OpenCLIP-H that folders do not hold, where they hold the ones before it."""
    if any(_LAST in name for name in entries):
        return {}
    return {
        re.sub(re.escape(_LAST_READ), _LAST, name): make
        for name, make in entries.items()
        if _LAST_READ in name
    }
