#!/usr/bin/env bash
# LoRA fine-tuning of Hunyuan-DiT on pictures with Chinese or English captions (v-prediction).
#
#   bash scripts/download.sh hunyuandit pokemon
#   bash scripts/train_lora_hunyuandit.sh
#   DATASET_NAME=/my/pictures CAPTION_COLUMN=text_zh bash scripts/train_lora_hunyuandit.sh
#   MODEL_NAME=/models/HunyuanDiT/t2i bash scripts/train_lora_hunyuandit.sh --lora_format comfyui
#   bash scripts/train_lora_hunyuandit.sh --rank 64 --lora_alpha 64
#
# Settings: rank 4, alpha 4, a rate of 1e-4, 500 steps, 1024 px, which people who train it with
#   DiffSynth-Studio use. Tencent's own script takes rank 64, 1e-4 and 2,000 steps for 100 pictures.
# Hardware: one GPU. --dry_run computes 5.3 GiB while the autoencoder encodes (an 8 GB card)
#   and 3.9 for training, for one picture with --gradient_checkpointing and 44 TFLOP a step; --fit
#   chooses. Published for Tencent's kohya scripts: 24 GB, with checkpointing 11 GB. Memory and
#   speed of this one: not measured.
# What one should see: validation pictures in OUTPUT_DIR/validation/ that take on the drawing style
#   of the data set, and an eval_loss in OUTPUT_DIR/metrics.jsonl that falls a little. After how many
#   steps: not measured.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, is drawn with by demo.py; diffusers' own
#   pipeline loads no LoRA of this model in one call, and OUTPUT_DIR/README.md says how it is loaded.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/HunyuanDiT}"
DATASET_NAME="${DATASET_NAME:-datas/pokemon-blip-captions}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/lora-hunyuandit}"
# Of that set the Chinese captions; empty: the first column with a usual name.
CAPTION_COLUMN="${CAPTION_COLUMN-$([[ "$DATASET_NAME" != datas/pokemon-* ]] || echo zh_text)}"
RESOLUTION="${RESOLUTION:-1024}"
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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh hunyuandit (or set MODEL_NAME)" >&2
    exit 2
fi
if [[ "$DATASET_NAME" == datas/* && ! -d "$DATASET_NAME" ]]; then
    echo "The data folder $DATASET_NAME is missing; fetch it with: bash scripts/download.sh pokemon (or set DATASET_NAME)" >&2
    exit 2
fi

# Prompts in a file of yours would be drawn beside ours: ours step back.
validation=(--validation_prompt "一只蓝色的卡通小龙" "a drawing of a green pokemon with red eyes")
if [[ " $* " == *" --validation_prompts_file"* ]]; then
    validation=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_lora_hunyuandit.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --dataset_name "$DATASET_NAME" \
    ${CAPTION_COLUMN:+--caption_column "$CAPTION_COLUMN"} \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --dataloader_num_workers 4 \
    --eval_fraction 0.02 \
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
    --checkpointing_steps 250 \
    --checkpoints_total_limit 3 \
    --resume_from_checkpoint latest \
    ${validation[@]+"${validation[@]}"} \
    --num_validation_images 2 \
    --validation_steps 250 \
    --report_to tensorboard \
    --seed "$SEED" \
    "$@"
