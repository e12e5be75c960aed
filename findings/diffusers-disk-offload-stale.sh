#!/usr/bin/env bash
# diffusers' group offloading to disk gives a second model the weights of the first.
#
# offload_to_disk_path is the folder that enable_group_offload puts a model's weights into while
# they are not needed. One would guess that it holds the weights of the model that was offloaded
# there last, so that the folder can be given again: for the next checkpoint of a training, say.
#
# What happens: ModuleGroup._offload_to_disk (hooks/group_offloading.py) writes a group only if
# there is no file of its name, and then frees the weights all the same. The name is a hash of the
# group's name in the model, "group_<hash>.safetensors", equal for all models of one architecture,
# and nothing removes the files. So a model with a folder that was used before draws with what lies
# there, in this process or any later one. Weights trained while the model is offloaded are lost
# likewise. Nothing is logged.
#
# Exits with 1 if the second model keeps its own weights.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
cat > draw.py <<'PYTHON'
"""Tells which of two models draws when the one of a seed is offloaded to ./offloaded."""

import sys
from importlib.metadata import version

import torch
from diffusers import SD3Transformer2DModel

CPU = torch.device("cpu")


def made(seed):
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
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
    ).eval()


def output(model):
    torch.manual_seed(9)
    latents, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.randn(1, 64)
    with torch.no_grad():
        return model(latents, text, pooled, torch.tensor([500.0])).sample


seed, kind = int(sys.argv[1]), sys.argv[2]
own = {other: output(made(other)) for other in (1, 2)}
model = made(seed)
model.enable_group_offload(
    onload_device=CPU,
    offload_device=CPU,
    offload_type=kind,
    num_blocks_per_group=1,
    offload_to_disk_path="offloaded",
)
drawn = output(model)
nearest = min(own, key=lambda other: float((drawn - own[other]).abs().max()))
gap = float((drawn - own[nearest]).abs().max())
print(f"diffusers {version('diffusers')}: {kind}, model {seed} draws as {nearest}, gap {gap:.1g}")
sys.exit(0 if nearest == 1 and gap < 1e-5 else 1)
PYTHON
for kind in leaf_level block_level; do
    rm -rf offloaded
    for seed in 1 2; do
        "$folder/venv/bin/python" -W ignore draw.py "$seed" "$kind"
    done
done
