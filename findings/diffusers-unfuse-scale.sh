#!/usr/bin/env bash
# diffusers' fuse_lora(lora_scale=0.5) is not undone by unfuse_lora: the LoRA stays at half.
#
# fuse_lora adds a LoRA into the weights, to draw faster, and lora_scale says how strongly.
# unfuse_lora "reverses the effect of fuse_lora" by its docs. One would guess that the LoRA then has
# the strength that it had before, and that the same fuse gives the same model again: to compare
# 0.25, 0.5 and 1 one fuses, draws and unfuses in turn.
#
# What happens: _fuse_lora_apply (loaders/peft.py) multiplies each layer's scaling by lora_scale
# before it merges, and _unfuse_lora_apply takes the weights out again and leaves the scaling. So
# the unfused model draws with the LoRA at half, and each further fuse multiplies again: 0.5 for the
# second time is 0.25, and 1 after 0.5 is 0.5. 0 leaves nothing: every later fuse adds nothing at
# all. Layers that a fuse of other adapters merges are as much multiplied: with adapter_names=["a"]
# the scale of an active "b" is halved too. set_adapters sets all right. Nothing is logged.
#
# Exits with 1 if the strength is the same after unfuse_lora, or set_adapters does not mend it.
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

import diffusers
import torch
from peft import LoraConfig

diffusers.logging.set_verbosity_error()
print(*(f"{name} {version(name)}" for name in ("diffusers", "peft", "torch")))


def made(*names):
    """A small UNet with LoRAs of random weights, all active, with their usual strength."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=8,
        layers_per_block=1,
    ).eval()
    for name in names:
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        unet.add_adapter(config, adapter_name=name)
    if names:
        unet.set_adapters(list(names))
    return unet


def drawn(unet):
    torch.manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 3, 8)).sample


def at(strength):
    """What is drawn with the LoRA at this strength, never fused."""
    unet = made("a")
    unet.set_adapters("a", float(strength))
    return drawn(unet)


STRENGTHS = (0, 0.125, 0.25, 0.5, 1)
WANTED = {strength: at(strength) for strength in STRENGTHS}


def told(unet):
    """The strength whose picture this is, within rounding."""
    picture = drawn(unet)
    nearest = min(STRENGTHS, key=lambda strength: (picture - WANTED[strength]).norm().item())
    assert torch.allclose(picture, WANTED[nearest], atol=1e-4)
    return nearest


as_described = []
unet = made("a")
print("strength before:", told(unet))
for scale, left in ((0.5, 0.5), (0.5, 0.25), (1, 0.25), (0, 0), (1, 0)):
    unet.fuse_lora(lora_scale=scale)
    found = [told(unet)]
    unet.unfuse_lora()
    found.append(told(unet))
    print(f"fuse_lora(lora_scale={scale}): {found[0]}, after unfuse_lora: {found[1]}")
    as_described.append(found == [left, left])
unet.set_adapters("a", 1.0)
print("after set_adapters:", told(unet))
as_described.append(told(unet) == 1)

unet = made("a", "b")
unet.fuse_lora(lora_scale=0.5, adapter_names=["a"])
unet.unfuse_lora()
scales = dict(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.scaling)
print("two adapters, a fused at 0.5 and unfused: scaling", scales)
as_described.append(scales == {"a": 0.5, "b": 0.5})
sys.exit(0 if all(as_described) else 1)
PYTHON
