"""How prompts steer a network: their embeddings, and guidance where it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from dojo.data import Geometry
from dojo.inputs.texts import Texts
from dojo.lazy import torch
from dojo.maths import transitions
from dojo.models.family import Model
from dojo.models.folders import Embeds

if TYPE_CHECKING:
    from torch import nn

Predictor: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""(latents [B, C, h, w], levels [B]) -> what the network says of them, guided: float32"""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """What a network is asked besides latents and levels."""

    model: Model
    texts: Texts
    size: tuple[int, int]
    """height and width of the pictures in pixels"""
    dtype: torch.dtype
    """that the network computes in"""
    guidance_scale: float = 1.0
    """of classifier-free guidance; 1 is none"""
    negative_prompt: str = ""
    """what guidance leads away from"""

    def embeds(self, prompts: Sequence[str]) -> Embeds:
        """What the network reads: with guidance the negative prompt's B rows, then the prompts'."""
        embeds = self.texts(prompts)
        if self.guidance_scale == 1:
            return embeds
        negative = self.texts([self.negative_prompt])
        return {
            name: torch.cat([negative[name].expand_as(value), value])
            for name, value in embeds.items()
        }

    def predictor(
        self, network: nn.Module, embeds: Embeds, geometry: Geometry | None = None
    ) -> Predictor:
        """What the network says, both branches of guidance in one batch.

        Args:
            geometry: of the pictures, for a model that is told; unset: they are drawn, whole. Only
                without guidance.
        """
        rows = len(next(iter(embeds.values())))

        def plain(latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            # Fewer latents than prompts: pictures of one prompt that have not parted yet.
            own = {name: value[:: rows // len(latents)] for name, value in embeds.items()}
            known = geometry
            if known is None and self.model.sized:
                known = Geometry.whole(self.size, len(latents))
            conditions = self.model.conditions(own, known)
            return self.model.predict(network, latents, level, conditions, self.dtype)

        def guided(latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            both = plain(torch.cat([latents, latents]), torch.cat([level, level]))
            unconditional, conditional = both.chunk(2)
            return transitions.guided(conditional, unconditional, self.guidance_scale)

        return plain if self.guidance_scale == 1 else guided

    def __call__(
        self, network: nn.Module, prompts: Sequence[str], geometry: Geometry | None = None
    ) -> Predictor:
        """What the network says for these prompts; see `predictor`."""
        return self.predictor(network, self.embeds(prompts), geometry)
