#!/usr/bin/env bash
# LoRA fine-tuning of Stable Diffusion XL on captioned pictures (denoising).
#
#   bash scripts/download.sh sdxl naruto
#   bash scripts/train_lora_sdxl.sh
#   bash scripts/train_lora_sdxl.sh --max_train_steps 500 --rank 32 --lora_alpha 16
#   MODEL_NAME=/my/sdxl.safetensors DATASET_NAME=/my/pictures OUTPUT_DIR=outputs/mine \
#       bash scripts/train_lora_sdxl.sh --lora_format kohya
#   bash scripts/train_lora_sdxl.sh --train_text_encoder --text_encoder_lr 1e-5
#   ACCELERATE_CONFIG=scripts/accelerate/multi_gpu.yaml NUM_PROCESSES=4 bash scripts/train_lora_sdxl.sh
#
# Settings: 1024 px and a rate of 1e-4, as diffusers' README_sdxl.md and sd-scripts' page of
#   sdxl_train_network.py have it; the latter takes rank 32, alpha 16, and 1e-5 for either text
#   encoder, whose training sd-scripts' page train_SDXL-en.md advises against.
# Hardware: one GPU. --dry_run computes 7.8 GiB for four pictures with --gradient_checkpointing, the
#   autoencoder gone by then, and 77 TFLOP a step; published for sd-scripts: 8 GB, better 10, with
#   checkpointing and an 8-bit optimizer. Memory and speed of this script: not measured.
# The autoencoder runs in float32: SDXL's own overflows in fp16, which is refused. --vae_dtype bf16
#   is for less memory, or VAE_NAME=models/sdxl-vae-fp16-fix (download.sh sdxl-vae-fp16-fix) with
#   --vae_dtype fp16.
# What one should see: validation pictures in OUTPUT_DIR/validation/ that take on the drawing style
#   of the data set, and an eval_loss in OUTPUT_DIR/metrics.jsonl that falls a little: the noise of
#   a picture is guessed well before any training. After how many steps: not measured.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, loads in plain diffusers.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-xl-base-1.0}"
DATASET_NAME="${DATASET_NAME:-datas/naruto-blip-captions}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/lora-sdxl}"
RESOLUTION="${RESOLUTION:-1024}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-3000}"
VAE_NAME="${VAE_NAME:-}" # another autoencoder: folder, hub id or file; empty: the model's own
SEED="${SEED:-42}"
NUM_PROCESSES="${NUM_PROCESSES:-}" # empty: what ACCELERATE_CONFIG says
# With one_gpu.yaml accelerate would start one process whatever their number.
several=$([[ "${NUM_PROCESSES:-1}" -gt 1 ]] && echo multi || echo one)
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-scripts/accelerate/${several}_gpu.yaml}"

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

if [[ "$MODEL_NAME" == models/* && ! -d "$MODEL_NAME" ]]; then
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sdxl (or set MODEL_NAME)" >&2
    exit 2
fi
if [[ "$DATASET_NAME" == datas/* && ! -d "$DATASET_NAME" ]]; then
    echo "The data folder $DATASET_NAME is missing; fetch it with: bash scripts/download.sh naruto (or set DATASET_NAME)" >&2
    exit 2
fi

# Prompts in a file of yours would be drawn beside ours: ours step back.
validation=(--validation_prompt "a ninja with blue eyes and a green jacket" "a cat in the style of Naruto")
if [[ " $* " == *" --validation_prompts_file"* ]]; then
    validation=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_lora_sdxl.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    ${VAE_NAME:+--pretrained_vae_model_name_or_path "$VAE_NAME"} \
    --dataset_name "$DATASET_NAME" \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --dataloader_num_workers 4 \
    --eval_fraction 0.02 \
    --validation_guidance_scale 5 \
    --validation_inference_steps 30 \
    --rank 16 \
    --lora_alpha 16 \
    --learning_rate 1e-4 \
    --lr_scheduler constant_with_warmup \
    --lr_warmup_steps 100 \
    --gradient_checkpointing \
    --train_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --max_grad_norm 1.0 \
    --max_train_steps "$MAX_TRAIN_STEPS" \
    --mixed_precision bf16 \
    --allow_tf32 \
    --checkpointing_steps 500 \
    --checkpoints_total_limit 3 \
    --resume_from_checkpoint latest \
    ${validation[@]+"${validation[@]}"} \
    --num_validation_images 2 \
    --validation_steps 500 \
    --report_to tensorboard \
    --seed "$SEED" \
    "$@"
