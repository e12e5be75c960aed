#!/usr/bin/env bash
# Runs all training scripts on two commits with the same commands and seed, and compares what
# they write: weights, checkpoints, metrics but for times, pictures. For changes that change nothing.
#
#   bash scripts/compare_commits.sh HEAD~1 HEAD               # about four minutes on two cores
#   bash scripts/compare_commits.sh main HEAD lora_sd3 grpo_sd3 --no_resume
#   bash scripts/compare_commits.sh HEAD "$(git stash create)"  # what is not committed yet
#
# Also lets the second commit go on from a checkpoint of the first. Untrained pocket models, 6 steps,
# on a CPU. Ends with a table; exit code 1 when anything differs. OUTPUT_DIR (outputs/compare) is
# made anew. What counts and what does not is said in tests/compare.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -lt 2 || "$1" == -* || "$2" == -* ]]; then
    echo "usage: bash scripts/compare_commits.sh BEFORE AFTER [SCRIPT...] [--no_resume]" >&2
    exit 2
fi
commits=(--before "$1" --after "$2")
shift 2
if [[ $# -gt 0 && "$1" != -* ]]; then
    set -- --scripts "$@"
fi

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

export OMP_NUM_THREADS=1 # before torch is loaded
exec python -m tests.compare "${commits[@]}" ${OUTPUT_DIR:+--output_dir "$OUTPUT_DIR"} "$@"
