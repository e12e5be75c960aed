#!/usr/bin/env bash
# diffusers loses the alphas of the attention layers of a LoRA in kohya's format for SD1.
#
# A file of sd-scripts has one alpha per layer, and the update of a layer is alpha / rank times
# up @ down. Tools that resize a LoRA write files whose alphas differ from layer to layer. One would
# guess that every layer gets its own alpha: feed-forward layers do.
#
# What happens: to_q, to_k, to_v and to_out.0 all get the alpha that is the most common in the file.
# _convert_unet_lora_key (loaders/lora_conversion_utils.py) ends an attention layer's name in
# .processor.to_q_lora.down.weight, _get_alpha_name there cuts names at ".lora." only, and so the
# keys of alpha_pattern, which get_peft_kwargs (utils/peft_utils.py) makes of them, match no module.
# peft warns of patterns that match nothing; load_lora_weights returns as if all were well.
#
# Exits with 1 if the attention layers get their own alphas, or the feed-forward layers do not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 peft==0.21.2 \
    transformers==5.23.0 safetensors==0.8.0 accelerate numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

RANK = 4
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
layers = {
    name: module
    for name, module in unet.named_modules()
    if isinstance(module, torch.nn.Linear) and ".transformer_blocks." in name
}
meant = {name: (1.0, 4.0, 16.0)[i % 3] / RANK for i, name in enumerate(layers)}
state = {}
for name, module in layers.items():
    key = "lora_unet_" + name.replace(".", "_")
    state[f"{key}.lora_down.weight"] = torch.randn(RANK, module.in_features)
    state[f"{key}.lora_up.weight"] = torch.randn(module.out_features, RANK)
    state[f"{key}.alpha"] = torch.tensor(meant[name] * RANK)
save_file(state, "kohya.safetensors")

absent = dict.fromkeys(
    ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
)
pipeline = StableDiffusionPipeline(unet=unet, **absent, requires_safety_checker=False)
pipeline.load_lora_weights(".", weight_name="kohya.safetensors", adapter_name="x")
found = {name: pipeline.unet.get_submodule(name).scaling["x"] for name in layers}

wrong = [name for name in layers if found[name] != meant[name]]
for name in layers:
    if name.startswith("mid_block"):
        print(f"{name}: alpha / rank {meant[name]:g}, used {found[name]:g}")
print(f"{len(wrong)} of {len(layers)} layers at another strength than the file says")
as_described = len(wrong) == 21 and all(".attn" in name for name in wrong)
sys.exit(0 if as_described else 1)
PYTHON
