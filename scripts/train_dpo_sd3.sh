#!/usr/bin/env bash
# Flow-DPO on Stable Diffusion 3.5 Medium: a LoRA learns which of two pictures people preferred.
#
#   bash scripts/download.sh sd35-medium pick-a-pic-v2
#   bash scripts/train_dpo_sd3.sh
#   NUM_PROCESSES=4 bash scripts/train_dpo_sd3.sh
#   DATASET_NAME=outputs/my-pairs OUTPUT_DIR=outputs/dpo-mine \
#       bash scripts/train_dpo_sd3.sh --ranked_pairs best_worst   # pairs of `python -m dojo.pairs`
#   OUTPUT_DIR=outputs/sft-sd3 bash scripts/train_dpo_sd3.sh --sft   # the usual comparison
#
# Settings: there is no recipe of SD3's authors. LoRA 32/64, 16 pairs a step and 1,000 steps are
#   verl-omni's for SD3.5-Medium (examples/dpo_trainer/sd35). Its rate of 2e-4 and its beta of 100 are
#   not: others report that 1e-4 collapses or spikes at a beta of 100 to 500 (Flow-Factory; flow_grpo,
#   issue 47, whose remedy is 2000), so that here it is 5e-5 at 2000. EFFECTIVE_BATCH_SIZE is reached by
#   accumulation over NUM_PROCESSES x TRAIN_BATCH_SIZE.
# --finetune full trains every weight, with a frozen copy as the reference: far more memory, and a
#   rate of about 1e-6.
# What it costs: each pair is two pictures forward and backward and, for the reference, forward once
#   more: eight forward passes. --dry_run counts 1,543 TFLOP a step, which at a third of an H100's peak
#   would be 5 s, 80 minutes in all. Speed: not measured.
# Hardware: --dry_run computes 10 GiB per GPU, while T5 reads the prompts, and 8.3 GiB from then on
#   (while prompts are drawn; one pair at 1024 px, with --gradient_checkpointing). Not measured.
# Disk: Pick-a-Pic v2's pictures take hundreds of GB (v1: 204 GB); they are encoded at every use. A
#   prompt's embedding takes 1.7 MB at 128 tokens of T5 (computed): 98 GB for all 58,960; take some
#   of the pairs (--max_train_samples).
# What one should see: a loss that begins at log 2 = 0.693 and hovers there while win rates rise: look
#   at `accuracy` and `margin` in OUTPUT_DIR/metrics.jsonl, at eval_accuracy on held-out pairs, and at
#   winner_drift: above 0 the winners are drawn worse than before (--winner_preserving_mu 0.9). How
#   far it goes: not measured.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, loads in plain diffusers.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-3.5-medium}"
DATASET_NAME="${DATASET_NAME:-datas/pickapic_v2}"
RESOLUTION="${RESOLUTION:-1024}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/dpo-sd3}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-1000}"
EFFECTIVE_BATCH_SIZE="${EFFECTIVE_BATCH_SIZE:-16}" # pairs a step, over all processes
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-1}" # pairs per process at a time
SEED="${SEED:-42}"
NUM_PROCESSES="${NUM_PROCESSES:-}" # empty: one, or what ACCELERATE_CONFIG says
# With one_gpu.yaml accelerate would start one process whatever their number.
several=$([[ "${NUM_PROCESSES:-1}" -gt 1 ]] && echo multi || echo one)
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-scripts/accelerate/${several}_gpu.yaml}"

at_a_time=$((${NUM_PROCESSES:-1} * TRAIN_BATCH_SIZE))
if ((EFFECTIVE_BATCH_SIZE % at_a_time)); then
    echo "EFFECTIVE_BATCH_SIZE $EFFECTIVE_BATCH_SIZE is no multiple of NUM_PROCESSES ${NUM_PROCESSES:-1} x TRAIN_BATCH_SIZE $TRAIN_BATCH_SIZE; change one of them" >&2
    exit 2
fi

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

if [[ "$MODEL_NAME" == models/* && ! -d "$MODEL_NAME" ]]; then
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sd35-medium (or set MODEL_NAME)" >&2
    exit 2
fi
if [[ "$DATASET_NAME" == datas/* && ! -d "$DATASET_NAME" ]]; then
    echo "The data folder $DATASET_NAME is missing; fetch it with: bash scripts/download.sh pick-a-pic-v2 (or set DATASET_NAME)" >&2
    exit 2
fi

# Prompts in a file of yours would be drawn beside ours: ours step back.
validation=(--validation_prompt "a portrait of an old fisherman, oil painting" "a red fox in the snow")
if [[ " $* " == *" --validation_prompts_file"* ]]; then
    validation=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_dpo_sd3.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --max_sequence_length 128 \
    --dataset_name "$DATASET_NAME" \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --dataloader_num_workers 8 \
    --no_cache_latents \
    --on_bad_sample skip \
    --eval_fraction 0.001 \
    --beta_dpo 2000 \
    --rank 32 \
    --lora_alpha 64 \
    --learning_rate 5e-5 \
    --gradient_checkpointing \
    --train_batch_size "$TRAIN_BATCH_SIZE" \
    --gradient_accumulation_steps "$((EFFECTIVE_BATCH_SIZE / at_a_time))" \
    --max_grad_norm 1.0 \
    --max_train_steps "$MAX_TRAIN_STEPS" \
    --mixed_precision bf16 \
    --allow_tf32 \
    --logging_steps 1 \
    --checkpointing_steps 100 \
    --checkpoints_total_limit 3 \
    --resume_from_checkpoint latest \
    ${validation[@]+"${validation[@]}"} \
    --validation_steps 100 \
    --report_to tensorboard \
    --seed "$SEED" \
    "$@"
