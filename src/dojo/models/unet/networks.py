"""A prediction of the UNet, and latents to pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dojo.models import folders
from dojo.models.unet.config import Config

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from torch import Tensor


def prediction(
    unet: torch.nn.Module,
    noisy: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    dtype: torch.dtype,
    *,
    pooled_prompt_embeds: Tensor | None = None,
    time_ids: Tensor | None = None,
) -> Tensor:
    """The noise (or v) that the network sees in `noisy` [B, C, h, w] at `timestep` (int64 [B]).

    float32, whatever the network computes in.

    Args:
        prompt_embeds: of the captions, [B, T, D].
        pooled_prompt_embeds: [B, P], where the network reads them (SDXL, Kolors).
        time_ids: sizes and offsets in pixels [B, 6], the same. They stay float32: bfloat16 would
            make 1024 of 1023, and the network's sines of them are computed in float32.
    """
    added = None
    if pooled_prompt_embeds is not None and time_ids is not None:
        added = {"text_embeds": pooled_prompt_embeds.to(dtype), "time_ids": time_ids.float()}
    return unet(
        noisy.to(dtype),
        timestep,
        encoder_hidden_states=prompt_embeds.to(dtype),
        **({} if added is None else {"added_cond_kwargs": added}),
        return_dict=False,
    )[0].float()


def decode(vae: AutoencoderKL, config: Config, latents: Tensor) -> Tensor:
    """Latents as the UNet sees them to pictures: float32 [B, 3, H, W] in [0, 1], differentiably."""
    return folders.decode(vae, latents, scale=config.scaling_factor)
