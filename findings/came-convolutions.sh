#!/usr/bin/env bash
# CAME, the memory-efficient optimizer, takes more memory than AdamW for Stable Diffusion 1.5.
#
# CAME and Adafactor keep a row and a column of numbers for each matrix of weights instead of one
# number for each weight, as AdamW does twice. One would guess that CAME, whose name says so and
# which trainers offer for this reason, takes a little more than one number for each weight (its
# momentum), half of AdamW's, whatever the network.
#
# What happens: came_pytorch (CAME.py) takes the last two dimensions of a weight for rows and
# columns. A convolution's are its kernel: of each 3 x 3 weights it keeps 3 + 3 numbers, and that
# twice, which with the momentum is 2.33 for each weight; of a 1 x 1 convolution it keeps 5. Two
# thirds of SD1.5's UNet are convolutions: 2.06 numbers for each weight, 6.6 GiB where AdamW takes
# 6.4. For its autoencoder it is 2.31; SDXL's UNet, which is mostly linear layers, has 1.19. torch's
# Adafactor has the same rows and columns: 0.67 and 2 numbers for each weight of such convolutions,
# next to none for linear layers. Nothing is logged.
#
# Exits with 1 if CAME takes less than AdamW for SD1.5's UNet, or Adafactor little for convolutions.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 came-pytorch==0.1.3 \
    numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import diffusers
import torch
from came_pytorch import CAME

diffusers.logging.set_verbosity_error()
print(*(f"{name} {version(name)}" for name in ("came-pytorch", "torch", "diffusers")))


def numbers(make, weights):
    """How many numbers the optimizer's state has after a step, for each weight."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = make(weights)
    optimizer.step()
    state = [value for of in optimizer.state.values() for value in of.values()]
    held = sum(value.numel() for value in state if torch.is_tensor(value) and value.dim())
    return held / sum(weight.numel() for weight in weights)


optimizers = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=1e-4, foreach=False),
    "CAME": lambda weights: CAME(weights, lr=1e-4),
    "Adafactor": lambda weights: torch.optim.Adafactor(weights, lr=1e-4, foreach=False),
}
layers = {
    "a linear layer": (320, 1280),
    "a convolution of 3 x 3": (320, 320, 3, 3),
    "a convolution of 1 x 1": (320, 320, 1, 1),
}
print("numbers that are kept for each weight")
kept = {}
for name, shape in layers.items():
    for optimizer, make in optimizers.items():
        kept[name, optimizer] = numbers(make, [torch.nn.Parameter(torch.ones(shape))])
    print(f"  {name}:", ", ".join(f"{of} {kept[name, of]:.2f}" for of in optimizers))

with torch.device("meta"):  # the real sizes, without memory
    networks = {
        "SD1.5's UNet": diffusers.UNet2DConditionModel(cross_attention_dim=768),
        "SD1.5's autoencoder": diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
    }
for name, network in networks.items():
    weights = list(network.parameters())
    count = sum(weight.numel() for weight in weights)
    for optimizer in ("AdamW", "CAME"):
        kept[name, optimizer] = numbers(optimizers[optimizer], weights)
        size = kept[name, optimizer] * count * 4 / 2**30
        print(f"  {name}: {optimizer} {kept[name, optimizer]:.3f}, {size:.2f} GiB of float32")
more = [kept[name, "CAME"] > kept[name, "AdamW"] for name in networks]
as_described = [
    *more,
    kept["a linear layer", "CAME"] < 1.1,
    abs(kept["a convolution of 3 x 3", "CAME"] - 7 / 3) < 0.01,
    abs(kept["a convolution of 1 x 1", "CAME"] - 5) < 0.01,
    kept["a linear layer", "Adafactor"] < 0.01,
    kept["a convolution of 3 x 3", "Adafactor"] > 0.6,
]
sys.exit(0 if all(as_described) else 1)
PYTHON
