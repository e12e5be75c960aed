#!/usr/bin/env bash
# ema-pytorch's forward_eval computes in training mode, and changes the average while it evaluates.
#
# EMA(model) copies a model and keeps the average in the copy. forward_eval is, by its comment, a
# "handy function for invoking ema model with no grad + eval". One would guess that it switches
# dropout off and uses the running statistics, as eval() does, and puts the mode back.
#
# What happens: it notes the copy's mode, calls it, and sets the mode it noted; eval() is never
# called (ema_pytorch.py, forward_eval). A copy has the mode of the model it was made from, which is
# training for a network that is about to be trained. So dropout drops, two evaluations differ, and
# a batch norm's running statistics, which are part of the average that is saved, move with each
# picture that is evaluated. Calling the wrapper itself, as the README does, is the same. Calling
# ema.eval() once helps: it switches the copy for good. Nothing is logged.
#
# Exits with 1 if forward_eval agrees with eval mode, or leaves the average alone.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 ema-pytorch==0.8.3 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from ema_pytorch import EMA

print(*(f"{name} {version(name)}" for name in ("ema-pytorch", "torch")))
torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Dropout(0.1)
)
ema = EMA(net, beta=0.999, update_every=1)
ema.update()
pictures = torch.rand(4, 3, 16, 16)
mean = ema.ema_model[1].running_mean.clone()
first, second = ema.forward_eval(pictures), ema.forward_eval(pictures)
moved = float((ema.ema_model[1].running_mean - mean).norm() / mean.norm().clamp(min=1e-9))
dropped = float((first == 0).float().mean())
print(f"share of zeros {dropped:.3f}, twice the same: {torch.equal(first, second)}")
print(f"the average's running mean moved: {moved > 0}, requires a gradient: {first.requires_grad}")

ema.eval()
mean = ema.ema_model[1].running_mean.clone()
first, second = ema.forward_eval(pictures), ema.forward_eval(pictures)
calm = torch.equal(first, second) and torch.equal(mean, ema.ema_model[1].running_mean)
print(f"after ema.eval() twice the same and nothing moved: {calm}")
sys.exit(0 if abs(dropped - 0.1) < 0.02 and moved > 0 and calm else 1)
PYTHON
