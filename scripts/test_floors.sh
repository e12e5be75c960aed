#!/usr/bin/env bash
# Tests with the oldest version of everything that requirements.txt allows, in .venv-floors.
#
#   bash scripts/test_floors.sh                everything that is not marked slow
#   bash scripts/test_floors.sh tests/maths    one folder; arguments go to pytest
#   bash scripts/test_floors.sh --resolve      installs nothing: is there such a set of versions?
#
# PYTHON=/path/to/python3.11 chooses the interpreter; it has to be 3.11, the oldest. The versions
# are those behind `>=` in requirements.txt; the tools for tests are the newest. It downloads as
# much as scripts/setup.sh does, and .venv-floors may be removed afterwards. Without uv, --resolve
# downloads wheels where an index has no metadata for them, to look inside.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

resolve=false
case "${1:-}" in
    -h | --help)
        sed -n '2,11s/^# \{0,1\}//p' scripts/test_floors.sh
        exit 0
        ;;
    --resolve) resolve=true ;;
esac

python="${PYTHON:-python3.11}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    echo "test_floors.sh: '$python' is not Python 3.11, the floor; name one: PYTHON=/path/to/python3.11" >&2
    exit 1
fi

floors="$(mktemp)"
trap 'rm -f "$floors"' EXIT
sed -nE 's/^([A-Za-z_-]+)>=([0-9.]+).*/\1==\2/p' requirements.txt >"$floors"

if [[ "$resolve" == true ]]; then
    if command -v uv >/dev/null; then
        uv pip compile --quiet --no-header --no-annotate --python "$python" \
            --extra dev --refresh-package sd-dojo --constraint "$floors" setup.py
    else
        # pip says what it would install beside an environment that has nothing.
        environment="$(mktemp -d)"
        trap 'rm -rf "$floors" "$environment"' EXIT
        "$python" -m venv "$environment"
        "$environment/bin/python" -m pip install --quiet --quiet --dry-run --constraint "$floors" '.[dev]'
    fi
    echo "There is such a set."
    exit 0
fi

[[ -x .venv-floors/bin/python ]] || "$python" -m venv .venv-floors
# A second run finds everything installed; an environment of other floors is brought to these.
.venv-floors/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
    --requirement requirements.txt --constraint "$floors"
.venv-floors/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
    --constraint "$floors" -e '.[dev]'
export HF_HUB_OFFLINE=1
export PATH="$PWD/.venv-floors/bin:$PATH"
# macOS does not say which cores a process may use.
cores="$(python -c 'import os; print(len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)))')"
pytest -n "$((cores < 4 ? cores : 4))" --dist worksteal "$@"
