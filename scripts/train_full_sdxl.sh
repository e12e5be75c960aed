#!/usr/bin/env bash
# Full fine-tuning of Stable Diffusion XL on captioned pictures (denoising).
#
#   bash scripts/download.sh sdxl naruto
#   bash scripts/train_full_sdxl.sh
#   bash scripts/train_full_sdxl.sh --train_dtype bf16          # less memory
#   bash scripts/train_full_sdxl.sh --use_ema --offload_ema
#   DATASET_NAME=/my/pictures OUTPUT_DIR=outputs/mine bash scripts/train_full_sdxl.sh
#   ACCELERATE_CONFIG=scripts/accelerate/multi_gpu.yaml NUM_PROCESSES=4 bash scripts/train_full_sdxl.sh
#
# Settings: diffusers' README_sdxl.md for the Naruto captions, 1e-6, batch 1 x 4, 10,000 steps, centre
#   crop, mirrored at random, a fifth of the captions dropped; but 1024 px in place of its 512, and
#   Adafactor with a constant rate in place of 8-bit AdamW: for 24 GB, sd-scripts' page
#   train_SDXL-en.md names the former and says that the latter does not seem to work. The rate
#   there, said to be SDXL's own, is 4e-7.
# Hardware: one GPU of 48 GB, with --train_dtype bf16 of 24 GB. --dry_run computes 24.7 GiB, 15.2 with
#   --train_dtype bf16, 43.9 with --optimizer adamw, without allocator's reserve, and 25 TFLOP a
#   picture. Published for sd-scripts with Adafactor: 24 GB. Memory, speed, and the quality after so
#   many steps: not measured.
# What one should see: validation pictures in OUTPUT_DIR/validation/ that take on the drawing style
#   of the data set, slowly.
# The result, OUTPUT_DIR, is a pipeline folder: demo.py --pretrained_model_name_or_path OUTPUT_DIR.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-xl-base-1.0}"
DATASET_NAME="${DATASET_NAME:-datas/naruto-blip-captions}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/full-sdxl}"
RESOLUTION="${RESOLUTION:-1024}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-10000}"
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
    train_full_sdxl.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    ${VAE_NAME:+--pretrained_vae_model_name_or_path "$VAE_NAME"} \
    --dataset_name "$DATASET_NAME" \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --dataloader_num_workers 4 \
    --eval_fraction 0.02 \
    --center_crop \
    --random_flip \
    --validation_guidance_scale 5 \
    --validation_inference_steps 30 \
    --caption_dropout 0.2 \
    --optimizer adafactor \
    --learning_rate 1e-6 \
    --lr_scheduler constant \
    --gradient_checkpointing \
    --train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --max_grad_norm 1.0 \
    --max_train_steps "$MAX_TRAIN_STEPS" \
    --mixed_precision bf16 \
    --allow_tf32 \
    --checkpointing_steps 1000 \
    --checkpoints_total_limit 3 \
    --resume_from_checkpoint latest \
    ${validation[@]+"${validation[@]}"} \
    --num_validation_images 2 \
    --validation_steps 1000 \
    --report_to tensorboard \
    --seed "$SEED" \
    "$@"
