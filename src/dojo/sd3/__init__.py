"""Stable Diffusion 3 and 3.5: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 16 latent channels, h = height / 8, T = CLIP tokens + T5 tokens (77 + 256 for
the real models), D = 4096. Latents are those that the transformer sees: shifted and scaled.
"""

from dojo.sd3.config import (
    DTYPES,
    TEXT_FOLDERS,
    Config,
    ModelArgs,
    NoiseArgs,
    fingerprint,
    open_model,
)
from dojo.sd3.models import (
    decode,
    load_transformer,
    load_vae,
    posterior,
    training_cost,
    velocity,
)
from dojo.sd3.text import TextEncoders

__all__ = [
    "DTYPES",
    "TEXT_FOLDERS",
    "Config",
    "ModelArgs",
    "NoiseArgs",
    "TextEncoders",
    "decode",
    "fingerprint",
    "load_transformer",
    "load_vae",
    "open_model",
    "posterior",
    "training_cost",
    "velocity",
]
