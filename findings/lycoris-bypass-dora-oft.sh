#!/usr/bin/env bash
# LyCORIS' bypass mode and its precise merge compute another adapter than the one in the file.
#
# bypass_mode adds an adapter's output to the layer's instead of changing the layer's weight: W x +
# D x for (W + D) x, the same thing for a LoRA. It is forced on quantised layers, whose weights
# cannot be changed, and can be chosen elsewhere. merge_to(precise=True) is there to merge without
# rounding errors. One would guess that all of them give one model, or raise where they cannot.
#
# What happens:
#  - DoRA (dora_wd=True): bypass_forward_diff of modules/locon.py, loha.py and lokr.py leaves the
#    magnitude out. dora_scale is made, is one of the weights to train, never gets a gradient, and
#    is saved, so that every reader of the file, LyCORIS' own too, applies the untrained magnitude
#    to an adapter that was trained without one.
#  - precise=True adds get_diff_weight, which has no magnitude either, while the usual merge has it
#    (modules/base.py, _compute_precise_result).
#  - OFT and BOFT: bypass turns the layer's output and with it the bias; the weight's way, and thus
#    the file, turn the weight alone (modules/diag_oft.py and boft.py, _bypass_forward). Without
#    a bias the two agree.
# The log says that both modes are enabled, and nothing else.
#
# Exits with 1 if the file of an adapter in bypass mode, or a precise merge, acts as was trained, or
# the cases without a magnitude or a bias differ.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 lycoris-lora==4.1.3 einops==0.8.2 toml==0.10.2 \
    numpy==2.4.6 safetensors==0.8.0
venv/bin/python -W ignore - <<'PYTHON'
import logging
import sys
from importlib.metadata import version

import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from lycoris.logging import logger

logger.setLevel(logging.ERROR)  # else it tells of each kind of layer that is not there
print(*(f"{name} {version(name)}" for name in ("lycoris-lora", "torch")))
picture = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def base(bias):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 32, bias=bias))


def trained(algo, bias, **options):
    """What a network adds after a few steps, and whether dora_scale (if any) has moved."""
    model = base(bias)
    wanted = model(picture).detach().roll(1, 1)
    network = create_lycoris(model, linear_dim=8, linear_alpha=8, algo=algo, **options)
    network.apply_to()
    start = [x.detach().clone() for n, x in network.named_parameters() if "dora_scale" in n]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (model(picture) - wanted).square().mean().backward()
        optimizer.step()
    end = [x.detach() for n, x in network.named_parameters() if "dora_scale" in n]
    moved = [not torch.equal(one, other) for one, other in zip(start, end, strict=True)]
    network.save_weights("saved.safetensors", torch.float32, {})
    return model(picture).detach() - base(bias)(picture), moved


def loaded(bias, precise=False):
    """What the file adds, merged precisely or put beside the layers in the usual way."""
    model = base(bias)
    network, _ = create_lycoris_from_weights(1.0, "saved.safetensors", model)
    if precise:
        network.merge_to(1.0, precise=True)
    else:
        network.apply_to()
    return model(picture).detach() - base(bias)(picture)


as_described = []
cases = [
    ("lora", False, {"dora_wd": True}, True),
    ("loha", False, {"dora_wd": True}, True),
    ("lokr", False, {"dora_wd": True}, True),
    ("lora", True, {}, False),
    ("diag-oft", True, {}, True),
    ("boft", True, {}, True),
    ("diag-oft", False, {}, False),
]
for algo, bias, options, differ in cases:
    added, moved = trained(algo, bias, bypass_mode=True, **options)
    apart = float((loaded(bias) - added).norm() / added.norm())
    name = " ".join([algo, *options, "with a bias" if bias else "without a bias"])
    print(f"{name}, trained in bypass mode: the file is {apart:.1%} off", end="")
    print("; dora_scale " + ("moved" if moved[0] else "never moved") if moved else "")
    as_described += [apart > 0.03 if differ else apart < 1e-3, not any(moved)]
for algo, options in (("lora", {"dora_wd": True}), ("lora", {})):
    added, moved = trained(algo, False, **options)
    usual, precise = (
        float((loaded(False, how) - added).norm() / added.norm()) for how in (False, True)
    )
    name = " ".join([algo, *options])
    print(f"{name}, usual mode: the file is {usual:.1%} off, merged precisely {precise:.1%}")
    as_described += [usual < 1e-3, precise > 0.1 if options else precise < 1e-3]
    as_described += moved
sys.exit(0 if all(as_described) else 1)
PYTHON
