"""What is known of a Kolors without its weights, in diffusers' layout or in its authors'."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dojo.cli import UserError
from dojo.models import family, folders, loaded
from dojo.models.folders import FLAG, UNET
from dojo.models.unet import sized

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
TEXT_FOLDERS = (TOKENIZER, TEXT_ENCODER)
# Every caption is padded to these: the pipeline draws with no other number, whatever it is told.
TOKENS = 256

TextArgs = family.TextArgs  # there is nothing to choose

# The pipeline's own default; its True ends every call without a negative prompt.
_NO_CAPTION = {"force_zeros_for_empty_prompt": False}
_CLASSES = {
    TEXT_ENCODER: ["kolors", "ChatGLMModel"],
    TOKENIZER: ["kolors", "ChatGLMTokenizer"],
}


def _kolors() -> Any:
    """diffusers' module of the text encoder, without what torch says of torch.jit.script there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module("diffusers.pipelines.kolors")


@dataclass(frozen=True, kw_only=True)
class ModelArgs(sized.ModelArgs):
    """The model that is trained."""

    pretrained_model_name_or_path: str
    """folder or hub id of a KolorsPipeline, or a folder as Kwai-Kolors/Kolors has it"""


@dataclass(frozen=True, kw_only=True)
class Config(sized.Config):
    """What is known of a model without its weights."""

    name = "Kolors"
    text_encoders = (TEXT_ENCODER,)
    text_folders = TEXT_FOLDERS
    pipeline_name = "Kolors"
    single_files = ()
    optional_parts = ("image_encoder", "feature_extractor")
    width_name = "encoder_hid_dim"
    rescales_guidance = False

    args: ModelArgs
    text: TextArgs = field(default_factory=TextArgs)

    @property
    def pipeline_class(self) -> Any:
        """See the base class."""
        return _kolors().KolorsPipeline

    @property
    def text_classes(self) -> dict[str, Any]:
        """See the base class."""
        return {TEXT_ENCODER: _kolors().ChatGLMModel}

    @property
    def tokenizer_class(self) -> Any:
        """See the base class."""
        return _kolors().ChatGLMTokenizer

    @property
    def text_tokens(self) -> int:
        """256."""
        return TOKENS

    @property
    def given_width(self) -> int:
        """ChatGLM's (4096 for the real one)."""
        return int(self.encoders[TEXT_ENCODER].get("hidden_size", 4096))

    @property
    def pooled_width(self) -> int:
        """The same: the pooled embedding is its last token's."""
        return self.given_width

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """The embeddings of "" stand for no caption."""
        return _NO_CAPTION

    def index_settings(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """A result is diffusers', whatever its base was."""
        return {"_class_name": "KolorsPipeline", **_CLASSES, **_NO_CAPTION}

    @property
    def opens_in_diffusers(self) -> bool:
        """Not in the layout of its authors, whose index names modules that diffusers has not."""
        index = loaded.read_index(self.folder, FLAG)
        encoder = index.get(TEXT_ENCODER) or [""]
        return str(index.get("_class_name")).startswith("Kolors") and encoder[0] == "kolors"

    def tokenizer_folder(self, part: str) -> str:
        """`tokenizer`, or the encoder's own folder, where the authors' layout has it."""
        own = (self.folder / TOKENIZER).is_dir() or not (
            self.folder / part / self.tokenizer_class.vocab_files_names["vocab_file"]
        ).is_file()
        return TOKENIZER if own else part

    def check_tokenizers(self) -> None:
        """Refuses a folder without the tokenizer, and an encoder that reads no 256 tokens."""
        place = self.tokenizer_folder(TEXT_ENCODER)
        where = loaded.subject(self.folder, place, FLAG)
        loaded.check_vocabulary_files(self.folder / place, where, self.tokenizer_class)
        places = int(self.encoders[TEXT_ENCODER].get("seq_length", 2048))
        if places < TOKENS:
            raise UserError(
                f"{FLAG}: {self.folder}: {TEXT_ENCODER} has {places} places for tokens "
                f"(seq_length), captions are padded to {TOKENS}"
            )

    def check(self) -> None:
        """See `sized.Config`."""
        where = f"{FLAG}: {self.folder}/{UNET}/config.json"
        folders.whole_numbers(self.unet, where, self.width_name)
        kind = self.unet.get("encoder_hid_dim_type") or "text_proj"
        if kind != "text_proj":
            raise UserError(
                f"{where} says encoder_hid_dim_type {kind}: the UNet reads projected pictures, "
                "which is not trained here"
            )
        super().check()
