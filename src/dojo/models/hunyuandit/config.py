"""What is known of a Hunyuan-DiT without its weights, in diffusers' layout or in Tencent's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from dojo.cli import UserError
from dojo.maths.ddpm import Prediction, Schedule
from dojo.models import family, folders, loaded
from dojo.models.folders import FLAG, TRANSFORMER
from dojo.models.hunyuandit import original
from dojo.models.hunyuandit.network import DIT
from dojo.models.hunyuandit.original import WEIGHTS_FLAG, Original, Weights

if TYPE_CHECKING:
    from torch import Tensor

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXT_FOLDERS = (*TOKENIZERS, *TEXT_ENCODERS)
# Every caption is padded to these; the network's own tables are as long.
TOKENS = {"text_encoder": 77, "text_encoder_2": 256}
EMBEDS = (
    *("prompt_embeds", "prompt_attention_mask"),  # of the BERT: [B, 77, 1024] and [B, 77]
    *("prompt_embeds_2", "prompt_attention_mask_2"),  # of mT5: [B, 256, 2048] and [B, 256]
)

TextArgs = family.TextArgs  # there is nothing to choose

_NEEDED = (
    *("in_channels", "patch_size", "sample_size", "num_layers", "hidden_size"),
    *("num_attention_heads", "attention_head_dim", "text_len", "text_len_t5"),
    *("cross_attention_dim", "cross_attention_dim_t5"),
)
# What an encoder's configuration calls the numbers of a token that it gives, and the network those
# that it reads.
_WIDTHS = {
    "text_encoder": ("hidden_size", "cross_attention_dim", "text_len"),
    "text_encoder_2": ("d_model", "cross_attention_dim_t5", "text_len_t5"),
}


@dataclass(frozen=True, kw_only=True)
class ModelArgs(family.ModelArgs):
    """The model that is trained."""

    pretrained_model_name_or_path: str
    """folder or hub id of a HunyuanDiTPipeline, or Tencent's own folder t2i (or what it is in)"""
    tencent_weights: Weights = "auto"
    """of Tencent's own folder, which model/pytorch_model_*.pt: auto is the averaged one (ema), or
    the one that is there; Tencent's LoRA begin from distill"""


@dataclass(frozen=True, kw_only=True)
class Config(family.Model):
    """What is known of a model without its weights."""

    name = "Hunyuan-DiT"
    network_class = "HunyuanDiT2DModel"
    network_facts = DIT
    text_encoders = TEXT_ENCODERS
    text_folders = TEXT_FOLDERS
    embed_names = EMBEDS
    sized = True  # v1.0 and v1.1 are told; v1.2 passes it over
    rescales_guidance = True

    args: ModelArgs
    text: TextArgs = field(default_factory=TextArgs)
    transformer: dict[str, Any]
    encoders: dict[str, dict[str, Any]]
    """configurations of the text encoders, by their folders"""
    original: Original | None = None
    """Tencent's folder, which `folder` stands for"""

    # -- sizes and the schedule ---------------------------------------------------------------

    @property
    def is_told_sizes(self) -> bool:
        """Whether the network reads a style and sizes: v1.0 and v1.1 do, v1.2 does not."""
        return bool(self.transformer.get("use_style_cond_and_image_meta_size", True))

    @property
    def opens_in_diffusers(self) -> bool:
        """Not in Tencent's layout."""
        return self.original is None

    @property
    def title(self) -> str:
        """With the version, as far as the network tells it."""
        return f"{self.name} {'v1.0 or v1.1' if self.is_told_sizes else 'v1.2'}"

    @cached_property
    def schedule(self) -> Schedule:
        """The signal's share at every timestep; the versions' ends differ."""
        return Schedule.of(self.scheduler)

    @property
    def prediction_type(self) -> Prediction:
        """What the network predicts: v."""
        return self.scheduler.get("prediction_type", "epsilon")

    @property
    def pixel_step(self) -> int:
        """16."""
        return self.pixels_per_latent * self.transformer["patch_size"]

    @property
    def native_size(self) -> int:
        """Height and width, in pixels, that the model was trained at (1024)."""
        return self.transformer["sample_size"] * self.pixels_per_latent

    @property
    def text_numbers(self) -> int:
        """Numbers in the embeddings of one caption, masks included."""
        sizes = self.transformer
        rows = sizes["text_len"] * (sizes["cross_attention_dim"] + 1)
        return rows + sizes["text_len_t5"] * (sizes["cross_attention_dim_t5"] + 1)

    @property
    def text_lengths(self) -> dict[str, int]:
        """77 and 256."""
        return dict(TOKENS)

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before the network sees them."""
        return float(self.vae.get("scaling_factor", 0.13025))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture.

        Raises:
            UserError: the size is not a multiple of `pixel_step`.
        """
        self.check_step(height, width)
        step = self.pixels_per_latent
        return self.transformer["in_channels"], height // step, width // step

    def scaled(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A draw from the autoencoder's posterior, as the network sees it: [B, C, h, w]."""
        return (mean.float() + std.float() * noise) * self.scaling_factor

    # -- what does not fit together -----------------------------------------------------------

    def check(self) -> None:
        """Refuses configurations that do not fit together.

        Raises:
            UserError: naming folder and part.
        """
        where = f"{FLAG}: {self.folder}/{TRANSFORMER}/config.json"
        channels, *_ = folders.whole_numbers(self.transformer, where, *_NEEDED)
        folders.check_channels(self.folder, self.vae, channels, TRANSFORMER)
        for part, (given, read, tokens) in _WIDTHS.items():
            self._check_text(part, given, read, tokens)
        if self.prediction_type not in get_args(Prediction):
            raise UserError(
                f"{FLAG}: {self.folder} predicts {self.prediction_type}; only models that predict "
                f"one of {' and '.join(get_args(Prediction))} are trained here"
            )
        try:
            assert self.schedule.num_timesteps
        except ValueError as error:
            raise UserError(f"{FLAG}: the scheduler of {self.folder}: {error}") from error
        if self.args.vae_dtype == "fp16" and self.vae.get("force_upcast", True):
            raise UserError(
                "--vae_dtype fp16: the autoencoder overflows in it (its config.json says "
                "force_upcast); take bf16"
            )

    def _check_text(self, part: str, given: str, read: str, tokens: str) -> None:
        """Refuses an encoder that the network does not read, or without its tokenizer."""
        tokenizer = part.replace("text_encoder", "tokenizer")
        where = loaded.subject(self.folder, tokenizer, FLAG)
        loaded.check_vocabulary_files(self.folder / tokenizer, where)
        own, sizes = self.encoders[part], self.transformer
        if own.get(given) != sizes[read]:
            raise UserError(
                f"{FLAG}: {self.folder} does not fit together: {part} gives {own.get(given)} "
                f"numbers per token, the transformer reads {sizes[read]} ({read})"
            )
        places = own.get("max_position_embeddings", TOKENS[part])
        if sizes[tokens] != TOKENS[part] or places < TOKENS[part]:
            raise UserError(
                f"{FLAG}: {self.folder} does not fit together: captions are padded to "
                f"{TOKENS[part]} tokens, {part} has {places} places for them and the transformer "
                f"{sizes[tokens]} ({tokens})"
            )


ConfigT = TypeVar("ConfigT", bound=Config)


def read(kind: type[ConfigT], args: ModelArgs, text: TextArgs) -> ConfigT:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no Hunyuan-DiT.
    """
    name = args.pretrained_model_name_or_path
    folder = folders.find_folder(name, FLAG, revision=args.revision, variant=args.variant)
    folders.check_kind(folder, FLAG, "HunyuanDiT", Config.name)
    theirs = folders.tencents(folder)
    found = None if theirs is None else original.linked(theirs, args.tencent_weights)
    if found is not None:
        folder = found.folder
    elif args.tencent_weights != "auto":
        raise UserError(
            f"{WEIGHTS_FLAG} {args.tencent_weights} is for Tencent's own folder (t2i), and "
            f"{folder} has diffusers' layout"
        )
    with nullcontext() if found is None else found.named():
        return _read(kind, args, text, folder, found)


def _read(
    kind: type[ConfigT], args: ModelArgs, text: TextArgs, folder: Path, found: Original | None
) -> ConfigT:
    """The configurations of a folder in diffusers' layout, checked."""
    config = kind(
        args=args,
        text=text,
        folder=folder,
        transformer=folders.read_config(folder, FLAG, TRANSFORMER),
        vae=folders.read_config(folder, FLAG, "vae"),
        scheduler=folders.read_config(folder, FLAG, "scheduler", "scheduler_config.json"),
        encoders={part: folders.read_config(folder, FLAG, part) for part in TEXT_ENCODERS},
        original=found,
    )
    config.check()
    return config


def with_parts(index: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """A model_index.json with these parts of a pipeline alone."""
    gone = {
        part: [None, None]
        for part, entry in index.items()
        if isinstance(entry, list) and part not in parts
    }
    return {**index, **gone, "requires_safety_checker": False}
