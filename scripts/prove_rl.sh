#!/usr/bin/env bash
# Shows reinforcement learning at work on the pocket SD3, without a GPU, and measures it.
#
#   bash scripts/prove_rl.sh                GRPO and DDPO, meant for 30 and 10 minutes on two cores
#   bash scripts/prove_rl.sh --long         GRPO with many more steps: overnight, or on a GPU
#   bash scripts/prove_rl.sh --table        short GRPO runs that differ in one setting each
#   bash scripts/prove_rl.sh --compare      GRPO in three forms, NFT, RAM, AWM and a control, each with
#                                           at most half of the work of the GRPO above
#   bash scripts/prove_rl.sh --seeds        the best two of the comparison with another seed
#   bash scripts/prove_rl.sh --rewards      the comparison's methods on three rewards, in short runs
#   bash scripts/prove_rl.sh --short        a handful of steps of each, to see the script through;
#                                           makes no claim (OUTPUT_DIR is outputs/proof-rl-short)
#   OUTPUT_DIR=outputs/again bash scripts/prove_rl.sh
#
# GRPO learns to draw what the caption says: it is rewarded by the verifier's partial credit and
# measured by its strict score, on captions that it was not trained on. Its base is made first:
# pocket-sd3, trained for some minutes on scenes of which a quarter have another's caption, as
# pictures of the web have. DDPO teaches pocket-sd3 pictures that make small JPEGs. The comparison
# counts forward passes, those of the sampling, the training and the frozen policies; with the GRPO
# above in the same folder, it says what half of the work reaches. It leaves in OUTPUT_DIR
#   rl.md, rl.json                  the table: every quantity before and after, and the goals
#   grpo.png, ddpo.png, table.png   what was reached over minutes and steps
#   grpo_pictures.png, ...          pictures of the same held-out prompts and seeds
#   arms.md, arms.json, arms.png    the comparison: gain, distance, diversity, work
#   rewards.md, .json, .png         what a thousand forward passes bring on each reward
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
    --train_batch_size 48
    --gradient_accumulation_steps $((4 / processes))
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
way=(
    --window_size 1
    --window_first 1 # from sigma 0.77 to 0.46; of pocket-sd3 itself 0.86 to 0.60
    --window_range 0.5
)
clip=(--clip_range 1e-3)
grpo=(
    --step_weighting velocity
    --reward pocket
    --balance task
    --noise_level 0.8
    --learning_rate 1.3e-3
    --num_prompts_per_epoch 24
    --group_size 8
    --branch # half the time, and the pictures differ by the trained step alone
)
ddpo=(
    "${way[@]}"
    --step_weighting velocity
    --reward jpeg_compressibility
    --learning_rate 1e-3
    --num_prompts_per_epoch 192
    --max_prompts 48 # each comes often enough to be judged by its own past
)
# Every epoch's pictures are learned from twice, in two optimizer steps. In the first the policy is
# the one that drew them, so that no ratio leaves 1: a bound has work to do in the second.
twice=(--num_inner_epochs 2)
finished=(
    --reward pocket
    --balance task
    --num_prompts_per_epoch 24
    --group_size 8
    --num_train_timesteps 2
    --solver ab2 # pictures as good as Euler's in five steps: docs/nft.md
    --sigma_grid even
    --advantage_std group
    --kl_beta 0
    --learning_rate 1e-3
    --ema_decay 0.9
    --eval_every 12
    --eval_guidance_scale 1 # the base draws without, and a second evaluation takes as long
    --checkpointing_steps 5
)
# With one optimizer step an epoch and an old policy that does not lag, nobody need be asked but the
# base: RAM's anchor. AWM is tied to an old policy that lags.
current=(--old_decay_max 0)
# The comparison's GRPO: the same trained step without the pipeline's last one, which moves nothing,
# and a higher rate for the shorter way.
shorter=(
    --sample_steps 3
    --sigma_grid even
    --learning_rate 1.5e-3
)
# An epoch of every method is 192 pictures, and one optimizer step of them where nothing is said.
base_scenes=6000
base_steps=400
grpo_steps=400
long_steps=8000
ddpo_steps=60
table_steps=60
# The comparison: 69,000 to 70,000 forward passes each, and of GRPO, whose pictures are decoded and
# scored most often, half of the proof's minutes. A picture takes 1.6 of GRPO's, 2 where it is learned
# from twice, 11 of NFT's, 12 of RAM's, 13 of AWM's; see dojo.maths.passes.
arms=(grpo grpo-clip grpo-divergence nft awm ram control)
arm_epochs=(220 180 180 33 28 30 33)
# On each of three rewards: 19,000 to 21,000 forward passes.
reward_epochs=(64 52 52 9 8 9)
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
        --long | --table | --compare | --seeds | --rewards) parts+=("${argument#--}") ;;
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
            arm_epochs=(4 2 2 3 3 3 3) reward_epochs=(2 2 2 2 2 2)
            goals=(--no_goals)
            ;;
        -h | --help)
            sed -n '2,27s/^# \{0,1\}//p' scripts/prove_rl.sh
            exit 0
            ;;
        *)
            echo "prove_rl.sh: unknown argument '$argument' (known: --long, --table, --compare," \
                "--seeds, --rewards, --short, --help; OUTPUT_DIR=... chooses the folder)" >&2
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

# make_base makes the base of GRPO and the comparison.
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
    finished+=(--pretrained_model_name_or_path "$OUTPUT_DIR/base")
}

# arm NUMBER FOLDER EPOCHS FLAGS... trains an arm of the comparison.
arm() {
    local name="${arms[$1]}"
    local policy=("${way[@]}" "${grpo[@]}" "${shorter[@]}" "${@:4}")
    local again=("$2" "$((2 * $3))" "${policy[@]}" "${twice[@]}")
    local nft=("$2" "$3" "${finished[@]}" "${@:4}")
    case "$name" in
        grpo) train grpo "$2" "$3" "${policy[@]}" "${clip[@]}" ;;
        grpo-clip) train grpo "${again[@]}" "${clip[@]}" ;;
        grpo-divergence) train grpo "${again[@]}" --trust_region divergence ;;
        nft) train nft "${nft[@]}" "${current[@]}" ;;
        ram) train nft "${nft[@]}" "${current[@]}" --objective ram ;;
        awm) train nft "${nft[@]}" --objective awm ;;
        control) train nft "${nft[@]}" "${current[@]}" --reward dojo.pocket.control:shuffled ;;
    esac
}

rest=no compared=no rewarded=no # which reports there will be
for part in "${parts[@]}"; do
    case "$part" in
        compare | seeds) compared=yes ;;
        rewards) rewarded=yes ;;
        *) rest=yes ;;
    esac
    case "$part" in
        grpo)
            make_base
            train grpo grpo "$grpo_steps" "${way[@]}" "${grpo[@]}" "${clip[@]}"
            ;;
        ddpo)
            train ddpo ddpo "$ddpo_steps" --pretrained_model_name_or_path "$MODEL_NAME" \
                "${ddpo[@]}" "${clip[@]}"
            ;;
        long)
            make_base
            train grpo grpo-long "$long_steps" "${way[@]}" "${grpo[@]}" "${clip[@]}"
            ;;
        table)
            make_base
            same=("$table_steps" "${grpo[@]}" "${clip[@]}" "${table[@]}")
            train grpo table/1-as-above "${same[@]}" "${way[@]}"
            train grpo table/2-sde "${same[@]}" "${way[@]}" --sampler sde --noise_level 0.7
            train grpo table/3-dance "${same[@]}" "${way[@]}" --sampler dance --noise_level 0.3
            train grpo table/4-all-steps "${same[@]}" --train_timesteps all
            train grpo table/5-guidance "${same[@]}" "${way[@]}" --guidance_scale 4
            ;;
        compare)
            make_base
            for i in "${!arms[@]}"; do
                arm "$i" "compare/${arms[i]}" "${arm_epochs[i]}"
            done
            ;;
        seeds)
            make_base
            best="$(python -m dojo.pocket.proof_arms --output_dir "$OUTPUT_DIR" --best 2)"
            for i in "${!arms[@]}"; do
                if grep -qx -- "${arms[i]}" <<<"$best"; then
                    arm "$i" "compare/${arms[i]}-seed1" "${arm_epochs[i]}" --seed 1
                fi
            done
            ;;
        rewards)
            make_base
            for i in "${!reward_epochs[@]}"; do
                few=(
                    "${reward_epochs[i]}"
                    --num_eval_prompts 120
                    --num_saved_images 0
                    --eval_every $(((reward_epochs[i] + 1) / 2))
                )
                arm "$i" "rewards/pocket/${arms[i]}" "${few[@]}"
                arm "$i" "rewards/jpeg/${arms[i]}" "${few[@]}" --reward jpeg_compressibility
                arm "$i" "rewards/clip/${arms[i]}" "${few[@]}" \
                    --reward "clip[model=models/pocket-clip]"
            done
            ;;
    esac
done

echo "== Before and after"
echo "Trained in $SECONDS s, what was done before not counted."
status=0
if [[ "$rest" == yes ]]; then
    python -m dojo.pocket.proof_rl --output_dir "$OUTPUT_DIR" ${goals[@]+"${goals[@]}"} || status=$?
fi
if [[ "$compared" == yes ]]; then
    python -m dojo.pocket.proof_arms --output_dir "$OUTPUT_DIR" ${goals[@]+"${goals[@]}"} ||
        status=$?
fi
if [[ "$rewarded" == yes ]]; then
    python -m dojo.pocket.proof_rewards --output_dir "$OUTPUT_DIR"
fi
exit "$status"
