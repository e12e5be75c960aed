"""What is known of a model with a UNet without its weights: options, sizes, the schedule."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args

from dojo.cli import UserError
from dojo.lazy import diffusers, torch, transformers
from dojo.maths import ddpm
from dojo.maths.ddpm import Prediction, Schedule
from dojo.models import family, folders, loaded
from dojo.models.folders import FLAG, UNET
from dojo.models.unet import autoencoder, network, schedule, single_file
from dojo.models.unet.autoencoder import Autoencoder
from dojo.models.unet.single_file import CONFIG_FLAG, SingleFile

if TYPE_CHECKING:
    from torch import Tensor

# What a UNet of another model reads beside latents, timestep and text, by its configuration.
_FOREIGN = {
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "addition_embed_type": "further text or sizes",
    "encoder_hid_dim": "projected text or pictures",
    "time_cond_proj_dim": "a guidance scale",
}
# What a UNet with more channels than the autoencoder is made for.
_WIDER = {9: "an inpainting model", 8: "a model that edits pictures (InstructPix2Pix)"}


@dataclass(frozen=True, kw_only=True)
class ModelArgs(family.ModelArgs):
    """The model that is trained."""

    pretrained_vae_model_name_or_path: str | None = None
    """autoencoder in place of the model's own: folder (of it, or with vae/ inside), hub id, or one
    .safetensors file; it is part of a result with every weight"""
    single_file_config: str | None = None
    """with a single file: folder or hub id of the same model in parts, which gives configurations,
    tokenizers and the parts that the file lacks; unset is made of what the file is"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.single_file_config and not self.is_single_file:
            raise ValueError(
                "--single_file_config goes with one file (.safetensors, .ckpt) as "
                "--pretrained_model_name_or_path"
            )

    @property
    def vae_is_said_to_fit(self) -> bool:
        """Whether the user says that the given autoencoder does not overflow in float16."""
        return False

    @property
    def is_single_file(self) -> bool:
        """Whether the model comes as one file."""
        return single_file.is_named_like_one(self.pretrained_model_name_or_path)


@dataclass(frozen=True, kw_only=True)
class Config(family.Model):
    """What is known of a model without its weights."""

    network_class = "UNet2DConditionModel"
    network_facts = network.UNET
    rescales_guidance = True

    pipeline_name: ClassVar[str]
    """what the class's name begins with in model_index.json"""
    optional_parts: ClassVar[tuple[str, ...]]
    """of a pipeline, which nothing is trained or drawn with: None where not needed"""
    single_files: ClassVar[tuple[str, ...]]
    """what its single files are (`single_file.FAMILIES`)"""
    reads: ClassVar[str | None] = None
    """what the UNet reads beside latents, timestep and text (`addition_embed_type`)"""
    width_name: ClassVar[str] = "cross_attention_dim"
    """what the UNet's configuration calls the numbers of a token that it is given"""

    args: ModelArgs
    unet: dict[str, Any]
    encoders: dict[str, dict[str, Any]]
    """configurations of the text encoders, by their folders"""
    other_vae: Autoencoder | None = None
    """in place of the model's own; `vae` is its configuration then"""
    checkpoint: SingleFile | None = None
    """the single file that some parts come from, instead of `folder`"""

    # -- sizes and the schedule ---------------------------------------------------------------

    @cached_property
    def schedule(self) -> Schedule:
        """The signal's share at every timestep."""
        return Schedule.of(self.scheduler)

    @property
    def prediction_type(self) -> Prediction:
        """What the UNet predicts: the noise, or v."""
        return self.scheduler.get("prediction_type", "epsilon")

    @property
    def steps_offset(self) -> int:
        """What a sampler's timesteps are shifted by: 1 for the real models."""
        return int(self.scheduler.get("steps_offset", 0))

    @property
    def flag(self) -> str:
        """What the user named the folder with."""
        return FLAG if self.checkpoint is None else CONFIG_FLAG

    @property
    def kind_of_file(self) -> str:
        """What the model is as one file: sd1, sd2 or sdxl."""
        return self.single_files[0] if self.checkpoint is None else self.checkpoint.family

    @property
    def clip_tokens(self) -> int:
        """Length that the CLIP tokenizer pads to (77 for the real models)."""
        return folders.clip_tokens(self.folder, self.flag)

    @property
    def text_tokens(self) -> int:
        """T: tokens that every caption is padded to."""
        return self.clip_tokens

    @property
    def text_width(self) -> int:
        """D: numbers of a token that the UNet is given."""
        return int(self.unet[self.width_name])

    @property
    def pixel_step(self) -> int:
        """Height and width of a picture must be multiples of this (SD 1.5: 64, SDXL: 32)."""
        return self.pixels_per_latent * 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def native_size(self) -> int:
        """Height and width, in pixels, that the model was trained at (SD 1.5: 512, SDXL: 1024)."""
        return int(self.unet["sample_size"]) * self.pixels_per_latent

    @property
    def text_numbers(self) -> int:
        """Numbers in the embeddings of one caption."""
        return self.text_tokens * self.text_width

    @property
    def text_lengths(self) -> dict[str, int]:
        """The same for every encoder: 77 for the real CLIPs."""
        return dict.fromkeys(self.text_encoders, self.text_tokens)

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

    # -- parts --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def pipeline_class(self) -> Any:
        """diffusers' class of the whole model."""

    @property
    @abstractmethod
    def text_classes(self) -> dict[str, Any]:
        """The classes of the text encoders, by their folders."""

    @property
    def tokenizer_class(self) -> Any:
        """The class of their tokenizers."""
        return transformers.CLIPTokenizer

    @property
    def networks(self) -> dict[str, Any]:
        """The classes of all networks, by their folders."""
        return {
            UNET: diffusers.UNet2DConditionModel,
            "vae": diffusers.AutoencoderKL,
            **self.text_classes,
        }

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """What the pipeline's class is told beside its parts."""
        return {}

    def index_settings(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of a result's model_index.json that differ from the base's."""
        return {}

    def elsewhere(self, part: str) -> bool:
        """Whether a part's weights are read from elsewhere than the model's folder."""
        if part == "vae" and self.other_vae is not None:
            return True
        return self.checkpoint is not None and part in self.checkpoint

    def load_part(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        """A network of the model: every load of one goes through here.

        Args:
            kind: its class, of diffusers or transformers.
        Raises:
            UserError: it is damaged, incomplete, or other than its configuration.
        """
        if part == "vae" and self.other_vae is not None:
            return self.other_vae.load(dtype)
        if self.checkpoint is not None and part in self.checkpoint:
            return single_file.load(self.checkpoint, part, self.folder, dtype)
        return loaded.network(
            kind, self.folder, part, flag=self.flag, dtype=dtype, variant=self.args.variant
        )

    def tokenizer_folder(self, part: str) -> str:
        """The folder of a text encoder's tokenizer."""
        return part.replace("text_encoder", "tokenizer")

    def load_tokenizer(self, part: str, encoder: Any = None) -> Any:
        """The tokenizer of a text encoder.

        Args:
            encoder: what reads the tokens, if it is there.
        Raises:
            UserError: files are missing or damaged, or the vocabulary is not the encoder's.
        """
        place = (self.folder, self.tokenizer_folder(part))
        return loaded.tokenizer(self.tokenizer_class, *place, flag=self.flag, encoder=encoder)

    def check_weights(self, parts: Sequence[str]) -> None:
        """See `family.Model`; what comes from elsewhere was found there."""
        parts = [part for part in parts if not self.elsewhere(part)]
        for part in parts:
            kinds = {path.suffix for path in (self.folder / part).glob("*")}
            if self.checkpoint is not None and not kinds & {".safetensors", ".bin"}:
                raise UserError(single_file.lacking(self.checkpoint, part))
        super().check_weights(parts)

    def exact_dtype(self, part: str) -> torch.dtype:
        """The precision that holds a part as it was given."""
        if part == "vae" and self.other_vae is not None:
            return torch.float32
        held = self.checkpoint is not None and part in self.checkpoint
        return self.checkpoint.dtype(part) if self.checkpoint and held else torch.float32

    def fingerprint(self, parts: Sequence[str]) -> str:
        """Identifies the model files that some parts (names of sub-folders) are loaded from."""
        words = [super().fingerprint([part for part in parts if not self.elsewhere(part)])]
        for part in parts:
            if part == "vae" and self.other_vae is not None:
                words.append(self.other_vae.fingerprint())
            elif self.checkpoint is not None and part in self.checkpoint:
                words.append((self.folder / part / "config.json").read_text())
                words.append(self.checkpoint.fingerprint(part))
        if len(words) == 1:
            return words[0]
        return hashlib.blake2b("\n".join(words).encode(), digest_size=16).hexdigest()

    # -- what does not fit together -----------------------------------------------------------

    @classmethod
    def refuse(cls, folder: Path, flag: str) -> None:
        """Refuses relatives of the family by their model_index.json.

        Raises:
            UserError: naming what it is.
        """

    def check(self) -> None:
        """Refuses configurations that do not fit together.

        Raises:
            UserError: naming folder and part.
        """
        _check_unet(self)
        _check_scheduler(self)

    def check_tokenizers(self) -> None:
        """Refuses tokenizers that are not there, or that do not fit their encoders.

        Raises:
            UserError: naming what is missing, or both numbers.
        """
        folders.check_tokens(self.folder, FLAG, self.encoders)

    def check_width(self, text: int) -> None:
        """Refuses text encoders of another width than the UNet reads.

        Args:
            text: numbers per token that they give.
        Raises:
            UserError: naming both.
        """
        width = self.text_width
        if text != width:
            gives = "encoder gives" if len(self.text_encoders) == 1 else "encoders give"
            raise UserError(
                f"{self.flag}: {self.folder} does not fit together: the text {gives} {text} "
                f"numbers per token, the UNet reads {width} ({self.width_name})"
            )


ConfigT = TypeVar("ConfigT", bound=Config)


def read(kind: type[ConfigT], args: ModelArgs, text: family.TextArgs) -> ConfigT:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no such model.
    """
    other = args.pretrained_vae_model_name_or_path
    checkpoint = _inspect(kind, args) if args.is_single_file else None
    flag = FLAG if checkpoint is None else CONFIG_FLAG
    folder = _find(args, checkpoint)
    folders.check_kind(folder, flag, kind.pipeline_name, kind.name)
    kind.refuse(folder, flag)
    unet = folders.read_config(folder, flag, UNET)
    scheduler = folders.read_config(folder, flag, "scheduler", "scheduler_config.json")
    if checkpoint is not None:
        scheduler = schedule.able(single_file.marked(checkpoint, scheduler))
    vae = None if other is None else autoencoder.find(other, folder)
    if vae is not None and args.vae_is_said_to_fit:
        vae = vae.fitting_half()
    config = kind(
        args=args,
        text=text,
        folder=folder,
        unet=unet,
        vae=folders.read_config(folder, flag, "vae") if vae is None else vae.config,
        scheduler=scheduler,
        encoders={part: folders.read_config(folder, flag, part) for part in kind.text_encoders},
        other_vae=vae,
        checkpoint=checkpoint,
    )
    config.check()
    if checkpoint is not None:
        single_file.check(checkpoint, folder)
    return config


def _inspect(kind: type[Config], args: ModelArgs) -> SingleFile:
    """A single file of a family; what is to be said of it goes to the screen once a run."""
    found = single_file.inspect(Path(args.pretrained_model_name_or_path).expanduser())
    if found.family not in kind.single_files:
        raise UserError(
            f"{FLAG}: {found.path} holds {single_file.FAMILIES[found.family]}, no {kind.name}"
        )
    if os.environ.get("RANK", "0") == "0":
        for remark in found.remarks:
            print(remark)
    return found


def _find(args: ModelArgs, checkpoint: SingleFile | None) -> Path:
    """The folder with the configurations, and with the weights that come from no single file."""
    if checkpoint is not None and args.single_file_config is None:
        return single_file.configurations(checkpoint)
    name, flag = args.pretrained_model_name_or_path, FLAG
    passed: list[str] = ["vae"] if args.pretrained_vae_model_name_or_path else []
    if checkpoint is not None:
        # What the file has is not downloaded; the configurations of these parts still are.
        name, flag = str(args.single_file_config), CONFIG_FLAG
        passed = [part for part in single_file.PARTS[checkpoint.family] if part in checkpoint]
    return folders.find_folder(
        *(name, flag),
        revision=args.revision,
        variant=args.variant,
        passed=dict.fromkeys(passed) or None,
    )


def _check_unet(config: Config) -> None:
    folder, unet = config.folder, config.unet
    where = f"{FLAG}: {folder}/{UNET}/config.json"
    channels, *_ = folders.whole_numbers(
        unet, where, "in_channels", "cross_attention_dim", "sample_size"
    )
    if not isinstance(unet.get("block_out_channels"), list):
        raise UserError(f"{where} has no list of block_out_channels")
    if channels in _WIDER:
        raise UserError(
            f"{FLAG}: {folder} holds {_WIDER[channels]}, which is not trained here: the UNet "
            f"expects {channels} channels"
        )
    if config.other_vae is None:
        folders.check_channels(folder, config.vae, channels, "UNet")
    else:
        own = folder / "vae" / "config.json"
        sizes = folders.read_config(folder, FLAG, "vae") if own.is_file() else {}
        autoencoder.check(config.other_vae, sizes, channels)
    config.check_tokenizers()
    for name, what in _FOREIGN.items():
        expected = config.reads if name == "addition_embed_type" else None
        if name != config.width_name and unet.get(name) != expected:
            raise UserError(
                f"{FLAG}: the UNet of {folder} reads {what} ({name} {unet.get(name)}), which no "
                f"{config.name} does"
            )


def _check_scheduler(config: Config) -> None:
    kinds = get_args(Prediction)
    if config.prediction_type not in kinds:
        raise UserError(
            f"{FLAG}: {config.folder} predicts {config.prediction_type}; only models that predict "
            f"one of {' and '.join(kinds)} are trained here"
        )
    try:
        schedule = config.schedule
        if config.prediction_type == "epsilon":
            ddpm.require_signal(schedule)
    except ValueError as error:
        raise UserError(f"{FLAG}: the scheduler of {config.folder}: {error}") from error
