#!/usr/bin/env bash
# With a textual inversion in the prompt, SDXL's pooled embedding forgets the words behind it.
#
# SDXL and SD3 read a prompt twice: token by token, and as one pooled vector, CLIP's output at the
# token that ends the text. load_textual_inversion adds a token to tokenizer and encoder, and one
# would guess that the pooled vector is still that of the end.
#
# What happens: the published encoders have eos_token_id 2 in their config.json (an old mistake of
# the conversion, in SDXL's and SD3's folders alike). For that value transformers looks for the end
# as the largest id of the row (models/clip/modeling_clip.py, `if self.eos_token_id == 2`), which
# 49407 was, until a token was added: 49408 and up are larger. So the pooled vector is taken at the
# first new token, and as CLIP looks only backwards, two prompts that differ behind it have the same
# pooled vector. With eos_token_id 49407 all is well. A comment in transformers knows of it;
# load_textual_inversion of diffusers neither mends the configuration nor says anything.
#
# Exits with 1 if the words behind the new token change the pooled vector.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6
venv/bin/pip download --quiet --no-deps open_clip_torch==3.3.0
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import gzip
import json
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

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


def pooled_change(eos_token_id, prompts):
    """How far apart the pooled vectors of two prompts are."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=16,
        eos_token_id=eos_token_id,
    )
    tokenizers = [CLIPTokenizer.from_pretrained(".", model_max_length=77) for _ in range(2)]
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=None,
        scheduler=None,
    )
    for tokenizer, encoder in zip(
        tokenizers, (pipeline.text_encoder, pipeline.text_encoder_2), strict=True
    ):
        pipeline.load_textual_inversion(
            {"<toy>": torch.randn(1, 32)}, token="<toy>", tokenizer=tokenizer, text_encoder=encoder
        )
    with torch.no_grad():
        pooled = [
            pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[2]
            for prompt in prompts
        ]
    return float((pooled[0] - pooled[1]).norm() / pooled[0].norm())


with_token = ["a <toy> in the snow", "a <toy> on the moon, at night"]
without = ["a cat in the snow", "a cat on the moon, at night"]
found = {
    (eos, kind): pooled_change(eos, prompts)
    for eos in (2, 49407)
    for kind, prompts in (("with the new token", with_token), ("without", without))
}
for (eos, kind), change in found.items():
    print(f"eos_token_id {eos}, {kind}: the pooled vectors of two prompts differ by {change:.1%}")
as_described = [
    (change < 1e-5) == (eos == 2 and kind != "without") for (eos, kind), change in found.items()
]
sys.exit(0 if all(as_described) else 1)
PYTHON
