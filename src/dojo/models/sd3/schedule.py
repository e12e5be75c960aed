"""What a scheduler's configuration says of the rectified flow: its shift, and noise of its own.

FlowMatchEuler and its kin call the shift `shift`; DPMSolver, UniPC and others follow a flow with
`use_flow_sigmas`, and call it `flow_shift`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dojo import rng
from dojo.cli import UserError
from dojo.lazy import diffusers, torch

_DEFAULT = "FlowMatchEulerDiscreteScheduler"
_STEPS = 28  # SD3's own number
_CLEAN = 0.02  # of the noise may be left: DPMSolver's final_sigmas_type sigma_min leaves half of it


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration with its class, which one that was never saved does not say."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def shift_name(config: Mapping[str, Any]) -> str | None:
    """What a scheduler's configuration calls the shift; None if it follows no rectified flow."""
    if str(config.get("_class_name", _DEFAULT)).startswith("FlowMatch"):
        return "shift"
    flows = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    return "flow_shift" if flows else None


def check_flow(config: Mapping[str, Any], where: str) -> None:
    """Refuses a scheduler that SD3 cannot be drawn with.

    With `use_flow_sigmas` not every class of diffusers ends at a clean picture (0.42.1: DEIS and
    SA-Solver leave the last sigma, 0.1 of the noise at 28 steps), and with some grids (Karras' and
    others) most take sigmas of up to 157 for the flow's. So it is asked for its sigmas.

    Raises:
        UserError: naming its class.
    """
    kind = str(config.get("_class_name", _DEFAULT))
    if shift_name(config) is None or kind not in dir(diffusers):
        raise UserError(
            f"{where}: its scheduler, a {kind}, follows no rectified flow (a FlowMatch... does, or "
            "one with use_flow_sigmas true and prediction_type flow_prediction)"
        )
    if shift_name(config) == "shift":
        return
    scheduler = with_shift(config, own_shift(config))
    scheduler.set_timesteps(_STEPS)
    first, last = float(scheduler.sigmas.max()), float(scheduler.sigmas[-1])
    if first > 1 + 1e-3 or last > _CLEAN:
        raise UserError(
            f"{where}: its scheduler, a {kind}, goes from sigma {first:.3g} to {last:.2g} in "
            f"{_STEPS} steps, and a rectified flow goes from 1 to 0: draw with a "
            "FlowMatchEulerDiscreteScheduler, or with UniPC or DPMSolverMultistep without a grid "
            "of their own (use_karras_sigmas and the like)"
        )


def own_shift(config: Mapping[str, Any]) -> float:
    """The shift of sigma that a scheduler's configuration says; 1 if it says none."""
    return float(config.get(shift_name(config) or "shift", 1.0))


def with_shift(config: Mapping[str, Any], shift: float) -> Any:
    """The scheduler of a configuration, of its own class, with another shift."""
    kind: Any = getattr(diffusers, str(config.get("_class_name", _DEFAULT)))
    return kind.from_config({**config, shift_name(config) or "shift": shift})


def draws_noise(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's steps add noise, which SD3's pipeline leaves to torch's generator."""
    kind = str(config.get("_class_name", _DEFAULT))
    return (
        bool(config.get("stochastic_sampling"))
        or kind in ("FlowMatchLCMScheduler", "SASolverScheduler")
        or str(config.get("algorithm_type", "")).startswith("sde-")
    )


@contextmanager
def step_noise(seed: int) -> Iterator[None]:
    """For a while the noise of the scheduler's steps hangs on `seed`; afterwards all is as before.

    Under another stream than the seed's own: else the first step's noise were the latents.
    """
    with torch.random.fork_rng():
        rng.seed_global("step noise", seed)
        yield
