"""A model with a UNet behind the contract of `dojo.models.family`."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.lazy import diffusers, torch
from dojo.maths.objective import Diffusion, Objective
from dojo.models import compiling, folders, loaded, precisions
from dojo.models.family import Saving
from dojo.models.folders import UNET
from dojo.models.loaded import Prepare
from dojo.models.truncation import Reader
from dojo.models.unet import folder as folder_
from dojo.models.unet import networks, noise, pipeline, schedule, text
from dojo.models.unet.config import Config
from dojo.models.unet.noise import NoiseArgs

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Model(Config, ABC):
    """One opened model: a diffusion whose noise or v is predicted, and its schedule."""

    # -- the objective ------------------------------------------------------------------------

    def objective(self, size: tuple[int, int], args: NoiseArgs | None = None) -> Diffusion:
        """What is predicted at which timesteps; the size changes nothing."""
        return noise.objective(self.schedule, self.prediction_type, args)

    def make_scheduler(self, objective: Objective) -> Any:
        """The model's own scheduler, which says what the objective trains."""
        return schedule.own(schedule.trained(self.scheduler, objective))

    # -- texts --------------------------------------------------------------------------------

    def readers(self) -> list[Reader]:
        """The tokenizers of the CLIPs."""
        return text.readers(self)

    # -- networks -----------------------------------------------------------------------------

    def load_network(
        self, dtype: torch.dtype, device: torch.device, *, prepare: Prepare | None = None
    ) -> diffusers.UNet2DConditionModel:
        """The frozen UNet."""
        whole = partial(self.load_part, diffusers.UNet2DConditionModel, UNET, dtype)
        if prepare is None:
            unet = whole()
        else:
            folder = None if self.elsewhere(UNET) else self.folder
            unet = loaded.prepared(
                *(diffusers.UNet2DConditionModel, folder, UNET, whole, prepare),
                dtype=dtype,
                device=device,
                variant=self.args.variant,
                flag=self.flag,
            )
        unet.requires_grad_(False)
        if self.args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if self.args.torch_compile:
            compiling.compile_blocks(unet, self.network_facts)
        return unet.to(device)

    def load_vae(
        self, device: torch.device, *, checkpointing: bool = False
    ) -> diffusers.AutoencoderKL:
        """The frozen autoencoder."""
        vae = self.load_part(
            diffusers.AutoencoderKL, "vae", precisions.dtype_of(self.args.vae_dtype)
        )
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
        """The noise at a timestep, or v."""
        return networks.prediction(network, noisy, level, **conditions, dtype=dtype)

    def decode(self, vae: diffusers.AutoencoderKL, latents: Tensor) -> Tensor:
        """Latents to pictures."""
        return networks.decode(vae, self, latents)

    # -- drawing ------------------------------------------------------------------------------

    def load_pipeline(self, dtype: torch.dtype, device: torch.device, *, texts: bool = True) -> Any:
        """The whole pipeline, without safety checker."""
        return pipeline.load_pipeline(self, dtype, device, texts=texts)

    def pipeline(self, network: Any, vae: diffusers.AutoencoderKL, objective: Objective) -> Any:
        """A pipeline with the scheduler of the objective."""
        return pipeline.around(network, vae, self.make_scheduler(objective), self)

    # -- writing ------------------------------------------------------------------------------

    def finish(self, folder: Path, objective: Objective) -> None:
        """Writes the scheduler, where the base model's is not right any more."""
        schedule.save(folder, self.scheduler, objective)

    def save_whole(self, folder: Path, network: Any, saving: Saving, objective: Objective) -> None:
        """Writes the whole pipeline."""
        folder_.save_whole(folder, network, self, saving, objective)

    # -- cost ---------------------------------------------------------------------------------

    def meta_network(self) -> Any:
        """A UNet of this size."""
        with torch.device("meta"):
            return diffusers.UNet2DConditionModel.from_config(self.unet)

    def meta_inputs(
        self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, timestep and embeddings."""
        noisy = torch.empty(rows, *shape, dtype=dtype, device="meta")
        timestep = torch.empty(rows, dtype=torch.int64, device="meta")
        embeds = torch.empty(rows, self.text_tokens, self.text_width, dtype=dtype, device="meta")
        return noisy, timestep, {"prompt_embeds": embeds}
