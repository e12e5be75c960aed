#!/usr/bin/env bash
# optimi's AdamW does not decay bfloat16 weights, and its second moment cannot fall.
#
# optimi's README says that its optimizers match mixed precision when all training is in bfloat16,
# by Kahan summation, which is switched on by itself for bfloat16 weights. One would guess that this
# covers all that a step adds up: the update, the weight decay and the two moments.
#
# What happens: only the update has a compensation. Function _single_param_adam (optimi/adam.py; its
# foreach twin likewise) first multiplies the weight by 1 - lr * decay in place. bfloat16 has 8
# bits, the nearest number below 1 is 0.996, so any factor above 0.998 gives the same weight back:
# with the usual decay of 0.01, any learning rate up to 0.19. The second moment is multiplied by
# beta2 in place too: for beta2 0.999 it never falls, however small the gradients become (0.99,
# optimi's default, does fall). Steps then stay as small as the largest gradients made them.
#
# Exits with 1 if bfloat16 weights decay, or the second moment falls.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torch-optimi==0.3.3 numpy==2.4.6 \
    packaging==26.4 # which optimi imports and does not ask for
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import optimi
import torch

print(*(f"{name} {version(name)}" for name in ("torch-optimi", "torch")))


def decayed(dtype, lr, decay):
    """What 1000 steps with gradients of zero leave of a weight of 1."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = optimi.AdamW([weight], lr=lr, weight_decay=decay)
    for _ in range(1000):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert bool(optimizer.param_groups[0]["kahan_sum"]) == (dtype == torch.bfloat16)
    return weight.max().item()


def second_moments(dtype):
    """Its mean after 1000 gradients of variance 1, and after 3000 more of variance 0.0001."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4096, dtype=dtype))
    optimizer = optimi.AdamW([weight], lr=1e-5, betas=(0.9, 0.999))
    means = []
    for size, steps in ((1, 1000), (0.01, 3000)):
        for _ in range(steps):
            weight.grad = (size * torch.randn(4096)).to(dtype)
            optimizer.step()
        means.append(optimizer.state[weight]["exp_avg_sq"].float().mean().item())
    return means


still = []
for lr, decay in ((1e-4, 0.01), (1e-4, 0.1), (1e-3, 1.0)):
    exact = (1 - lr * decay) ** 1000
    plain, half = (decayed(dtype, lr, decay) for dtype in (torch.float32, torch.bfloat16))
    print(f"lr {lr:g} decay {decay:g}: exact {exact:.4f}, float32 {plain:.4f}, bfloat16 {half:.4f}")
    still.append(half == 1.0 and abs(plain - exact) < 1e-3)
plain, half = second_moments(torch.float32), second_moments(torch.bfloat16)
for name, (large, small) in (("float32", plain), ("bfloat16", half)):
    print(f"second moment in {name}: {large:.4f}, with small gradients {small:.4f}")
print(f"steps {(half[1] / plain[1]) ** 0.5:.1f} times too short")
stuck = half[1] == half[0] and plain[1] < 0.1 * plain[0]
sys.exit(0 if all(still) and stuck else 1)
PYTHON
