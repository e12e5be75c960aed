#!/usr/bin/env bash
# Kills small runs of all training scripts at random moments, resumes them, and compares what
# they end with to what undisturbed ones end with: weights, metrics and pictures, to the bit.
#
#   bash scripts/prove_kills.sh            # 200 kills, about half an hour on two cores
#   bash scripts/prove_kills.sh 20 --scripts grpo_sd3 --processes 2 --seed 1
#
# SIGKILL, SIGINT and SIGTERM, with one process and with two, on untrained pocket models, on a CPU.
# Ends with a table; exit code 1 when something was lost. OUTPUT_DIR (outputs/kills) is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kills=200
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    kills="$1"
    shift
fi

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

export OMP_NUM_THREADS=1 # before torch is loaded
exec python -m tests.kills --kills "$kills" ${OUTPUT_DIR:+--output_dir "$OUTPUT_DIR"} "$@"
