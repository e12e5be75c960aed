#!/usr/bin/env bash
# diffusers' find_nearest_bucket puts most pictures into the smallest bucket of a list.
#
# Its DreamBooth examples take the sizes to train at as a string, "512,512;1024,1024;1216,832", and
# each picture goes to the "closest" one. One would guess that this is the bucket of the closest
# aspect ratio, and of several the one of the closest size.
#
# What happens: the distance is abs(h * bucket_w - w * bucket_h) (training_utils.py,
# find_nearest_bucket). It measures the aspect ratio, but in numbers that grow with the bucket, so
# that a bucket of half the side is half as far away at the same shape. A picture of 1024 x 1000 is
# trained at 256 x 256 where 1024 x 1024 is in the list, and one of 1216 x 900 is cropped to a
# square of 256 although 1216 x 832 is much nearer in shape and in size. Only a picture of exactly a
# bucket's shape is sure of it, and of two such buckets the last in the list is taken, whichever is
# larger. The place in the list then decides: a square picture of 256 is blown up to 1024. Buckets
# of one area, as in the examples' own text, are chosen rightly. Nothing is logged.
#
# Exits with 1 if one of those pictures gets its bucket, or buckets of one area are chosen wrongly.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math
import random
import sys
from importlib.metadata import version

from diffusers.training_utils import find_nearest_bucket, parse_buckets_string

print(*(f"{name} {version(name)}" for name in ("diffusers", "torch")))


def off(height, width, bucket):
    """How far the bucket's shape is from the picture's: 0 if alike, 0.69 at twice the ratio."""
    return abs(math.log(height / width * bucket[1] / bucket[0]))


mixed = "256,256;512,512;832,1216;1216,832;1024,1024"
buckets = parse_buckets_string(mixed)
print(f"buckets {mixed}")
found = {}
for height, width in ((1024, 1000), (1216, 900), (2000, 1500), (1024, 1024), (256, 256)):
    bucket = buckets[find_nearest_bucket(height, width, buckets)]
    found[height, width] = bucket
    shapes = ", ".join(f"{h}x{w} {off(height, width, (h, w)):.3f}" for h, w in buckets)
    print(f"  {height}x{width} is trained at {bucket[0]}x{bucket[1]}; shapes off by {shapes}")

random.seed(0)
pictures = [(random.randint(256, 2048), random.randint(256, 2048)) for _ in range(2000)]
chosen = [buckets[find_nearest_bucket(*picture, buckets)] for picture in pictures]
smallest = chosen.count((256, 256)) / len(chosen)
print(f"of 2000 sizes between 256 and 2048, {smallest:.0%} are trained at 256x256")

equal = parse_buckets_string("1024,1024;768,1360;1360,768;880,1168;1168,880;1248,832;832,1248")
right = sum(
    equal[find_nearest_bucket(*picture, equal)] == min(equal, key=lambda b: off(*picture, b))
    for picture in pictures
) / len(pictures)
print(f"with buckets of one area {right:.1%} get the closest shape")

as_described = (
    found[1024, 1000] == found[1216, 900] == found[2000, 1500] == (256, 256)
    and found[1024, 1024] == found[256, 256] == (1024, 1024)
    and smallest > 0.5
    and right > 0.99
)
sys.exit(0 if as_described else 1)
PYTHON
