#!/usr/bin/env bash
# ReFL on Stable Diffusion 3.5 Medium: an adapter learns from the gradient of a reward, here
# ImageReward.
#
#   bash scripts/download.sh sd35-medium imagereward bert-tokenizer pickscore
#   PROMPT_FILE=/my/refl_data.json bash scripts/train_refl_sd3.sh
#   NUM_PROCESSES=8 PROMPT_FILE=/my/prompts.txt bash scripts/train_refl_sd3.sh
#   PRETRAIN_DATA=/my/pictures bash scripts/train_refl_sd3.sh      # with the paper's second term
#   REWARD=pickscore OUTPUT_DIR=outputs/draft MAX_TRAIN_STEPS=200 \
#       bash scripts/train_refl_sd3.sh --sample_steps 4 --first_step 3     # DRaFT-1, see below
#
# REWARD is what is trained on; gradients must pass it (`python -m dojo.rewards list` tells for which
#   they do). EVAL_REWARD only watches: unset, the first of pickscore (3.9 GB to fetch), hpsv2.1 and
#   imagereward that REWARD does not hold; empty, none. What is not in models/ is taken from the hub.
# PROMPT_FILE is .txt with a prompt per line, .jsonl, .csv or .json, such as the authors' own prompts
#   (zai-org/ImageReward, data/refl_data.json, on GitHub); without it PROMPT_SET is taken: animals
#   (DDPO's 45), enough to see that it works, or pocket. The embedding of a prompt takes 1.7 MB of
#   disk (computed): see --max_prompts.
# PRETRAIN_DATA is a folder of captioned pictures. With it the loss that the model was trained with
#   before is added (Xu et al. 2023, arXiv:2304.05977, Equation 5), which keeps pictures from leaving
#   what pictures look like.
# Settings: the loss is the authors' for SD1.4 (zai-org/ImageReward, ImageReward/ReFL.py): no
#   guidance, a prediction of the last quarter is scored, loss 1e-3 relu(2 - r), 64 pictures a step,
#   100 steps, an EMA. They have none for SD3: 20 steps of the ODE in place of 40 of DDPM are this
#   repository's choice. The adapter (rank 32, alpha 64, 1e-4, no weight decay) and the DRaFT-1
#   above, four steps of which the last, from sigma 0.5, is scored, are UniRL's for SD3.5-Medium and
#   PickScore (Tencent-Hunyuan/UniRL, examples/diffusion/refl_sd3.yaml); it trains 200 steps.
#   EFFECTIVE_BATCH_SIZE is reached by accumulation over NUM_PROCESSES x TRAIN_BATCH_SIZE. The margin
#   of 2 is ImageReward's; other rewards have none here and are maximised for ever: give --margin, or
#   stop early.
# Work: a picture is 17 forward passes without gradients on average and one with, counted as three;
#   DRaFT-1 in four steps is 3 and one.
# Hardware: --dry_run computes 10 GiB while prompts are embedded (T5), then 8.4 GiB (4 pictures at
#   512 px), without what the gradient keeps in the autoencoder, in float32, and ImageReward (1.8 GB).
#   For less: TRAIN_BATCH_SIZE=1, --vae_dtype bf16. With --finetune full 50.1 GiB. Not measured.
# Duration: not measured. --dry_run counts 2,909 TFLOP a step on one GPU, which at a third of an
#   H100's peak would be 9 s, and 886 TFLOP of DRaFT-1; decoding and scoring come on top.
# What one should see: `reward` in OUTPUT_DIR/metrics.jsonl and eval_reward on held-out prompts rise
#   within the 100 steps. How far: not measured.
# Reward hacking: a gradient finds what a reward overrates sooner than reinforcement does.
#   eval_reward/<held-out> falls while eval_reward rises, and the pictures in OUTPUT_DIR/validation/
#   take on one style or artefacts. Remedies: fewer steps (a checkpoint every 25), PRETRAIN_DATA, a
#   lower --learning_rate, --margin, a mix of rewards.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, holds the averaged weights and loads in
#   plain diffusers. It was trained without guidance; the evaluation draws with 4.5.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-3.5-medium}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/refl-sd3}"
REWARD="${REWARD:-imagereward}"
PROMPT_SET="${PROMPT_SET:-animals}"
PROMPT_FILE="${PROMPT_FILE:-}"
PRETRAIN_DATA="${PRETRAIN_DATA:-}" # empty: the reward alone
RESOLUTION="${RESOLUTION:-512}"
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-4}" # pictures per process at a time
EFFECTIVE_BATCH_SIZE="${EFFECTIVE_BATCH_SIZE:-64}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-100}"
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

# A reward that is trained on tells nothing about itself.
for held_out in pickscore hpsv2.1 imagereward ""; do
    if [[ -z "$held_out" || "$REWARD" != *"$held_out"* ]]; then
        break
    fi
done
EVAL_REWARD="${EVAL_REWARD-$held_out}" # set but empty: none

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

if [[ "$MODEL_NAME" == models/* && ! -d "$MODEL_NAME" ]]; then
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sd35-medium (or set MODEL_NAME)" >&2
    exit 2
fi

# Nine held-out animals are few: four pictures of each. The prompts come from one place: ours steps
# back for yours.
prompts=(--prompt_set "$PROMPT_SET" --num_eval_images 4)
if [[ -n "$PROMPT_FILE" ]]; then
    prompts=(--prompt_file "$PROMPT_FILE")
fi
if [[ " $* " == *" --prompt_"* ]]; then
    prompts=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_refl_sd3.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --max_sequence_length 128 \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    ${prompts[@]+"${prompts[@]}"} \
    --reward "$REWARD" \
    --sample_steps 20 \
    --guidance_scale 1 \
    --grad_scale 1e-3 \
    ${PRETRAIN_DATA:+--pretrain_data_dir "$PRETRAIN_DATA"} \
    --finetune lora \
    --rank 32 \
    --lora_alpha 64 \
    --use_ema \
    --learning_rate 1e-4 \
    --adam_weight_decay 0 \
    --gradient_checkpointing \
    --train_batch_size "$TRAIN_BATCH_SIZE" \
    --gradient_accumulation_steps "$((EFFECTIVE_BATCH_SIZE / at_a_time))" \
    --max_grad_norm 1.0 \
    --max_train_steps "$MAX_TRAIN_STEPS" \
    --mixed_precision bf16 \
    --allow_tf32 \
    --logging_steps 1 \
    --checkpointing_steps 25 \
    --checkpoints_total_limit 4 \
    --resume_from_checkpoint latest \
    ${EVAL_REWARD:+--eval_reward "$EVAL_REWARD"} \
    --validation_steps 25 \
    --report_to tensorboard \
    --seed "$SEED" \
    "$@"
