#!/usr/bin/env bash
# ChatGLMModel, Kolors' text encoder, is not made on the meta device: it takes its memory at once.
#
# A network is made without memory under `torch.device("meta")` or accelerate's
# `init_empty_weights()`, to count its weights or to plan where they go. One would guess that every
# network of diffusers can be.
#
# What happens: the class makes its parts by `torch.nn.utils.skip_init` (text_encoder.py,
# `empty_init=True`), which makes them on the meta device and then asks for memory on the device
# that it was told, and without one on the CPU: 25 GB of float32 for the real sizes. The
# rotary buffer alone stays on the meta device, so that a forward pass fails by mixing both. With
# `empty_init=False` both ways work. Besides, a `ChatGLMConfig` of its own defaults makes no model:
# `original_rope` has none.
#
# Exits with 1 if the default is on the meta device, or empty_init=False is not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6 sentencepiece==0.2.3
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from accelerate import init_empty_weights
from diffusers.pipelines.kolors import ChatGLMModel

print(*(f"{name} {version(name)}" for name in ("diffusers", "transformers", "accelerate", "torch")))
sizes = dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, kv_channels=8, num_attention_heads=4)
Config = ChatGLMModel.config_class
try:
    ChatGLMModel(Config(**sizes, padded_vocab_size=100))
except AttributeError as error:
    print(f"the configuration's own defaults: {error}")
config = Config(**sizes, padded_vocab_size=100, original_rope=True)
as_described = []
for name, context in (
    ('torch.device("meta")', torch.device("meta")),
    ("init_empty_weights()", init_empty_weights()),
):
    with context:
        usual = ChatGLMModel(config)
    where = {param.device.type for param in usual.parameters()}
    print(f"{name}: weights on {', '.join(sorted(where))}")
    as_described.append(where == {"cpu"})
with torch.device("meta"):
    plain = ChatGLMModel(config, empty_init=False)
where = {param.device.type for param in plain.parameters()}
print(f"empty_init=False: weights on {', '.join(sorted(where))}")
sys.exit(0 if all(as_described) and where == {"meta"} else 1)
PYTHON
