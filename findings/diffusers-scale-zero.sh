#!/usr/bin/env bash
# In diffusers one look at a model without its LoRA, by scale 0, forgets the strength of the LoRA.
#
# set_adapters("x", 0.5) gives a LoRA half its strength for all further pictures. A scale in
# cross_attention_kwargs (or joint_attention_kwargs) multiplies the strength for one call only, and
# 0 gives the picture of the model alone. One would guess that the call after it is as the one
# before.
#
# What happens: after a call with scale 0 every LoRA has its full strength, 1. unscale_lora_layers
# (utils/peft_utils.py), which ends each forward, cannot divide by 0 and so sets the scale to 1,
# "the original value" by its comment, which set_adapters has since changed. Other scales are undone
# rightly. So who compares pictures with and without a LoRA this way, or takes scale 0 as the
# reference of a preference loss, goes on with another model. Nothing is logged.
#
# Exits with 1 if the strength is the same after a call with scale 0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 peft==0.21.2 \
    transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig

print(*(f"{name} {version(name)}" for name in ("diffusers", "peft", "transformers", "torch")))
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
transformer = SD3Transformer2DModel(
    sample_size=8,
    patch_size=1,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    caption_projection_dim=32,
    joint_attention_dim=32,
    pooled_projection_dim=64,
)
latents, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.randn(1, 64)
calls = {
    "UNet2DConditionModel": (unet, (latents, 500, text), "cross_attention_kwargs"),
    "SD3Transformer2DModel": (
        transformer,
        (latents, text, pooled, torch.tensor([500.0])),
        "joint_attention_kwargs",
    ),
}
targets = ["to_q", "to_k", "to_v", "to_out.0"]
as_described = []
for name, (model, inputs, keyword) in calls.items():
    model.eval().add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False), "x"
    )
    layer = next(module for module in model.modules() if hasattr(module, "scaling"))
    for scale in (0.3, 0.0):
        model.set_adapters(["x"], [0.5])
        with torch.no_grad():
            before = model(*inputs).sample
            model(*inputs, **{keyword: {"scale": scale}})
            after = model(*inputs).sample
        strength = layer.scaling["x"]
        change = float((after - before).norm() / before.norm())
        print(f"{name}: 0.5; after a call with scale {scale:g}: {strength:g}, {change:.1%} off")
        as_described.append(strength == (0.5 if scale else 1.0) and (change > 1e-3) == (not scale))
sys.exit(0 if all(as_described) else 1)
PYTHON
