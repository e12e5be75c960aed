#!/usr/bin/env bash
# Under DeepSpeed ZeRO-3, accelerate's zero3_init_flag and its context manager change nothing:
# transformers deals out every model that it reads.
#
# A training script for diffusion reads text encoders and an autoencoder beside the network that it
# trains. They are never given to DeepSpeed's engine, so they must not be sharded. accelerate has a
# setting for that (`zero3_init_flag: false` in its YAML files) and DeepSpeedPlugin has
# zero3_init_context_manager(enable=False), round which diffusers' examples read their encoders. One
# would guess that either keeps a model whole.
#
# What happens: set_deepspeed_weakref (accelerate/utils/dataclasses.py) registers ZeRO-3's settings
# with transformers whatever the flag says, and the context manager does no more than call it again.
# from_pretrained (transformers/modeling_utils.py) asks is_deepspeed_zero3_enabled, which looks at
# the stage alone, and reads the model under deepspeed.zero.Init. So each weight is left with no
# elements, and without an engine's hooks a forward pass raises an error about shapes, or about a
# length of 0. unset_hf_deepspeed_config of transformers.integrations does help.
#
# Exits with 1 if the flag or the context manager keeps a model whole, or the last way does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 deepspeed==0.19.8 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6
cd "$folder"
export DS_ACCELERATOR=cpu LOCAL_RANK=0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import sys
from importlib.metadata import version

import torch
import transformers
from accelerate.utils import DeepSpeedPlugin
from deepspeed.ops import __compatible_ops__
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.integrations import unset_hf_deepspeed_config

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
logging.disable(logging.WARNING)
__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
names = ("accelerate", "transformers", "deepspeed", "torch")
print(*(f"{name} {version(name)}" for name in names))
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
tokens = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1}
config = CLIPTextConfig(**sizes, **tokens, num_attention_heads=2)
CLIPTextModel(config).save_pretrained("encoder")


def read(how):
    model = CLIPTextModel.from_pretrained("encoder")
    there = sum(weight.numel() for weight in model.parameters())
    print(f"{how}: {there} numbers in the weights of the text encoder")
    return there


found = [read("without ZeRO-3") > 0]
for flag in (False, True):
    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=flag)
    plugin.select(_from_accelerator_state=True)  # as Accelerator() does
    found.append(read(f"zero3_init_flag {flag}") == 0)
    with plugin.zero3_init_context_manager(enable=False):
        found.append(read(f"zero3_init_flag {flag}, context manager with enable=False") == 0)
unset_hf_deepspeed_config()
found.append(read("after unset_hf_deepspeed_config") > 0)
torch.distributed.destroy_process_group()
sys.exit(0 if all(found) else "something else than described")
PYTHON
