#!/usr/bin/env bash
# A textual inversion whose name has a capital letter is read with the first of its vectors alone.
#
# load_textual_inversion gives an embedding of n vectors the tokens NAME, NAME_1, ... NAME_<n-1>, and
# the pipelines write all of them where a prompt has NAME. One would guess that the name's letters do
# not matter: published files are called EasyNegative, BadDream or FastNegativeV2.
#
# What happens: since transformers 5 CLIP's tokenizer lower-cases added tokens too, as it does all
# text, and `tokenizer.tokenize("EasyNegative")` says "easynegative". The pipelines look for what it
# says among the tokens that were added (loaders/textual_inversion.py, `_maybe_convert_prompt`:
# `if token in tokenizer.added_tokens_encoder`), which has "EasyNegative": they find nothing and write
# nothing. The prompt still becomes the token of the first vector, so that the embedding does
# something; the other vectors are never read, and nothing is logged.
#
# Where names do not have capitals, the replacement is by text, in the order of a Python set: with
# "badstyle" and "badstyle-v2" in one prompt the longer name is torn apart, and what becomes of
# it changes from process to process with the seed of Python's hashes.
#
# Exits with 1 if all vectors are read.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.3.5
venv/bin/pip download --quiet --no-deps open_clip_torch==3.3.0
cat >script.py <<'PYTHON'
import gzip
import json
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

print(*(f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch")))
# CLIP's vocabulary, which open_clip carries, in the two files that transformers reads.
[wheel] = Path().glob("open_clip_torch-*.whl")
with zipfile.ZipFile(wheel) as archive:
    packed = archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
merges = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
rest = [byte for byte in range(256) if byte not in printable]
letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
words = letters + [f"{letter}</w>" for letter in letters]
words += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")

config = CLIPTextConfig(
    vocab_size=49408,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
)
tokenizer = CLIPTokenizer("vocab.json", "merges.txt", model_max_length=77)
pipeline = StableDiffusionPipeline(
    vae=None,
    text_encoder=CLIPTextModel(config).eval(),
    tokenizer=tokenizer,
    unet=None,
    scheduler=None,
    safety_checker=None,
    feature_extractor=None,
)
read = {}
for name in ("easynegative", "BadDream", "badstyle", "badstyle-v2"):
    pipeline.load_textual_inversion({name: torch.randn(4, 32)})
for prompt in ("easynegative", "BadDream", "baddream"):
    spelled = pipeline.maybe_convert_prompt(prompt, tokenizer)
    ids = tokenizer(spelled)["input_ids"]
    read[prompt] = sum(number >= 49408 for number in ids)
    print(f"{prompt!r}: {read[prompt]} of 4 vectors")
print(repr(pipeline.maybe_convert_prompt("badstyle-v2, badstyle", tokenizer)))
sys.exit(0 if (read["easynegative"], read["BadDream"]) == (4, 1) else 1)
PYTHON
for seed in 1 2 3; do
    PYTHONHASHSEED=$seed HF_HUB_OFFLINE=1 venv/bin/python -W ignore script.py
done
