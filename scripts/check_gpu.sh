#!/usr/bin/env bash
# Checks on this machine's GPU what the tests can only claim on a CPU, in at most nine minutes on one
# H100: precision, determinism, the ratio before the first update, attention, quantised weights,
# weights in CPU memory, predicted against measured memory, and the speed of SD3.5-Medium and SDXL.
# It is also what to run before a problem is reported: send outputs/check_gpu/check.json along.
#
#   bash scripts/check_gpu.sh
#   bash scripts/check_gpu.sh --steps precision attention
#   bash scripts/check_gpu.sh --pocket      the same steps on the pocket models, without a GPU too
#
# Needs no hub: models of the published sizes are made with random weights in outputs/bench (10 GB).
# Each step prints what it found and survives the failure of the one before. At the end: a table,
# outputs/check_gpu/check.json, and rows.md with the rows for docs/benchmarks.md. The exit status is
# 1 if a claim did not hold or a step failed, 2 if there is no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

exec python -m dojo.bench check "$@"
