#!/usr/bin/env bash
# Full fine-tuning of Stable Diffusion 1.5 on captioned pictures (denoising).
#
#   bash scripts/download.sh sd15 naruto
#   bash scripts/train_full_sd15.sh
#   bash scripts/train_full_sd15.sh --max_train_steps 500 --optimizer adamw8bit
#   DATASET_NAME=/my/pictures OUTPUT_DIR=outputs/mine bash scripts/train_full_sd15.sh
#   ACCELERATE_CONFIG=scripts/accelerate/multi_gpu.yaml NUM_PROCESSES=4 bash scripts/train_full_sd15.sh
#
# Settings: those with which Stable Diffusion 1.5 is tuned on the Naruto captions in
#   Zeyi-Lin/Stable-Diffusion-Example, diffusers' train_text_to_image.py: 512 px, centre crop,
#   mirrored at random, batch 1 x 4, 15,000 steps, a constant 1e-5, an average with decay 0.9999.
# Hardware: one GPU. Published for that script: about 22 GB. Computed, not measured: float32
#   weights, gradients and AdamW's state of 860 million weights take 16 bytes each, 13.8 GB, the
#   average 3.4 GB more unless --offload_ema; activations come on top (--dry_run estimates them).
#   Speed, and the quality after so many steps: not measured.
# What one should see: validation pictures in OUTPUT_DIR/validation/ that take on the drawing style
#   of the data set. With a decay of 0.9999 the average, which is what is drawn, follows slowly.
# The result, OUTPUT_DIR, is a pipeline folder: demo.py --pretrained_model_name_or_path OUTPUT_DIR.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-v1-5}"
DATASET_NAME="${DATASET_NAME:-datas/naruto-blip-captions}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/full-sd15}"
RESOLUTION="${RESOLUTION:-512}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-15000}"
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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sd15 (or set MODEL_NAME)" >&2
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
    train_full_sd15.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --dataset_name "$DATASET_NAME" \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --dataloader_num_workers 4 \
    --eval_fraction 0.02 \
    --center_crop \
    --random_flip \
    --validation_guidance_scale 7.5 \
    --validation_inference_steps 30 \
    --use_ema \
    --ema_decay 0.9999 \
    --learning_rate 1e-5 \
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
