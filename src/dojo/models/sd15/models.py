"""The UNet and the autoencoder: loading, predicted noise, latents to pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from dojo.models import folder as pipelines
from dojo.models import loaded
from dojo.models.folder import UNET
from dojo.models.sd15.config import Config, ModelArgs
from dojo.run import cost


def load_unet(
    config: Config, args: ModelArgs, dtype: torch.dtype, device: torch.device
) -> UNet2DConditionModel:
    """The frozen UNet in `dtype`."""
    unet = loaded.network(
        UNet2DConditionModel,
        *(config.folder, UNET),
        flag=config.flag,
        dtype=dtype,
        variant=args.variant,
    )
    unet.requires_grad_(False)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(device)


def load_vae(
    config: Config, args: ModelArgs, device: torch.device, *, checkpointing: bool = False
) -> AutoencoderKL:
    """The frozen autoencoder in `--vae_dtype`.

    Args:
        checkpointing: recompute the decoder's activations when a gradient goes back through it.
    """
    vae = loaded.network(
        AutoencoderKL,
        *(config.folder, "vae"),
        flag=config.flag,
        dtype=pipelines.DTYPES[args.vae_dtype],
        variant=args.variant,
    )
    if checkpointing:
        vae.enable_gradient_checkpointing()
    return vae.requires_grad_(False).eval().to(device)


def epsilon(
    unet: torch.nn.Module,
    noisy: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The noise that the network sees in `noisy` [B, C, h, w] at `timestep` (int64 [B]).

    float32, whatever the network computes in.
    """
    return unet(
        noisy.to(dtype),
        timestep,
        encoder_hidden_states=prompt_embeds.to(dtype),
        return_dict=False,
    )[0].float()


def decode(vae: AutoencoderKL, config: Config, latents: Tensor) -> Tensor:
    """Latents as the UNet sees them to pictures: float32 [B, 3, H, W] in [0, 1], differentiably."""
    return pipelines.decode(vae, latents, scale=config.scaling_factor)


def training_cost(
    config: Config,
    args: ModelArgs,
    dtype: torch.dtype,
    add_adapter: Callable[[torch.nn.Module], object],
    batch_size: int,
    latent_shape: tuple[int, int, int],
    *,
    checkpointing: bool,
) -> tuple[UNet2DConditionModel, cost.Cost]:
    """A UNet on the meta device as it will be trained, and what one micro-batch costs on it."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config.unet)

    def loss() -> Tensor:
        noisy = torch.empty(batch_size, *latent_shape, dtype=dtype, device="meta")
        rows = (batch_size, config.clip_tokens, config.unet["cross_attention_dim"])
        timestep = torch.empty(batch_size, dtype=torch.int64, device="meta")
        text = torch.empty(*rows, dtype=dtype, device="meta")
        return epsilon(unet, noisy, timestep, text, dtype).mean()

    return unet, cost.training_cost(unet, add_adapter, loss, dtype, checkpointing=checkpointing)
