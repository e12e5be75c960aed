"""What is known of a Stable Diffusion 3 without its weights: options, sizes, the shift rule."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dojo.cli import UserError, ranges
from dojo.maths import flow
from dojo.models import family, folders, loaded, published
from dojo.models.folders import FLAG
from dojo.models.sd3 import schedule, single_file
from dojo.models.sd3.keys import PREFIXES
from dojo.models.sd3.network import MMDIT
from dojo.models.sd3.single_file import SingleFile

if TYPE_CHECKING:
    from torch import Tensor

TEXT_FOLDERS = tuple(
    f"{part}{i}" for part in ("tokenizer", "text_encoder") for i in ("", "_2", "_3")
)
# What is read of the transformer's configuration here.
_NEEDED = (
    *("in_channels", "patch_size", "sample_size", "pos_embed_max_size"),
    *("joint_attention_dim", "pooled_projection_dim"),
)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")  # [B, T, D] and [B, P]


@dataclass(frozen=True, kw_only=True)
class ModelArgs(family.ModelArgs):
    """The model that is trained."""

    pretrained_model_name_or_path: str
    """folder or hub id of a StableDiffusion3Pipeline, or one .safetensors file (original names)"""
    single_file_config: str | None = None
    """with a single file: folder or hub id of the same model in parts, which gives configurations,
    tokenizers and the parts that the file lacks; unset is Stability's repository of that size"""
    max_sequence_length: int = 256
    """tokens of T5, 1 to 512; the same in training, validation and demo.py"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_sequence_length <= 512:
            raise ValueError("--max_sequence_length must lie between 1 and 512")
        if self.single_file_config and not self.is_single_file:
            raise ValueError(
                "--single_file_config goes with a .safetensors file as "
                "--pretrained_model_name_or_path"
            )

    @property
    def is_single_file(self) -> bool:
        """Whether the model comes as one file."""
        return self.pretrained_model_name_or_path.endswith(".safetensors")


@dataclass(frozen=True, kw_only=True)
class NoiseArgs(flow.ShiftArgs, family.NoiseArgs):
    """The flow-matching objective: which noise levels are trained, and how they weigh."""

    weighting_scheme: flow.WeightingScheme = "logit_normal"
    """density of sigma; cosmap and sigma_sqrt draw uniformly and weigh the loss"""
    logit_mean: float = 0.0
    """logit_normal: mean of the logit; positive is more noise"""
    logit_std: float = 1.0
    """logit_normal: standard deviation of the logit"""
    mode_scale: float = 1.29
    """mode: positive puts more weight on the middle of the path"""
    precondition_outputs: bool = False
    """compare clean estimates instead of velocities (diffusers' form: sigma^2 times the error)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = {"logit_normal": "logit_mean logit_std", "mode": "mode_scale"}
        ranges.check_choice(self, "weighting_scheme", own)
        if self.weighting_scheme == "sigma_sqrt" and not self.precondition_outputs:
            raise ValueError(
                "--weighting_scheme sigma_sqrt weighs by sigma^-2, which is unbounded on velocity "
                "errors: add --precondition_outputs"
            )
        if self.logit_std <= 0:
            raise ValueError("--logit_std must be positive")
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError("--mode_scale must lie in [-1, 1.75], or sigma would leave [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TextArgs(family.TextArgs):
    """How captions become embeddings, and what stands for no caption."""

    t5_padding: Literal["unmodified", "zero"] = "unmodified"
    """T5's rows of padding: as the encoder gives them (as the pipeline does), or zeros"""
    uncond: Literal["empty_string", "zeros"] = "empty_string"
    """what the empty caption becomes in caption dropout and at validation: the embeddings of "", as
    in the pipeline, or zeros, as the base model was trained with"""


@dataclass(frozen=True, kw_only=True)
class TextDropoutArgs(TextArgs):
    """The same, and how often single encoders are left out in training."""

    clip_l_dropout: float = 0.0
    """share of samples whose CLIP-L embeddings are zeros, independently of the other encoders"""
    clip_g_dropout: float = 0.0
    """the same for CLIP-G"""
    t5_dropout: float = 0.0
    """the same for T5"""

    def __post_init__(self) -> None:
        for name, share in self.dropout.items():
            if not 0 <= share <= 1:
                raise ValueError(f"--{name}_dropout must lie between 0 and 1")

    @property
    def dropout(self) -> dict[str, float]:
        """Share of dropped samples per encoder."""
        return {"clip_l": self.clip_l_dropout, "clip_g": self.clip_g_dropout, "t5": self.t5_dropout}


@dataclass(frozen=True, kw_only=True)
class Config(family.Model):
    """What is known of a model without its weights."""

    name = "Stable Diffusion 3"
    network_class = "SD3Transformer2DModel"
    network_facts = MMDIT
    text_encoders = TEXT_ENCODERS
    text_folders = TEXT_FOLDERS
    embed_names = EMBEDS

    args: ModelArgs
    text: TextArgs = field(default_factory=TextArgs)
    transformer: dict[str, Any]
    checkpoint: SingleFile | None = None
    """the single file that some parts come from, instead of `folder`"""

    @property
    def flag(self) -> str:
        """What the user named the folder with."""
        return FLAG if self.checkpoint is None else "--single_file_config"

    @property
    def clip_tokens(self) -> int:
        """Length that the CLIP tokenizers pad to (77 for the real models)."""
        return folders.clip_tokens(self.folder, self.flag)

    @property
    def needed(self) -> tuple[str, ...]:
        """T5 may be missing."""
        return ("vae", *TEXT_ENCODERS[:2], self.part)

    @property
    def text_numbers(self) -> int:
        """Numbers in the embeddings of one caption."""
        tokens = self.clip_tokens + self.args.max_sequence_length
        return tokens * self._int("joint_attention_dim") + self._int("pooled_projection_dim")

    @property
    def text_lengths(self) -> dict[str, int]:
        """77 tokens for the CLIPs, and T5's own number."""
        own: dict[str, int] = {part: self.clip_tokens for part in TEXT_ENCODERS[:2]}
        return {**own, TEXT_ENCODERS[2]: self.args.max_sequence_length} if self.has_t5 else own

    @property
    def has_t5(self) -> bool:
        """Whether there is a T5; without one zeros take its place."""
        part = "text_encoder_3"
        if self.checkpoint is not None and part in self.checkpoint:
            return True
        if published.has_no_weights(self.folder):
            return True
        return any((self.folder / part).glob("*.safetensors"))

    @property
    def pixel_step(self) -> int:
        """Height and width of a picture must be multiples of this (16 for SD3.5)."""
        return self.pixels_per_latent * self._int("patch_size")

    @property
    def native_size(self) -> int:
        """Height and width, in pixels, that the model was trained at."""
        return self._int("sample_size") * self.pixels_per_latent

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture.

        Raises:
            UserError: the size is not a multiple of `pixel_step` or larger than the model's table
                of positions.
        """
        self.check_step(height, width)
        for name, pixels in (("height", height), ("width", width)):
            largest = self._int("pos_embed_max_size") * self.pixel_step
            if pixels > largest:
                raise UserError(
                    f"--{name} (or --resolution) {pixels} is larger than this model's positions "
                    f"reach ({largest})"
                )
        step = self.pixels_per_latent
        return self._int("in_channels"), height // step, width // step

    def shift(self, choice: float | Literal["auto"] | None, height: int, width: int) -> float:
        """The one shift rule, for training, validation and the saved scheduler.

        `auto` keeps the scheduler's shift at the model's native size and follows the square root of
        the token count elsewhere (arXiv:2403.03206, Equation 23).
        """
        own = schedule.own_shift(self.scheduler)
        if choice is None:
            return own
        if choice == "auto":
            tokens = (height // self.pixel_step) * (width // self.pixel_step)
            native = (self._int("sample_size") // self._int("patch_size")) ** 2
            return own * math.sqrt(tokens / native)
        return choice

    def with_shift(self, shift: float) -> Any:
        """The model's scheduler, of its own class, with another shift."""
        return schedule.with_shift(self.scheduler, shift)

    def scaled(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A draw from the autoencoder's posterior, as the transformer sees it: [B, C, h, w]."""
        shift, scale = self.vae["shift_factor"], self.vae["scaling_factor"]
        return (mean.float() + std.float() * noise - shift) * scale  # pyright: ignore

    def check_weights(self, parts: Sequence[str]) -> None:
        """See `family.Model`; a single file has its own."""
        super().check_weights([p for p in parts if not self.checkpoint or p not in self.checkpoint])

    def fingerprint(self, parts: Sequence[str]) -> str:
        """Identifies the model files that some parts (names of sub-folders) are loaded from."""
        if self.checkpoint is None:
            return super().fingerprint(parts)
        inside = [part for part in parts if part in self.checkpoint]
        words = [super().fingerprint([part for part in parts if part not in inside])]
        for part in inside:
            words.append((self.folder / part / "config.json").read_text())
            words.append(self.checkpoint.fingerprint(part))
        return hashlib.blake2b("\n".join(words).encode(), digest_size=16).hexdigest()

    def _int(self, name: str) -> int:
        value = self.transformer[name]
        assert isinstance(value, int)
        return value


ConfigT = TypeVar("ConfigT", bound=Config)


def read(kind: type[ConfigT], args: ModelArgs, text: TextArgs) -> ConfigT:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder, file or hub repository, or it holds no SD3.
    """
    find = partial(folders.find_folder, revision=args.revision, variant=args.variant)
    if not args.is_single_file:
        name, flag = args.pretrained_model_name_or_path, FLAG
        return _read_folder(kind, find(name, flag), flag, args, text)
    checkpoint = single_file.inspect(Path(args.pretrained_model_name_or_path).expanduser())
    flag = "--single_file_config"
    name = args.single_file_config or checkpoint.hub_id
    if name is None:
        raise UserError(
            f"{flag}: name a folder with the configurations of {checkpoint.path.name}, which is "
            "neither an SD3-medium nor an SD3.5-medium or -large"
        )
    # What the file has is not downloaded; the configurations of these parts still are.
    passed = {part: None for part in PREFIXES if part in checkpoint}
    config = replace(
        _read_folder(kind, find(name, flag, passed=passed), flag, args, text),
        checkpoint=checkpoint,
    )
    checkpoint.check(config.transformer, config.vae)
    return config


def _read_folder(
    kind: type[ConfigT], folder: Path, flag: str, args: ModelArgs, text: TextArgs
) -> ConfigT:
    folders.check_kind(folder, flag, "StableDiffusion3", "Stable Diffusion 3")
    config = kind(
        args=args,
        text=text,
        folder=folder,
        transformer=folders.read_config(folder, flag, "transformer"),
        vae=folders.read_config(folder, flag, "vae"),
        scheduler=folders.read_config(folder, flag, "scheduler", "scheduler_config.json"),
    )
    schedule.check_flow(config.scheduler, f"{flag}: {folder}")
    where = f"{flag}: {folder}/transformer/config.json"
    channels, *_ = folders.whole_numbers(config.transformer, where, *_NEEDED)
    folders.check_channels(folder, config.vae, channels, "transformer")
    for name in ("scaling_factor", "shift_factor"):
        if not isinstance(config.vae.get(name), float | int):
            raise UserError(f"{flag}: {folder}/vae/config.json has no number for {name}")
    _check_texts(config, flag)
    return config


def _check_texts(config: Config, flag: str) -> None:
    """Refuses text encoders of other widths than the transformer reads."""
    clips = {part: folders.read_config(config.folder, flag, part) for part in TEXT_ENCODERS[:2]}
    folders.check_tokens(config.folder, flag, clips)
    has_t5 = (config.folder / TEXT_ENCODERS[2] / "config.json").is_file()
    if has_t5:
        where = loaded.subject(config.folder, "tokenizer_3", flag)
        loaded.check_vocabulary_files(config.folder / "tokenizer_3", where)
    sizes = config.transformer
    pooled = sum(settings.get("projection_dim", 512) for settings in clips.values())
    rows = sum(settings.get("hidden_size", 512) for settings in clips.values())
    wrong = None
    if pooled != sizes["pooled_projection_dim"]:
        wrong = f"{pooled} pooled numbers from the CLIPs", "pooled_projection_dim"
    if rows > sizes["joint_attention_dim"]:
        wrong = f"{rows} numbers per token from the CLIPs", "joint_attention_dim"
    if has_t5:
        t5 = folders.read_config(config.folder, flag, TEXT_ENCODERS[2])
        if t5.get("d_model", 512) != sizes["joint_attention_dim"]:
            wrong = f"{t5.get('d_model', 512)} numbers per token from T5", "joint_attention_dim"
    if wrong is not None:
        raise UserError(
            f"{flag}: {config.folder} does not fit together: {wrong[0]}, where the transformer "
            f"reads {sizes[wrong[1]]} ({wrong[1]})"
        )
