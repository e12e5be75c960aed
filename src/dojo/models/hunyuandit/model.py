"""Hunyuan-DiT behind the contract of `dojo.models.family`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.lazy import diffusers, torch, transformers
from dojo.models import compiling, folders, loaded, precisions
from dojo.models.folders import TRANSFORMER
from dojo.models.hunyuandit import config, networks, text
from dojo.models.hunyuandit.config import (
    TEXT_ENCODERS,
    TEXT_FOLDERS,
    TOKENIZERS,
    TOKENS,
    Config,
    ModelArgs,
    TextArgs,
)
from dojo.models.unet import noise, schedule

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, HunyuanDiT2DModel
    from torch import Tensor, nn

    from dojo.data.geometry import Geometry
    from dojo.maths.objective import Diffusion, Objective
    from dojo.models.family import Saving
    from dojo.models.folders import Embeds
    from dojo.models.loaded import Prepare
    from dojo.models.truncation import Reader
    from dojo.models.unet.noise import NoiseArgs


@dataclass(frozen=True, kw_only=True)
class Model(Config):
    """One opened model: a diffusion whose v is predicted, and its version's schedule."""

    # -- the objective ------------------------------------------------------------------------

    def objective(self, size: tuple[int, int], args: NoiseArgs | None = None) -> Diffusion:
        """What is predicted at which timesteps; the size changes nothing."""
        return noise.objective(self.schedule, self.prediction_type, args)

    def make_scheduler(self, objective: Objective) -> Any:
        """The model's own scheduler, which says what the objective trains."""
        return schedule.own(schedule.trained(self.scheduler, objective))

    # -- texts and conditions -----------------------------------------------------------------

    def load_encoder(self, part: str, dtype: torch.dtype) -> Any:
        """A text encoder as it is, without what nothing reads of it."""
        kinds = (transformers.BertModel, transformers.T5EncoderModel)
        kind = kinds[TEXT_ENCODERS.index(part)]
        more = {"add_pooling_layer": False} if kind is transformers.BertModel else {}
        with _quiet():
            return self.load_part(kind, part, dtype, **more)

    def load_tokenizer(self, part: str, encoder: Any = None) -> Any:
        """A tokenizer, held against the encoder that reads its tokens, if that is there."""
        kinds = (transformers.BertTokenizer, transformers.T5Tokenizer)
        kind = kinds[TOKENIZERS.index(part)]
        with self.named():
            return loaded.tokenizer(kind, self.folder, part, flag=self.flag, encoder=encoder)

    def load_text(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole: bool = True,
        only: str | None = None,
    ) -> text.TextEncoders:
        """Both frozen encoders, or one."""
        return text.TextEncoders.load(self, dtype, device, only)

    def readers(self) -> list[Reader]:
        """The tokenizers of both."""
        return text.readers([self.load_tokenizer(part) for part in TOKENIZERS])

    def conditions(self, embeds: Embeds, geometry: Geometry | None) -> dict[str, Tensor]:
        """The embeddings, and for v1.0 and v1.1 `image_meta_size` float32 [B, 6].

        Width before height, as Tencent's training has it: in the file, trained, and of the crop's
        corner.
        """
        if not self.is_told_sizes:
            return embeds
        assert geometry is not None, "the rows of a model that is told sizes have a geometry"
        pairs = (geometry.original, geometry.target, geometry.crop)
        told = torch.cat([pair.flip(1) for pair in pairs], dim=1)
        return {**embeds, "image_meta_size": told.to(embeds["prompt_embeds"].device)}

    # -- networks -----------------------------------------------------------------------------

    def load_part(self, kind: Any, part: str, dtype: torch.dtype, **options: Any) -> Any:
        """A network of the model: every load of one goes through here.

        Args:
            options: for `from_pretrained`.
        Raises:
            UserError: it is damaged, incomplete, or other than its configuration.
        """
        if self.original is not None and part == TRANSFORMER:
            return self.original.load(dtype)
        settings = {"dtype": dtype, "variant": self.args.variant, **options}
        with self.named():
            return loaded.network(kind, self.folder, part, flag=self.flag, **settings)

    def named(self) -> AbstractContextManager[None]:
        """While a part is read: what is wrong with it is said of the user's folder."""
        return nullcontext() if self.original is None else self.original.named()

    def load_network(
        self, dtype: torch.dtype, device: torch.device, *, prepare: Prepare | None = None
    ) -> HunyuanDiT2DModel:
        """The frozen network."""
        kind = diffusers.HunyuanDiT2DModel
        whole = partial(self.load_part, kind, TRANSFORMER, dtype)
        if prepare is None:
            network = whole()
        else:
            network = loaded.prepared(
                *(kind, None if self.original else self.folder, TRANSFORMER, whole, prepare),
                dtype=dtype,
                device=device,
                variant=self.args.variant,
                flag=self.flag,
            )
        networks.ready(network).requires_grad_(False)
        if self.args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if self.args.torch_compile:
            compiling.compile_blocks(network, self.network_facts)
        return network.to(device)

    def load_vae(self, device: torch.device, *, checkpointing: bool = False) -> AutoencoderKL:
        """The frozen autoencoder."""
        dtype = precisions.dtype_of(self.args.vae_dtype)
        vae = self.load_part(diffusers.AutoencoderKL, "vae", dtype)
        if checkpointing:
            vae.enable_gradient_checkpointing()
        return folders.frugal(vae, self.args).requires_grad_(False).eval().to(device)

    def predict(
        self,
        network: nn.Module,
        noisy: Tensor,
        level: Tensor,
        conditions: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """v at a timestep."""
        return networks.prediction(network, self.transformer, noisy, level, dtype, **conditions)

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Latents to pictures."""
        return folders.decode(vae, latents, scale=self.scaling_factor)

    # -- drawing ------------------------------------------------------------------------------

    def load_pipeline(self, dtype: torch.dtype, device: torch.device, *, texts: bool = True) -> Any:
        """The whole pipeline, of either layout, without safety checker."""
        from dojo.models.hunyuandit import pipeline

        parts: dict[str, Any] = {}
        if texts:
            parts = {part: self.load_encoder(part, dtype) for part in TEXT_ENCODERS}
            for part, encoder in zip(TOKENIZERS, [*parts.values()], strict=True):
                parts[part] = self.load_tokenizer(part, encoder)
        vae = self.load_part(diffusers.AutoencoderKL, "vae", dtype)
        network = self.load_part(diffusers.HunyuanDiT2DModel, TRANSFORMER, dtype)
        folders.frugal(vae, self.args)
        made = pipeline.around(network, vae, schedule.own(self.scheduler), **parts)
        return made.to(device)

    def pipeline(self, network: Any, vae: AutoencoderKL, objective: Objective) -> Any:
        """A pipeline with the scheduler of the objective."""
        from dojo.models.hunyuandit import pipeline

        return pipeline.around(network, vae, self.make_scheduler(objective))

    @property
    def call_options(self) -> dict[str, Any]:
        """diffusers' own pipeline would draw the nearest of ten sizes."""
        return {"use_resolution_binning": False}

    # -- writing ------------------------------------------------------------------------------

    def finish(self, folder: Path, objective: Objective) -> None:
        """Writes the scheduler, where the base model's is not right any more."""
        schedule.save(folder, self.scheduler, objective)

    def save_whole(self, folder: Path, network: Any, saving: Saving, objective: Objective) -> None:
        """Writes the whole pipeline in diffusers' layout."""

        def load(part: str) -> Any:
            if part in TEXT_ENCODERS:
                return self.load_encoder(part, torch.float32)
            if part in TOKENIZERS:
                return self.load_tokenizer(part)
            return self.load_part(diffusers.AutoencoderKL, part, torch.float32)

        folders.save_network(folder, network, self.part, saving.dtype, saving.max_shard_size)
        kind = schedule.save(folder, self.scheduler, objective)
        copied = () if kind else ("scheduler",)
        parts = ("vae", *copied, *TEXT_FOLDERS)
        index = folders.copy_parts(self.folder, folder, parts, self.args.variant, load)
        if kind:
            index["scheduler"] = ["diffusers", kind]
        kept = (self.part, "scheduler", *parts)
        folders.write_index(folder, config.with_parts(index, kept))

    # -- cost ---------------------------------------------------------------------------------

    def meta_network(self) -> Any:
        """A network of this size."""
        return networks.empty(self.transformer)

    def meta_inputs(
        self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, timestep, embeddings, masks and sizes."""
        sizes = self.transformer

        def empty(*dims: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(rows, *dims, dtype=kind, device="meta")

        conditions: dict[str, Tensor] = {
            "prompt_embeds": empty(TOKENS["text_encoder"], sizes["cross_attention_dim"]),
            "prompt_attention_mask": empty(TOKENS["text_encoder"], kind=torch.int64),
            "prompt_embeds_2": empty(TOKENS["text_encoder_2"], sizes["cross_attention_dim_t5"]),
            "prompt_attention_mask_2": empty(TOKENS["text_encoder_2"], kind=torch.int64),
        }
        if self.is_told_sizes:
            conditions["image_meta_size"] = empty(6, kind=torch.float32)
        return empty(*shape), empty(kind=torch.int64), conditions


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' list of what an encoder leaves aside: `loaded` looks at it."""
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)


def drawing(pipeline: Any) -> Any:
    """A pipeline of diffusers' as it has to be called, with adapters that it can switch."""
    from dojo.models.hunyuandit import pipeline as own

    return own.HunyuanDiTPipeline(**pipeline.components, requires_safety_checker=False)


def open_model(args: ModelArgs, text: TextArgs | None = None) -> Model:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no Hunyuan-DiT.
    """
    return config.read(Model, args, text or TextArgs())
