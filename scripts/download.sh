#!/usr/bin/env bash
# Fetches models into models/ and data sets into datas/.
#
#   bash scripts/download.sh                          what there is
#   bash scripts/download.sh --dry_run sd35-medium    files, size and licence, nothing is fetched
#   bash scripts/download.sh sd35-medium naruto
#   bash scripts/download.sh --source modelscope sd15
#
# HF_ENDPOINT names another hub address (a mirror); HF_TOKEN opens gated models such as
# SD3.5 Medium, whose licence is accepted once on its page. A download that was interrupted goes
# on where it stopped. How long it takes depends on the line; sizes are printed first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The environment of scripts/setup.sh, unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -d .venv/bin ]]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
if ! python3 -c 'import huggingface_hub' 2>/dev/null; then
    echo "download.sh: huggingface_hub is not installed; run first: bash scripts/setup.sh" >&2
    exit 1
fi

PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec python3 -m dojo.download "$@"
