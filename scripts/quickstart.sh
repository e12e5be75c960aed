#!/usr/bin/env bash
# From a fresh clone to a LoRA that works, on a laptop without a GPU.
#
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --max_train_steps 600      flags go to train_lora_sd3.py
#
# It makes .venv and installs (about 3 GB to download), then teaches the pocket SD3, which knows
# six shapes, a seventh: hearts. After the installation it takes about a minute on two CPU cores
# (README.md has the measured time). It leaves outputs/quickstart/before_after.png, the LoRA, and
# prints the eval loss and how often a verifier recognises the hearts, before and after.
# A second run continues or finds everything done; remove outputs/quickstart to begin again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT_DIR="${OUTPUT_DIR:-outputs/quickstart}"
MODEL_NAME=models/pocket-sd3

bash scripts/setup.sh
# Everything that follows lies in the repository.
export HF_HUB_OFFLINE=1
PATH="$PWD/.venv/bin:$PATH"
SECONDS=0

echo "== Training a LoRA on datas/pocket-hearts"
python train_lora_sd3.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --dataset_name datas/pocket-hearts \
    --resolution 64 \
    --max_sequence_length 24 \
    --output_dir "$OUTPUT_DIR" \
    --latent_cache_dir "$OUTPUT_DIR/cache" \
    --rank 16 \
    --learning_rate 1e-3 \
    --lr_scheduler cosine \
    --lr_warmup_steps 20 \
    --train_batch_size 16 \
    --max_train_steps 300 \
    --caption_dropout 0.1 \
    --eval_fraction 0.15 \
    --validation_prompt "a red heart" "two blue hearts" "a star" \
    --validation_guidance_scale 4 \
    --validation_steps 100 \
    --checkpointing_steps 100 \
    --resume_from_checkpoint latest \
    --seed 0 \
    "$@"

echo "== Drawing before and after"
python demo.py \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --lora_weights_path "$OUTPUT_DIR" \
    --compare \
    --prompt "a red heart" "two blue hearts" "a large green heart on the left" \
    "a heart and a star" "a red star" \
    --max_sequence_length 24 \
    --guidance_scale 4 \
    --num_inference_steps 20 \
    --seed 3 \
    --output_dir "$OUTPUT_DIR/demo"
cp "$OUTPUT_DIR/demo/compare.png" "$OUTPUT_DIR/before_after.png"

echo "== Hearts that the verifier recognises"
python -m dojo.pocket.score \
    --pretrained_model_name_or_path "$MODEL_NAME" \
    --lora_weights_path "$OUTPUT_DIR" \
    --shape heart \
    --num_captions 60 \
    --output "$OUTPUT_DIR/scores.json"

python - "$OUTPUT_DIR" <<'PY'
import json
import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
scores = json.loads((folder / "scores.json").read_text())
before, after = scores["base"]["overall"], scores["LoRA"]["overall"]
print(f"eval loss:                 {losses[0]:.4f} before, {losses[-1]:.4f} after")
print(f"hearts as the caption says: {before:.0%} before, {after:.0%} after")
PY
echo "Look at $OUTPUT_DIR/before_after.png. Done in $SECONDS s."
