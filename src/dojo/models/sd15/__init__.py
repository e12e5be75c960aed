"""Stable Diffusion 1: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 4 latent channels, h = height / 8, T = CLIP tokens (77 for the real models),
D = 768. Latents are those that the UNet sees: scaled. The network predicts the noise.
"""

from dojo.models.folder import UNET, Embeds, posterior
from dojo.models.sd15.config import TEXT_FOLDERS, Config, ModelArgs, open_model
from dojo.models.sd15.folder import copy_parts
from dojo.models.sd15.models import decode, epsilon, load_unet, load_vae, training_cost
from dojo.models.sd15.pipeline import load_pipeline
from dojo.models.sd15.text import TextEncoder, load_text_encoder, readers

__all__ = [
    "TEXT_FOLDERS",
    "UNET",
    "Config",
    "Embeds",
    "ModelArgs",
    "TextEncoder",
    "copy_parts",
    "decode",
    "epsilon",
    "load_pipeline",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "open_model",
    "posterior",
    "readers",
    "training_cost",
]
