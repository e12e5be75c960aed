#!/usr/bin/env bash
# optimi's StableAdamW chooses its triton kernels on a CPU, and fails, wherever triton is installed.
#
# optimi's README says that the triton implementation is chosen by itself where the device supports
# it, and its other optimizers do so: on a CPU they take torch's functions.
#
# What happens: StableAdamW._init_group (optimi/stableadamw.py) asks `_default_to_triton(params)`
# before it has collected `params`. `all` of an empty list is true, so that the answer is yes for
# every device. torch's wheels for CUDA bring triton along; with them the first step on a CPU raises
# "0 active drivers". Passing triton=False helps.
#
# Exits with 1 if StableAdamW takes a step on a CPU with triton installed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torch-optimi==0.3.3 triton==3.8.0 numpy==2.4.6 \
    packaging==26.4 # which optimi imports and does not ask for
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import optimi
import torch

print(*(f"{name} {version(name)}" for name in ("torch-optimi", "torch", "triton")))


def step(kind, **options):
    """What comes of a step on a CPU."""
    weight = torch.nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    try:
        kind([weight], lr=1e-3, **options).step()
    except RuntimeError as error:
        return str(error)
    return "stepped"


found = {
    "AdamW": step(optimi.AdamW),
    "StableAdamW": step(optimi.StableAdamW),
    "StableAdamW triton=False": step(optimi.StableAdamW, triton=False),
}
for name, said in found.items():
    print(f"{name}: {said}")
sys.exit(0 if [said == "stepped" for said in found.values()] == [True, False, True] else 1)
PYTHON
