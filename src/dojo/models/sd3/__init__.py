"""Stable Diffusion 3 and 3.5: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 16 latent channels, h = height / 8, T = CLIP tokens + T5 tokens (77 + 256 for
the real models), D = 4096. Latents are those that the transformer sees: shifted and scaled.
"""

from dojo.models.folders import Embeds, fingerprint, posterior
from dojo.models.sd3.config import (
    EMBEDS,
    TEXT_ENCODERS,
    TEXT_FOLDERS,
    Config,
    ModelArgs,
    NoiseArgs,
    TextArgs,
    TextDropoutArgs,
)
from dojo.models.sd3.folder import copy_parts
from dojo.models.sd3.guidance import why_no_skipping
from dojo.models.sd3.model import Model, open_model
from dojo.models.sd3.models import decode, load_text_pipeline, velocity
from dojo.models.sd3.schedule import (
    draws_noise,
    own_shift,
    scheduler_config,
    shift_name,
    step_noise,
    with_shift,
)
from dojo.models.sd3.single_file import save_single_file
from dojo.models.sd3.text import Layout, TextEncoders, with_live_clip

__all__ = [
    "EMBEDS",
    "TEXT_ENCODERS",
    "TEXT_FOLDERS",
    "Config",
    "Embeds",
    "Layout",
    "Model",
    "ModelArgs",
    "NoiseArgs",
    "TextArgs",
    "TextDropoutArgs",
    "TextEncoders",
    "copy_parts",
    "decode",
    "draws_noise",
    "fingerprint",
    "load_text_pipeline",
    "open_model",
    "own_shift",
    "posterior",
    "save_single_file",
    "scheduler_config",
    "shift_name",
    "step_noise",
    "velocity",
    "why_no_skipping",
    "with_live_clip",
    "with_shift",
]
