#!/usr/bin/env bash
# DreamBooth with LoRA on Kolors: one subject from a few pictures of it, in Chinese or English.
#
#   bash scripts/download.sh kolors
#   bash scripts/train_dreambooth_lora_kolors.sh
#   INSTANCE_DIR=/my/cat INSTANCE_PROMPT="一张sks猫的照片" CLASS_PROMPT="一张猫的照片" \
#       CLASS_DIR=outputs/class-cat OUTPUT_DIR=outputs/cat bash scripts/train_dreambooth_lora_kolors.sh
#   bash scripts/train_dreambooth_lora_kolors.sh --text_encoder_precision int8
#
# The class pictures (CLASS_DIR, made once and reused) keep "一张狗的照片" what it was.
#
# Settings: rank 4, alpha 4, a rate of 1e-4, 500 steps, 1024 px, which people who train Kolors with
#   DiffSynth-Studio use, with prior preservation besides. Kolors' own train.sh takes rank 4, 2e-5
#   and 2,000 steps in fp16.
# Hardware: one GPU; every batch holds as many class pictures as pictures of the subject. --dry_run
#   computes 14.4 GiB while the text encoder, of 6.2 billion weights, reads the captions, 9.1 with
#   --text_encoder_precision int8, 6.4 with --text_encoder_device cpu, 6.2 for training, and 40 TFLOP
#   a step. Memory, speed and quality of this script: not measured.
# The autoencoder is SDXL's and runs in float32: it overflows in fp16, which is refused. --vae_dtype
#   bf16 is for less memory, or VAE_NAME=models/sdxl-vae-fp16-fix (download.sh sdxl-vae-fp16-fix)
#   with --vae_dtype fp16.
# What one should see: validation pictures in OUTPUT_DIR/validation/ that show the subject from step
#   to step, while the class prompt's pictures stay varied.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, loads in diffusers' KolorsPipeline.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/Kolors}"
INSTANCE_DIR="${INSTANCE_DIR:-datas/dog}"
INSTANCE_PROMPT="${INSTANCE_PROMPT:-一张sks狗的照片}"
CLASS_DIR="${CLASS_DIR:-outputs/class-dog-kolors}"
CLASS_PROMPT="${CLASS_PROMPT:-一张狗的照片}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/dreambooth-lora-kolors}"
RESOLUTION="${RESOLUTION:-1024}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-500}"
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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh kolors (or set MODEL_NAME)" >&2
    exit 2
fi
if [[ ! -d "$INSTANCE_DIR" ]]; then
    echo "The folder of pictures $INSTANCE_DIR is missing (set INSTANCE_DIR)" >&2
    exit 2
fi

# Prompts in a file of yours would be drawn beside ours: ours step back.
# A scene in the language of the prompt: a Chinese one has more than ASCII.
scene=$(LC_ALL=C; [[ "$INSTANCE_PROMPT" == *[![:ascii:]]* ]] && echo "，在雪地里" || echo " in the snow")
validation=(--validation_prompt "$INSTANCE_PROMPT$scene" "$CLASS_PROMPT")
if [[ " $* " == *" --validation_prompts_file"* ]]; then
    validation=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_dreambooth_lora_kolors.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    ${VAE_NAME:+--pretrained_vae_model_name_or_path "$VAE_NAME"} \
    --instance_data_dir "$INSTANCE_DIR" \
    --instance_prompt "$INSTANCE_PROMPT" \
    --with_prior_preservation \
    --class_data_dir "$CLASS_DIR" \
    --class_prompt "$CLASS_PROMPT" \
    --num_class_images 100 \
    --prior_loss_weight 1.0 \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --validation_guidance_scale 5 \
    --validation_inference_steps 50 \
    --rank 4 \
    --lora_alpha 4 \
    --learning_rate 1e-4 \
    --lr_scheduler constant \
    --gradient_checkpointing \
    --train_batch_size 1 \
    --gradient_accumulation_steps 1 \
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
