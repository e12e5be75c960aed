#!/usr/bin/env bash
# `set_attention_backend` says nothing and changes nothing in SD3, SDXL, SD1.5 and Hunyuan-DiT.
#
# Every model of diffusers has `set_attention_backend(name)`. It refuses a name that it does not
# know and a package that is not installed, so one would guess that a name it takes is used from then
# on. The same is said of the context `attention_backend(name)` and of DIFFUSERS_ATTN_BACKEND.
#
# What happens: only processors that call `dispatch_attention_fn` read it. JointAttnProcessor2_0
# (SD3), AttnProcessor2_0 (all UNets) and HunyuanAttnProcessor2_0 call torch's
# scaled_dot_product_attention themselves (models/attention_processor.py). A setting that no processor
# of the model has is passed over in silence: `if not hasattr(processor, "_attention_backend"):
# continue` (models/modeling_utils.py). Who measures "sage" or "flash" there measures torch twice.
# A kernel that fails whenever it is asked shows it: with Flux's processor the model fails, with the
# others it draws as before.
#
# Exits with 1 if one of those models asks the dispatcher, or Flux does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6
"$folder/bin/python" -W ignore - <<'PYTHON'
import sys

import diffusers
import torch
from diffusers import FluxTransformer2DModel, HunyuanDiT2DModel, SD3Transformer2DModel
from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch

diffusers.utils.logging.set_verbosity_error()
print("diffusers", diffusers.__version__)
registry = attention_dispatch._AttentionBackendRegistry
name = attention_dispatch.AttentionBackendName._NATIVE_MATH


def broken(query, **kwargs):
    raise RuntimeError("the kernel was asked")


registry._backends[name] = broken
torch.manual_seed(0)
text, pooled, half = torch.randn(1, 3, 32), torch.randn(1, 16), torch.tensor([0.5])
latents = torch.randn(1, 4, 8, 8)
models = {
    "SD3": (
        SD3Transformer2DModel(
            sample_size=8, in_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
        ),
        dict(hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled,
             timestep=half),
    ),
    "UNet": (
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
        ),
        dict(sample=latents, timestep=half, encoder_hidden_states=text),
    ),
    "Flux": (
        FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        dict(hidden_states=torch.randn(1, 4, 4), encoder_hidden_states=text,
             pooled_projections=pooled, timestep=half, img_ids=torch.zeros(4, 3),
             txt_ids=torch.zeros(3, 3)),
    ),
}
asked = {}
for kind, (model, inputs) in models.items():
    model.eval().set_attention_backend("_native_math")
    try:
        with torch.no_grad():
            model(**inputs)
        asked[kind] = False
    except RuntimeError as error:
        asked[kind] = str(error) == "the kernel was asked"
    print(f"  {kind}: the backend that was set is asked: {asked[kind]}")
dit = HunyuanDiT2DModel(
    in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16, hidden_size=32,
    sample_size=8, patch_size=2, cross_attention_dim=32, cross_attention_dim_t5=32,
    pooled_projection_dim=16, activation_fn="gelu-approximate",
)
heard = any(hasattr(one, "_attention_backend") for one in dit.attn_processors.values())
print(f"  Hunyuan-DiT: a processor has a place for it: {heard}")
sys.exit(0 if asked == {"SD3": False, "UNet": False, "Flux": True} and not heard else 1)
PYTHON
