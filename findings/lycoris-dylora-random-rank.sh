#!/usr/bin/env bash
# A DyLoRA of LyCORIS draws with a random rank at every call, and is saved at a fraction of itself.
#
# DyLoRA trains a LoRA in blocks of ranks, so that it can be cut later: each step draws at random
# how many blocks take part. One would guess that this ends with training: that a model in eval
# mode and a merge use all blocks, and that the saved file, which is a plain LoRA of the full
# rank, acts as the trained one with all its blocks does.
#
# What happens:
#  - forward and get_merged_weight (modules/dylora.py) ask get_random_rank_weight whether the
#    model is training or not: each layer of a validation picture has another number of blocks at
#    each step of the sampler, and merge_to merges whichever number came up.
#  - A product of b blocks counts alpha / b there (get_weight), while custom_state_dict writes the
#    same alpha beside all the ranks, and every reader, LyCORIS' own too, takes alpha / rank. The
#    file is weaker than what was trained by the block size: by 4, which is create_lycoris' own
#    choice.
# Nothing is logged.
#
# Exits with 1 if calls or merges are alike in eval mode, or the file has the strength of training.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 lycoris-lora==4.1.3 einops==0.8.2 toml==0.10.2 \
    numpy==2.4.6 safetensors==0.8.0
venv/bin/python -W ignore - <<'PYTHON'
import logging
import random
import sys
from importlib.metadata import version

import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from lycoris.logging import logger

logger.setLevel(logging.ERROR)  # else it tells of each kind of layer that is not there
print(*(f"{name} {version(name)}" for name in ("lycoris-lora", "torch")))
RANK, ALPHA = 16, 16
picture = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 32)).eval()


def trained(block_size):
    """A model with a DyLoRA, with random weights in place of a training, and its network."""
    model = base()
    network = create_lycoris(
        model, linear_dim=RANK, linear_alpha=ALPHA, algo="dylora", block_size=block_size
    )
    network.apply_to()
    for weight in network.parameters():
        weight.data = 0.1 * torch.randn_like(weight)
    return model, network.eval()


def kinds(outputs):
    """How many of these are different."""
    return len({tuple(output.flatten().tolist()) for output in outputs})


random.seed(0)
as_described = []
with torch.no_grad():
    before = base()(picture)
    for block_size in (4, 8):
        blocks = RANK // block_size
        model, network = trained(block_size)
        calls = [model(picture) - before for _ in range(100)]
        network.save_weights("saved.safetensors", torch.float32, {})
        loaded = base()
        create_lycoris_from_weights(1.0, "saved.safetensors", loaded)[0].apply_to()
        file = loaded(picture) - before
        shares = [float((file * call).sum() / call.square().sum()) for call in calls]
        residue = [
            (file - s * call).norm() / file.norm() for s, call in zip(shares, calls, strict=True)
        ]
        full = min(range(100), key=residue.__getitem__)  # the call that the file is a multiple of
        merged = []
        for _ in range(20):
            model, network = trained(block_size)
            network.restore()
            network.merge_to(1.0)
            merged.append(model(picture))
        print(f"rank {RANK} in blocks of {block_size}, alpha {ALPHA}, eval mode:")
        print(f"  100 calls with one input: {kinds(calls)} outputs; 20 merges: {kinds(merged)}")
        print(f"  the saved file has {shares[full]:.3f} of the strength of all blocks", end="")
        print(f" (and is apart from this multiple by {float(residue[full]):.0e})")
        as_described += [
            kinds(calls) == blocks,
            kinds(merged) > 1,
            float(residue[full]) < 1e-4,
            abs(shares[full] - 1 / block_size) < 1e-4,
        ]
sys.exit(0 if all(as_described) else 1)
PYTHON
