"""Stable Diffusion 1 behind the contract of `dojo.models.family`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from dojo.maths.objective import Diffusion, Objective
from dojo.models import family
from dojo.models.family import Saving
from dojo.models.sd15 import config, models, pipeline, text
from dojo.models.sd15.config import Config, ModelArgs
from dojo.models.sd15.folder import save_whole
from dojo.models.truncation import Reader


@dataclass(frozen=True, kw_only=True)
class Model(Config):
    """One opened Stable Diffusion 1: a diffusion whose noise is predicted, and its schedule."""

    # -- the objective ------------------------------------------------------------------------

    def objective(self, size: tuple[int, int], args: family.NoiseArgs | None = None) -> Diffusion:
        """The noise, at timesteps of the model's own schedule; the size changes nothing."""
        return Diffusion(schedule=self.schedule)

    def make_scheduler(self, objective: Objective) -> Any:
        """The model's own scheduler: training does not change it."""
        return pipeline.own_scheduler(self)

    # -- texts --------------------------------------------------------------------------------

    def load_text(
        self, dtype: torch.dtype, device: torch.device, *, whole: bool = True
    ) -> text.TextEncoder:
        """The frozen CLIP."""
        return text.load_text_encoder(self, dtype, device)

    def readers(self) -> list[Reader]:
        """CLIP's tokenizer."""
        return text.readers(self)

    # -- networks -----------------------------------------------------------------------------

    def load_network(self, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
        """The frozen UNet."""
        return models.load_unet(self, dtype, device)

    def load_vae(self, device: torch.device, *, checkpointing: bool = False) -> AutoencoderKL:
        """The frozen autoencoder."""
        return models.load_vae(self, device, checkpointing=checkpointing)

    def predict(
        self,
        network: nn.Module,
        noisy: Tensor,
        level: Tensor,
        conditions: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """The noise at a timestep."""
        return models.epsilon(network, noisy, level, **conditions, dtype=dtype)

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Latents to pictures."""
        return models.decode(vae, self, latents)

    # -- drawing ------------------------------------------------------------------------------

    def load_pipeline(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The whole pipeline, without safety checker."""
        return pipeline.load_pipeline(self, dtype, device)

    def pipeline(self, network: Any, vae: AutoencoderKL, objective: Objective) -> Any:
        """A pipeline with the model's own scheduler."""
        return pipeline.around(network, vae, self)

    # -- writing ------------------------------------------------------------------------------

    def finish(self, folder: Path, objective: Objective) -> None:
        """Nothing: the base model's scheduler is right."""

    def save_whole(self, folder: Path, network: Any, saving: Saving, objective: Objective) -> None:
        """Writes the whole pipeline."""
        save_whole(folder, network, self, saving)

    # -- cost ---------------------------------------------------------------------------------

    def meta_network(self) -> Any:
        """A UNet of this size."""
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(self.unet)

    def meta_inputs(
        self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, timestep and embeddings."""
        width = self.unet["cross_attention_dim"]
        noisy = torch.empty(rows, *shape, dtype=dtype, device="meta")
        timestep = torch.empty(rows, dtype=torch.int64, device="meta")
        embeds = torch.empty(rows, self.clip_tokens, width, dtype=dtype, device="meta")
        return noisy, timestep, {"prompt_embeds": embeds}


def open_model(args: ModelArgs, text: family.TextArgs | None = None) -> Model:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no SD1.
    """
    return config.read(Model, args, text or family.TextArgs())
