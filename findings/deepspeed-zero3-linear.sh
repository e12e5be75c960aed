#!/usr/bin/env bash
# DeepSpeed's zero.Init replaces torch's linear for the whole process, and under autocast the new one
# is less exact: for models, too, that DeepSpeed has never seen.
#
# ZeRO-3 deals a network's weights out to the processes. One would guess that this touches the
# network that it is given, and that another model of the process (an autoencoder, a text encoder, a
# frozen reference, a reward) computes what it computed before.
#
# What happens: with memory_efficient_linear, which is on unless it is switched off,
# _enable_mem_efficient_linear (deepspeed/runtime/zero/partition_parameters.py) puts
# zero3_linear_wrap in the place of torch.nn.functional.linear and leaves it there. For inputs of
# more than two dimensions that is a product and an addition (LinearFunctionForZeroStage3.forward in
# zero/linear.py). Under autocast the product is rounded to bfloat16, the bias is added, and the sum
# is rounded once more, where torch's own adds the bias before it rounds once.
#
# Exits with 1 if torch's function is left as it was, or the other model's error does not grow.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 deepspeed==0.19.8 numpy==2.4.6
cd "$folder"
export DS_ACCELERATOR=cpu LOCAL_RANK=0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import sys
from importlib.metadata import version

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from torch import nn

logging.disable(logging.WARNING)
__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
print(*(f"{name} {version(name)}" for name in ("deepspeed", "torch")))
torch.manual_seed(0)
other, tokens = nn.Linear(256, 256), torch.randn(4, 64, 256)
own = nn.functional.linear
with torch.no_grad():
    exact = other.double()(tokens.double())
other.float()


def error():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return (other(tokens).double() - exact).square().mean().sqrt().item()


before = error()
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
shared = nn.Linear(8, 8)
deepspeed.zero.Init(module=shared, config_dict_or_path=settings)
del shared
after = error()
print("torch.nn.functional.linear is now", nn.functional.linear.__name__)
print(f"error of a layer that DeepSpeed has not seen: {before:.5f}, then {after:.5f}")
torch.distributed.destroy_process_group()
as_described = nn.functional.linear is not own and after > 1.1 * before
sys.exit(0 if as_described else "something else than described")
PYTHON
