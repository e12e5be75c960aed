#!/usr/bin/env bash
# peft's OFT on a convolution scrambles its input: a new adapter is no identity, and merges as one.
#
# OFT (orthogonal fine-tuning, arXiv 2306.07280) multiplies each layer's weight by a rotation, and
# peft has it for convolutions too, as those of SD's UNet. A rotation begins as the identity. One
# would guess that the network with a new OFT computes what it computed before, as with a LoRA, and
# that merging a trained one keeps what it computes.
#
# What happens: the forward pass turns the input instead of the weight, and for that cuts it into
# patches of the kernel's size and adds them up to a picture again (peft/tuners/oft/layer.py,
# OFTRotationModule._unfold and _fold). The patches overlap, so that of a 3 x 3 kernel each pixel
# counts nine times, and fold is given channels, rows, columns, kernel rows, kernel columns as if
# the kernel came before the rows: numbers land at other places. A picture with one bright pixel
# comes out with others lit, far from it. The network is trained on this input; merging computes the
# rotated weight, which is right and which nobody has trained. A new adapter merges to the base. So
# do kernels of 1 x 1 and linear layers, which are right throughout, and BOFT and HRA on 3 x 3.
# A saved adapter comes back as it was trained. Nothing is logged.
#
# Exits with 1 if OFT on a 3 x 3 convolution begins as the base or merges as what it computes, or if
# a kernel of 1 x 1 or one of the others does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 peft==0.21.2 transformers==5.23.0 \
    accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import sys
from importlib.metadata import version

import torch
from peft import BOFTConfig, HRAConfig, OFTConfig, PeftModel, get_peft_model

print(*(f"{name} {version(name)}" for name in ("peft", "torch")))


class Net(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, kernel, padding=kernel // 2)

    def forward(self, x):
        return self.conv(x)


def made(kernel):
    torch.manual_seed(0)
    return Net(kernel).eval()


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


def oft():
    return OFTConfig(r=0, oft_block_size=4, target_modules=["conv"])


def boft():
    return BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["conv"])


def hra():
    return HRAConfig(r=4, target_modules=["conv"])


as_described = []
x = torch.randn(4, 8, 12, 12, generator=torch.Generator().manual_seed(1))
for name, config, kernel in (("OFT", oft, 3), ("OFT", oft, 1), ("BOFT", boft, 3), ("HRA", hra, 3)):
    base = made(kernel)(x).detach()
    net = get_peft_model(made(kernel), config())
    with torch.no_grad():
        begins = apart(net(x), base)
        merged = apart(copy.deepcopy(net).merge_and_unload()(x), base)
    # Trained towards the base with its channels in another order.
    wanted = base.flip(1)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    for _ in range(100):
        loss = (net(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    net.save_pretrained("trained")
    with torch.no_grad():
        trained = net(x)
        loaded = apart(PeftModel.from_pretrained(made(kernel), "trained").eval()(x), trained)
        moved = apart(copy.deepcopy(net).merge_and_unload()(x), trained)
    print(f"{name}, {kernel} x {kernel}: new {begins:.1e} from the base, merged {merged:.1e}")
    print(f"  trained: loaded {loaded:.1e} from it, merged {moved:.1e}")
    wrong = (name, kernel) == ("OFT", 3)
    as_described += [(begins > 0.5) == wrong, (moved > 0.3) == wrong]
    as_described += [wrong or (begins < 1e-5 and moved < 1e-5), merged < 1e-5, loaded < 1e-5]

# What the layer sees of one bright pixel: a convolution that passes the picture on.
net = made(3)
with torch.no_grad():
    net.conv.weight.zero_()
    net.conv.bias.zero_()
    for channel in range(8):
        net.conv.weight[channel, channel, 1, 1] = 1
    net = get_peft_model(net, oft())
    pixel = torch.zeros(1, 8, 12, 12)
    pixel[0, 0, 6, 6] = 1
    seen = net(pixel)[0]
lit = [(y, x, round(seen[0, y, x].item(), 2)) for y, x in (seen[0].abs() > 1e-6).nonzero().tolist()]
print("a pixel at row 6, column 6 of channel 0 is seen at (row, column, value):", lit)
print("  in all channels the values add up to", round(seen.sum().item(), 2))
as_described += [any((y, x) != (6, 6) for y, x, _ in lit), abs(seen.sum().item() - 9) < 1e-3]
sys.exit(0 if all(as_described) else 1)
PYTHON
