#!/usr/bin/env bash
# HunyuanDiTPipeline tells Hunyuan-DiT v1.0 and v1.1 a picture's height and width the wrong way round.
#
# These versions read six numbers beside the text: the size of the picture in its file, the size that
# is drawn, and the corner of its crop. Tencent's training writes them as PIL has sizes, width first
# (hydit/data_loader/arrow_load_stream.py: origin_size = image.size, the target's likewise, the crop
# as x, y), and so does Tencent's own pipeline when it draws (hydit/diffusion/pipeline.py: size_cond =
# src_size_cond + [target_W, target_H, 0, 0]); both read at Tencent/HunyuanDiT@368280ec.
#
# What happens: diffusers' pipeline, whose network is converted from Tencent's without touching these
# numbers, joins `original_size + target_size + crops_coords_top_left` with target_size = (height,
# width) (pipeline_hunyuandit.py, "7 create image_rotary_emb, style embedding & time ids"), which is
# SDXL's order. A picture 96 px wide and 64 high is drawn by a network that is told 64 wide and 96
# high. Nothing is logged, and square pictures are right. `target_size=(width, height)` in the call
# sets it right, and the picture is another one then.
#
# A LoRA trained on the sizes in Tencent's order is drawn with the other one for every picture that
# is no square; one trained in diffusers' order was trained against the base.
#
# Exits with 1 if the width is told first, or if the order changes nothing.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
from diffusers.utils import logging

logging.set_verbosity_error()
print(*(f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch")))
torch.manual_seed(0)
transformer = HunyuanDiT2DModel(
    num_attention_heads=4,
    attention_head_dim=8,
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=32,
    num_layers=4,
    cross_attention_dim=32,
    cross_attention_dim_t5=48,
    pooled_projection_dim=16,
)  # told a style and sizes, as v1.0 and v1.1 are: the class's default
pipeline = HunyuanDiTPipeline(
    vae=AutoencoderKL(block_out_channels=(32,) * 4, norm_num_groups=8,
                      down_block_types=("DownEncoderBlock2D",) * 4,
                      up_block_types=("UpDecoderBlock2D",) * 4),
    text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    transformer=transformer,
    scheduler=DDPMScheduler(prediction_type="v_prediction"),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)
pipeline.set_progress_bar_config(disable=True)
told = []
transformer.register_forward_pre_hook(
    lambda _, given, more: told.append(more["image_meta_size"][0].tolist()), with_kwargs=True
)


def draw(**more):
    return pipeline(
        prompt_embeds=torch.ones(1, 77, 32),
        prompt_attention_mask=torch.ones(1, 77),
        prompt_embeds_2=torch.ones(1, 256, 48),
        prompt_attention_mask_2=torch.ones(1, 256),
        width=96,
        height=64,
        guidance_scale=1.0,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        use_resolution_binning=False,
        **more,
    ).images


plain = draw()
other = draw(target_size=(96, 64))
print(f"96 px wide, 64 px high: the network is told {[int(one) for one in told[0]]}")
print(f"with target_size=(96, 64):                  {[int(one) for one in told[1]]}")
moved = (plain - other).abs().max().item()
print(f"the latents of the two differ by up to {moved:.2g}, their own size is {plain.std():.2g}")
sys.exit(0 if told[0][2:4] == [64, 96] and moved > 0 else 1)
PYTHON
