#!/usr/bin/env bash
# DDPO on Stable Diffusion 3.5 Medium: a LoRA that raises a reward, here the aesthetic score.
#
#   bash scripts/download.sh sd35-medium clip-vit-l-14 improved-aesthetic-heads pickscore
#   bash scripts/train_ddpo_sd3.sh
#   NUM_PROCESSES=4 bash scripts/train_ddpo_sd3.sh
#   REWARD="pickscore[scale=1/26]" OUTPUT_DIR=outputs/ddpo-pickscore bash scripts/train_ddpo_sd3.sh
#   REWARD="aesthetic=0.5,pickscore=1,hpsv2.1=2" bash scripts/train_ddpo_sd3.sh
#   EVAL_REWARD=clip bash scripts/train_ddpo_sd3.sh     # watched by the CLIP that is there already
#
# REWARD is what is trained on, EVAL_REWARD what only watches: unset, the first of pickscore (3.9 GB
#   to fetch), hpsv2.1 and imagereward (1.8 GB) that REWARD does not hold; empty, none. `python -m
#   dojo.rewards list` names all scorers with size and licence. What is not in models/ is taken from
#   the hub. Weights multiply the raw scores: aesthetic is about 5, pickscore 22, hpsv2.1 0.3, and
#   what counts is how far they spread.
# PROMPT_SET is animals (DDPO's 45, nine of them held out) or pocket; PROMPT_FILE, a prompt per
#   line, wins over it. DDPO judges a picture by its prompt's past: with many prompts, of which each
#   comes too seldom to have one, train_grpo_sd3.sh is the better choice.
# Settings: 64 pictures an epoch on one GPU and 256 on four, the number of DDPO's own runs
#   (kvablack/ddpo-pytorch, config/dgx.py), of prompts drawn at random, in two optimizer steps; a
#   prompt is judged by its last 32 scores as soon as it has 16, on one GPU after about nine epochs.
#   The rest is not DDPO's, which trains all of 50 DDIM steps with guidance, but Flow-GRPO's for
#   SD3.5-Medium (yifan123/flow_grpo, config/grpo.py, geneval_sd3_fast_nocfg): no guidance, ten
#   steps of which a window of three among the first five draws noise (CPS, 0.8) and is trained,
#   clip range 1e-5, LoRA 32/64, an EMA. Other sizes change the steps of an epoch, which --dry_run
#   prints; MAX_TRAIN_STEPS has to be a whole number of epochs.
# bf16, although Flow-GRPO's README advises fp16, with which its log-probabilities differ less
#   between sampling and training. Here both run the same code on the same batches and float32
#   trajectories, so that they do not differ (ratio_max_deviation must be 0; on a GPU: not
#   measured), and bf16 neither overflows, as SD3 does in fp16, nor needs a scaler.
# Hardware: --dry_run computes 24.8 GiB per GPU, without the scorers (1.7 GB and 3.9 GB). Before that,
#   while prompts are embedded, T5 takes 10 GB. For less: --train_batch_size 4 --gradient_accumulation_steps 8, or
#   --gradient_checkpointing. Memory and speed of this script: not measured; an optimizer step has
#   1,185 TFLOP per GPU, its share of the sampling included (--dry_run).
# What one should see: `reward` in OUTPUT_DIR/metrics.jsonl must rise clearly within 15 epochs, or
#   something is wrong (Flow-GRPO's author says so of the aesthetic score, its issue 23). How far it
#   goes here: not measured. Published for DDPO on SD1.5: 200 epochs of 256 pictures for the
#   aesthetic score, about 4 hours per 100 epochs on eight A100, unstable when run for long
#   (kvablack/ddpo-pytorch).
# Reward hacking: eval_reward/<held-out> falls while eval_reward rises, diversity falls, eval_kl
#   grows without end, and the pictures in OUTPUT_DIR/validation/ take on one style or artefacts.
#   Remedies: stop earlier (a checkpoint every ten epochs, 0.4 GB each), a lower --learning_rate or
#   one that decays (--lr_scheduler cosine), --ratio guard, several rewards; --beta, a tie to the
#   base, is train_grpo_sd3.sh's.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, holds the averaged weights and loads in
#   plain diffusers. It was trained without guidance: demo.py --guidance_scale 1.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-3.5-medium}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/ddpo-sd3}"
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

# 64 pictures per process, of prompts drawn at random.
num_prompts=$((64 * ${NUM_PROCESSES:-1}))

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

# The bound on the divergence has no clip.
clip=(--clip_range 1e-5)
if [[ " $* " == *" --trust_region"[\ =]"divergence "* ]]; then
    clip=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_ddpo_sd3.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --max_sequence_length 128 \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    ${prompts[@]+"${prompts[@]}"} \
    --num_prompts_per_epoch "$num_prompts" \
    --reward "$REWARD" \
    --sampler cps \
    --noise_level 0.8 \
    --sample_steps 10 \
    --guidance_scale 1 \
    --train_timesteps window \
    --window_size 3 \
    ${clip[@]+"${clip[@]}"} \
    --rank 32 \
    --lora_alpha 64 \
    --use_ema \
    --ema_decay 0.9 \
    --ema_update_every 8 \
    --learning_rate 3e-4 \
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
