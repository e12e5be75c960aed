#!/usr/bin/env bash
# DiffSynth-Studio's reset_lora_rank takes the mean out of a LoRA, and its merge_lora whole layers.
#
# reset_lora_rank writes a LoRA with another rank, and merge_lora adds several up in one file;
# neither is told anything about the data. One would guess that a LoRA of rank 16 that is reset to
# rank 16 or more acts as before, and that a merged one has the layers of all.
#
# What happens: reset_lora_rank (utils/lora/reset_rank.py) calls torch.pca_lowrank, whose `center`
# is on unless it is switched off: from each column of the update it takes the mean over all
# outputs, and nothing adds it again. Of random numbers that is a small part, 2 % for 3072 outputs
# and 12 % for the 64 of Flux's last layer. But what makes a picture brighter or darker as a whole
# is in this mean: of a LoRA that was trained to change a layer in some way and to raise all its
# outputs, the change is kept and nothing at all of the raise, a quarter of the update. merge_lora
# (utils/lora/merge.py) goes by the keys of the first file: layers that the others have beyond them
# are left out. With the files the other way round it raises KeyError. Nothing is logged.
#
# Exits with 1 if a LoRA is the same at its own rank, or if a merged one has all layers.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps diffsynth==2.1.12 # its two files need torch alone
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import runpy
import sys
from importlib.metadata import distribution, version

import torch

print(*(f"{name} {version(name)}" for name in ("diffsynth", "torch")))


def tool(path, name):
    """A function of the package, without all that the package itself imports."""
    return runpy.run_path(str(distribution("diffsynth").locate_file(path)))[name]


reset_lora_rank = tool("diffsynth/utils/lora/reset_rank.py", "reset_lora_rank")
merge_lora = tool("diffsynth/utils/lora/merge.py", "merge_lora")


def lora(down, up, name="layer"):
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def update(of):
    return of["layer.lora_B.weight"] @ of["layer.lora_A.weight"]


def trained():
    """A LoRA of rank 16 that learned some change, and to raise all outputs by 0.1."""
    torch.manual_seed(0)
    down = torch.nn.Parameter(torch.randn(16, 64) / 8)
    up = torch.nn.Parameter(torch.zeros(64, 16))
    change = 0.05 * torch.randn(64, 4) @ torch.randn(4, 64) / 8
    optimizer = torch.optim.AdamW([down, up], lr=1e-3)
    for _ in range(1000):
        inputs = torch.randn(256, 64) + 0.5
        loss = (inputs @ (up @ down - change).T - 0.1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lora(down.detach(), up.detach())


torch.manual_seed(0)
cases = {
    f"random, {outputs} outputs": lora(torch.randn(16, 3072), torch.randn(outputs, 16))
    for outputs in (3072, 64)
}
cases["trained, 64 outputs"] = trained()
as_described = []
for name, before in cases.items():
    wanted = update(before)
    exact = torch.linalg.matrix_rank(wanted) <= 16
    for rank in (16, 32):
        torch.manual_seed(1)
        made = update(reset_lora_rank(before, rank))
        lost = float((made - wanted).norm() / wanted.norm())
        centred = wanted - wanted.mean(0)
        print(f"{name}, rank 16 reset to {rank}: {lost:.3f} of the update lost")
        as_described += [bool(exact), lost > 0.01, torch.allclose(made, centred, atol=1e-3)]
    if "trained" in name:
        inputs = torch.randn(4096, 64) + 0.5
        raised = [float((inputs @ of.T).mean()) for of in (wanted, made)]
        print("  it raises outputs by {:.3f}, and by {:.3f} after".format(*raised))
        as_described += [lost > 0.2, abs(raised[0] - 0.1) < 0.05, abs(raised[1]) < 0.01]

few = lora(torch.randn(4, 64), torch.randn(64, 4), "attention")
many = {**few, **lora(torch.randn(4, 64), torch.randn(64, 4), "feed_forward")}
layers = sorted({key.split(".")[0] for key in merge_lora([few, many])})
print("attention, merged with attention and feed_forward:", *layers)
as_described.append(layers == ["attention"])
try:
    merge_lora([many, few])
    as_described.append(False)
except KeyError as error:
    print("the other way round: KeyError", error)
sys.exit(0 if all(as_described) else 1)
PYTHON
