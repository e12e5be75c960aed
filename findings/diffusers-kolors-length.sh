#!/usr/bin/env bash
# KolorsPipeline takes max_sequence_length, checks it, and reads 256 tokens whatever it says.
#
# The UNet attends to all tokens of a prompt, padding included: a LoRA that was trained with 77
# tokens (as SimpleTuner trains Kolors) should be drawn with 77. The pipeline's call has
# `max_sequence_length`, by its docs the most tokens of a prompt that are used, and refuses
# 257. One would guess that 77 makes it read 77.
#
# What happens: the call hands the number to `check_inputs` and not to `encode_prompt`
# (pipeline_kolors.py, "3. Encode input prompt"), whose default is 256. The text encoder is asked
# for 256 tokens each time, and the pictures of 256, 77 and 8 are equal bit for bit. `encode_prompt`
# itself obeys. Nothing is logged.
#
# Exits with 1 if the number changes what the encoder is asked or what is drawn.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6 sentencepiece==0.2.3
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import sentencepiece
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.utils import logging

logging.set_verbosity_error()
print(*(f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch")))
torch.manual_seed(0)
with open("tokenizer.model", "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red star on white", "two blue circles"] * 9),
        model_writer=file,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
tokenizer = ChatGLMTokenizer("tokenizer.model")
sizes = dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, kv_channels=8, num_attention_heads=4)
sizes |= dict(padded_vocab_size=tokenizer.vocab_size, original_rope=True)
encoder = ChatGLMModel(ChatGLMModel.config_class(**sizes), empty_init=False)
for param in encoder.parameters():
    torch.nn.init.normal_(param, std=0.2)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    encoder_hid_dim=32,
    encoder_hid_dim_type="text_proj",
    attention_head_dim=8,
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 32,
)
pipeline = KolorsPipeline(
    vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
    text_encoder=encoder,
    tokenizer=tokenizer,
    unet=unet,
    scheduler=EulerDiscreteScheduler(),
)
pipeline.set_progress_bar_config(disable=True)
asked = []
encoder.register_forward_pre_hook(
    lambda _, args, kwargs: asked.append(kwargs["input_ids"].shape[1]), with_kwargs=True
)


def draw(length):
    return pipeline(
        "a red star",
        max_sequence_length=length,
        height=8,
        width=8,
        guidance_scale=1.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


drawn = {length: draw(length) for length in (256, 77, 8)}
print(f"max_sequence_length 256, 77, 8: the encoder reads {asked} tokens")
equal = all(torch.equal(drawn[256], one) for one in drawn.values())
print(f"and the three pictures are {'equal' if equal else 'different'}")
own = pipeline.encode_prompt("a red star", "cpu", 1, False, max_sequence_length=77)[0]
print(f"encode_prompt(max_sequence_length=77) gives {own.shape[1]} tokens")
try:
    draw(257)
    print("257 is taken")
except ValueError as error:
    print(f"257: {error}")
sys.exit(0 if asked[:3] == [256] * 3 and equal and own.shape[1] == 77 else 1)
PYTHON
