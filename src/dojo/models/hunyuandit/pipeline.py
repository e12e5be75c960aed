"""diffusers' pipeline, as it has to be called, and with adapters that it can switch.

It is imported when something is drawn: its class derives from one of diffusers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import diffusers
from peft.tuners.tuners_utils import BaseTunerLayer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class HunyuanDiTPipeline(diffusers.HunyuanDiTPipeline):
    """Draws the size that it is asked for, and tells it in training's order.

    diffusers' own draws the nearest of ten sizes. It tells a network that is told sizes the height
    before the width, where Tencent trains and draws with the width first. And it has none of the
    methods by which other pipelines switch adapters.
    """

    @wraps(diffusers.HunyuanDiTPipeline.__call__)
    def __call__(self, *given: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `diffusers.HunyuanDiTPipeline`."""
        native = self.default_sample_size * self.vae_scale_factor
        size = [(options.get(name) or native) // 16 * 16 for name in ("width", "height")]
        told = {"use_resolution_binning": False, "target_size": tuple(size)}
        return super().__call__(*given, **{**told, **options})

    def _layers(self) -> Iterator[Any]:
        modules = self.transformer.modules()
        return (module for module in modules if isinstance(module, BaseTunerLayer))

    def set_adapters(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Makes adapters active, each at a strength."""
        for layer in self._layers():
            for name, weight in zip(names, weights, strict=True):
                layer.set_scale(name, weight)
            layer.set_adapter(list(names))

    def disable_lora(self) -> None:
        """Draws without adapters from here on."""
        for layer in self._layers():
            layer.enable_adapters(False)

    def enable_lora(self) -> None:
        """Draws with the active ones again."""
        for layer in self._layers():
            layer.enable_adapters(True)


def around(
    transformer: Any, vae: AutoencoderKL, scheduler: Any, **texts: Any
) -> HunyuanDiTPipeline:
    """A pipeline; without text encoders it is given embeddings."""
    absent: Any = None
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"), absent)
    return HunyuanDiTPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        safety_checker=absent,
        feature_extractor=absent,
        requires_safety_checker=False,
        **{**parts, **texts},
    )
