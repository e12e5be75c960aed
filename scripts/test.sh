#!/usr/bin/env bash
# Makes .venv if it is missing, then checks and tests everything:
# ruff, pyright, shellcheck, pytest. Arguments are passed on to pytest.
#
#   bash scripts/test.sh                    everything that is not marked slow
#   bash scripts/test.sh -m slow            the slow tests
#   bash scripts/test.sh tests/cli          one folder
#   bash scripts/test.sh -n 0               one test after the other, in one process
#
# It needs no GPU and no hub. Each stage says how long it took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh --dev
# Only now: the installation is the one step that needs the network.
export HF_HUB_OFFLINE=1
export PATH="$PWD/.venv/bin:$PATH"

stage() {
    local name="$1"
    shift
    local started=$SECONDS
    echo "== $name"
    if ! "$@"; then
        echo "== $name FAILED after $((SECONDS - started)) s" >&2
        exit 1
    fi
    echo "== $name passed in $((SECONDS - started)) s"
}

stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "pyright" pyright
stage "shellcheck" shellcheck -x scripts/*.sh scripts/lib/*.sh .ci/run
# A process per core, and one more for the time in which tests wait for processes of their own; up
# to four, since each loads torch and the tests are small.
# macOS does not say which cores a process may use.
cores="$(python -c 'import os; print(len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)))')"
stage "pytest" pytest -n "$((cores < 3 ? cores + 1 : 4))" --dist worksteal "$@"
echo "All stages passed in $SECONDS s."
