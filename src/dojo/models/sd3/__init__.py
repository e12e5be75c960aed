"""Stable Diffusion 3 and 3.5: what diffusers and transformers want to be told, in one place.

Shapes: B batch, C = 16 latent channels, h = height / 8, T = CLIP tokens + T5 tokens (77 + 256 for
the real models), D = 4096. Latents are those that the transformer sees: shifted and scaled.
"""

from dojo.models.folder import Embeds, fingerprint, posterior
from dojo.models.sd3.config import (
    TEXT_ENCODERS,
    TEXT_FOLDERS,
    Config,
    ModelArgs,
    NoiseArgs,
    open_model,
)
from dojo.models.sd3.folder import copy_parts
from dojo.models.sd3.guidance import why_no_skipping
from dojo.models.sd3.models import (
    decode,
    load_text_pipeline,
    load_transformer,
    load_vae,
    training_cost,
    velocity,
)
from dojo.models.sd3.pipeline import load_pipeline
from dojo.models.sd3.schedule import (
    draws_noise,
    own_shift,
    scheduler_config,
    shift_name,
    step_noise,
    with_shift,
)
from dojo.models.sd3.single_file import save_single_file
from dojo.models.sd3.text import (
    EMBEDS,
    Layout,
    TextArgs,
    TextDropoutArgs,
    TextEncoders,
    readers,
    with_live_clip,
)

__all__ = [
    "EMBEDS",
    "TEXT_ENCODERS",
    "TEXT_FOLDERS",
    "Config",
    "Embeds",
    "Layout",
    "ModelArgs",
    "NoiseArgs",
    "TextArgs",
    "TextDropoutArgs",
    "TextEncoders",
    "copy_parts",
    "decode",
    "draws_noise",
    "fingerprint",
    "load_pipeline",
    "load_text_pipeline",
    "load_transformer",
    "load_vae",
    "open_model",
    "own_shift",
    "posterior",
    "readers",
    "save_single_file",
    "scheduler_config",
    "shift_name",
    "step_noise",
    "training_cost",
    "velocity",
    "why_no_skipping",
    "with_live_clip",
    "with_shift",
]
