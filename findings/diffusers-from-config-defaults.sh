#!/usr/bin/env bash
# diffusers converts a scheduler in memory to another noise schedule than the same one saved.
#
# OtherScheduler.from_config(pipeline.scheduler.config) is how diffusers' guides change the sampler.
# One would guess that the new scheduler keeps the noise schedule that the model was trained with,
# and that saving the pipeline and loading it again first makes no difference.
#
# What happens: a value that nobody gave is left out, and the new class's own default is taken.
# register_to_config (configuration_utils.py) notes such names in _use_default_values,
# extract_init_dict drops them, to_json_string does not save the note. So
#  - a model trained with DDPMScheduler(), betas 0.0001 to 0.02, is drawn by Heun's, KDPM2, LCM's or
#    TCD's scheduler with betas 0.00085 to 0.012, until it has been saved and loaded once;
#  - Stable Diffusion 1.5's scheduler_config.json names no timestep_spacing. Its Euler sampler
#    starts at timestep 999; saving the pipeline, with nothing changed, makes that 951.
# Nothing is logged.
#
# Exits with 1 if conversion keeps the schedule, or saving makes no difference to it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 scipy==1.17.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import diffusers

print(*(f"{name} {version(name)}" for name in ("diffusers", "torch")))


def both(name, scheduler):
    """The scheduler of the class `name` made from `scheduler`, at once and through a folder."""
    kind = getattr(diffusers, name)
    scheduler.save_pretrained("saved")
    saved = type(scheduler).from_pretrained("saved")
    return kind.from_config(scheduler.config), kind.from_config(saved.config)


as_described = []
trained = diffusers.DDPMScheduler()
print(f"trained with DDPMScheduler(): alphas_cumprod[500] {trained.alphas_cumprod[500]:.4f}")
for name in ("HeunDiscrete", "KDPM2Discrete", "LCM", "TCD"):
    at_once, saved = both(f"{name}Scheduler", trained)
    values = [float(scheduler.alphas_cumprod[500]) for scheduler in (at_once, saved)]
    print(f"{name}: {values[0]:.4f} at once, {values[1]:.4f} when saved and loaded before")
    kept = [abs(value - float(trained.alphas_cumprod[500])) < 1e-6 for value in values]
    as_described.append(kept == [False, True])

# Stable Diffusion 1.5's file, as it was published with diffusers 0.6.
published = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
Path("sd15").mkdir()
Path("sd15/scheduler_config.json").write_text(json.dumps(published), encoding="utf-8")
starts = []
for euler in both("EulerDiscreteScheduler", diffusers.PNDMScheduler.from_pretrained("sd15")):
    euler.set_timesteps(20)
    starts.append(round(float(euler.timesteps[0])))
print(f"SD1.5 with Euler: 20 steps from {starts[0]}; from {starts[1]} once it has been saved")
as_described.append(starts == [999, 951])
sys.exit(0 if all(as_described) else 1)
PYTHON
