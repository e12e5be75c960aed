#!/usr/bin/env bash
# Shows DPO and ReFL at work on the pocket SD1.5, and DPO on the pocket SDXL, without a GPU, and
# measures them.
#
#   bash scripts/prove_preference.sh            meant for 30 minutes on two cores
#   bash scripts/prove_preference.sh --only dpo-sdxl
#                                               one of dpo, sft, refl, refl-pretrain, dpo-sdxl, or
#                                               several; the report has all that are finished
#   bash scripts/prove_preference.sh --short    a handful of steps of each, to see the script
#                                               through; makes no claim (OUTPUT_DIR is
#                                               outputs/proof-preference-short)
#   OUTPUT_DIR=outputs/again bash scripts/prove_preference.sh
#
# SD1.5 draws four pictures of each of some captions, and the verifier ranks them. DPO learns from
# the best and the worst of each, SFT from the best alone; SDXL learns from the same pairs. ReFL is
# taught by pocket-clip, with and without a pre-training loss on drawn scenes. All are LoRA, and are
# measured on captions that none of them has seen. It leaves in OUTPUT_DIR
#   preference.md, preference.json  the table: win rates and scores against the base, and the goals
#   curves.png, pictures.png        what was learned over the steps, and what is drawn now
# and ends with exit code 1 when a goal was missed. A run that was stopped continues, and what is
# done is not done again; remove OUTPUT_DIR to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

known=(dpo sft refl refl-pretrain dpo-sdxl)
source scripts/lib/folder.sh
source scripts/lib/spread.sh

# ---- What is trained and how ----

common=(
    --resolution 64
    --finetune lora
    --rank 16
    --mixed_precision no
    --lr_scheduler cosine # a rate that stays high leaves its noise in the weights
    --use_ema
    --ema_decay 0.98
    --eval_guidance_scale 1 # all learn without guidance, which would multiply what they learned
    --eval_sample_steps 20
    --num_saved_images 12
    --logging_steps 5
    --checkpointing_steps 50
    --checkpoints_total_limit 1
    --resume_from_checkpoint latest
    --report_to none
    --seed 0
)
pairs=(--num_captions 600 --num_images 4 --num_held_out 720 --guidance_scale 1)
preference=(
    --ranked_pairs best_worst
    --no_hflip # left and right mean something here
    --train_batch_size $((32 / processes))
    --eval_fraction 0.08
    --validation_steps 50
)
dpo=(--beta_dpo 500 --learning_rate 2e-4)
sft=(--sft --learning_rate 2e-4)
refl=(
    --reward "clip[model=models/pocket-clip]"
    --eval_reward "pocket,pocket_strict=0"
    --train_batch_size $((16 / processes))
    --sample_steps 20
    --learning_rate 5e-4
    --grad_scale 1
    --validation_steps 60
)
preference_steps=300
refl_steps=240
eval_prompts=60 # of the held-out captions, while ReFL trains
short=()        # wins over all of the above
goals=()

# ---- What is asked for ----

parts=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --only)
            if [[ " ${known[*]} " != *" ${2:-} "* ]]; then
                echo "prove_preference.sh: --only takes one of ${known[*]}" >&2
                exit 2
            fi
            parts+=("$2")
            shift
            ;;
        --short)
            OUTPUT_DIR="${OUTPUT_DIR:-outputs/proof-preference-short}"
            pairs=(--num_captions 12 --num_images 2 --num_held_out 6 --num_inference_steps 2)
            short=(--train_batch_size $((2 / processes)) --validation_steps 2 --eval_sample_steps 2)
            refl+=(--sample_steps 4)
            preference+=(--eval_fraction 0.3)
            preference_steps=3 refl_steps=3 eval_prompts=2
            goals=(--no_goals --num_inference_steps 2)
            ;;
        -h | --help)
            sed -n '2,22s/^# \{0,1\}//p' scripts/prove_preference.sh
            exit 0
            ;;
        *)
            echo "prove_preference.sh: unknown argument '$1' (known: --only, --short, --help;" \
                "OUTPUT_DIR=... chooses the folder)" >&2
            exit 2
            ;;
    esac
    shift
done
[[ ${#parts[@]} -gt 0 ]] || parts=("${known[@]}")
OUTPUT_DIR="${OUTPUT_DIR:-outputs/proof-preference}"
take_folder "$OUTPUT_DIR" pairs/metadata.jsonl

bash scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
# Everything that follows lies in the repository.
export HF_HUB_OFFLINE=1
SECONDS=0

# ---- Pairs and training ----

# train METHOD FAMILY FOLDER STEPS FLAGS...
train() {
    echo "== $3 ($4 steps)"
    # `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
    start "train_$1_$2.py" "${common[@]}" "${@:5}" ${short[@]+"${short[@]}"} \
        --pretrained_model_name_or_path "models/pocket-$2" \
        --max_train_steps "$4" \
        --latent_cache_dir "$OUTPUT_DIR/cache" \
        --output_dir "$OUTPUT_DIR/$3"
}

echo "== pairs"
drawn="$OUTPUT_DIR/pairs"
python -m dojo.pocket.pairs --pretrained_model_name_or_path models/pocket-sd15 \
    --output_dir "$drawn" "${pairs[@]}"

on_pairs=(--dataset_name "$drawn" "${preference[@]}")
prompts=(
    --prompt_file "$drawn/train.txt"
    --eval_prompt_file "$drawn/held_out.txt"
    --num_eval_prompts "$eval_prompts"
)
for part in "${parts[@]}"; do
    case "$part" in
        dpo) train dpo sd15 dpo "$preference_steps" "${on_pairs[@]}" "${dpo[@]}" ;;
        sft) train dpo sd15 sft "$preference_steps" "${on_pairs[@]}" "${sft[@]}" ;;
        dpo-sdxl) train dpo sdxl dpo-sdxl "$preference_steps" "${on_pairs[@]}" "${dpo[@]}" ;;
        refl) train refl sd15 refl "$refl_steps" "${prompts[@]}" "${refl[@]}" ;;
        refl-pretrain)
            train refl sd15 refl-pretrain "$refl_steps" "${prompts[@]}" "${refl[@]}" \
                --pretrain_data_dir "$drawn/scenes"
            ;;
    esac
done

echo "== Before and after"
echo "Trained in $SECONDS s, what was done before not counted."
python -m dojo.pocket.proof_preference --output_dir "$OUTPUT_DIR" ${goals[@]+"${goals[@]}"}
