"""Pictures as a model's own pipeline draws them: its scheduler's steps, and the noise of a seed.

An evaluation shows what a user of the result will see: the picture of a seed here is that of
`demo.py` and of every diffusers pipeline with that seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from dojo.lazy import no_grad, torch

Predict: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""(latents float32 [B, ...], timesteps [B]) -> what the network says of them, guided, float32"""
Look: TypeAlias = "Callable[[Any, int, torch.Tensor], None]"
"""(the scheduler, number of a step, latents after it): looks and changes nothing"""


@no_grad
def sample(
    predict: Predict,
    shape: Sequence[int],
    seeds: Sequence[int],
    scheduler: Any,
    steps: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    look: Look | None = None,
) -> torch.Tensor:
    """Latents of finished pictures, float32 [B, *shape].

    Each picture has a generator of its own, on the CPU whatever the device, so that it depends
    neither on its batch nor on the machine (up to rounding).

    Args:
        seeds: one per picture.
        scheduler: a diffusers scheduler; left as it is.
        steps: `num_inference_steps`.
        dtype: the pipeline's precision, in which it draws the first noise.
        look: is shown every step.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Drawn in it: torch 2.11 has other numbers in bfloat16 than in float32, 2.14 those rounded.
    noise = torch.stack([torch.randn(*shape, generator=own, dtype=dtype) for own in generators])
    latents = noise.float().to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    # What a pipeline hands on: ancestral schedulers draw more noise, DDIM's takes none at eta 0.
    own = {"generator": generators, "eta": 0.0}
    accepted = inspect.signature(scheduler.step).parameters
    further = {name: value for name, value in own.items() if name in accepted}
    for step, timestep in enumerate(scheduler.timesteps):
        seen = latents
        if hasattr(scheduler, "scale_model_input"):
            seen = scheduler.scale_model_input(latents, timestep)
        predicted = predict(seen, timestep.expand(len(latents)))
        latents = scheduler.step(predicted, timestep, latents, return_dict=False, **further)[0]
        if look is not None:
            look(scheduler, step, latents)
    return latents
