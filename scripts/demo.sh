#!/usr/bin/env bash
# Pictures from Stable Diffusion 3.5 Medium with a LoRA, side by side with the model without it.
#
#   bash scripts/download.sh sd35-medium
#   bash scripts/demo.sh
#   bash scripts/demo.sh --prompt "a red fox" "a blue boat" --num_images_per_prompt 4
#   LORA_WEIGHTS_PATH= bash scripts/demo.sh        the model alone
#
# Who draws better, by rewards that were not trained on (win rates in versus.json and on the screen,
# the pictures that gained and lost most in versus.png; a row per picture in versus.csv):
#   LORA_WEIGHTS_PATH= bash scripts/demo.sh --versus outputs/lora-sd3 --prompt_file prompts.txt \
#       --reward "pickscore,hpsv2.1=0,aesthetic=0" --num_images_per_prompt 2
#
# Hardware: one GPU. The weights of SD3.5 Medium with its three text encoders take about 16 GB in
#   bfloat16 (2.2 B parameters in the transformer, 4.8 B in T5, 0.8 B in the two CLIPs); with less
#   memory add `--offload model`. Time per picture: not measured.
# What one should see: in OUTPUT_DIR the pictures, prompts.json, and a labelled grid of the same
#   seeds without and with the LoRA.
# The sampler's settings (40 steps, guidance 4.5) are those of the model's card.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-3.5-medium}"
LORA_WEIGHTS_PATH="${LORA_WEIGHTS_PATH-outputs/lora-sd3}" # set but empty: no LoRA
PROMPT="${PROMPT:-a ninja with blue eyes and a green jacket}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/demo}"
RESOLUTION="${RESOLUTION:-1024}"
SEED="${SEED:-42}"

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

if [[ "$MODEL_NAME" == models/* && ! -d "$MODEL_NAME" ]]; then
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sd35-medium (or set MODEL_NAME)" >&2
    exit 2
fi

lora=()
if [[ -n "$LORA_WEIGHTS_PATH" ]]; then
    lora=(--lora_weights_path "$LORA_WEIGHTS_PATH" --compare)
fi

# Prompts in a file of yours would be drawn beside ours: ours step back.
prompt=(--prompt "$PROMPT")
if [[ " $* " == *" --prompt_file"* ]]; then
    prompt=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python3 demo.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    ${lora[@]+"${lora[@]}"} \
    ${prompt[@]+"${prompt[@]}"} \
    --height "$RESOLUTION" \
    --width "$RESOLUTION" \
    --num_inference_steps 40 \
    --guidance_scale 4.5 \
    --dtype bf16 \
    --seed "$SEED" \
    --output_dir "$OUTPUT_DIR" \
    "$@"
