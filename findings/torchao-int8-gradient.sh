#!/usr/bin/env bash
# A LoRA on torchao's dynamic int8 layers trains on a wrong gradient, and nothing says so.
#
# peft has a layer of its own for bases that torchao quantised, and says nothing about which of
# torchao's schemes can be trained. Int8DynamicActivationInt8WeightConfig computes in int8, where
# Int8WeightOnlyConfig only stores so; forward they agree within some percent. One would guess that
# the gradients do too, or that backward raises, as torchao's float8 twin does.
#
# What happens: the output of such a layer does not require a gradient, although its input does. The
# function for linear in torchao/quantization/quantize_/workflows/int8/int8_tensor.py turns the
# activation into an Int8Tensor, which is no part of the graph. A single layer would raise in
# backward; in a network the residual connections and the LoRA branches keep the graph connected, so
# that the loss falls and nothing is logged, while the gradient lacks every path through a base
# layer.
#
# Exits with 1 if the gradients agree, or backward raises.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchao==0.18.0 peft==0.21.2 \
    transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

print(*(f"{name} {version(name)}" for name in ("torchao", "peft", "torch")))


class Block(nn.Module):
    """A transformer's feed-forward half."""

    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden):
        return hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))


torch.manual_seed(0)
base = nn.Sequential(*(Block() for _ in range(4))).requires_grad_(False)
inputs, wanted = torch.randn(2, 32, 64, 64).unbind(0)
schemes = {
    "float32": None,
    "int8 weights": Int8WeightOnlyConfig(),
    "int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
}
outputs, gradients = {}, {}
for name, scheme in schemes.items():
    model = copy.deepcopy(base)
    if scheme is not None:
        quantize_(model, scheme)
    single = model[0].up(inputs.clone().requires_grad_())
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["up", "down"], init_lora_weights=False)
    torch.manual_seed(1)
    model = inject_adapter_in_model(config, model)
    outputs[name] = model(inputs)
    nn.functional.mse_loss(outputs[name], wanted).backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradients[name] = [
        torch.cat([weight.grad.flatten() for weight in block.parameters() if weight.requires_grad])
        for block in model
    ]
    print(f"{name}: {type(model[0].up).__name__}, a layer's output has {single.grad_fn}")


def off(found, right):
    return float((found - right).norm() / right.norm())


errors = {}
for name in ("int8 weights", "int8 dynamic"):
    errors[name] = [off(*pair) for pair in zip(gradients[name], gradients["float32"], strict=True)]
    print(
        f"{name}: output {off(outputs[name], outputs['float32']):.1%} off, gradients of the blocks",
        ", ".join(f"{error:.0%}" for error in errors[name]),
        "off",
    )
agree = off(outputs["int8 dynamic"], outputs["float32"]) < 0.05
as_described = max(errors["int8 weights"]) < 0.05 and min(errors["int8 dynamic"]) > 0.2
sys.exit(0 if agree and as_described else 1)
PYTHON
