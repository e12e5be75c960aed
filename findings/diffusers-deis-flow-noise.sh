#!/usr/bin/env bash
# DEIS and SA-Solver of diffusers leave noise in the pictures of flow models: a seventh at 20 steps.
#
# The schedulers of DPM-Solver, UniPC, DEIS and SA-Solver have use_flow_sigmas and flow_shift, and
# OtherScheduler.from_config(pipeline.scheduler.config) exchanges one for another, as in pipelines
# of Sana (DPM-Solver) or Wan (UniPC). One would guess that each ends with a clean picture, as the
# number of steps decides how exact a solver is and not how far it goes.
#
# What happens: set_timesteps of scheduling_deis_multistep.py and scheduling_sasolver.py ends the
# list of sigmas with the last one again (`np.concatenate([sigmas, sigmas[-1:]])`), so that the last
# call of the network changes nothing, and there is no final_sigmas_type to choose. For a
# variance-preserving model that is the smallest sigma of the training, 0.03, and harmless. A flow's
# last sigma is that of the last step, shift / (steps + shift - 1): with a shift of 3, 0.25 of the
# noise stays at 10 steps, 0.14 at 20, 0.1 at 28, and the picture itself is as much paler.
# UniPC and DPM-Solver go on to 0. Nothing is logged.
#
# Exits with 1 if DEIS or SA-Solver end without noise, or the others with it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import diffusers
import torch

diffusers.logging.set_verbosity_error()
print(*(f"{name} {version(name)}" for name in ("diffusers", "torch")))
PICTURE = 0.5  # every pixel; the network below knows it, and so the exact velocity of any sample


def draw(scheduler, steps):
    """The sample after all steps, from noise of variance 1."""
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    sample = torch.randn(1, 1, 128, 128)
    for timestep in scheduler.timesteps:
        velocity = (sample - PICTURE) / (float(timestep) / 1000)
        sample = scheduler.step(velocity, timestep, sample).prev_sample
    return sample


flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
as_described = []
for name in ("UniPCMultistep", "DPMSolverMultistep", "DEISMultistep", "SASolver"):
    print(f"{name}: a picture of {PICTURE} everywhere comes out as")
    for steps, shift in ((10, 3.0), (20, 3.0), (28, 3.0), (28, 1.0)):
        published = diffusers.UniPCMultistepScheduler(**flow, flow_shift=shift)
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(published.config)
        sample = draw(scheduler, steps)
        mean, noise = float(sample.mean()), float(sample.std())
        last = ", ".join(f"{sigma:.3f}" for sigma in scheduler.sigmas[-3:])
        print(f"  {steps} steps, shift {shift:g}: mean {mean:.3f}, noise {noise:.3f}", end="")
        print(f"; last sigmas {last}")
        if name in ("DEISMultistep", "SASolver"):
            stays = shift / (steps + shift - 1)
            as_described += [abs(noise - stays) < 0.01, abs(mean - PICTURE * (1 - stays)) < 0.01]
        else:
            as_described += [noise < 0.005, abs(mean - PICTURE) < 0.005]
sys.exit(0 if all(as_described) else 1)
PYTHON
