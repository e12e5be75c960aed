#!/usr/bin/env bash
# diffusers' adaptive projected guidance can guide less than no guidance: it starts at the wrong
# end.
#
# APG (arXiv 2410.02416) tames the difference between the prediction with the prompt and the one
# without: its norm is held below a threshold, and the part along the prediction can be left out.
# The paper adds (scale - 1) times what remains to the prediction WITH the prompt. Guiders of
# diffusers have use_original_formulation, and by the docs of ClassifierFreeGuidance the default,
# which starts at the prediction without, is equivalent in theory. One would guess that a scale just
# above 1 gives next to the prediction with the prompt, and that more guides more.
#
# What happens: normalized_guidance (guiders/adaptive_projected_guidance.py) adds scale times the
# tamed difference to the prediction WITHOUT the prompt. That is the same thing only for a
# difference that was left as it is. The usual threshold is 15, for SDXL; the norm grows with the
# square root of the latents' size, and those of a video reach hundreds. With a difference of norm
# 57 a scale of 2 goes 0.52 of the way from the picture without the prompt to the one with it, where
# the paper's goes 1.26; with one of 324, 7.5 goes 0.35. eta=0, the paper's choice, takes the part
# along the prediction out of the prompt itself, tame or not. A scale of 1 is treated apart and
# gives the prediction with the prompt, so that 1.001 is far from 1. With use_original_formulation
# the guider is the paper's, with a scale that is one less. AdaptiveProjectedMixGuidance has the
# same lines. Nothing is logged.
#
# Exits with 1 if the default is the paper's where the difference is tamed, or is not elsewhere.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import diffusers
import torch
from diffusers.guiders import AdaptiveProjectedGuidance

diffusers.logging.set_verbosity_error()
print(*(f"{name} {version(name)}" for name in ("diffusers", "torch")))


def paper(cond, uncond, scale, eta, threshold):
    """Algorithm 1 of the paper, without momentum."""
    difference = (cond - uncond).double()
    difference = difference * min(1.0, threshold / float(difference.norm()))
    along = cond.double() / cond.double().norm()
    parallel = (difference * along).sum() * along
    return cond + (scale - 1) * (difference - parallel + eta * parallel).float()


def way(guided, cond, uncond):
    """How far from the prediction without the prompt (0) to the one with it (1)."""
    difference = cond - uncond
    return float(((guided - uncond) * difference).sum() / difference.square().sum())


def guider(scale, eta, original=False):
    made = AdaptiveProjectedGuidance(
        guidance_scale=scale, eta=eta, use_original_formulation=original
    )
    made.set_state(step=10, num_inference_steps=50, timestep=torch.tensor(500))
    return made


as_described = []
for name, shape, share in (
    ("SDXL at 1024 px, alike", (1, 4, 128, 128), 0.05),
    ("SDXL at 1024 px", (1, 4, 128, 128), 0.2),
    ("a video of 81 frames at 480p", (1, 16, 21, 60, 104), 0.2),
):
    torch.manual_seed(0)
    cond = torch.randn(shape)
    uncond = (1 - share / 2) * cond + share * torch.randn(shape)
    norm = float((cond - uncond).norm())
    print(f"{name}: the difference has a norm of {norm:.0f}, 15 is the threshold")
    for eta in (1.0, 0.0):
        found = []
        for scale in (1.0, 1.001, 2.0, 5.0, 7.5):
            default = way(guider(scale, eta).forward(cond, uncond).pred, cond, uncond)
            wanted = paper(cond, uncond, scale, eta, 15.0)
            original = guider(scale - 1, eta, True).forward(cond, uncond).pred
            as_described.append(torch.allclose(original, wanted, atol=1e-4))
            found.append((default, way(wanted, cond, uncond)))
        print(f"  eta {eta:g}:", ", ".join(f"{ours:.2f} ({theirs:.2f})" for ours, theirs in found))
        ours, theirs = zip(*found)
        if norm < 15 and eta == 1:
            as_described += [abs(one - other) < 1e-3 for one, other in found]
        elif norm < 15:
            as_described += [ours[0] == 1.0, ours[1] < 0.85, theirs[1] > 0.99]
        else:
            as_described += [ours[0] == 1.0, ours[1] < 0.3, theirs[1] > 0.99, ours[2] < 0.6]
            as_described += [other - one > 0.5 for one, other in found[1:]]
print("scales 1, 1.001, 2, 5 and 7.5: how far diffusers goes to the prompt (the paper)")
sys.exit(0 if all(as_described) else 1)
PYTHON
