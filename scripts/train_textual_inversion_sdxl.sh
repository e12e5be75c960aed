#!/usr/bin/env bash
# Textual inversion for Stable Diffusion XL: a new word from a few pictures.
#
#   bash scripts/download.sh sdxl
#   bash scripts/train_textual_inversion_sdxl.sh
#   TRAIN_DIR=/my/cat NEW_TOKEN="<my-cat>" INITIALIZER=cat OUTPUT_DIR=outputs/cat \
#       bash scripts/train_textual_inversion_sdxl.sh
#   NEW_TOKEN="<my-dog>:4" bash scripts/train_textual_inversion_sdxl.sh   # four vectors
#
# The word is learned from pictures that are all called "a photo of <my-dog>"; INSTANCE_PROMPT="" takes
# the folder's own captions, which must have the word.
#
# Settings: those of diffusers' textual_inversion/README_sdxl.md (5e-4 with --scale_lr, batch 1 x 4,
#   500 steps), at 1024 px in place of its 768.
# Hardware: one GPU; nothing but the vectors is trained, and the network's activations are kept all
#   the same. Memory, speed and quality: not measured; --dry_run estimates the first two.
# What one should see: validation pictures in OUTPUT_DIR/validation/ that come to look like the
#   pictures; long before the last step, as a rule.
# The result, OUTPUT_DIR/embeddings/, is a file for each word: see docs/textual_inversion.md.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-xl-base-1.0}"
TRAIN_DIR="${TRAIN_DIR:-datas/dog}"
NEW_TOKEN="${NEW_TOKEN:-<my-dog>}"
INITIALIZER="${INITIALIZER:-dog}" # the word that its vectors begin as
INSTANCE_PROMPT="${INSTANCE_PROMPT-a photo of ${NEW_TOKEN%%:*}}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/textual-inversion-sdxl}"
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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sdxl (or set MODEL_NAME)" >&2
    exit 2
fi
if [[ ! -d "$TRAIN_DIR" ]]; then
    echo "The folder of pictures $TRAIN_DIR is missing (set TRAIN_DIR)" >&2
    exit 2
fi

# Prompts in a file of yours would be drawn beside ours: ours step back.
validation=(--validation_prompt "a photo of ${NEW_TOKEN%%:*} in a bucket" "a photo of a $INITIALIZER")
if [[ " $* " == *" --validation_prompts_file"* ]]; then
    validation=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_textual_inversion_sdxl.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    ${VAE_NAME:+--pretrained_vae_model_name_or_path "$VAE_NAME"} \
    --train_data_dir "$TRAIN_DIR" \
    ${INSTANCE_PROMPT:+--instance_prompt "$INSTANCE_PROMPT"} \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --validation_guidance_scale 5 \
    --validation_inference_steps 30 \
    --new_tokens "$NEW_TOKEN" \
    --initializer_token "$INITIALIZER" \
    --learning_rate 5e-4 \
    --scale_lr \
    --lr_scheduler constant \
    --gradient_checkpointing \
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
