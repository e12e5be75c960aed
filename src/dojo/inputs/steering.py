"""How prompts steer a network: their embeddings, and guidance where it is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dojo.inputs.texts import Texts
from dojo.maths import denoising
from dojo.maths import transitions as samplers
from dojo.models import sd15


def predictor(
    unet: nn.Module,
    texts: Texts,
    prompts: Sequence[str],
    dtype: torch.dtype,
    *,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
) -> denoising.Epsilon:
    """The network's noise for B prompts, with guidance where the scale is above 1."""
    embeds = texts(prompts)["prompt_embeds"]  # [B, T, D]

    def plain(latents: Tensor, timestep: Tensor) -> Tensor:
        return sd15.epsilon(unet, latents, timestep, embeds, dtype)

    if guidance_scale == 1:
        return plain
    both = torch.cat([texts([negative_prompt] * len(prompts))["prompt_embeds"], embeds])

    def guided(latents: Tensor, timestep: Tensor) -> Tensor:
        twice = torch.cat([latents, latents]), torch.cat([timestep, timestep])
        unconditional, conditional = sd15.epsilon(unet, *twice, both, dtype).chunk(2)
        return samplers.guided(conditional, unconditional, guidance_scale)

    return guided
