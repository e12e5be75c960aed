"""What a run holds in a device's memory, phase by phase, computed from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from diffusers import AutoencoderKL
from torch import nn

from dojo.run import cost

CARDS = (8, 12, 16, 24, 48, 80)
"""Sizes of graphics cards in GiB (sold as GB)."""
MARGIN = 1.1
"""What the allocator and kernels take on top of the tensors: assumed, not measured."""
CONTEXT = 1.0
"""GiB that the CUDA context and libraries take: assumed, not measured."""

_GIB = 2**30


class Parts(Protocol):
    """A pipeline's folder and what is known of its autoencoder."""

    @property
    def folder(self) -> Path: ...
    @property
    def vae(self) -> dict[str, Any]: ...
    @property
    def pixels_per_latent(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run holds beside the network that it trains."""

    config: Parts
    text: Sequence[str]
    """folders of the text encoders"""
    dtype: torch.dtype
    """of text encoders"""
    vae_dtype: torch.dtype
    size: tuple[int, int]
    """height and width of the largest picture in pixels"""
    encoded: int = 0
    """pictures whose latents are computed at a time, 0 for none"""
    decoded: int = 0
    """pictures that are drawn at a time, 0 for none"""
    class_pictures: int = 0
    """those that the whole pipeline draws at a time before training"""
    scorers: Sequence[nn.Module] = ()
    """networks of the rewards, as loaded"""


def memory(needs: Needs, network: int, kept: int, training: int) -> dict[str, float]:
    """GiB of tensors in each phase of a run, in their order.

    Args:
        network: bytes of the network's weights.
        kept: bytes of the network and what its training keeps between two steps.
        training: bytes in a training step.
    """
    vae = _autoencoder(needs)
    own = bytes_of(vae, needs.vae_dtype)
    drawing = own + _decoding(vae, needs, needs.decoded)
    text = sum(bytes_of(encoder, needs.dtype) for encoder in _text_encoders(needs))
    scoring = sum(param.nbytes for scorer in needs.scorers for param in scorer.parameters())
    found = {
        "class pictures": needs.class_pictures
        and text + network + own + _decoding(vae, needs, needs.class_pictures),
        "latents": needs.encoded and own + _encoding(vae, needs),
        "text embeddings": text,
        "training": training + own + scoring,
        "drawing": needs.decoded and kept + drawing + scoring,
    }
    return {name: size / _GIB for name, size in found.items() if size}


def told(found: Mapping[str, float]) -> dict[str, str]:
    """The phases as the dry run prints them, and which cards hold the largest."""
    name, most = max(found.items(), key=lambda phase: phase[1])
    wanted = MARGIN * most + CONTEXT
    fits = ", ".join(f"{card} {'yes' if wanted <= card else 'no'}" for card in CARDS)
    shown = ", ".join(f"{phase} {size:.2f}" for phase, size in found.items())
    return {
        "memory by phase, computed": f"{shown} GiB of tensors",
        "peak over all phases": f"{most:.2f} GiB ({name})",
        "fits on a card of so many GB": f"{fits} (with {MARGIN - 1:.0%} and {CONTEXT:g} GiB on top "
        "for allocator and context: assumed)",
    }


def bytes_of(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in a precision."""
    return dtype.itemsize * sum(param.numel() for param in model.parameters())


def _text_encoders(needs: Needs) -> list[nn.Module]:
    made: list[nn.Module] = []
    for part in needs.text:
        folder = needs.config.folder / part
        if not (folder / "config.json").is_file():  # SD3 without T5
            continue
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (config.architectures or ["CLIPTextModel"])[0])
        with torch.device("meta"):
            made.append(kind(config))
    return made


def _autoencoder(needs: Needs) -> Any:
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(needs.config.vae)
    for param in vae.parameters():
        param.data = param.data.to(needs.vae_dtype)
    return vae


def _encoding(vae: Any, needs: Needs) -> int:
    pixels = torch.empty(needs.encoded, 3, *needs.size, dtype=needs.vae_dtype, device="meta")
    return cost.live_bytes(lambda: vae.encode(pixels))


def _decoding(vae: Any, needs: Needs, count: int) -> int:
    if not count:
        return 0
    step = needs.config.pixels_per_latent
    channels, (height, width) = needs.config.vae["latent_channels"], needs.size
    shape = (count, channels, height // step, width // step)
    latents = torch.empty(shape, dtype=needs.vae_dtype, device="meta")
    return cost.live_bytes(lambda: vae.decode(latents))
