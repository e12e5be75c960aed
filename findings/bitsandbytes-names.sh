#!/usr/bin/env bash
# bitsandbytes' Adam is AdamW, and its LAMB8bit and LARS8bit bound no step of large weights.
#
# bitsandbytes.optim has Adam and AdamW, which in torch differ in weight_decay: Adam adds it to the
# gradient, where the second moment divides it away again, AdamW shrinks the weights. It has LAMB
# and LARS, which hold each layer's step to its weights' size, to train with large batches and
# rates. One would guess that Adam decays as torch's does, and that LAMB8bit is LAMB with states of
# 8 bits.
#
# What happens: all of Adam, AdamW and LAMB hand "adam" or "lamb" to one kernel whose decay shrinks
# the weights (optim/optimizer.py, Optimizer2State): Adam and AdamW differ in their default alone, 0
# and 0.01. LAMB and LARS are this kernel and SGD's with max_unorm, the bound of the step, and the
# update of 8-bit states has no such argument. So LAMB8bit's steps are Adam8bit's to the bit, 130
# times LAMB's on the weights below, and LARS8bit's are SGD's. A note on max_unorm tells that it is
# not supported and has to stay at 1. Weights of less than 4096 numbers keep float32 states and with
# them the bound: in one network biases and norms take LAMB's steps, all else Adam's. The same names
# with "32bit" are as they should be, Adam apart. Nothing is logged.
#
# Exits with 1 if Adam decays as torch's, or LAMB8bit or LARS8bit bounds the steps of large weights.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 bitsandbytes==0.50.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from bitsandbytes import optim

print(*(f"{name} {version(name)}" for name in ("bitsandbytes", "torch")))


def trained(kind, shape, size=1.0, **options):
    """The weights after ten steps, and how far they went as a share of themselves."""
    torch.manual_seed(0)
    start = 0.02 * torch.randn(shape)
    weight = torch.nn.Parameter(start.clone())
    optimizer = kind([weight], lr=1e-3, **options)
    for step in range(10):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        weight.grad = size * noise
        optimizer.step()
    end = weight.detach()
    return end, float((end - start).norm() / start.norm())


as_described = []
print("weight_decay=1, steps of a share of the weights, and with the decay alone")
found = {}
for name, kind in {
    "torch's Adam": torch.optim.Adam,
    "torch's AdamW": torch.optim.AdamW,
    "bitsandbytes' Adam": optim.Adam,
    "bitsandbytes' AdamW": optim.AdamW,
}.items():
    with_noise = trained(kind, (128, 64), weight_decay=1.0)
    found[name] = with_noise[0], trained(kind, (128, 64), size=0.0, weight_decay=1.0)[1]
    print(f"  {name}: {with_noise[1]:.4f}, {found[name][1]:.4f}")
adams = found["bitsandbytes' Adam"], found["bitsandbytes' AdamW"]
as_described.append(torch.equal(adams[0][0], adams[1][0]))
as_described.append(abs(adams[0][1] - found["torch's AdamW"][1]) < 1e-4)
as_described.append(found["torch's Adam"][1] > 10 * adams[0][1])

for bounded, free, options in (("LAMB", "Adam", {}), ("LARS", "SGD", {"momentum": 0.9})):
    for shape in ((128, 64), (16, 16)):
        ends, shares = {}, {}
        for name in (bounded, f"{bounded}8bit", free, f"{free}8bit"):
            ends[name], shares[name] = trained(getattr(optim, name), shape, **options)
        equal = torch.equal(ends[f"{bounded}8bit"], ends[f"{free}8bit"])
        print(f"{shape[0]} x {shape[1]} weights:", end=" ")
        print(*(f"{name} {share:.5f}" for name, share in shares.items()), sep=", ", end="; ")
        print(f"{bounded}8bit is {free}8bit: {equal}")
        large = shape == (128, 64)
        as_described.append(equal == large)
        as_described.append((shares[f"{bounded}8bit"] > 100 * shares[bounded]) == large)
sys.exit(0 if all(as_described) else 1)
PYTHON
