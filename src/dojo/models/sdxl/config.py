"""What is known of a Stable Diffusion XL without its weights: options, sizes, what is zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dojo.cli import UserError
from dojo.models import family, folders, loaded
from dojo.models.folders import FLAG, UNET
from dojo.models.unet import autoencoder
from dojo.models.unet import config as unet

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TEXT_FOLDERS = ("tokenizer", "tokenizer_2", *TEXT_ENCODERS)
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")  # [B, T, D] and [B, P]
TIME_IDS = 6  # numbers of a picture's size, crop and target

MicroConditioning = Literal["file", "resized", "constant"]
_ZEROS = "force_zeros_for_empty_prompt"
_SMALL = 0.5  # of the native area: 768 of 1024 pixels a side are above


@dataclass(frozen=True, kw_only=True)
class ModelArgs(unet.ModelArgs):
    """The model that is trained."""

    pretrained_model_name_or_path: str
    """folder or hub id of a StableDiffusionXLPipeline, or one .safetensors or .ckpt file (original
    names)"""
    micro_conditioning: MicroConditioning = "file"
    """what the UNet is told of a picture beside the size that is trained: file is its size in the
    file and the crop, as SDXL was trained; resized is its size when resized, and the crop; constant
    is nothing, as if it had been of the trained size"""
    vae_fits_fp16: bool = False
    """with one file as pretrained_vae_model_name_or_path: it does not overflow in --vae_dtype fp16,
    as sdxl-vae-fp16-fix does not, which a file by itself does not say"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae_fits_fp16 and self.pretrained_vae_model_name_or_path is None:
            raise ValueError(
                f"--vae_fits_fp16 is said of an autoencoder that is given as {autoencoder.FLAG}"
            )

    @property
    def vae_is_said_to_fit(self) -> bool:
        """Whether the user says so."""
        return self.vae_fits_fp16


@dataclass(frozen=True, kw_only=True)
class TextArgs(family.TextArgs):
    """What stands for no caption."""

    uncond: Literal["zeros", "empty_string"] | None = None
    """what the empty caption becomes in caption dropout and at validation: zeros, or the embeddings
    of ""; unset is what the model's own pipeline does (force_zeros_for_empty_prompt)"""


@dataclass(frozen=True, kw_only=True)
class Config(unet.Config):
    """What is known of a model without its weights."""

    name = "Stable Diffusion XL"
    text_encoders = TEXT_ENCODERS
    text_folders = TEXT_FOLDERS
    embed_names = EMBEDS
    sized = True
    pipeline_class = StableDiffusionXLPipeline
    pipeline_name = "StableDiffusionXL"
    single_files = ("sdxl",)
    clips = MappingProxyType(
        {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    )
    optional_parts = ("image_encoder", "feature_extractor")
    reads = "text_time"

    args: ModelArgs
    text: TextArgs = field(default_factory=TextArgs)

    @cached_property
    def zeros(self) -> bool:
        """Whether zeros stand for no caption."""
        if self.text.uncond is not None:
            return self.text.uncond == "zeros"
        # The pipeline's own default where its folder says nothing.
        return bool(loaded.read_index(self.folder, self.flag).get(_ZEROS, True))

    @property
    def pooled_width(self) -> int:
        """P: numbers in the pooled embedding of a caption (1280 for the real models)."""
        return int(self.encoders["text_encoder_2"].get("projection_dim", 512))

    @property
    def text_numbers(self) -> int:
        """Numbers in the embeddings of one caption."""
        return super().text_numbers + self.pooled_width

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """What stands for no caption, and no watermark."""
        return {_ZEROS: self.zeros, "add_watermarker": False}

    def index_settings(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """A result's pipeline guides away from what stood for no caption in training."""
        return {_ZEROS: self.zeros}

    def remark(self, height: int, width: int) -> str | None:
        """Says that pictures are far smaller than the model's."""
        share = height * width / self.native_size**2
        if share >= _SMALL:
            return None
        return (
            f"pictures of {width} x {height} have {share:.0%} of the area that this model was "
            f"trained at ({self.native_size} x {self.native_size}): expect artifacts"
        )

    @classmethod
    def refuse(cls, folder: Path, flag: str) -> None:
        """Refuses the refiner, which has no CLIP-L."""
        if (loaded.read_index(folder, flag).get("text_encoder") or [None])[0] is None:
            raise UserError(
                f"{flag}: {folder} has no text_encoder: it is SDXL's refiner, which is not trained "
                "here; name the base model"
            )

    def check(self) -> None:
        """See `unet.Config`."""
        super().check()
        self.check_width(sum(one.get("hidden_size", 512) for one in self.encoders.values()))
        where = f"{FLAG}: {self.folder}/{UNET}/config.json"
        width, reads = folders.whole_numbers(
            self.unet, where, "addition_time_embed_dim", "projection_class_embeddings_input_dim"
        )
        if reads != self.pooled_width + TIME_IDS * width:
            raise UserError(
                f"{FLAG}: {self.folder} does not fit together: the UNet reads {reads} numbers of "
                f"text and sizes (projection_class_embeddings_input_dim), which are "
                f"{self.pooled_width} pooled ones and {TIME_IDS} x {width} for the sizes"
            )
        if self.vae.get("latents_mean") is not None:
            raise UserError(
                f"{FLAG}: the latents of {self.folder} have a mean of their own (latents_mean), "
                "which no SDXL's have"
            )
        if self.args.vae_dtype == "fp16" and self.vae.get("force_upcast", True):
            raise UserError(
                "--vae_dtype fp16: the autoencoder overflows in it (its config.json says "
                f"force_upcast); take bf16, or give {autoencoder.FLAG} the folder or hub id of "
                "one that does not, such as madebyollin/sdxl-vae-fp16-fix (of one file, which does "
                "not say it, say --vae_fits_fp16)"
            )
