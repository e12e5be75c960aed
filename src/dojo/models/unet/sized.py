"""What SDXL and Kolors share: a UNet that is told sizes, crops and a pooled embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dojo.cli import UserError
from dojo.data.geometry import Geometry
from dojo.lazy import torch
from dojo.models import folders
from dojo.models.folders import FLAG, UNET, Embeds
from dojo.models.unet import autoencoder, config, model, sizes
from dojo.models.unet.sizes import MicroConditioning

if TYPE_CHECKING:
    from torch import Tensor

EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")  # [B, T, D] and [B, P]

_SMALL = 0.5  # of the native area: 768 of 1024 pixels a side are above


@dataclass(frozen=True, kw_only=True)
class ModelArgs(config.ModelArgs):
    """The model that is trained."""

    micro_conditioning: MicroConditioning = "file"
    """what the UNet is told of a picture beside the size that is trained: file is its size in the
    file and the crop, as SDXL was trained; resized is its size when resized, and the crop; constant
    is nothing, as if it had been of the trained size"""
    vae_fits_fp16: bool = False
    """with one file as pretrained_vae_model_name_or_path: it does not overflow in --vae_dtype fp16,
    as sdxl-vae-fp16-fix does not, which a file by itself does not say"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae_fits_fp16 and self.pretrained_vae_model_name_or_path is None:
            raise ValueError(
                f"--vae_fits_fp16 is said of an autoencoder that is given as {autoencoder.FLAG}"
            )

    @property
    def vae_is_said_to_fit(self) -> bool:
        """Whether the user says so."""
        return self.vae_fits_fp16


@dataclass(frozen=True, kw_only=True)
class Config(config.Config, ABC):
    """What is known of such a model without its weights."""

    embed_names = EMBEDS
    sized = True
    reads = "text_time"

    args: ModelArgs

    @property
    @abstractmethod
    def pooled_width(self) -> int:
        """P: numbers in the pooled embedding of a caption."""

    @property
    @abstractmethod
    def given_width(self) -> int:
        """Numbers of a token that the text encoders give."""

    @property
    def text_numbers(self) -> int:
        """Numbers in the embeddings of one caption."""
        return super().text_numbers + self.pooled_width

    def remark(self, height: int, width: int) -> str | None:
        """Says that pictures are far smaller than the model's."""
        share = height * width / self.native_size**2
        if share >= _SMALL:
            return None
        return (
            f"pictures of {width} x {height} have {share:.0%} of the area that this model was "
            f"trained at ({self.native_size} x {self.native_size}): expect artifacts"
        )

    def check(self) -> None:
        """See `unet.Config`."""
        super().check()
        self.check_width(self.given_width)
        where = f"{FLAG}: {self.folder}/{UNET}/config.json"
        width, reads = folders.whole_numbers(
            self.unet, where, "addition_time_embed_dim", "projection_class_embeddings_input_dim"
        )
        if reads != self.pooled_width + sizes.COUNT * width:
            raise UserError(
                f"{FLAG}: {self.folder} does not fit together: the UNet reads {reads} numbers of "
                f"text and sizes (projection_class_embeddings_input_dim), which are "
                f"{self.pooled_width} pooled ones and {sizes.COUNT} x {width} for the sizes"
            )
        if self.vae.get("latents_mean") is not None:
            raise UserError(
                f"{FLAG}: the latents of {self.folder} have a mean of their own (latents_mean), "
                f"which no {self.name}'s have"
            )
        if self.args.vae_dtype == "fp16" and self.vae.get("force_upcast", True):
            raise UserError(
                "--vae_dtype fp16: the autoencoder overflows in it (its config.json says "
                f"force_upcast); take bf16, or give {autoencoder.FLAG} the folder or hub id of "
                "one that does not, such as madebyollin/sdxl-vae-fp16-fix (of one file, which does "
                "not say it, say --vae_fits_fp16)"
            )


@dataclass(frozen=True, kw_only=True)
class Model(Config, model.Model):
    """One opened model whose network is told sizes and crops."""

    def conditions(self, embeds: Embeds, geometry: Geometry | None) -> dict[str, Tensor]:
        """The embeddings, and `time_ids` float32 [B, 6]."""
        assert geometry is not None, "the rows of a model that is told sizes have a geometry"
        told = sizes.time_ids(geometry, self.args.micro_conditioning)
        return {**embeds, "time_ids": told.to(embeds["prompt_embeds"].device)}

    def meta_inputs(
        self, rows: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, timestep, embeddings and sizes."""
        noisy, timestep, conditions = super().meta_inputs(rows, shape, dtype)
        pooled = torch.empty(rows, self.pooled_width, dtype=dtype, device="meta")
        told = torch.empty(rows, sizes.COUNT, device="meta")
        return noisy, timestep, {**conditions, "pooled_prompt_embeds": pooled, "time_ids": told}
