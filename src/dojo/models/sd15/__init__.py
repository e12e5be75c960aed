"""Stable Diffusion 1: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 4 latent channels, h = height / 8, T = CLIP tokens (77 for the real models),
D = 768. Latents are those that the UNet sees: scaled. The network predicts the noise.
"""

from dojo.models.folders import UNET, Embeds, posterior
from dojo.models.sd15.config import TEXT_FOLDERS, Config, ModelArgs
from dojo.models.sd15.folder import copy_parts
from dojo.models.sd15.model import Model, open_model
from dojo.models.sd15.models import decode, epsilon
from dojo.models.sd15.text import TextEncoder

__all__ = [
    "TEXT_FOLDERS",
    "UNET",
    "Config",
    "Embeds",
    "Model",
    "ModelArgs",
    "TextEncoder",
    "copy_parts",
    "decode",
    "epsilon",
    "open_model",
    "posterior",
]
