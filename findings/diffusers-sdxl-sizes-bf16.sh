#!/usr/bin/env bash
# In bfloat16 SDXL's pipeline is told other picture sizes than it was given.
#
# SDXL is told the original size of a picture, its crop and its target size; the numbers go through
# a sinusoidal embedding that is computed in float32. One would guess that a precision of the
# weights does not change them.
#
# What happens: the six numbers are made in the precision of the prompt's embeddings
# (pipeline_stable_diffusion_xl.py, _get_add_time_ids, `torch.tensor([add_time_ids],
# dtype=dtype)`), and bfloat16 has 8 bits: beyond 256 whole numbers are rounded, to multiples of 8
# from 1024 on. original_size=(1333, 2001) draws, bit for bit, the picture of (1336, 2000). In
# float16 and float32 the two differ, as they should. diffusers' training examples cast the numbers
# in the same way (`.to(accelerator.device, dtype=weight_dtype)`), so that a network that is trained
# in bfloat16 never sees most sizes. Nothing is logged.
#
# Exits with 1 if the two sizes give different pictures in bfloat16, or equal ones elsewhere.
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
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging

logging.set_verbosity_error()
print(*(f"{name} {version(name)}" for name in ("diffusers", "torch")))
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type="text_time",
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=6 * 32 + 16,
    use_linear_projection=True,
)
vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
text, pooled = torch.randn(1, 5, 32), torch.randn(1, 16)


def draw(dtype, original_size):
    """Latents of two steps; without guidance, from one seed."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    ).to(dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=text.to(dtype),
        pooled_prompt_embeds=pooled.to(dtype),
        height=8,
        width=8,
        original_size=original_size,
        target_size=(1024, 1024),
        guidance_scale=1.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


as_described = []
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    equal = torch.equal(draw(dtype, (1333, 2001)), draw(dtype, (1336, 2000)))
    print(f"{dtype}: 1333 x 2001 and 1336 x 2000 give {'equal' if equal else 'different'} pictures")
    as_described.append(equal == (dtype == torch.bfloat16))
sys.exit(0 if all(as_described) else 1)
PYTHON
