#!/usr/bin/env bash
# LyCORIS merges a LoHa or LoKr at another strength than the one it was trained with.
#
# An adapter's alpha divided by its rank says how strongly its product counts; the forward pass of
# training applies it, and one would guess that `get_merged_weight`, which is there to put the
# adapter into the weights, does the same.
#
# What happens: get_weight (modules/loha.py, modules/lokr.py) has the factor alpha / rank in it
# already, as the forward pass needs, and get_merged_weight multiplies what it returns by the same
# factor once more (get_diff_weight: `scale = self.scale * multiplier`). With
# alpha = 1 and rank = 2 half of what was trained is merged, with the usual alpha = 1 and rank = 16
# a sixteenth. A LoKr with two whole factors has the scale 1 and is merged rightly; so is every
# adapter whose alpha is its rank. Nothing is logged, and the merged model draws something in
# between.
#
# Exits with 1 if the merged weights act as the adapter does.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 lycoris-lora==4.1.3 einops==0.8.2 toml==0.10.2 \
    numpy==2.4.6 safetensors==0.8.0
venv/bin/python -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

print(*(f"{name} {version(name)}" for name in ("lycoris-lora", "torch")))
torch.manual_seed(0)
cases = {
    "LoHa, rank 2, alpha 1": (LohaModule, {"lora_dim": 2, "alpha": 1}, 0.5),
    "LoHa, rank 2, alpha 2": (LohaModule, {"lora_dim": 2, "alpha": 2}, 1.0),
    "LoKr, rank 1, alpha 0.5": (LokrModule, {"lora_dim": 1, "alpha": 0.5, "factor": 4}, 0.5),
    "LoKr, whole factors": (LokrModule, {"lora_dim": 2, "alpha": 1, "full_matrix": True}, 1.0),
}
as_described = []
for name, (kind, options, share) in cases.items():
    base = torch.nn.Linear(16, 16, bias=False)
    weight = base.weight.data.clone()
    module = kind("layer", base, 1.0, **options)
    for parameter in module.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    module.eval()
    picture = torch.randn(3, 16)
    with torch.no_grad():
        trained = module(picture) - picture @ weight.T
        merged = picture @ (module.get_merged_weight(1)[0] - weight).T
    found = float((merged * trained).sum() / trained.square().sum())
    print(f"{name}: {found:.3f} of what the forward pass adds is merged")
    as_described.append(abs(found - share) < 1e-3)
sys.exit(0 if all(as_described) else 1)
PYTHON
