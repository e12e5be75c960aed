#!/usr/bin/env bash
# Times training scripts of this repository beside those of diffusers' examples: the same pocket
# model, pictures, layers and batch, by turns, in float32 on a CPU. Ends with two tables of ratios:
# of whole runs, from the start of a process to its end, and of the speed of their steps.
#
#   git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers /tmp/diffusers
#   bash scripts/compare_peers.sh /tmp/diffusers
#   bash scripts/compare_peers.sh /tmp/diffusers --num_steps 120 --num_rounds 5   # whole runs
#
# Take the tag of the installed diffusers, and leave the machine alone meanwhile: about ten minutes
# on two cores. What the examples import and this project does not (wandb) goes into
# outputs/peers/packages, once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -lt 1 || "$1" == -* ]]; then
    echo "usage: bash scripts/compare_peers.sh CLONE [flags of python -m dojo.bench peers]" >&2
    exit 2
fi
clone="$1"
shift

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

packages=outputs/peers/packages
if ! python -c "import wandb" 2>/dev/null; then
    if [[ ! -d $packages/wandb ]]; then
        python -m pip install --quiet --quiet --disable-pip-version-check --target "$packages" wandb
    fi
    export PYTHONPATH="$PWD/$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
exec python -m dojo.bench peers --clone "$clone" "$@"
