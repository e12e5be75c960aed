"""Kolors: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 4 latent channels, h = height / 8, T = 256 tokens, D = P = 4096 (ChatGLM3's).
Latents are those that the UNet sees: scaled. The UNet is SDXL's with a projection of the text in
front and another schedule (1,100 timesteps that end with less signal); it predicts the noise.
"""

from dojo.models.folders import UNET, Embeds, posterior
from dojo.models.kolors.config import TEXT_FOLDERS, TOKENS, Config, ModelArgs, TextArgs
from dojo.models.kolors.model import Model, open_model
from dojo.models.kolors.text import TextEncoders
from dojo.models.unet.folder import copy_parts
from dojo.models.unet.networks import decode, prediction
from dojo.models.unet.noise import NoiseArgs
from dojo.models.unet.sized import EMBEDS
from dojo.models.unet.sizes import time_ids

__all__ = [
    "EMBEDS",
    "TEXT_FOLDERS",
    "TOKENS",
    "UNET",
    "Config",
    "Embeds",
    "Model",
    "ModelArgs",
    "NoiseArgs",
    "TextArgs",
    "TextEncoders",
    "copy_parts",
    "decode",
    "open_model",
    "posterior",
    "prediction",
    "time_ids",
]
