#!/usr/bin/env bash
# Diffusion-DPO on Stable Diffusion 1.5: every weight learns which of two pictures people preferred.
#
#   bash scripts/download.sh sd15 pick-a-pic-v2
#   bash scripts/train_dpo_sd15.sh
#   NUM_PROCESSES=8 bash scripts/train_dpo_sd15.sh
#   USE_LORA=1 bash scripts/train_dpo_sd15.sh                   # a LoRA: far cheaper
#   DATASET_NAME=/my/pairs OUTPUT_DIR=outputs/mine EFFECTIVE_BATCH_SIZE=256 \
#       bash scripts/train_dpo_sd15.sh --max_train_steps 500
#   bash scripts/train_dpo_sd15.sh --choice_model pickscore     # a model's preferences instead
#   OUTPUT_DIR=outputs/sft-sd15 bash scripts/train_dpo_sd15.sh --sft   # the usual comparison
#
# Settings: the paper's for SD1.5 (Wallace et al. 2023, arXiv:2311.12908; SalesforceAIResearch/
#   DiffusionDPO, launchers/sd15.sh): beta 5000, 2,048 pairs a step, AdamW, a learning rate of 1e-8 a
#   pair (--scale_lr: 2.05e-5), 500 steps of warm-up, 2,000 steps. EFFECTIVE_BATCH_SIZE is reached by
#   accumulation over NUM_PROCESSES x TRAIN_BATCH_SIZE. The rate goes with it: with one pair a step
#   the same flags mean 1e-8 and learn nothing in 2,000 steps (the predecessor of this repository
#   shipped that). For 128 pairs a step, --learning_rate 1.6e-7 means 2.05e-5 again.
# USE_LORA=1: rank 8, 32 pairs a step, a constant 1e-5, 10,000 steps, as diffusers' example has it
#   (examples/research_projects/diffusion_dpo, whose beta of 2500 is 5000 here); it calls itself
#   tested on little data only.
# What it costs: 2,000 x 2,048 = 4.1 million pairs, each two pictures forward and backward and, for
#   the reference, forward once more. Published for the paper's code: 16 GPUs (A100), about 24 hours.
#   Of this script: not measured; --dry_run counts 15,586 TFLOP a step on one GPU, which at a third
#   of an H100's peak would be 47 s, 26 hours in all; the LoRA's 10,000 steps a fifteenth of that.
# Hardware: --dry_run computes 23.9 GiB per GPU (8 pairs at 512 px, with --gradient_checkpointing;
#   float32 weights, AdamW, the frozen reference), the LoRA 8 GiB, both while prompts are drawn and without the
#   allocator's reserve. Not measured.
# Disk: Pick-a-Pic v2 has 851,293 pairs for 58,960 prompts, and its pictures take hundreds of GB
#   (v1: 204 GB). They are encoded at every use, as in the paper's code: a cache of their latents
#   would take 0.26 MB for each (--latent_cache_dir; leave out --no_cache_latents for smaller sets).
#   The embeddings of the prompts take 7 GB (computed). Before the first step every picture is decoded once, to
#   be checked.
# What one should see: the loss starts at 0.6931 exactly and hardly leaves it while pictures get
#   better (DiffusionDPO, issues 1 and 23): look at `accuracy` and `margin` in OUTPUT_DIR/
#   metrics.jsonl, at eval_accuracy on held-out pairs, and at winner_drift: above 0 the winners are
#   drawn worse than before, and the losers worse still. How far it goes: not measured.
# The result, OUTPUT_DIR, is a pipeline folder: demo.py --pretrained_model_name_or_path OUTPUT_DIR.
#   With USE_LORA it is OUTPUT_DIR/pytorch_lora_weights.safetensors.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-v1-5}"
DATASET_NAME="${DATASET_NAME:-datas/pickapic_v2}"
USE_LORA="${USE_LORA:-}" # anything: a LoRA
RESOLUTION="${RESOLUTION:-512}"
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-8}" # pairs per process at a time
SEED="${SEED:-42}"
NUM_PROCESSES="${NUM_PROCESSES:-}" # empty: one, or what ACCELERATE_CONFIG says
# With one_gpu.yaml accelerate would start one process whatever their number.
several=$([[ "${NUM_PROCESSES:-1}" -gt 1 ]] && echo multi || echo one)
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-scripts/accelerate/${several}_gpu.yaml}"

if [[ -n "$USE_LORA" ]]; then
    OUTPUT_DIR="${OUTPUT_DIR:-outputs/dpo-lora-sd15}"
    EFFECTIVE_BATCH_SIZE="${EFFECTIVE_BATCH_SIZE:-32}"
    MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-10000}"
    trained=(--finetune lora --rank 8 --learning_rate 1e-5)
else
    OUTPUT_DIR="${OUTPUT_DIR:-outputs/dpo-sd15}"
    EFFECTIVE_BATCH_SIZE="${EFFECTIVE_BATCH_SIZE:-2048}"
    MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-2000}"
    trained=(--learning_rate 1e-8 --scale_lr --lr_scheduler constant_with_warmup --lr_warmup_steps 500)
fi

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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sd15 (or set MODEL_NAME)" >&2
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
    train_dpo_sd15.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --dataset_name "$DATASET_NAME" \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --dataloader_num_workers 8 \
    --no_cache_latents \
    --on_bad_sample skip \
    --eval_fraction 0.001 \
    --beta_dpo 5000 \
    "${trained[@]}" \
    --adam_weight_decay 1e-2 \
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
