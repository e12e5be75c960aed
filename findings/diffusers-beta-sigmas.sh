#!/usr/bin/env bash
# diffusers' use_beta_sigmas spends half of SD's steps on the noisiest eighth of the timesteps.
#
# "Beta Sampling is All You Need" (arXiv 2407.12173) takes the timesteps of a picture from a beta
# distribution, which is dense at both ends: more steps where the picture is laid out and where its
# details come, fewer between. ComfyUI's and WebUI's "beta" do so. One would guess that
# use_beta_sigmas, which names this paper, does it too: half of the steps above timestep 500.
#
# What happens: _convert_to_beta (in Euler's, Heun's, DPM-Solver's, UniPC's, DEIS's and SA-Solver's
# scheduler) puts sigma, not the timestep, through the distribution. Stable Diffusion's sigma goes
# from 0.03 to 14.6 and passes 1 at timestep 354: half of the steps lie above 870. Of 20 steps 3 are
# left for the last quarter, where the paper has 6 and the list without the option 5; they are at
# 235, 51 and 0. At the noisy end timesteps fall on the same whole number when there are many of
# them, from 32 steps on; DPM-Solver, UniPC and DEIS, which look up the first timestep's place in
# the list, then begin a place too late, and the last step raises an error. For a flow, whose sigmas
# are its timesteps, all is as in the paper. Nothing is logged.
#
# Exits with 1 if half of the steps are below 750, or as many as in the paper in the last quarter.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 scipy==1.17.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import diffusers
import numpy as np
import scipy.stats
import torch

diffusers.logging.set_verbosity_error()
print(*(f"{name} {version(name)}" for name in ("diffusers", "scipy", "torch")))
SIZES = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep")


def told(name, timesteps):
    """The median, and how many of the timesteps lie in the last quarter."""
    steps = sorted({round(float(timestep)) for timestep in timesteps}, reverse=True)
    late = [step for step in steps if step < 250]
    print(f"{name}: {len(steps)} steps, half above {np.median(steps):.0f}, below 250", *late)
    return np.median(steps), len(late)


def fails(scheduler, steps):
    """Whether drawing raises an error; the network says 0."""
    scheduler.set_timesteps(steps)
    sample = torch.zeros(1, 4, 8, 8)
    try:
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample
    except (AssertionError, IndexError):
        return True
    return False


shares = 1 - np.linspace(0, 1, 20)
_, paper = told("the paper", 999 * scipy.stats.beta.ppf(shares, 0.6, 0.6))
as_described = []
for kind in KINDS:
    made = getattr(diffusers, f"{kind}Scheduler")
    plain, beta = (made(**SIZES, use_beta_sigmas=option) for option in (False, True))
    plain.set_timesteps(20)
    beta.set_timesteps(20)
    told(f"{kind} without the option", plain.timesteps)
    middle, late = told(f"{kind} with it", beta.timesteps)
    failing = [steps for steps in range(2, 81) if fails(beta, steps)]
    if failing:
        print(f"  an error with {failing[0]} steps, and {len(failing)} of 2 to 80")
    without = [steps for steps in range(2, 81) if fails(plain, steps)]
    as_described += [middle > 750, late <= 0.5 * paper, not without]
    as_described.append(bool(failing) == (kind not in ("EulerDiscrete", "HeunDiscrete")))
flow = diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
flow.set_timesteps(20)
middle, late = told("a flow", flow.timesteps)
as_described += [abs(middle - 500) < 10, late == paper]
sys.exit(0 if all(as_described) else 1)
PYTHON
