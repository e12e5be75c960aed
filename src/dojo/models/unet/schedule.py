"""What a scheduler's configuration says of the training: what is predicted, and how it ends.

A result that is drawn with another one shows noise, or grey.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dojo.files import outputs
from dojo.lazy import diffusers
from dojo.maths.objective import Diffusion, Objective

# What of a configuration the weights hang on.
_TRAINED = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
_DARK = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# For classes without zero terminal SNR, such as PNDM: of DDIM, what its usual values would spoil.
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}


def own(config: Mapping[str, Any]) -> Any:
    """The scheduler of a configuration, of its own class."""
    # A scheduler's own configuration lists what it left to its class, and `from_config` passes over
    # whatever stands there since.
    settings = {name: value for name, value in config.items() if name != "_use_default_values"}
    return getattr(diffusers, str(config["_class_name"])).from_config(settings)


def trained(config: Mapping[str, Any], objective: Objective) -> dict[str, Any]:
    """The configuration with which weights are drawn that an objective has trained.

    It is the model's own where training changed nothing of it. Where the signal ends, timesteps are
    spaced from the last one on (`trailing`), since the picture begins there (Lin et al. 2023,
    arXiv:2305.08891, Section 3.3); a class that knows no such schedule gives way to DDIM.

    Args:
        config: the model's own.
    """
    assert isinstance(objective, Diffusion)
    now = dict(config)
    if config.get("prediction_type", "epsilon") != objective.prediction_type:
        now["prediction_type"] = objective.prediction_type
    if objective.schedule.ends_without_signal and not config.get("rescale_betas_zero_snr"):
        now = _of_a_class_that_knows(now, "rescale_betas_zero_snr") | _DARK
    return now


def able(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it is, or for DDIM where its own class passes over zero terminal SNR."""
    if not config.get("rescale_betas_zero_snr"):
        return dict(config)
    return _of_a_class_that_knows(config, "rescale_betas_zero_snr")


def save(folder: Path, config: Mapping[str, Any], objective: Objective) -> str | None:
    """Writes `scheduler/` where training made the model's own wrong, and returns its class.

    Where it did not, nothing is written and None returned.

    Args:
        folder: of a result or a checkpoint.
        config: the model's own.
    """
    settings = trained(config, objective)
    if settings == config:
        outputs.clear(folder / "scheduler")
        return None
    outputs.fill(folder / "scheduler", own(settings).save_pretrained)
    return str(settings["_class_name"])


def taken_over(config: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of any class, with what another one says of how weights were trained.

    Args:
        config: of the pipeline that the weights come into.
        saved: what lies beside the weights.
    """
    said = {name: saved[name] for name in _TRAINED if name in saved}
    if said.get("rescale_betas_zero_snr"):
        config = _of_a_class_that_knows(config, "rescale_betas_zero_snr")
    return {**config, **said}


def _of_a_class_that_knows(config: Mapping[str, Any], option: str) -> dict[str, Any]:
    """The configuration, for DDIM if its own class does not have an option."""
    if option in _options(str(config["_class_name"])):
        return dict(config)
    known = _options(_DDIM["_class_name"])
    return {k: v for k, v in config.items() if k in known or k.startswith("_")} | _DDIM


def _options(kind: Any) -> Mapping[str, Any]:
    return inspect.signature(getattr(diffusers, kind).__init__).parameters
