"""What generic code may ask of a model, whatever family it is of.

`dojo.models.opening.open_model` looks at a folder or a file and gives one frozen `Model`, of a
class that stands in the family's own package; nothing outside `models` knows which. It is cheap: it
has read configurations and no weights.

Shapes: B batch, C latent channels, h = height / `pixels_per_latent`. Latents are those that the
network sees: scaled, and shifted where the family does that. A level is what the family's objective
makes of it: sigma of a flow, the timestep of a diffusion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from dojo.cli import UserError, option
from dojo.lazy import late, torch, transformers
from dojo.models import attention, folders, int8, published
from dojo.models.facts import NetworkFacts
from dojo.models.folders import FLAG
from dojo.models.precisions import dtype_of
from dojo.run import phases

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor, nn

    from dojo.data.geometry import Geometry
    from dojo.maths.objective import Objective
    from dojo.models.folders import Embeds
    from dojo.models.loaded import Prepare
    from dojo.models.truncation import Reader
    from dojo.models.words import Words
    from dojo.run import cost
else:
    cost = late("dojo.run.cost")


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The model that is trained: which files of it, and how its frozen parts compute."""

    pretrained_model_name_or_path: str
    """folder or hub id of a pipeline in diffusers' layout"""
    revision: str | None = None
    """branch, tag or commit of the hub repository"""
    variant: str | None = None
    """file variant of the hub repository, such as fp16"""
    text_encoder_device: Literal["auto", "cpu"] = "auto"
    """where frozen text encoders compute: auto is the run's device; cpu is slow, and takes none of
    a GPU's memory"""
    text_encoder_precision: Literal["auto", "int8"] = "auto"
    """precision of frozen text encoders: auto is the run's; int8 halves the memory of their blocks
    and changes the embeddings by about half a percent"""
    vae_dtype: Literal["no", "fp16", "bf16"] = "no"
    """precision of the frozen autoencoder; no is float32"""
    enable_vae_tiling: bool = False
    """the autoencoder takes pictures larger than its own size (1024 px in SD3 and SDXL) in tiles
    that overlap: less memory, and pixels and latents that differ somewhat"""
    enable_vae_slicing: bool = False
    """the autoencoder takes the pictures of a batch one by one: less memory, slower"""
    gradient_checkpointing: bool = option(False, incidental=True, common=True)
    """recompute the blocks' activations in the backward pass: less memory, about 30 % slower"""
    activations_on_cpu: bool = option(False, incidental=True)
    """what the trained network's forward pass keeps for the backward pass (with
    --gradient_checkpointing the blocks' inputs) lies in CPU memory meanwhile"""
    attention_backend: attention.Backend | None = option(None, incidental=True)
    """what computes the trained network's attention, by diffusers' names; unset is torch's own
    choice"""
    torch_compile: bool = option(False, incidental=True)
    """compile the trained network's repeated blocks: the first steps take minutes, unless they were
    compiled before (kept in ~/.cache/sd-dojo/compiled)"""

    def __post_init__(self) -> None:
        if self.torch_compile and self.activations_on_cpu:
            raise ValueError(
                "--activations_on_cpu does not go with --torch_compile: "
                "--gradient_checkpointing does"
            )
        attention.check_trains(self.attention_backend)


@dataclass(frozen=True, kw_only=True)
class TextArgs:
    """How captions become embeddings; a family adds what it has to choose from."""

    @property
    def dropout(self) -> Mapping[str, float]:
        """Share of training samples that go without the output of an encoder, by its name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class NoiseArgs:
    """The objective's options; a family adds its own."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The form of a result with every weight."""

    dtype: torch.dtype = field(default_factory=lambda: torch.float32)
    """of the trained network, and of the single file"""
    max_shard_size: str = "5GB"
    single_file: bool = False
    """also all of it as one file with the family's original names, where it has one"""
    largest_encoder: bool = True
    """with the largest text encoder in that file"""


class TextEncoders(Protocol):
    """The loaded encoders of a model: captions to what the network reads, on the CPU."""

    @property
    def trainable(self) -> list[Any]:
        """Those that may carry adapters; what is put in their place answers from then on."""
        ...

    def __call__(self, captions: Sequence[str]) -> Embeds: ...

    def said(self, captions: Sequence[str]) -> Embeds:
        """What each loaded encoder says by itself, under names that `joined` knows."""
        ...

    def joined(self, said: Mapping[str, Tensor]) -> Embeds:
        """The embeddings, of what all encoders said: moved, never computed with."""
        ...

    def refresh(self, cached: Mapping[str, Tensor], captions: Sequence[str]) -> Embeds:
        """Cached embeddings with the part of the trainable encoders as it is now."""
        ...

    def free_others(self) -> None:
        """Lets go of the encoders that are not trainable."""
        ...


@dataclass(frozen=True, kw_only=True)
class Model(ABC):
    """One opened model; see the family's package for what its methods do there."""

    name: ClassVar[str]
    """as titles call the family"""
    network_class: ClassVar[str]
    """the class of the trained network"""
    network_facts: ClassVar[NetworkFacts]
    """what adapters, freezing and files have to know of it"""
    text_encoders: ClassVar[tuple[str, ...]]
    """folders of the text encoders; what is told of a text comes in this order"""
    text_folders: ClassVar[tuple[str, ...]]
    """these and their tokenizers'"""
    embed_names: ClassVar[tuple[str, ...]]
    """the embeddings of a caption, by the name that the pipeline's call has for them"""

    sized: ClassVar[bool] = False
    """whether the network is told the pictures' sizes and crops"""
    rescales_guidance: ClassVar[bool] = False
    """whether the pipeline's call takes `guidance_rescale`"""

    args: ModelArgs
    folder: Path
    vae: dict[str, Any]
    """the autoencoder's configuration"""
    scheduler: dict[str, Any]
    """the scheduler's configuration"""
    text: TextArgs = field(default_factory=TextArgs)
    words: Words | None = None
    """new ones, which its CLIPs are taught as they are loaded"""

    # -- facts --------------------------------------------------------------------------------

    @property
    def part(self) -> str:
        """The trained network's name in a pipeline."""
        return self.network_facts.part

    @property
    def flag(self) -> str:
        """What the user named the folder with."""
        return FLAG

    @property
    def opens_in_diffusers(self) -> bool:
        """Whether diffusers' `from_pretrained` reads what the user named."""
        return True

    @property
    def title(self) -> str:
        """How a result calls this model: the family, or which of its models it is."""
        return self.name

    @property
    def pixels_per_latent(self) -> int:
        """8 for every known autoencoder of Stable Diffusion."""
        channels = self.vae["block_out_channels"]
        assert isinstance(channels, list | tuple)
        return 2 ** (len(channels) - 1)

    @property
    @abstractmethod
    def pixel_step(self) -> int:
        """Height and width of a picture must be multiples of this."""

    @property
    @abstractmethod
    def native_size(self) -> int:
        """Height and width, in pixels, that the model was trained at."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture.

        Raises:
            UserError: the model takes no such size.
        """

    def check_step(self, height: int, width: int) -> None:
        """Refuses sizes that the network cannot halve as often as it wants to.

        Raises:
            UserError: naming the nearest size.
        """
        for name, pixels in (("height", height), ("width", width)):
            if pixels % self.pixel_step:
                nearest = max(1, round(pixels / self.pixel_step)) * self.pixel_step
                raise UserError(
                    f"--{name} (or --resolution) {pixels} is not a multiple of {self.pixel_step}, "
                    f"which this model needs; the nearest is {nearest}"
                )

    def remark(self, height: int, width: int) -> str | None:
        """What a user should hear before training on pictures of a size that the model takes."""
        return None

    @property
    def needed(self) -> tuple[str, ...]:
        """Parts without whose weights nothing can be trained."""
        return ("vae", *self.text_encoders, self.part)

    def check_weights(self, parts: Sequence[str]) -> None:
        """Refuses, without reading any, a model that lacks the weights of a part.

        Raises:
            UserError: naming the part.
        """
        if published.has_no_weights(self.folder):  # a dry run does without
            return
        for part in parts:
            names = [path.name for path in (self.folder / part).glob("*")]
            if not any(name.endswith((".safetensors", ".bin")) for name in names):
                raise UserError(f"{self.flag}: {self.folder}/{part} holds no weights")

    def fingerprint(self, parts: Sequence[str]) -> str:
        """Identifies the model files that some parts (names of sub-folders) are loaded from."""
        return folders.fingerprint(self.folder, parts)

    # -- the objective ------------------------------------------------------------------------

    @abstractmethod
    def objective(self, size: tuple[int, int], args: Any = None) -> Objective:
        """What is learned on pictures of a size: levels, noise, target, weight.

        Args:
            size: height and width in pixels.
            args: the family's `NoiseArgs`; None is the model's own.
        """

    @abstractmethod
    def make_scheduler(self, objective: Objective) -> Any:
        """A scheduler of the model's own class that draws as the objective was trained."""

    # -- texts and conditions -----------------------------------------------------------------

    @property
    @abstractmethod
    def text_numbers(self) -> int:
        """Numbers in the embeddings of one caption."""

    @property
    @abstractmethod
    def text_lengths(self) -> Mapping[str, int]:
        """Tokens that each text encoder reads of a caption, by its folder."""

    @property
    def text_settings(self) -> dict[str, object]:
        """What the embeddings hang on besides the encoders' files and their precision."""
        return self.words.settings if self.words else {}

    @abstractmethod
    def load_text(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole: bool = True,
        only: str | None = None,
    ) -> TextEncoders:
        """The frozen text encoders, in `--text_encoder_precision`.

        Args:
            whole: False leaves those out that are not trainable.
            only: the one of `text_encoders` that is loaded; it can say, the others' part is joined.
        """

    def meta_encoder(self, part: str) -> nn.Module:
        """A text encoder on the meta device, without weights, of the class its folder names."""
        settings = transformers.AutoConfig.from_pretrained(self.folder / part)
        kind = getattr(transformers, (settings.architectures or ["CLIPTextModel"])[0])
        with torch.device("meta"):
            return kind(settings).eval()

    @abstractmethod
    def readers(self) -> list[Reader]:
        """The tokenizers and how much their encoders read, without the encoders."""

    def no_caption(self, embeds: Embeds, captions: Sequence[str]) -> Embeds:
        """The embeddings with what stands for no caption in the rows of empty ones."""
        return embeds

    def drop(self, embeds: Mapping[str, Tensor], dropped: Mapping[str, Tensor]) -> Embeds:
        """The embeddings without the output of single encoders.

        Args:
            dropped: by the names of `text.dropout`, bool [B]: whose output a sample goes without.
        """
        raise NotImplementedError(f"{self.name} drops no single encoder")

    def conditions(self, embeds: Embeds, geometry: Geometry | None) -> dict[str, Tensor]:
        """What the network reads beside latents and level.

        Args:
            geometry: of the rows' pictures; None where the model is not `sized`.
        """
        return embeds

    # -- networks -----------------------------------------------------------------------------

    @abstractmethod
    def load_network(
        self, dtype: torch.dtype, device: torch.device, *, prepare: Prepare | None = None
    ) -> Any:
        """The frozen network in `dtype`.

        Args:
            prepare: puts layers into it that store their weights in a way of their own.
        """

    @abstractmethod
    def load_vae(self, device: torch.device, *, checkpointing: bool = False) -> AutoencoderKL:
        """The frozen autoencoder in `--vae_dtype`.

        Args:
            checkpointing: recompute the decoder's activations when a gradient goes back through it.
        """

    @abstractmethod
    def predict(
        self,
        network: nn.Module,
        noisy: Tensor,
        level: Tensor,
        conditions: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """What the network says of `noisy` [B, C, h, w] at `level` [B].

        float32, whatever the network computes in.
        """

    @abstractmethod
    def scaled(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A draw from the autoencoder's posterior, as the network sees it: [B, C, h, w]."""

    @abstractmethod
    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Latents to pictures: float32 [B, 3, H, W] in [0, 1], differentiably."""

    # -- drawing ------------------------------------------------------------------------------

    @abstractmethod
    def load_pipeline(self, dtype: torch.dtype, device: torch.device, *, texts: bool = True) -> Any:
        """The whole model as it was, every part in `dtype`, with its own scheduler.

        Args:
            texts: with text encoders and tokenizers; without them it is given embeddings.
        """

    @abstractmethod
    def pipeline(self, network: Any, vae: AutoencoderKL, objective: Objective) -> Any:
        """A pipeline round a trained network, without text encoders: it is given embeddings."""

    @property
    def call_options(self) -> dict[str, Any]:
        """What the pipeline's call has to be told in any case."""
        return {}

    def step_noise(self, scheduler: Any, seed: int) -> AbstractContextManager[None]:
        """For a while, what noise the scheduler's steps draw hangs on `seed`."""
        return nullcontext()

    def why_no_skipping(
        self,
        layers: Sequence[int],
        *,
        guidance_scale: float,
        scale: float,
        num_steps: int,
        start: float,
        stop: float,
    ) -> str | None:
        """Why skip-layer guidance would change nothing; None where it works."""
        return f"has no effect: {self.name} has no skip-layer guidance"

    # -- writing ------------------------------------------------------------------------------

    @abstractmethod
    def finish(self, folder: Path, objective: Objective) -> None:
        """Writes what belongs beside weights of a training: in a checkpoint, or with a LoRA."""

    @abstractmethod
    def save_whole(self, folder: Path, network: Any, saving: Saving, objective: Objective) -> None:
        """Writes the whole pipeline, every component, so that one plain call loads the folder.

        Raises:
            TrainingStopped: the weights are too large for the precision.
        """

    # -- cost ---------------------------------------------------------------------------------

    @abstractmethod
    def meta_network(self) -> Any:
        """The network on the meta device, without weights."""

    @abstractmethod
    def meta_inputs(
        self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, level and conditions for `predict`, on the meta device."""

    def training_cost(
        self,
        dtype: torch.dtype,
        adapt: Callable[[nn.Module], object],
        rows: int,
        shape: tuple[int, int, int],
        *,
        checkpointing: bool,
    ) -> tuple[Any, cost.Cost]:
        """The network on the meta device as it will be trained, and what one micro-batch costs.

        Args:
            adapt: makes something in the frozen network trainable.
            rows: of the micro-batch.
            shape: [C, h, w] of its latents.
        """
        network = self.meta_network()
        noisy, level, conditions = self.meta_inputs(rows, shape, dtype)

        def loss() -> Tensor:
            if not any(param.requires_grad for param in network.parameters()):
                for value in conditions.values():  # what is trained lies before the network
                    value.requires_grad_(value.is_floating_point())
            return self.predict(network, noisy, level, conditions, dtype).mean()

        made = cost.training_cost(network, adapt, loss, dtype, checkpointing=checkpointing)
        return network, made

    def needs(self, dtype: torch.dtype, size: tuple[int, int], **more: Any) -> phases.Needs:
        """What a run holds beside its network, for the dry run.

        Args:
            dtype: of the text encoders.
            size: of the largest pictures.
            more: further fields of `phases.Needs`.
        Raises:
            UserError: weights are not there.
        """
        embedded = more.get("embedded", True)
        parts = [one for one in self.needed if embedded or one not in self.text_encoders]
        self.check_weights(parts)
        return phases.Needs(
            config=self,
            dtype=dtype,
            size=size,
            **{**needs_of(self.args), **more},
        )


def needs_of(args: ModelArgs) -> dict[str, Any]:
    """What the options say of the frozen parts: fields of `phases.Needs`."""
    packed = args.text_encoder_precision == "int8"
    return {
        "vae_dtype": dtype_of(args.vae_dtype),
        "text_on_cpu": args.text_encoder_device == "cpu",
        "text_bytes": int8.bytes_of if packed else phases.encoder_bytes,
        "tiling": args.enable_vae_tiling,
        "slicing": args.enable_vae_slicing,
    }
