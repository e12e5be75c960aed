"""Stable Diffusion 1 and 2: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 4 latent channels, h = height / 8, T = CLIP tokens (77 for the real models),
D = 768 (SD2: 1024). Latents are those that the UNet sees: scaled. The network predicts the noise,
or v.
"""

from dojo.models.folders import UNET, Embeds, posterior
from dojo.models.sd15.config import TEXT_FOLDERS, Config, ModelArgs, TextArgs
from dojo.models.sd15.model import Model, open_model
from dojo.models.sd15.text import TextEncoders
from dojo.models.unet.folder import copy_parts
from dojo.models.unet.networks import decode, prediction
from dojo.models.unet.noise import NoiseArgs

__all__ = [
    "TEXT_FOLDERS",
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
]
