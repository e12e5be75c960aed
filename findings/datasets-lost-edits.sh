#!/usr/bin/env bash
# datasets' map throws away what a function draws into a picture that came from a file.
#
# One would guess that a function which changes the picture it is given, by thumbnail, by paste or
# with ImageDraw, and returns the row, has changed the data set; and that it makes no difference
# whether the pictures lie in a folder or, as those of the Hub, in Parquet files.
#
# What happens: encode_pil_image (features/image.py) looks at the picture's filename. If there is
# one, only this path is written, whatever was done to the pixels since. Pictures from Parquet have
# none and are kept as changed, and so is a copy, because convert, resize and crop return a new one.
# Shrunk pictures are the full size again, watermarks and masks are gone. Nothing is logged.
#
# Exits with 1 if the edits are kept for pictures from files, or lost for the others.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pillow==13.0.0
cd "$folder"
export HF_HOME=$folder/cache HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

print(*(f"{name} {version(name)}" for name in ("datasets", "pillow")))
RED = (255, 0, 0)
Path("pictures").mkdir()
for i in range(3):
    Image.new("RGB", (96, 64), RED).save(f"pictures/{i}.png")


def shrink(row):
    row["image"].thumbnail((48, 48))
    return row


def blacken(row):
    ImageDraw.Draw(row["image"]).rectangle((0, 0, 96, 64), fill=(0, 0, 0))
    return row


def cover(row):
    row["image"].paste((0, 0, 0), (0, 0, 96, 64))
    return row


def blacken_copy(row):
    return blacken({"image": row["image"].copy()})


files = load_dataset("imagefolder", data_dir="pictures", split="train")
cells = [{"bytes": path.read_bytes(), "path": None} for path in Path("pictures").iterdir()]
features = Features({"image": ImageFeature()})
Dataset.from_dict({"image": cells}, features=features).to_parquet("pictures.parquet")
parquet = load_dataset("parquet", data_files="pictures.parquet", split="train")
changed = {}
for kind, rows in (("files", files), ("parquet", parquet)):
    for edit in (shrink, blacken, cover, blacken_copy):
        picture = rows.map(edit)[0]["image"]
        changed[kind, edit.__name__] = picture.size != (96, 64) or picture.getpixel((1, 1)) != RED
        print(f"{kind}, {edit.__name__}: {picture.size}, pixel {picture.getpixel((1, 1))}")
lost = {key for key, was_kept in changed.items() if not was_kept}
sys.exit(0 if lost == {("files", name) for name in ("shrink", "blacken", "cover")} else 1)
PYTHON
