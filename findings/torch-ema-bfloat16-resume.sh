#!/usr/bin/env bash
# torch-ema's average of bfloat16 weights stands still once a training has been resumed.
#
# An average that moves by a thousandth or less per step cannot be kept in bfloat16, which has 8
# bits: the movement is rounded away. ExponentialMovingAverage has `to(dtype=torch.float32)` for
# that, and updates a float32 average from bfloat16 weights rightly. One would guess that state_dict
# and load_state_dict, by which a training goes on where it was, give the average back as it was
# saved.
#
# What happens: load_state_dict casts each average to the type of the weights, "consistent with
# torch.optim.Optimizer" by its comment (torch_ema/ema.py). The float32 in the file become bfloat16,
# without a word, and from then on the average does not move, however far the weights go: 0.9999 or
# 0.999 alike, as a step of less than 0.2 % of the average is rounded away. Calling
# `to(dtype=torch.float32)` again after loading lets it move again, from rounded numbers. Nothing is
# logged.
#
# Exits with 1 if the average is float32 after loading, or moves as the one that was not resumed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torch-ema==0.3 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from torch_ema import ExponentialMovingAverage

print(*(f"{name} {version(name)}" for name in ("torch-ema", "torch")))


def train(net, ema, steps):
    """The weights grow by half of themselves while the average follows."""
    for step in range(steps):
        net.weight.data.fill_(1.0 + 0.5 * step / steps)
        ema.update()


def made(net, dtype):
    ema = ExponentialMovingAverage(net.parameters(), decay=0.999, use_num_updates=False)
    ema.to(dtype=dtype)
    return ema


as_described = []
for kind in (torch.float32, torch.bfloat16):
    net = torch.nn.Linear(8, 8, bias=False, dtype=kind)
    net.weight.data.fill_(1.0)
    ema = made(net, torch.float32)
    torch.save(ema.state_dict(), "ema.pt")

    resumed = made(net, torch.float32)
    resumed.load_state_dict(torch.load("ema.pt"))
    told = resumed.shadow_params[0].dtype
    train(net, ema, 2000)
    train(net, resumed, 2000)
    again = made(net, torch.float32)
    again.load_state_dict(torch.load("ema.pt"))
    again.to(dtype=torch.float32)
    train(net, again, 2000)
    kept, lost, mended = (float(of.shadow_params[0].mean()) for of in (ema, resumed, again))
    print(f"weights of {kind}: from 1 to {float(net.weight[0, 0]):.3f}, average {kept:.4f}")
    print(f"  resumed: average of {told} {lost:.4f}; with `to` after loading {mended:.4f}")
    as_described.append(abs(mended - kept) < 1e-6)
    as_described.append(lost == 1.0 if kind == torch.bfloat16 else lost == kept)
    as_described.append((told == torch.bfloat16) == (kind == torch.bfloat16))
sys.exit(0 if all(as_described) else 1)
PYTHON
