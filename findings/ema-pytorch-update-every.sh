#!/usr/bin/env bash
# ema-pytorch averages over other times than asked, as soon as it does not update at every step.
#
# PostHocEMA keeps averages of EDM2's kind, whose width is a share of the training, sigma_rel: 0.05
# reaches back over a twentieth of it, and at the end any other width can be put together from
# checkpoints. update_every is there "to save on compute", 10 in the README's examples and 100
# unless it is given. One would guess that a longer interval makes the average coarser, at the same
# width.
#
# What happens: KarrasEMA.beta (post_hoc_ema.py) is the decay of one step, (1 - 1 / step) ** (1 +
# gamma), and is applied as it is once in update_every steps instead of being raised to that power.
# The weights fade ten or a hundred times too slowly. With the default over 10000 steps 0.94 of the
# average of sigma_rel 0.28 is the model of step 0, from before the training, and 0.4 of the one of
# 0.05; with the README's 10 it is 0.43 of the former. synthesize_ema_model takes the averages for
# right, and what it puts together for 0.15 is 0.83 the model of step 0. EMA, the usual average,
# does likewise: its beta counts updates, so that with the default, 10, its models are ten times as
# old. With update_every=1 all widths are right. Nothing is logged.
#
# Exits with 1 if an interval of 100 gives the widths asked for, or an interval of 1 does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 ema-pytorch==0.8.3 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from ema_pytorch import EMA, PostHocEMA

print(*(f"{name} {version(name)}" for name in ("ema-pytorch", "torch")))
STEPS = 10000
WIDTHS = (0.05, 0.28)
ASKED = (*WIDTHS, 0.15)


class Net(torch.nn.Module):
    """Its weights tell the step: 1 at step 0 and else 0, the step's share of all, its square."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def train_to(self, step):
        share = step / STEPS
        self.weight.data = torch.tensor([float(step == 0), share, share**2], dtype=torch.float64)


def described(average):
    """What the model of step 0 counts, the mean age of the models, the width, in shares of all."""
    first, mean, square = average.ema_model.weight.tolist()
    variance = square - mean**2
    return first, 1 - mean, variance**0.5 if variance > 0 else float("nan")


def shown(name, average):
    first, age, width = described(average)
    print(f"  {name}: step 0 counts {first:.3f}, mean age {age:.3f}, width {width:.3f}")
    return first, age, width


as_described = []
for every in (1, 10, 100):
    net = Net()
    averages = PostHocEMA(
        net,
        sigma_rels=WIDTHS,
        update_every=every,
        checkpoint_every_num_steps=STEPS // 10,
        checkpoint_folder=f"every-{every}",
        checkpoint_dtype=torch.float64,
    )
    usual = EMA(net, beta=0.999, update_every=every)
    for step in range(STEPS):
        net.train_to(step)
        averages.update()
        usual.update()
    print(f"update_every={every}")
    found = [shown(f"{width} asked for", of) for width, of in zip(WIDTHS, averages.ema_models)]
    found.append(shown("0.15 put together", averages.synthesize_ema_model(sigma_rel=0.15)))
    plain = shown("EMA, 0.999", usual)
    if every == 1:
        widths = [width for _, _, width in found]
        as_described += [abs(width - asked) < 0.01 for width, asked in zip(widths, ASKED)]
        as_described += [first < 0.001 for first, _, _ in (*found, plain)] + [plain[1] < 0.05]
    if every == 100:
        as_described += [found[0][0] > 0.3, found[1][0] > 0.9, found[2][0] > 0.7, plain[1] > 0.5]
sys.exit(0 if all(as_described) else 1)
PYTHON
