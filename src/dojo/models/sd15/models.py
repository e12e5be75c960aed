"""The UNet and the autoencoder: loading, predicted noise, latents to pictures."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from dojo.models import folders, loaded
from dojo.models.folders import UNET
from dojo.models.sd15.config import Config


def load_unet(config: Config, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """The frozen UNet in `dtype`."""
    unet = loaded.network(
        UNet2DConditionModel,
        *(config.folder, UNET),
        flag=config.flag,
        dtype=dtype,
        variant=config.args.variant,
    )
    unet.requires_grad_(False)
    if config.args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(device)


def load_vae(config: Config, device: torch.device, *, checkpointing: bool = False) -> AutoencoderKL:
    """The frozen autoencoder in `--vae_dtype`.

    Args:
        checkpointing: recompute the decoder's activations when a gradient goes back through it.
    """
    vae = loaded.network(
        AutoencoderKL,
        *(config.folder, "vae"),
        flag=config.flag,
        dtype=folders.DTYPES[config.args.vae_dtype],
        variant=config.args.variant,
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
    return folders.decode(vae, latents, scale=config.scaling_factor)
