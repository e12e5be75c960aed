#!/usr/bin/env bash
# Makes .venv in the repository and installs what requirements.txt names.
#
#   bash scripts/setup.sh          what training and inference need
#   bash scripts/setup.sh --dev    and the tools that scripts/test.sh needs
#
# PYTHON=/path/to/python3.12 chooses the interpreter (3.10 or newer; default: python3).
# A second run finds nothing to do and ends at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dev=false
for argument in "$@"; do
    case "$argument" in
        --dev) dev=true ;;
        -h | --help)
            sed -n '2,9s/^# \{0,1\}//p' scripts/setup.sh
            exit 0
            ;;
        *)
            echo "setup.sh: unknown argument '$argument' (known: --dev, --help)" >&2
            exit 2
            ;;
    esac
done

require_recent() {
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "setup.sh: Python 3.10 or newer is needed, but '$1' is $("$1" --version); $2" >&2
        exit 1
    fi
}

python="${PYTHON:-python3}"
if [[ ! -x .venv/bin/python ]]; then
    if ! command -v "$python" >/dev/null; then
        echo "setup.sh: '$python' was not found; install Python 3.10 or newer, or name it: PYTHON=/path/to/python3 bash scripts/setup.sh" >&2
        exit 1
    fi
    require_recent "$python" "name another: PYTHON=/path/to/python3 bash scripts/setup.sh"
    echo "Making .venv with $("$python" --version)."
    if ! "$python" -m venv .venv; then
        echo "setup.sh: '$python -m venv .venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
fi
require_recent .venv/bin/python "remove the folder .venv and run this again"
# pip comes last when an environment is made: one that was interrupted has none yet.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    .venv/bin/python -m ensurepip >/dev/null
fi

# The stamp says which requirements the environment was installed from. The dev stamp is a
# superset, so a plain run after a --dev run has nothing to do.
fingerprint="$(.venv/bin/python - <<'PY'
import hashlib
import pathlib
import sys

parts = [pathlib.Path(name).read_bytes() for name in ("requirements.txt", "setup.py")]
parts.append(sys.version.encode())
# An editable install points at this folder: a copied or moved one has to be installed again.
parts.append(str(pathlib.Path.cwd()).encode())
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
)"
stamp=.venv/dojo-stamp
dev_stamp=.venv/dojo-stamp-dev
has_stamp() { [[ -f "$1" && "$(<"$1")" == "$fingerprint" ]]; }

if has_stamp "$dev_stamp" || { [[ "$dev" == false ]] && has_stamp "$stamp"; }; then
    echo "The environment .venv is up to date (0 s)."
    exit 0
fi

echo "Installing into .venv: about 3 GB to download and 6 to 7 GB on disk (Linux, CUDA wheels); about two minutes on a fast line and an idle machine."
SECONDS=0
rm -f "$stamp" "$dev_stamp"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
if [[ "$dev" == true ]]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
    echo "$fingerprint" >"$dev_stamp"
fi
echo "$fingerprint" >"$stamp"
echo "Installed in $SECONDS s."
