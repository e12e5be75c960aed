"""What is known of a Stable Diffusion 1 without its weights: options, sizes, the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dojo.cli import UserError
from dojo.maths import ddpm
from dojo.maths.ddpm import Schedule
from dojo.models import family, folders
from dojo.models.folders import FLAG, UNET
from dojo.models.sd15 import network

TEXT_FOLDERS = ("tokenizer", "text_encoder")

# What a UNet of another model reads beside latents, timestep and text, by its configuration.
_FOREIGN = {
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "addition_embed_type": "further text or sizes",
    "encoder_hid_dim": "projected text or pictures",
    "time_cond_proj_dim": "a guidance scale",
}


@dataclass(frozen=True, kw_only=True)
class ModelArgs(family.ModelArgs):
    """The model that is trained."""

    pretrained_model_name_or_path: str
    """folder or hub id of a StableDiffusionPipeline that predicts noise, such as SD 1.5"""


@dataclass(frozen=True, kw_only=True)
class Config(family.Model):
    """What is known of a model without its weights."""

    name = "Stable Diffusion 1"
    network_class = "UNet2DConditionModel"
    network_facts = network.UNET
    text_encoders = ("text_encoder",)
    text_folders = TEXT_FOLDERS
    embed_names = ("prompt_embeds",)

    args: ModelArgs
    unet: dict[str, Any]
    text_encoder: dict[str, Any]

    @cached_property
    def schedule(self) -> Schedule:
        """The signal's share at every timestep."""
        return Schedule.of(self.scheduler)

    @property
    def steps_offset(self) -> int:
        """What a sampler's timesteps are shifted by: 1 for the real models."""
        return int(self.scheduler.get("steps_offset", 0))

    @property
    def clip_tokens(self) -> int:
        """Length that the CLIP tokenizer pads to (77 for the real models)."""
        return folders.clip_tokens(self.folder, self.flag)

    @property
    def pixel_step(self) -> int:
        """Height and width of a picture must be multiples of this (64 for SD 1.5)."""
        return self.pixels_per_latent * 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def native_size(self) -> int:
        """Height and width, in pixels, that the model was trained at (512 for SD 1.5)."""
        return int(self.unet["sample_size"]) * self.pixels_per_latent

    @property
    def text_numbers(self) -> int:
        """Numbers in the embeddings of one caption."""
        return self.clip_tokens * int(self.unet["cross_attention_dim"])

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before the UNet sees them."""
        return float(self.vae.get("scaling_factor", 0.18215))  # older folders do not say it

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture.

        Raises:
            UserError: the size is not a multiple of `pixel_step`.
        """
        self.check_step(height, width)
        step = self.pixels_per_latent
        return int(self.unet["in_channels"]), height // step, width // step

    def scaled(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A draw from the autoencoder's posterior, as the UNet sees it: [B, C, h, w]."""
        return (mean.float() + std.float() * noise) * self.scaling_factor


ConfigT = TypeVar("ConfigT", bound=Config)


def read(kind: type[ConfigT], args: ModelArgs, text: family.TextArgs) -> ConfigT:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no SD1.
    """
    name = args.pretrained_model_name_or_path
    folder = folders.find_folder(name, FLAG, revision=args.revision, variant=args.variant)
    folders.check_kind(folder, FLAG, "StableDiffusionPipeline", "Stable Diffusion 1")
    config = kind(
        args=args,
        text=text,
        folder=folder,
        unet=folders.read_config(folder, FLAG, UNET),
        vae=folders.read_config(folder, FLAG, "vae"),
        scheduler=folders.read_config(folder, FLAG, "scheduler", "scheduler_config.json"),
        text_encoder=folders.read_config(folder, FLAG, "text_encoder"),
    )
    _check_unet(folder, config)
    _check_scheduler(folder, config)
    return config


def _check_unet(folder: Path, config: Config) -> None:
    unet, where = config.unet, f"{FLAG}: {folder}/{UNET}/config.json"
    channels, width, _ = folders.whole_numbers(
        unet, where, "in_channels", "cross_attention_dim", "sample_size"
    )
    if not isinstance(unet.get("block_out_channels"), list):
        raise UserError(f"{where} has no list of block_out_channels")
    folders.check_channels(folder, config.vae, channels, "UNet")
    text = config.text_encoder.get("hidden_size", 512)
    if text != width:
        raise UserError(
            f"{FLAG}: {folder} does not fit together: the text encoder gives {text} numbers per "
            f"token, the UNet reads {width} (cross_attention_dim)"
        )
    folders.check_tokens(folder, FLAG, {"text_encoder": config.text_encoder})
    for name, what in _FOREIGN.items():
        if unet.get(name) is not None:
            raise UserError(
                f"{FLAG}: the UNet of {folder} reads {what} ({name} {unet[name]}), which no Stable "
                "Diffusion 1 does"
            )


def _check_scheduler(folder: Path, config: Config) -> None:
    kind = config.scheduler.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise UserError(
            f"{FLAG}: {folder} predicts {kind}; only models that predict noise (prediction_type "
            "epsilon) are trained here"
        )
    if config.scheduler.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{FLAG}: {folder} ends without signal (rescale_betas_zero_snr), where predicted noise "
            "says nothing of the picture"
        )
    try:
        ddpm.require_signal(config.schedule)
    except ValueError as error:
        raise UserError(f"{FLAG}: the scheduler of {folder}: {error}") from error
