#!/usr/bin/env bash
# DiffusionNFT on Stable Diffusion 3.5 Medium: a LoRA that raises a reward by what came of pictures,
# without likelihoods; --objective ram, awm or dgpo are its siblings (dgpo wants
# whole groups in a batch: on four GPUs --train_batch_size 16 --gradient_accumulation_steps 2).
#
#   bash scripts/download.sh sd35-medium clip-vit-l-14 improved-aesthetic-heads pickscore
#   bash scripts/train_nft_sd3.sh
#   NUM_PROCESSES=4 bash scripts/train_nft_sd3.sh
#   REWARD="pickscore[scale=1/26]" PROMPT_FILE=/my/prompts.txt OUTPUT_DIR=outputs/nft-pickscore \
#       bash scripts/train_nft_sd3.sh
#
# REWARD is what is trained on, EVAL_REWARD what only watches: unset, the first of pickscore (3.9 GB
#   to fetch), hpsv2.1 and imagereward (1.8 GB) that REWARD does not hold; empty, none. `python -m
#   dojo.rewards list` names all scorers with size and licence. What is not in models/ is taken from
#   the hub.
# PROMPT_SET is animals (DDPO's 45, nine of them held out) or pocket; PROMPT_FILE, a prompt per
#   line, wins over it. The embedding of a prompt takes 1.7 MB of disk (computed): see
#   --max_prompts.
# Settings: DiffusionNFT's for SD3.5-Medium (NVlabs/DiffusionNFT, config/nft.py: beta 1, KL 1e-4,
#   LoRA 32/64, no guidance, an average of 0.9, std over all pictures) with three departures that
#   its users' reports speak for: a rate of 1e-4 and not 3e-4, four levels of the noisier half per
#   picture and not nine, 14 steps of the ODE. Two more are for the sake of small machines: an epoch
#   has 8 prompts x 8 pictures on one GPU and 16 x 16 on four, its authors' 48 x 24; and it is always
#   two optimizer steps (64 pictures of a process, 32 a step).
# Work: 14 + 4 x (3 + 1 + 1) = 34 forward passes per picture; GRPO's window takes 19.
# Hardware: --dry_run computes 24.9 GiB per GPU, without the scorers. Memory and speed: not measured.
# What to watch: x0_norm (latents grow, pictures brighten), norm_ratio above 1.05, old_deviate,
#   eval_reward/<held-out> and eval_guided_reward; docs/nft.md says what they mean. Remedies: stop
#   earlier, a lower --learning_rate, --norm_guard 1, a larger --kl_beta.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, holds the averaged weights and loads in
#   plain diffusers. It was trained without guidance: demo.py --guidance_scale 1.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-3.5-medium}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/nft-sd3}"
REWARD="${REWARD:-aesthetic}"
PROMPT_SET="${PROMPT_SET:-animals}"
PROMPT_FILE="${PROMPT_FILE:-}"
RESOLUTION="${RESOLUTION:-512}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-400}" # two an epoch
SEED="${SEED:-42}"
NUM_PROCESSES="${NUM_PROCESSES:-}" # empty: what ACCELERATE_CONFIG says
# With one_gpu.yaml accelerate would start one process whatever their number.
several=$([[ "${NUM_PROCESSES:-1}" -gt 1 ]] && echo multi || echo one)
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-scripts/accelerate/${several}_gpu.yaml}"

# 64 pictures per process: 8 prompts x 8 on one GPU, 16 x 16 on four.
group_size=$([[ "${NUM_PROCESSES:-1}" -ge 4 ]] && echo 16 || echo 8)
num_prompts=$((64 * ${NUM_PROCESSES:-1} / group_size))

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
    train_nft_sd3.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --max_sequence_length 128 \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    ${prompts[@]+"${prompts[@]}"} \
    --num_prompts_per_epoch "$num_prompts" \
    --group_size "$group_size" \
    --reward "$REWARD" \
    --sample_steps 14 \
    --num_train_timesteps 4 \
    --timestep_range 0.5 \
    --guidance_scale 1 \
    --rank 32 \
    --lora_alpha 64 \
    --use_ema \
    --ema_decay 0.9 \
    --learning_rate 1e-4 \
    --train_batch_size 8 \
    --gradient_accumulation_steps 4 \
    --max_grad_norm 1.0 \
    --max_train_steps "$MAX_TRAIN_STEPS" \
    --mixed_precision bf16 \
    --allow_tf32 \
    --checkpointing_steps 20 \
    --checkpoints_total_limit 10 \
    --resume_from_checkpoint latest \
    ${EVAL_REWARD:+--eval_reward "$EVAL_REWARD"} \
    --eval_every 10 \
    --eval_sample_steps 40 \
    --report_to tensorboard \
    --seed "$SEED" \
    "$@"
