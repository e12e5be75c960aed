#!/usr/bin/env bash
# In compel the words of a prompt with a weight of 0 come back as soon as there are two of them.
#
# compel's weights below 1 mix the prompt's embedding with one of the prompt without the word: 0.5
# is half-way, 0 is the prompt without it, which is another thing than a negative prompt. One
# would guess that this holds for every word that has such a weight: "(red)0 hat, (big)0 cat" is
# neither red nor big, and with 0.5 both are half gone.
#
# What happens: there is one embedding for each such word, which lacks this word alone, and all
# are averaged with the prompt's own (embeddings_provider.py,
# get_embeddings_for_weighted_prompt_fragments: weights 1 and tan((1 - weight) * pi / 2),
# normalised by their sum). For "(red)0 hat, (big)0 cat" that is the mean of a prompt without
# "red" that has "big" and one without "big" that has "red", and the embedding of "cat" is nearer
# to that of the full prompt than with "red" alone taken out. Two words with 0.5 count two thirds
# each, four with 0.5 four fifths: the more words are weighted down, the less each of them is.
# Both ways to take a word out, MASK and REMOVE, do so. Nothing is logged.
#
# Exits with 1 if two words of weight 0 are both gone, or two words of 0.5 are half gone.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 compel==2.5.1 diffusers==0.42.1 \
    transformers==5.23.0 numpy==2.4.6
cd "$folder"
venv/bin/pip download --quiet --no-deps open_clip_torch==3.3.0
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import gzip
import json
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from compel import Compel, DownweightMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

print(*(f"{name} {version(name)}" for name in ("compel", "diffusers", "transformers", "torch")))

# CLIP's vocabulary, which open_clip carries; the encoder has random weights.
[wheel] = Path().glob("open_clip_torch-*.whl")
with zipfile.ZipFile(wheel) as archive:
    packed = archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
merges = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
words = letters + [f"{letter}</w>" for letter in letters]
words += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
tokenizer = CLIPTokenizer(
    "vocab.json", "merges.txt", pad_token="<|endoftext|>", model_max_length=77
)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
encoder = CLIPTextModel(
    CLIPTextConfig(vocab_size=49408, num_attention_heads=4, eos_token_id=49407, **sizes)
).eval()
CAT = 5  # tokens: start, red, hat, comma, big, cat

as_described = []
for mode in (DownweightMode.MASK, DownweightMode.REMOVE):
    compel = Compel(tokenizer=tokenizer, text_encoder=encoder, downweight_mode=mode)

    @torch.no_grad()
    def cat(prompt):
        """The embedding of the word cat, which has a weight of 1 in all of these prompts."""
        return compel(prompt)[0, CAT]

    def apart(one, other):
        return float((one - other).norm())

    full = cat("red hat, big cat")
    no_red, no_big = cat("(red)0 hat, big cat"), cat("red hat, (big)0 cat")
    neither = cat("(red)0 hat, (big)0 cat")
    print(f"{mode}: the embedding of cat, from that of the full prompt")
    print(f"  (red)0 hat, big cat: {apart(no_red, full):.2f}")
    print(f"  red hat, (big)0 cat: {apart(no_big, full):.2f}")
    print(f"  (red)0 hat, (big)0 cat: {apart(neither, full):.2f}", end="")
    print(f"; from the mean of the two above {apart(neither, (no_red + no_big) / 2):.0e}")
    half, both = cat("(red)0.5 hat, big cat"), cat("(red)0.5 hat, (big)0.5 cat")
    shares = apart(half, (full + no_red) / 2), apart(both, (full + no_red + no_big) / 3)
    print(f"  (red)0.5: {shares[0]:.0e} from the mean of full and without red")
    print(f"  (red)0.5 and (big)0.5: {shares[1]:.0e} from a third each of full, no red, no big")
    as_described += [
        apart(neither, (no_red + no_big) / 2) < 1e-3,
        apart(neither, full) < max(apart(no_red, full), apart(no_big, full)),
        shares[0] < 1e-3,
        shares[1] < 1e-3,
    ]
sys.exit(0 if all(as_described) else 1)
PYTHON
