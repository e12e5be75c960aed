#!/usr/bin/env bash
# DDPO on Stable Diffusion XL: a LoRA that raises a reward, here small JPEG files, then any other.
#
#   bash scripts/download.sh sdxl pickscore
#   bash scripts/train_ddpo_sdxl.sh
#   NUM_PROCESSES=8 bash scripts/train_ddpo_sdxl.sh
#   bash scripts/download.sh sdxl clip-vit-l-14 improved-aesthetic-heads
#   REWARD=aesthetic OUTPUT_DIR=outputs/ddpo-sdxl-aesthetic bash scripts/train_ddpo_sdxl.sh --buffer_size 32
#   SAMPLE_STEPS=50 bash scripts/train_ddpo_sdxl.sh        # DDPO's own number, at 2.6 times the cost
#   bash scripts/train_ddpo_sdxl.sh --train_timesteps window --window_size 4 --guidance_scale 1
#   bash scripts/train_ddpo_sdxl.sh --baseline group --group_size 8 --num_prompts_per_epoch 32   # GRPO
#
# REWARD is what is trained on, EVAL_REWARD what only watches: unset, the first of pickscore (3.9 GB
#   to fetch), hpsv2.1 and imagereward (1.8 GB) that REWARD does not hold; empty, none. `python -m
#   dojo.rewards list` names all scorers with size and licence. What is not in models/ is taken from
#   the hub. jpeg_compressibility needs no network and moves within minutes: begin with it, to see
#   that everything works.
# PROMPT_SET is animals (DDPO's 45, nine of them held out) or pocket; PROMPT_FILE, a prompt per
#   line, wins over it. DDPO judges a picture by its prompt's past: with many prompts, of which each
#   comes too seldom to have one, take groups (--baseline group, the last line above).
# Settings: those of train_ddpo_sd15.sh, which DDPO's authors found for SD1.5 (kvablack/ddpo-pytorch);
#   nobody has published any for SDXL: untried. At 1024 px a latent has four times the numbers, which
#   makes the ratio half as sensitive: the clip range is half of theirs (docs/rl.md has the table).
#   PICTURES_PER_EPOCH is reached by accumulation over NUM_PROCESSES x TRAIN_BATCH_SIZE.
# bf16, where the authors' is fp16: both sides of the ratio run the same code on the same batches and
#   float32 trajectories, so that they do not differ (ratio_max_deviation must be 0; on a GPU: not
#   measured), and bf16 neither overflows nor needs a scaler.
# Hardware: --dry_run computes 8 GiB per GPU, without scorers, with --gradient_checkpointing and the
#   autoencoder in bf16. For less: TRAIN_BATCH_SIZE=1. Not measured.
# Duration: not measured. --dry_run counts 128,118 TFLOP an optimizer step on one GPU, which at a
#   third of an H100's peak would be 6.5 minutes: take NUM_PROCESSES, a window (--train_timesteps
#   window --window_size 4) or fewer pictures (PICTURES_PER_EPOCH=64).
# What one should see: `reward` in OUTPUT_DIR/metrics.jsonl rises within a few epochs, for JPEG size
#   from the first ones on.
# Reward hacking: eval_reward/<held-out> falls while eval_reward rises, diversity falls, eval_kl
#   grows without end, and the pictures in OUTPUT_DIR/validation/ take on one style or lose their
#   content; small files end as pictures of nothing. Remedies: stop earlier (a checkpoint every ten
#   epochs), a lower --learning_rate, --trust_region divergence, several rewards.
# The result, OUTPUT_DIR/pytorch_lora_weights.safetensors, loads in plain diffusers; draw with the
#   guidance it was trained with: demo.py --guidance_scale 5.
#
# Every variable below can be set from the environment; further flags are passed on and win over
# those below. Relative paths start at the repository. The same command again resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME="${MODEL_NAME:-models/stable-diffusion-xl-base-1.0}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/ddpo-sdxl}"
REWARD="${REWARD:-jpeg_compressibility}"
PROMPT_SET="${PROMPT_SET:-animals}"
PROMPT_FILE="${PROMPT_FILE:-}"
RESOLUTION="${RESOLUTION:-1024}"
SAMPLE_STEPS="${SAMPLE_STEPS:-20}"
PICTURES_PER_EPOCH="${PICTURES_PER_EPOCH:-256}" # in two optimizer steps
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-2}" # pictures per process at a time
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-200}" # two an epoch
SEED="${SEED:-42}"
VAE_NAME="${VAE_NAME:-}" # another autoencoder: folder, hub id or file; empty: the model's own
NUM_PROCESSES="${NUM_PROCESSES:-}" # empty: one, or what ACCELERATE_CONFIG says
# With one_gpu.yaml accelerate would start one process whatever their number.
several=$([[ "${NUM_PROCESSES:-1}" -gt 1 ]] && echo multi || echo one)
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-scripts/accelerate/${several}_gpu.yaml}"

at_a_time=$((2 * ${NUM_PROCESSES:-1} * TRAIN_BATCH_SIZE)) # in two optimizer steps
if ((PICTURES_PER_EPOCH % at_a_time)); then
    pictures=$(((PICTURES_PER_EPOCH / at_a_time + 1) * at_a_time))
    echo "$PICTURES_PER_EPOCH pictures are no two steps of NUM_PROCESSES ${NUM_PROCESSES:-1} x TRAIN_BATCH_SIZE $TRAIN_BATCH_SIZE: $pictures an epoch instead" >&2
    PICTURES_PER_EPOCH=$pictures
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
    echo "The model folder $MODEL_NAME is missing; fetch it with: bash scripts/download.sh sdxl (or set MODEL_NAME)" >&2
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

# The bound on the divergence has no clip, and groups have no buffer.
clip=(--clip_range 5e-5)
if [[ " $* " == *" --trust_region"[\ =]"divergence "* ]]; then
    clip=()
fi
buffer=(--buffer_size 16 --buffer_min_count 16)
if [[ " $* " == *" --baseline"[\ =]"group "* ]]; then
    buffer=()
fi

# `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
exec python -m dojo.launch --quiet --config_file "$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
    train_ddpo_sdxl.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    ${VAE_NAME:+--pretrained_vae_model_name_or_path "$VAE_NAME"} \
    --output_dir "$OUTPUT_DIR" \
    --resolution "$RESOLUTION" \
    ${prompts[@]+"${prompts[@]}"} \
    --num_prompts_per_epoch "$PICTURES_PER_EPOCH" \
    --reward "$REWARD" \
    --eta 1 \
    --sample_steps "$SAMPLE_STEPS" \
    --guidance_scale 5 \
    --train_timesteps all \
    ${clip[@]+"${clip[@]}"} \
    ${buffer[@]+"${buffer[@]}"} \
    --rank 4 \
    --lora_alpha 4 \
    --learning_rate 3e-4 \
    --adam_weight_decay 1e-4 \
    --train_batch_size "$TRAIN_BATCH_SIZE" \
    --gradient_accumulation_steps "$((PICTURES_PER_EPOCH / at_a_time))" \
    --max_grad_norm 1.0 \
    --max_train_steps "$MAX_TRAIN_STEPS" \
    --gradient_checkpointing \
    --vae_dtype bf16 \
    --mixed_precision bf16 \
    --allow_tf32 \
    --checkpointing_steps 20 \
    --checkpoints_total_limit 10 \
    --resume_from_checkpoint latest \
    ${EVAL_REWARD:+--eval_reward "$EVAL_REWARD"} \
    --eval_every 10 \
    --eval_sample_steps 30 \
    --report_to tensorboard \
    --seed "$SEED" \
    "$@"
