#!/usr/bin/env bash
# For training, the add_noise of DPM-Solver, UniPC and DEIS counts the timesteps from the wrong end.
#
# diffusers' schedulers have add_noise(sample, noise, timesteps). Some published pipelines come with
# a DPMSolverMultistepScheduler or, as Wan's, a UniPCMultistepScheduler. Who trains with it would
# guess that timestep 0 is nearly clean and 999 nearly all noise, as the DDPM and Euler schedulers
# of the same betas have it.
#
# What happens:
#  - As made, timesteps run from 999 down and sigmas from the smallest up (`__init__` of schedulers/
#    scheduling_dpmsolver_multistep.py, _unipc_multistep.py, _deis_multistep.py and
#    _dpmsolver_singlestep.py); add_noise takes the place in the one for the other. So timestep 0 is
#    all noise, 999 is clean, and a model is told the opposite of what it sees. Euler flips both.
#  - With use_flow_sigmas these sigmas, which reach 157, are put into (1 - sigma) * sample + sigma *
#    noise: the sample comes with a weight of -156.
#  - After set_timesteps, as for a validation picture drawn with the same object, a timestep that is
#    not on the list gets the noise of the last one (index_for_timestep: `len(self.timesteps) - 1`).
#    With 20 steps those are 980 of the 1000. Euler raises IndexError there.
# Nothing is logged.
#
# Exits with 1 if one of them gives the noise of DDPM's, or Euler's scheduler does not.
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
one, zero = torch.ones(1000), torch.zeros(1000)
timesteps = torch.arange(1000)
shown = [0, 100, 500, 900, 999]
betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ratio(scheduler):
    """How much noise each timestep gets for each sample: sigma, whatever the scale."""
    clean = scheduler.add_noise(one, zero, timesteps)
    return scheduler.add_noise(zero, one, timesteps) / clean, clean


def row(values):
    return ", ".join(f"{value:.3g}" for value in values[shown])


right, _ = ratio(diffusers.DDPMScheduler(**betas))
euler, _ = ratio(diffusers.EulerDiscreteScheduler(**betas))
print("noise for a part of the sample at timesteps", *shown)
print("  DDPMScheduler:", row(right))
print("  EulerDiscreteScheduler:", row(euler))
as_described = [torch.allclose(euler, right, rtol=1e-3)]
drawn = diffusers.EulerDiscreteScheduler(**betas)
drawn.set_timesteps(20)
try:
    ratio(drawn)
    as_described.append(False)
except IndexError as error:
    print(f"    after set_timesteps(20): IndexError: {error}")
for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"):
    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = kind(**betas)
    fresh, _ = ratio(scheduler)
    scheduler.set_timesteps(20)
    later, _ = ratio(scheduler)
    alike = int((later == later[1]).sum())
    flow = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    _, weight = ratio(flow)
    print(f"  {name}: {row(fresh)}")
    print(f"    after set_timesteps(20): {row(later)}; {alike} timesteps alike")
    print(f"    for a flow, as made, the sample's weight: {row(weight)}")
    as_described += [
        torch.allclose(fresh, right.flip(0), rtol=1e-3),
        alike > 950,
        float(weight[0]) < -100,
    ]
sys.exit(0 if all(as_described) else 1)
PYTHON
