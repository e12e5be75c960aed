#!/usr/bin/env bash
# Diffusion-DPO on Stable Diffusion XL: every weight learns which of two pictures people preferred.
#
#   bash scripts/download.sh sdxl pick-a-pic-v2
#   NUM_PROCESSES=16 bash scripts/train_dpo_sdxl.sh
#   USE_LORA=1 bash scripts/train_dpo_sdxl.sh                   # a LoRA: far cheaper
#   DATASET_NAME=/my/pairs OUTPUT_DIR=outputs/mine EFFECTIVE_BATCH_SIZE=256 \
#       bash scripts/train_dpo_sdxl.sh --max_train_steps 500
#   OUTPUT_DIR=outputs/sft-sdxl bash scripts/train_dpo_sdxl.sh --sft   # the usual comparison
#
# Settings: the paper's for SDXL (Wallace et al. 2023, arXiv:2311.12908; SalesforceAIResearch/
#   DiffusionDPO, launchers/sdxl.sh): beta 5000, 2,048 pairs a step, Adafactor, a learning rate of
#   1e-8 a pair (--scale_lr: 2.05e-5), 200 steps of warm-up, 1024 px. EFFECTIVE_BATCH_SIZE is reached
#   by accumulation over NUM_PROCESSES x TRAIN_BATCH_SIZE. The rate goes with it: for 128 pairs a
#   step, --learning_rate 1.6e-7 means 2.05e-5 again. That launcher asks for 2,000 steps and notes
#   30 hours for 200 on 16 GPUs.
#   It also tells the UNet constant sizes; here each picture of a pair has its own size and crop
#   (--micro_conditioning constant is what it does).
# USE_LORA=1: rank 8, 16 pairs a step, a constant 1e-5, 2,000 steps, as diffusers' example has it
#   (examples/research_projects/diffusion_dpo); it calls itself tested on little data only.
# Hardware: --dry_run computes 35.3 GiB per GPU (one pair at 1024 px, with --gradient_checkpointing;
#   float32 weights, Adafactor, the frozen reference) and 64 TFLOP a pair, for the LoRA 6.6 GiB.
#   Not measured.
# The autoencoder, run at every use, is SDXL's own in bfloat16. VAE_NAME=models/sdxl-vae-fp16-fix with
#   --vae_dtype fp16 is the paper's.
# Disk: Pick-a-Pic v2's pictures take hundreds of GB (v1: 204 GB); they are encoded at every use. Its
#   prompts' embeddings (77 x 2048 and 1280 numbers) take about 0.3 MB each in 16 bit: 19 GB (computed).
# What one should see: the loss starts at 0.6931 exactly and hardly leaves it while pictures get
#   better: look at `accuracy` and `margin` in OUTPUT_DIR/metrics.jsonl, at eval_accuracy on
#   held-out pairs, and at winner_drift: above 0 the winners are drawn worse than before, and the
#   losers worse still. How far it goes: not measured.
# The result, OUTPUT_DIR, is a pipeline folder: demo.py --pretrained_model_name_or_path OUTPUT_DIR.
#   With USE_LORA it is OUTPUT_DIR/pytorch_lora_weights.safetensors.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-xl-base-1.0}"
DATASET_NAME="${DATASET_NAME:-datas/pickapic_v2}"
USE_LORA="${USE_LORA:-}" # anything: a LoRA
RESOLUTION="${RESOLUTION:-1024}"
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-1}" # pairs per process at a time
VAE_NAME="${VAE_NAME:-}" # another autoencoder: folder, hub id or file; empty: the model's own
SEED="${SEED:-42}"
NUM_PROCESSES="${NUM_PROCESSES:-}" # empty: one, or what ACCELERATE_CONFIG says
# With one_gpu.yaml accelerate would start one process whatever their number.
several=$([[ "${NUM_PROCESSES:-1}" -gt 1 ]] && echo multi || echo one)
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-scripts/accelerate/${several}_gpu.yaml}"

if [[ -n "$USE_LORA" ]]; then
    OUTPUT_DIR="${OUTPUT_DIR:-outputs/dpo-lora-sdxl}"
    EFFECTIVE_BATCH_SIZE="${EFFECTIVE_BATCH_SIZE:-16}"
    MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-2000}"
    trained=(--finetune lora --rank 8 --learning_rate 1e-5)
else
    OUTPUT_DIR="${OUTPUT_DIR:-outputs/dpo-sdxl}"
    EFFECTIVE_BATCH_SIZE="${EFFECTIVE_BATCH_SIZE:-2048}"
    MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-2000}"
    trained=(--optimizer adafactor --learning_rate 1e-8 --scale_lr)
    trained+=(--lr_scheduler constant_with_warmup --lr_warmup_steps 200)
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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sdxl (or set MODEL_NAME)" >&2
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
    train_dpo_sdxl.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    ${VAE_NAME:+--pretrained_vae_model_name_or_path "$VAE_NAME"} \
    --dataset_name "$DATASET_NAME" \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    --dataloader_num_workers 8 \
    --no_cache_latents \
    --vae_dtype bf16 \
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
