"""Hunyuan-DiT: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 4 latent channels, h = height / 8. Latents are those that the network sees:
scaled. It is a transformer with long skips that predicts v, over a diffusion of 1,000 timesteps
whose end differs by version (v1.2: beta_end 0.018; v1.0 and v1.1: 0.03), and reads a BERT of 77
tokens and mT5 of 256, both with a mask. v1.0 and v1.1 are also told a style, which is always 0, and
the pictures' sizes and crops.
"""

from dojo.models.folders import TRANSFORMER, Embeds, posterior
from dojo.models.hunyuandit.config import (
    EMBEDS,
    TEXT_FOLDERS,
    TOKENS,
    Config,
    ModelArgs,
    TextArgs,
)
from dojo.models.hunyuandit.model import Model, drawing, open_model
from dojo.models.hunyuandit.networks import prediction
from dojo.models.hunyuandit.original import WEIGHTS_FLAG, Weights, linked
from dojo.models.hunyuandit.text import TextEncoders, readers
from dojo.models.unet.noise import NoiseArgs

__all__ = [
    "EMBEDS",
    "TEXT_FOLDERS",
    "TOKENS",
    "TRANSFORMER",
    "WEIGHTS_FLAG",
    "Config",
    "Embeds",
    "Model",
    "ModelArgs",
    "NoiseArgs",
    "TextArgs",
    "TextEncoders",
    "Weights",
    "drawing",
    "linked",
    "open_model",
    "posterior",
    "prediction",
    "readers",
]
