"""Stable Diffusion 3 and 3.5 behind the contract of `dojo.models.family`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dojo.lazy import diffusers, torch
from dojo.maths.objective import Flow, Objective
from dojo.models import folders
from dojo.models.family import Saving
from dojo.models.folders import Embeds
from dojo.models.loaded import Prepare
from dojo.models.sd3 import config, guidance, models, pipeline, schedule, text
from dojo.models.sd3.config import Config, ModelArgs, NoiseArgs, TextArgs
from dojo.models.sd3.folder import save_scheduler, save_whole
from dojo.models.truncation import Reader

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Model(Config):
    """One opened Stable Diffusion 3: a flow, whose shift goes with the weights."""

    # -- the objective ------------------------------------------------------------------------

    def objective(self, size: tuple[int, int], args: NoiseArgs | None = None) -> Flow:
        """The flow with the density and the shift of `args`."""
        args = args or NoiseArgs()
        return Flow(
            weighting_scheme=args.weighting_scheme,
            shift=self.shift(args.flow_shift, *size),
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
            precondition_outputs=args.precondition_outputs,
        )

    def make_scheduler(self, objective: Objective) -> Any:
        """The model's scheduler with the shift of the objective."""
        return self.with_shift(_shift(objective))

    # -- texts --------------------------------------------------------------------------------

    @property
    def text_settings(self) -> dict[str, object]:
        """How long T5's part is, and how it is padded."""
        return {
            **super().text_settings,
            "max_sequence_length": self.args.max_sequence_length,
            "t5_padding": self.text.t5_padding,
        }

    def load_text(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole: bool = True,
        only: str | None = None,
    ) -> text.TextEncoders:
        """The three frozen encoders, the two CLIPs, or one of the three."""
        return text.TextEncoders.load(self, dtype, device, with_t5=whole, only=only)

    def readers(self) -> list[Reader]:
        """CLIP's tokenizers and T5's."""
        return text.readers(self)

    def no_caption(self, embeds: Embeds, captions: Sequence[str]) -> Embeds:
        """As `--uncond` says: the embeddings of "", or zeros."""
        if self.text.uncond != "zeros":
            return embeds
        return folders.zeros_for_empty(embeds, captions)

    @cached_property
    def layout(self) -> text.Layout:
        """Where each encoder's numbers lie in the embeddings."""
        return text.Layout.of(self)

    def drop(self, embeds: Mapping[str, Tensor], dropped: Mapping[str, Tensor]) -> Embeds:
        """Zeros in place of single encoders' outputs."""
        return self.layout.drop(embeds, dropped)

    # -- networks -----------------------------------------------------------------------------

    def load_network(
        self, dtype: torch.dtype, device: torch.device, *, prepare: Prepare | None = None
    ) -> diffusers.SD3Transformer2DModel:
        """The frozen MMDiT."""
        return models.load_transformer(self, dtype, device, prepare)

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
        """The velocity at sigma."""
        return models.velocity(network, noisy, level, **conditions, dtype=dtype)

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Latents to pictures."""
        return models.decode(vae, self, latents)

    # -- drawing ------------------------------------------------------------------------------

    def load_pipeline(self, dtype: torch.dtype, device: torch.device, *, texts: bool = True) -> Any:
        """The whole pipeline."""
        return pipeline.load_pipeline(self, dtype, device, texts=texts)

    def pipeline(self, network: Any, vae: AutoencoderKL, objective: Objective) -> Any:
        """A pipeline with the objective's shift."""
        return pipeline.around(network, vae, self, _shift(objective))

    def step_noise(self, scheduler: Any, seed: int) -> AbstractContextManager[None]:
        """SD3's pipeline leaves the noise of steps to torch's generator."""
        noisy = schedule.draws_noise(schedule.scheduler_config(scheduler))
        return schedule.step_noise(seed) if noisy else nullcontext()

    def why_no_skipping(self, layers: Sequence[int], **settings: Any) -> str | None:
        """See `guidance.why_no_skipping`."""
        return guidance.why_no_skipping(layers, self.transformer["num_layers"], **settings)

    # -- writing ------------------------------------------------------------------------------

    def finish(self, folder: Path, objective: Objective) -> None:
        """Writes the scheduler with the training's shift."""
        save_scheduler(folder, self, _shift(objective))

    def save_whole(self, folder: Path, network: Any, saving: Saving, objective: Objective) -> None:
        """Writes the whole pipeline, and one file with the original names where it is wanted."""
        save_whole(folder, network, self, saving, _shift(objective))

    # -- cost ---------------------------------------------------------------------------------

    def meta_network(self) -> Any:
        """An MMDiT of this size."""
        with torch.device("meta"):
            return diffusers.SD3Transformer2DModel.from_config(self.transformer)

    def meta_inputs(
        self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, sigma and embeddings."""

        def empty(*sizes: int) -> Tensor:
            return torch.empty(rows, *sizes, dtype=dtype, device="meta")

        tokens = self.clip_tokens + self.args.max_sequence_length
        conditions = {
            "prompt_embeds": empty(tokens, self.transformer["joint_attention_dim"]),
            "pooled_prompt_embeds": empty(self.transformer["pooled_projection_dim"]),
        }
        return empty(*shape), torch.empty(rows, device="meta"), conditions


def _shift(objective: Objective) -> float:
    """The shift of sigma that was trained with."""
    assert isinstance(objective, Flow)
    return objective.shift


def open_model(args: ModelArgs, text: TextArgs | None = None) -> Model:
    """Finds the model's folder (downloading a hub id) and reads its configurations.

    Raises:
        UserError: there is no such folder, file or hub repository, or it holds no SD3.
    """
    return config.read(Model, args, text or TextArgs())
