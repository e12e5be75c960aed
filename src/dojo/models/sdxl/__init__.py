"""Stable Diffusion XL: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 4 latent channels, h = height / 8, T = CLIP tokens (77 for the real models),
D = 2048, P = 1280. Latents are those that the UNet sees: scaled. The network predicts the noise, or
v, and is told the picture's size in its file, its crop and the size that is trained.
"""

from dojo.models.folders import UNET, Embeds, posterior
from dojo.models.sdxl.config import TEXT_ENCODERS, TEXT_FOLDERS, Config, ModelArgs, TextArgs
from dojo.models.sdxl.model import Model, open_model
from dojo.models.sdxl.text import TextEncoders
from dojo.models.unet.folder import copy_parts
from dojo.models.unet.networks import decode, prediction
from dojo.models.unet.noise import NoiseArgs
from dojo.models.unet.sized import EMBEDS
from dojo.models.unet.sizes import MicroConditioning, time_ids

__all__ = [
    "EMBEDS",
    "TEXT_ENCODERS",
    "TEXT_FOLDERS",
    "UNET",
    "Config",
    "Embeds",
    "MicroConditioning",
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
