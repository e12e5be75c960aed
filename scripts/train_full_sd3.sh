#!/usr/bin/env bash
# Full fine-tuning of Stable Diffusion 3.5 Medium on captioned pictures (flow matching).
#
#   bash scripts/download.sh sd35-medium naruto
#   bash scripts/train_full_sd3.sh
#   bash scripts/train_full_sd3.sh --max_train_steps 500 --optimizer adamw8bit
#   DATASET_NAME=/my/pictures OUTPUT_DIR=outputs/mine bash scripts/train_full_sd3.sh
#   ACCELERATE_CONFIG=scripts/accelerate/multi_gpu.yaml NUM_PROCESSES=4 bash scripts/train_full_sd3.sh
#
# Hardware: one GPU with 80 GB. Computed, not measured: float32 weights, gradients and AdamW's state
#   of SD3.5-Medium's 2.24 billion weights take 16 bytes each, 36 GB; the average 9 GB more unless
#   --offload_ema; with activations and all --dry_run computes 50.7 GiB. With --train_dtype bf16 (the
#   optimizer keeps the weights' lower halves) 14 bytes each, with --freeze adaln a third of the weights
#   needs 4 instead of 16.
# Memory and speed of this script, and the quality after so many steps: not measured. A learning rate
#   of 1e-5 with warm-up is cautious; users of other trainers report that larger ones explode.
# What one should see: validation pictures in OUTPUT_DIR/validation/ that take on the drawing style
#   of the data set, and an eval_loss in OUTPUT_DIR/metrics.jsonl that falls.
# The result, OUTPUT_DIR, is a pipeline folder: demo.py --pretrained_model_name_or_path OUTPUT_DIR.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-3.5-medium}"
DATASET_NAME="${DATASET_NAME:-datas/naruto-blip-captions}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/full-sd3}"
RESOLUTION="${RESOLUTION:-1024}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-3000}"
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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sd35-medium (or set MODEL_NAME)" >&2
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
    train_full_sd3.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --dataset_name "$DATASET_NAME" \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --dataloader_num_workers 4 \
    --eval_fraction 0.02 \
    --aspect_buckets \
    --use_ema \
    --ema_decay 0.999 \
    --caption_dropout 0.1 \
    --save_dtype bf16 \
    --learning_rate 1e-5 \
    --lr_scheduler constant_with_warmup \
    --lr_warmup_steps 100 \
    --gradient_checkpointing \
    --train_batch_size 4 \
    --gradient_accumulation_steps 4 \
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
