#!/usr/bin/env bash
# A LoRA that was hot-swapped has the right strength until set_adapters is called.
#
# load_lora_weights(..., hotswap=True) of diffusers puts the next LoRA into the place of the last,
# for instance of a compiled model that is to draw with many. Each has its own rank and alpha, and
# set_adapters("x", 0.8) then says how strongly it counts. One would guess that 0.8 is the same part
# of its strength as for a LoRA that was loaded in the usual way, and that 1.0 changes nothing.
#
# What happens: hotswap_adapter_from_state_dict (peft/utils/hotswap.py, _update_scaling) writes the
# new alpha / rank into `scaling` and leaves `lora_alpha` and `r` of the layer as they were, and
# set_adapters computes the strength from these (LoraLayer.set_scale). So the new LoRA gets the
# first one's alpha / rank: a LoRA of alpha 1 and rank 16 after one of alpha 16 and rank 16 comes
# out 16 times too strong. A call with scale 0 ends in set_scale as well. Until then, and wherever
# alpha / rank is the same, all is right, which is why a first look finds nothing. Nothing is
# logged.
#
# Exits with 1 if the strength is right after set_adapters, or wrong before.
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
print(*(f"{name} {version(name)}" for name in ("peft", "diffusers", "torch")))


def made():
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
    )
    return unet.eval()


def trained(name, rank, alpha):
    """The folder of a LoRA with random weights."""
    unet = made()
    torch.manual_seed(rank + alpha)
    targets = ["to_q", "to_v"]
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    )
    unet.save_lora_adapter(name)
    return name


def drawn(unet):
    torch.manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 3, 8)).sample


def load(unet, folder, hotswap=False):
    unet.load_lora_adapter(
        folder, prefix=None, adapter_name="x", use_safetensors=True, hotswap=hotswap
    )


as_described = []
for first, second, factor in (
    ((16, 16), (16, 1), 16),
    ((4, 4), (8, 4), 2),
    ((8, 4), (4, 4), 0.5),
    ((8, 8), (4, 4), 1),
):
    folders = [trained("{}-{}".format(*of), *of) for of in (first, second)]
    usual, swapped = made(), made()
    load(usual, folders[1])
    load(swapped, folders[0])
    load(swapped, folders[1], hotswap=True)
    wanted = drawn(usual)
    before = torch.allclose(drawn(swapped), wanted, atol=1e-6)
    swapped.set_adapters("x", 1.0)
    after = torch.allclose(drawn(swapped), wanted, atol=1e-6)
    usual.set_adapters("x", float(factor))
    told = torch.allclose(drawn(swapped), drawn(usual), atol=1e-5)
    print(f"rank, alpha {first}, then {second}: right at first {before}, ", end="")
    print(f"after set_adapters 1.0 {after}, drawn as with {factor:g}: {told}")
    as_described += [before, told, after == (factor == 1)]
sys.exit(0 if all(as_described) else 1)
PYTHON
