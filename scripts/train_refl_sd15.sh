#!/usr/bin/env bash
# ReFL on Stable Diffusion 1.5: every weight learns from the gradient of a reward, here ImageReward.
#
#   bash scripts/download.sh sd15 imagereward bert-tokenizer pickscore
#   PROMPT_FILE=/my/refl_data.json bash scripts/train_refl_sd15.sh
#   NUM_PROCESSES=8 PROMPT_FILE=/my/prompts.txt bash scripts/train_refl_sd15.sh
#   PRETRAIN_DATA=/my/pictures bash scripts/train_refl_sd15.sh     # with the paper's second term
#   REWARD="hpsv2.1" OUTPUT_DIR=outputs/refl-hps bash scripts/train_refl_sd15.sh
#   bash scripts/train_refl_sd15.sh --finetune lora --rank 32 --learning_rate 1e-4
#
# REWARD is what is trained on; gradients must pass it (`python -m dojo.rewards list` tells for which
#   they do). EVAL_REWARD only watches: unset, the first of pickscore (3.9 GB to fetch), hpsv2.1 and
#   imagereward that REWARD does not hold; empty, none. What is not in models/ is taken from the hub.
# PROMPT_FILE is .txt with a prompt per line, .jsonl, .csv or .json, such as the authors' own prompts
#   (zai-org/ImageReward, data/refl_data.json, on GitHub); without it PROMPT_SET is taken: animals
#   (DDPO's 45), enough to see that it works, or pocket.
# PRETRAIN_DATA is a folder of captioned pictures. With it the loss that the model was trained with
#   before is added (Xu et al. 2023, arXiv:2304.05977, Equation 5), which keeps pictures from leaving
#   what pictures look like. The authors' public code has left it out, and users got results that
#   were worse than the base model's (ImageReward, issue 95).
# Settings: the authors' (zai-org/ImageReward, ImageReward/ReFL.py): 40 DDPM steps without guidance,
#   the prediction at one of the steps 30 to 39 is scored, loss 1e-3 relu(2 - r), a learning rate of
#   1e-5, 64 pictures a step, 100 steps, an EMA. EFFECTIVE_BATCH_SIZE is reached by accumulation over
#   NUM_PROCESSES x TRAIN_BATCH_SIZE. The margin of 2 is ImageReward's; other rewards have none here
#   and are maximised for ever: give --margin, or stop early.
# Hardware: --dry_run computes 20.9 GiB per GPU (4 pictures at 512 px; float32 weights, AdamW, the
#   average), without what the gradient keeps in the autoencoder, in float32, and ImageReward (1.8 GB). For less: TRAIN_BATCH_SIZE=1, --finetune lora. Not measured.
# Duration: not measured. --dry_run counts 1,966 TFLOP a step on one GPU, which at a third of an
#   H100's peak would be 6 s; decoding and scoring come on top.
# What one should see: `reward` in OUTPUT_DIR/metrics.jsonl and eval_reward on held-out prompts rise
#   within the 100 steps. How far: not measured.
# Reward hacking: a gradient finds what a reward overrates sooner than reinforcement does.
#   eval_reward/<held-out> falls while eval_reward rises, and the pictures in OUTPUT_DIR/validation/
#   take on one style or artefacts. Remedies: fewer steps (a checkpoint every 25), PRETRAIN_DATA, a
#   lower --learning_rate, --margin, a mix of rewards.
# The result, OUTPUT_DIR, is a pipeline folder that holds the averaged weights:
#   demo.py --pretrained_model_name_or_path OUTPUT_DIR.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-v1-5}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/refl-sd15}"
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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sd15 (or set MODEL_NAME)" >&2
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
    train_refl_sd15.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    ${prompts[@]+"${prompts[@]}"} \
    --reward "$REWARD" \
    --sampler ddpm \
    --sample_steps 40 \
    --guidance_scale 1 \
    --grad_scale 1e-3 \
    ${PRETRAIN_DATA:+--pretrain_data_dir "$PRETRAIN_DATA"} \
    --use_ema \
    --learning_rate 1e-5 \
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
