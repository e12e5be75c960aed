#!/usr/bin/env bash
# The tokens that CLIP reads of a typographic apostrophe depend on the version of transformers, and
# in version 4 on whether another package is installed.
#
# CLIP was trained on text that ftfy had cleaned: “I’m” came to it as "I'm", "rock &amp; roll" as
# "rock & roll", full-width letters as plain ones. Captions that a language model wrote are full of
# such quotes. One would guess that a CLIPTokenizer prepares text as CLIP's own code does, or at
# least that one vocabulary gives one answer.
#
# What happens: CLIPTokenizer of transformers 4 cleans by ftfy where ftfy can be imported and else
# in a way of its own that knows neither quotes nor entities (models/clip/tokenization_clip.py,
# __init__); a line in the log is all the difference. The fast tokenizer of version 4 and the only one of version
# 5 (tokenization_clip.py, `normalizer`) have NFC, white space and lower case: the quotes stay, and
# each becomes two or three tokens that CLIP hardly ever saw. open_clip_torch (tokenizer.py,
# basic_clean) cleans quotes and entities. So a cache of text embeddings, a LoRA's captions and the
# prompts at inference may differ between two installations in nothing but this.
#
# Exits with 1 if any of these tokens have changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv old
python3 -m venv new
old/bin/pip install --quiet transformers==4.57.1 numpy==2.3.5
new/bin/pip install --quiet transformers==5.23.0 numpy==2.3.5
old/bin/pip download --quiet --no-deps open_clip_torch==3.3.0
old/bin/python - <<'PYTHON'
# CLIP's vocabulary, which open_clip carries, in the two files that transformers reads.
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
Path("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
PYTHON
cat >show.py <<'PYTHON'
import importlib.util
import json
import sys
from importlib.metadata import version

from transformers import CLIPTokenizer

tokenizer = CLIPTokenizer.from_pretrained(".")
texts = ["I'm here", "I\N{RIGHT SINGLE QUOTATION MARK}m here", "rock &amp; roll", "rock & roll"]
found = [tokenizer(text)["input_ids"][1:-1] for text in texts]
ftfy = "with" if importlib.util.find_spec("ftfy") else "without"
print(f"transformers {version('transformers')} {ftfy} ftfy:", file=sys.stderr)
for text, ids in zip(texts, found):
    print(f"  {text!r}: {tokenizer.convert_ids_to_tokens(ids)}", file=sys.stderr)
print(json.dumps(found))
PYTHON
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
old/bin/python show.py 2>messages >without.json || { cat messages; exit 1; }
grep -vi "pytorch" messages
old/bin/pip install --quiet ftfy==6.3.1
old/bin/python show.py 2>messages >with.json || { cat messages; exit 1; }
grep -vi "pytorch" messages
new/bin/pip install --quiet ftfy==6.3.1
new/bin/python show.py 2>messages >new.json || { cat messages; exit 1; }
grep -vi "pytorch" messages
old/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

without, cleaned, new = (
    json.loads(Path(f"{name}.json").read_text()) for name in ("without", "with", "new")
)
straight, curly, entity, plain = range(4)
as_described = (
    cleaned[curly] == cleaned[straight]
    and without[curly] != without[straight]
    and new[curly] != new[straight]
    and new[straight] == cleaned[straight] == without[straight]
    and cleaned[entity] == cleaned[plain]
    and all(found[entity] != found[plain] for found in (without, new))
)
sys.exit(0 if as_described else 1)
PYTHON
