"""What is known of a Stable Diffusion 1 or 2 without its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dojo.cli import UserError, ranges
from dojo.lazy import diffusers, transformers
from dojo.models import family
from dojo.models.unet import config as unet

TEXT_FOLDERS = ("tokenizer", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class ModelArgs(unet.ModelArgs):
    """The model that is trained."""

    pretrained_model_name_or_path: str
    """folder or hub id of a StableDiffusionPipeline, such as SD 1.5, SD 2.1 and what is made of
    them, or one .safetensors or .ckpt file (original names)"""


@dataclass(frozen=True, kw_only=True)
class TextArgs(family.TextArgs):
    """How captions become embeddings."""

    clip_skip: int = 0
    """last layers of CLIP that are left out, as diffusers counts: many anime models want 1, which
    sd-scripts and web UIs call 2"""

    def __post_init__(self) -> None:
        ranges.check(self, "clip_skip", least=0)


@dataclass(frozen=True, kw_only=True)
class Config(unet.Config):
    """What is known of a model without its weights."""

    name = "Stable Diffusion 1"
    text_encoders = ("text_encoder",)
    text_folders = TEXT_FOLDERS
    embed_names = ("prompt_embeds",)
    pipeline_name = "StableDiffusionPipeline"
    single_files = ("sd1", "sd2")
    optional_parts = ("safety_checker", "feature_extractor", "image_encoder")

    text: TextArgs = field(default_factory=TextArgs)

    @property
    def pipeline_class(self) -> Any:
        """See the base class."""
        return diffusers.StableDiffusionPipeline

    @property
    def text_classes(self) -> dict[str, Any]:
        """See the base class."""
        return {"text_encoder": transformers.CLIPTextModel}

    @property
    def kind_of_file(self) -> str:
        """OpenCLIP, which SD2 reads, has another activation than CLIP."""
        if self.checkpoint is not None:
            return self.checkpoint.family
        clip = self.encoders["text_encoder"].get("hidden_act", "quick_gelu")
        return "sd1" if clip == "quick_gelu" else "sd2"

    @property
    def title(self) -> str:
        """SD1 is 1.5 to most, and no file tells it from 1.4."""
        return "Stable Diffusion 2" if self.kind_of_file == "sd2" else "Stable Diffusion 1.5"

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """No warning of a safety checker that is not there."""
        return {"requires_safety_checker": False}

    def index_settings(self, index: Any) -> dict[str, Any]:
        """No such warning in a result either."""
        absent = index.get("safety_checker", [None])[0] is None
        return {"requires_safety_checker": False} if absent else {}

    def check(self) -> None:
        """See `unet.Config`."""
        super().check()
        settings = self.encoders["text_encoder"]
        self.check_width(settings.get("hidden_size", 512))
        layers = settings.get("num_hidden_layers", 12)
        if self.text.clip_skip >= layers:
            raise UserError(
                f"--clip_skip {self.text.clip_skip}: the text encoder of {self.folder} has "
                f"{layers} layers"
            )
