#!/usr/bin/env bash
# Shows reinforcement learning at work on the pocket SD3, without a GPU, and measures it.
#
#   bash scripts/prove_rl.sh                GRPO and DDPO, meant for 30 and 10 minutes on two cores
#   bash scripts/prove_rl.sh --long         GRPO with many more steps: overnight, or on a GPU
#   bash scripts/prove_rl.sh --table        short GRPO runs that differ in one setting each
#   bash scripts/prove_rl.sh --short        a handful of steps of each, to see the script through;
#                                           makes no claim (OUTPUT_DIR is outputs/proof-rl-short)
#   OUTPUT_DIR=outputs/again bash scripts/prove_rl.sh
#
# GRPO learns to draw what the caption says: it is rewarded by the verifier's partial credit and
# measured by its strict score, on captions that it was not trained on. Its base is made first:
# pocket-sd3, trained for some minutes on scenes of which a quarter have another's caption, as
# pictures of the web have. DDPO teaches pocket-sd3 pictures that make small JPEGs. It leaves in
# OUTPUT_DIR
#   rl.md, rl.json                  the table: every quantity before and after, and the goals
#   grpo.png, ddpo.png, table.png   what was reached over minutes and steps
#   grpo_pictures.png, ...          pictures of the same held-out prompts and seeds
# and ends with exit code 1 when a goal was missed. A run that was stopped continues, and what is
# done is not done again; remove OUTPUT_DIR to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL_NAME=models/pocket-sd3
source scripts/lib/folder.sh
source scripts/lib/spread.sh

# ---- What is trained and how ----

small=(
    --resolution 64
    --max_sequence_length 24
    --mixed_precision no # bf16 is faster on some processors, and far slower on others
    --checkpoints_total_limit 1
    --resume_from_checkpoint latest
    --report_to none
    --seed 0
)
base=(
    --train_batch_size $((64 / processes))
    --learning_rate 3e-4
    --lr_scheduler cosine
    --lr_warmup_steps 20
    --flow_shift 1.7
    --no_hflip # left and right mean something here
    --checkpointing_steps 100
)
common=(
    --prompt_set pocket
    --sample_steps 4
    --window_size 1
    --window_first 1 # from sigma 0.90 to 0.75, where the layout is decided
    --window_range 0.5
    --step_weighting velocity
    --train_batch_size 48
    --gradient_accumulation_steps $((4 / processes))
    --clip_range 1e-3
    --lr_scheduler cosine # a rate that stays high leaves its noise in the weights
    --use_ema
    --ema_decay 0.97
    --eval_reward pocket_strict
    --num_eval_prompts 240
    --eval_sample_steps 10
    --eval_every 50
    --num_saved_images 48
    --checkpointing_steps 20
)
grpo=(
    --reward pocket
    --balance task
    --noise_level 0.8
    --learning_rate 1.3e-3
    --num_prompts_per_epoch 24
    --group_size 8
    --branch # half the time, and the pictures differ by the trained step alone
)
ddpo=(
    --reward jpeg_compressibility
    --learning_rate 1e-3
    --num_prompts_per_epoch 192
    --max_prompts 48 # each comes often enough to be judged by its own past
)
# An optimizer step of either method is an epoch of 192 pictures.
base_scenes=6000
base_steps=400
grpo_steps=400
long_steps=8000
ddpo_steps=60
table_steps=60
table=(
    --num_eval_prompts 120
    --eval_every 20
    --num_saved_images 0
)
short=() # wins over all of the above
goals=()

# ---- What is asked for ----

parts=()
for argument in "$@"; do
    case "$argument" in
        --long | --table) parts+=("${argument#--}") ;;
        --short)
            OUTPUT_DIR="${OUTPUT_DIR:-outputs/proof-rl-short}"
            short=(
                --max_prompts 48
                --train_batch_size 8
                --gradient_accumulation_steps $((2 / processes))
                --num_prompts_per_epoch 4
                --group_size 4
                --num_eval_prompts 12
                --num_saved_images 12
                --eval_sample_steps 2
                --eval_every 1
            )
            base_scenes=48 base_steps=4
            base+=(--train_batch_size $((8 / processes)) --checkpointing_steps 2)
            grpo_steps=4 long_steps=6 ddpo_steps=4 table_steps=4
            goals=(--no_goals)
            ;;
        -h | --help)
            sed -n '2,20s/^# \{0,1\}//p' scripts/prove_rl.sh
            exit 0
            ;;
        *)
            echo "prove_rl.sh: unknown argument '$argument' (known: --long, --table, --short," \
                "--help; OUTPUT_DIR=... chooses the folder)" >&2
            exit 2
            ;;
    esac
done
OUTPUT_DIR="${OUTPUT_DIR:-outputs/proof-rl}"
take_folder "$OUTPUT_DIR" scenes/metadata.jsonl ddpo/args.json
if [[ ${#parts[@]} -eq 0 ]]; then
    parts=(grpo ddpo)
fi

bash scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
# Everything that follows lies in the repository.
export HF_HUB_OFFLINE=1
SECONDS=0

# ---- Training ----

# train METHOD FOLDER STEPS FLAGS...
train() {
    echo "== $2 ($3 steps)"
    # `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
    start "train_$1_sd3.py" "${small[@]}" "${common[@]}" "${@:4}" ${short[@]+"${short[@]}"} \
        --max_train_steps "$3" \
        --latent_cache_dir "$OUTPUT_DIR/cache" \
        --output_dir "$OUTPUT_DIR/$2"
}

# make_base makes GRPO's base.
make_base() {
    echo "== base ($base_steps steps)"
    local scenes="$OUTPUT_DIR/scenes"
    if [[ ! -f "$scenes/metadata.jsonl" ]]; then
        python -m dojo.pocket.datasets --set careless --count "$base_scenes" \
            --output_dir "$scenes"
    fi
    start train_full_sd3.py "${small[@]}" "${base[@]}" \
        --pretrained_model_name_or_path "$MODEL_NAME" \
        --dataset_name "$scenes" \
        --max_train_steps "$base_steps" \
        --latent_cache_dir "$OUTPUT_DIR/cache" \
        --output_dir "$OUTPUT_DIR/base"
    grpo+=(--pretrained_model_name_or_path "$OUTPUT_DIR/base")
}

for part in "${parts[@]}"; do
    case "$part" in
        grpo)
            make_base
            train grpo grpo "$grpo_steps" "${grpo[@]}"
            ;;
        ddpo)
            train ddpo ddpo "$ddpo_steps" --pretrained_model_name_or_path "$MODEL_NAME" \
                "${ddpo[@]}"
            ;;
        long)
            make_base
            train grpo grpo-long "$long_steps" "${grpo[@]}"
            ;;
        table)
            make_base
            same=("$table_steps" "${grpo[@]}" "${table[@]}")
            train grpo table/1-as-above "${same[@]}"
            train grpo table/2-sde "${same[@]}" --sampler sde --noise_level 0.7
            train grpo table/3-dance "${same[@]}" --sampler dance --noise_level 0.3
            train grpo table/4-all-steps "${same[@]}" --train_timesteps all
            train grpo table/5-guidance "${same[@]}" --guidance_scale 4
            ;;
    esac
done

echo "== Before and after"
echo "Trained in $SECONDS s, what was done before not counted."
python -m dojo.pocket.proof_rl --output_dir "$OUTPUT_DIR" ${goals[@]+"${goals[@]}"}
