"""What is known of a Stable Diffusion XL without its weights: options, sizes, what is zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dojo.cli import UserError
from dojo.lazy import diffusers, transformers
from dojo.models import family, loaded
from dojo.models.unet import sized

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TEXT_FOLDERS = ("tokenizer", "tokenizer_2", *TEXT_ENCODERS)

_ZEROS = "force_zeros_for_empty_prompt"


@dataclass(frozen=True, kw_only=True)
class ModelArgs(sized.ModelArgs):
    """The model that is trained."""

    pretrained_model_name_or_path: str
    """folder or hub id of a StableDiffusionXLPipeline, or one .safetensors or .ckpt file (original
    names)"""


@dataclass(frozen=True, kw_only=True)
class TextArgs(family.TextArgs):
    """What stands for no caption."""

    uncond: Literal["zeros", "empty_string"] | None = None
    """what the empty caption becomes in caption dropout and at validation: zeros, or the embeddings
    of ""; unset is what the model's own pipeline does (force_zeros_for_empty_prompt)"""


@dataclass(frozen=True, kw_only=True)
class Config(sized.Config):
    """What is known of a model without its weights."""

    name = "Stable Diffusion XL"
    text_encoders = TEXT_ENCODERS
    text_folders = TEXT_FOLDERS
    pipeline_name = "StableDiffusionXL"
    single_files = ("sdxl",)
    optional_parts = ("image_encoder", "feature_extractor")

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
    def pipeline_class(self) -> Any:
        """See the base class."""
        return diffusers.StableDiffusionXLPipeline

    @property
    def text_classes(self) -> dict[str, Any]:
        """See the base class."""
        first, second = TEXT_ENCODERS
        bigger = transformers.CLIPTextModelWithProjection
        return {first: transformers.CLIPTextModel, second: bigger}

    @property
    def pooled_width(self) -> int:
        """P: numbers in the pooled embedding of a caption (1280 for the real models)."""
        return int(self.encoders["text_encoder_2"].get("projection_dim", 512))

    @property
    def given_width(self) -> int:
        """Those of both CLIPs, side by side."""
        return sum(one.get("hidden_size", 512) for one in self.encoders.values())

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """What stands for no caption, and no watermark."""
        return {_ZEROS: self.zeros, "add_watermarker": False}

    def index_settings(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """A result's pipeline guides away from what stood for no caption in training."""
        return {_ZEROS: self.zeros}

    @classmethod
    def refuse(cls, folder: Path, flag: str) -> None:
        """Refuses the refiner, which has no CLIP-L."""
        if (loaded.read_index(folder, flag).get("text_encoder") or [None])[0] is None:
            raise UserError(
                f"{flag}: {folder} has no text_encoder: it is SDXL's refiner, which is not trained "
                "here; name the base model"
            )
