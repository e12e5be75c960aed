#!/usr/bin/env bash
# In SDXL's second tokenizer every exclamation mark of a prompt becomes the padding token.
#
# OpenCLIP fills captions up with zeros, and 0 is the number of the piece "!" inside a word. So the
# folders of SDXL (tokenizer_2), of SD2 and of SD3's second encoder say `"pad_token": "!"`, to get
# zeros as padding. One would guess that this changes the padding and nothing else: "a cat!" ends
# with the piece "!" at the end of a word, which is number 256, as in OpenCLIP's own tokenizer.
#
# What happens: a padding token is a special token, and special tokens are cut out of the text before
# anything else, wherever they stand (transformers 5: tokenization_utils_tokenizers.py, __init__ of
# TokenizersBackend adds them; 4: tokenization_utils.py). "!" becomes 0, "!!", which is one
# piece (748), becomes 0 0, "!?" (6004) becomes 0 and "?". The encoder was never trained on that;
# its first encoder, whose padding is the end token, reads the same prompt as it should. Nothing is
# logged.
#
# Exits with 1 if the exclamation marks come through.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 4.57.1 5.23.0; do
    python3 -m venv "$version"
    "$version/bin/pip" install --quiet "transformers==$version" numpy==2.3.5
done
5.23.0/bin/pip download --quiet --no-deps open_clip_torch==3.3.0
5.23.0/bin/python - <<'PYTHON'
# CLIP's vocabulary, which open_clip carries, as the two folders that SDXL has.
import gzip
import json
import zipfile
from pathlib import Path

[wheel] = Path().glob("open_clip_torch-*.whl")
with zipfile.ZipFile(wheel) as archive:
    packed = archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
merges = gzip.decompress(packed).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
rest = [byte for byte in range(256) if byte not in printable]
letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
words = letters + [f"{letter}</w>" for letter in letters]
words += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
    folder = Path(name)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
PYTHON
cat >show.py <<'PYTHON'
import sys
from importlib.metadata import version

from transformers import CLIPTokenizer

print(f"transformers {version('transformers')}:")
texts = ["a cat!", "wow!!", "no way!?"]
expected = {
    "tokenizer": [[320, 2368, 256], [2781, 748], [871, 923, 6004]],
    "tokenizer_2": [[320, 2368, 0], [2781, 0, 0], [871, 923, 0, 286]],
}
as_described = []
for name, wanted in expected.items():
    tokenizer = CLIPTokenizer.from_pretrained(name)
    found = [tokenizer(text)["input_ids"][1:-1] for text in texts]
    print(f"  {name}: {dict(zip(texts, found))}")
    as_described.append(found == wanted)
sys.exit(0 if all(as_described) else 1)
PYTHON
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
for version in 4.57.1 5.23.0; do
    "$version/bin/python" -W ignore show.py 2>messages || { cat messages; exit 1; }
done
