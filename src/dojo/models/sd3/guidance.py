"""Skip-layer guidance (SD3.5): what diffusers' pipeline makes of its options."""

from __future__ import annotations

from collections.abc import Sequence


def why_no_skipping(
    layers: Sequence[int],
    num_layers: int,
    *,
    guidance_scale: float,
    scale: float,
    num_steps: int,
    start: float,
    stop: float,
) -> str | None:
    """Why skip-layer guidance would change nothing, or what is wrong with it; None if it works.

    Step i of N, from 0, skips the layers if start < i / N < stop: with few steps it may be none.
    """
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong:
        return f"{wrong[0]}: the model's layers are 0 to {num_layers - 1}"
    if guidance_scale <= 1:
        return "has no effect without guidance (guidance_scale above 1)"
    if scale == 0:
        return "has no effect with skip_layer_guidance_scale 0"
    if not any(num_steps * start < i < num_steps * stop for i in range(num_steps)):
        return (
            f"has no effect: with {num_steps} steps none lies between the fractions {start:g} and "
            f"{stop:g} (skip_layer_guidance_start and _stop)"
        )
    return None
