#!/usr/bin/env bash
# DreamBooth with LoRA on Stable Diffusion 1.5: one subject from a few pictures of it.
#
#   bash scripts/download.sh sd15
#   bash scripts/train_dreambooth_lora_sd15.sh
#   INSTANCE_DIR=/my/cat INSTANCE_PROMPT="a photo of sks cat" CLASS_PROMPT="a photo of a cat" \
#       OUTPUT_DIR=outputs/cat bash scripts/train_dreambooth_lora_sd15.sh
#   bash scripts/train_dreambooth_lora_sd15.sh --train_text_encoder --text_encoder_lr 5e-6
#
# The class pictures (CLASS_DIR, made once and reused) keep "a photo of a dog" what it was.
#
# Hardware: one GPU; every batch holds as many class pictures as pictures of the subject. Memory,
#   speed and quality of this script: not measured; --dry_run estimates the first two.
# What one should see: validation pictures in OUTPUT_DIR/validation/ that show the subject from step
#   to step, while the class prompt's pictures stay varied.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, loads in plain diffusers.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-v1-5}"
INSTANCE_DIR="${INSTANCE_DIR:-datas/dog}"
INSTANCE_PROMPT="${INSTANCE_PROMPT:-a photo of sks dog}"
CLASS_DIR="${CLASS_DIR:-outputs/class-dog-sd15}"
CLASS_PROMPT="${CLASS_PROMPT:-a photo of a dog}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/dreambooth-lora-sd15}"
RESOLUTION="${RESOLUTION:-512}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-500}"
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
if [[ ! -d "$INSTANCE_DIR" ]]; then
    echo "The folder of pictures $INSTANCE_DIR is missing (set INSTANCE_DIR)" >&2
    exit 2
fi

# Prompts in a file of yours would be drawn beside ours: ours step back.
validation=(--validation_prompt "$INSTANCE_PROMPT in a bucket" "$CLASS_PROMPT")
if [[ " $* " == *" --validation_prompts_file"* ]]; then
    validation=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_dreambooth_lora_sd15.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --instance_data_dir "$INSTANCE_DIR" \
    --instance_prompt "$INSTANCE_PROMPT" \
    --with_prior_preservation \
    --class_data_dir "$CLASS_DIR" \
    --class_prompt "$CLASS_PROMPT" \
    --num_class_images 100 \
    --prior_loss_weight 1.0 \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --validation_guidance_scale 7.5 \
    --validation_inference_steps 30 \
    --rank 16 \
    --lora_alpha 16 \
    --learning_rate 1e-4 \
    --lr_scheduler constant_with_warmup \
    --lr_warmup_steps 50 \
    --train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --max_grad_norm 1.0 \
    --max_train_steps "$MAX_TRAIN_STEPS" \
    --mixed_precision bf16 \
    --allow_tf32 \
    --checkpointing_steps 100 \
    --checkpoints_total_limit 3 \
    --resume_from_checkpoint latest \
    ${validation[@]+"${validation[@]}"} \
    --num_validation_images 2 \
    --validation_steps 100 \
    --report_to tensorboard \
    --seed "$SEED" \
    "$@"
