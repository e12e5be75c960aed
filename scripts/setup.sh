#!/usr/bin/env bash
# Makes .venv in the repository and installs what requirements.txt names.
#
#   bash scripts/setup.sh          what training and inference need; torch as PyPI has it
#   bash scripts/setup.sh --auto   torch for what is in this machine: --cuda, --rocm or --cpu
#   bash scripts/setup.sh --cpu    torch without CUDA, from PyTorch's own index
#   bash scripts/setup.sh --cuda   torch for NVIDIA's GPUs: on Linux that is PyPI's
#   bash scripts/setup.sh --rocm   torch for AMD's GPUs, from PyTorch's own index
#   bash scripts/setup.sh --dev    and the tools that scripts/test.sh needs (beside any of these)
#
# PYTHON=/path/to/python3.12 chooses the interpreter (3.11 or newer; default: python3).
# INSTALLER=uv|pip chooses what installs (default: uv where it is found, else pip).
# TORCH_INDEX=URL is a mirror of https://download.pytorch.org/whl; ROCM=7.2 the version of ROCm
# (default: what /opt/rocm says). Without a flag an environment stays as it was made.
# A second run finds nothing to do and ends at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
    echo "setup.sh: $2" >&2
    exit "$1"
}

dev=false
wanted=""
for argument in "$@"; do
    case "$argument" in
        --dev) dev=true ;;
        --auto | --cpu | --cuda | --rocm)
            [[ -z "$wanted" || "--$wanted" == "$argument" ]] ||
                die 2 "--$wanted and $argument exclude each other; choose one"
            wanted="${argument#--}"
            ;;
        -h | --help)
            sed -n '2,16s/^# \{0,1\}//p' scripts/setup.sh
            exit 0
            ;;
        *)
            die 2 "unknown argument '$argument' (known: --auto, --cpu, --cuda, --rocm, --dev, --help)"
            ;;
    esac
done

if [[ "$wanted" == auto ]]; then
    if [[ "$(nvidia-smi -L 2>/dev/null)" == *"GPU 0"* ]]; then
        wanted=cuda
    elif [[ "$(rocminfo 2>/dev/null)" == *gfx* ]]; then
        wanted=rocm
    else
        wanted=cpu
    fi
    echo "--auto found: --$wanted."
fi

system="$(uname -s)"
if [[ "$system" == Darwin ]]; then
    # PyPI's wheel for macOS is the only one: no CUDA in it, Apple's GPU is.
    [[ "$wanted" != cuda && "$wanted" != rocm ]] || die 2 "--$wanted: torch has none for macOS; leave the flag out"
    wanted=""
fi

require_recent() {
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        die 1 "Python 3.11 or newer is needed, but '$1' is $("$1" --version); $2"
    fi
}

python="${PYTHON:-python3}"
if [[ ! -x .venv/bin/python ]]; then
    if ! command -v "$python" >/dev/null; then
        die 1 "'$python' was not found; install Python 3.11 or newer, or name it: PYTHON=/path/to/python3 bash scripts/setup.sh"
    fi
    require_recent "$python" "name another: PYTHON=/path/to/python3 bash scripts/setup.sh"
    echo "Making .venv with $("$python" --version)."
    if ! "$python" -m venv .venv; then
        die 1 "'$python -m venv .venv' failed; on Debian and Ubuntu: apt install python3-venv"
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
log=.venv/dojo-install.log
# Whose wheel of torch the environment has: pypi, cpu or rocm. One from before has PyPI's.
wheels_file=.venv/dojo-torch
has_stamp() { [[ -f "$1" && "$(<"$1")" == "$fingerprint" ]]; }

wheels=""
if [[ -f "$wheels_file" ]]; then
    wheels="$(<"$wheels_file")"
elif [[ -f "$stamp" || -f "$dev_stamp" ]]; then
    wheels=pypi
fi
case "$wanted:${wheels:-none}" in
    :* | cuda:pypi | cuda:none | cpu:cpu | cpu:none | rocm:rocm | rocm:none) ;;
    cpu:pypi) echo ".venv has PyPI's torch, which runs on a CPU too; to save its CUDA libraries' room, remove .venv and run this again." ;;
    *) die 1 "--$wanted needs another torch than the one in .venv (made with --${wheels/pypi/cuda}); remove the folder .venv and run this again" ;;
esac

if has_stamp "$dev_stamp" || { [[ "$dev" == false ]] && has_stamp "$stamp"; }; then
    echo "The environment .venv is up to date (0 s)."
    exit 0
fi

installer="${INSTALLER:-$(command -v uv >/dev/null && echo uv || echo pip)}"
case "$installer" in
    pip) ;;
    uv)
        command -v uv >/dev/null || die 1 "INSTALLER=uv, but uv was not found"
        # uv reads none of pip's settings; a machine behind a mirror has usually told pip alone.
        if [[ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]]; then
            mirror="${PIP_INDEX_URL:-$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)}"
            [[ -z "$mirror" ]] || export UV_DEFAULT_INDEX="$mirror"
        fi
        ;;
    *) die 2 "INSTALLER is '$installer' (known: uv, pip)" ;;
esac

# install ARGUMENTS...: what the installer says goes into the log, and its end to the screen where it
# fails. (pip's own --log would bring its warnings and bars back to the screen.)
install() {
    local words=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    [[ "$installer" == pip ]] || words=(uv pip install --quiet --python .venv/bin/python)
    "${words[@]}" "$@" >>"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        die 1 "$installer could not install $* (its words: $log; INSTALLER=pip|uv chooses another)"
    }
}

reachable() {
    .venv/bin/python - "$1" <<'PY' 2>/dev/null
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=10).close()
PY
}

# What would be downloaded, in bytes. uv resolves from the index's metadata; pip would have to
# download the wheels for that, so that with pip nothing is computed.
computed_size() {
    [[ "$installer" == uv ]] || return 1
    grep -v '^-e' requirements.txt |
        uv pip compile --quiet --python .venv/bin/python --format pylock.toml - 2>>"$log" |
        .venv/bin/python -c '
import sys
import tomllib

packages = tomllib.loads(sys.stdin.read())["packages"]
files = [package.get("wheels") or [package.get("sdist", {})] for package in packages]
print(sum(max(one.get("size", 0) for one in some) for some in files))'
}

# say_size BYTES HOW DISK
say_size() {
    local tenths=$(($1 / 100000000)) minutes=$(($1 / 600000000 + 1))
    echo "Installing into .venv with $installer: $((tenths / 10)).$((tenths % 10)) GB to download ($2)," \
        "roughly $3 on disk; at 10 MB/s about $minutes min, and a few to unpack. Warnings: $log"
}

torch_index="" # an index of PyTorch's; empty: torch comes with everything else
index="${TORCH_INDEX:-https://download.pytorch.org/whl}"
case "${wanted:-$wheels}" in
    cpu)
        if [[ "${wheels:-cpu}" == cpu ]]; then
            if reachable "$index/cpu/torch/"; then
                torch_index="$index/cpu"
            elif [[ "$wheels" == cpu ]]; then
                die 1 "PyTorch's index ($index/cpu), which this .venv has its torch from, was not reached"
            else
                echo "PyTorch's index ($index/cpu) was not reached, and PyPI has no torch for Linux without CUDA: PyPI's is taken, which is larger and runs on a CPU too."
            fi
        fi
        ;;
    rocm)
        version="${ROCM:-$(cut -d. -f1,2 /opt/rocm/.info/version 2>/dev/null || true)}"
        [[ -n "$version" ]] || die 1 "--rocm: /opt/rocm does not say which version of ROCm is here; name one that PyTorch has wheels for, such as ROCM=7.2"
        torch_index="$index/rocm$version"
        reachable "$torch_index/torch/" || die 1 "--rocm: $torch_index was not reached, or PyTorch has no wheels for ROCm $version; name another version with ROCM=, or a mirror with TORCH_INDEX="
        ;;
esac

case "$torch_index" in
    "")
        new_wheels=pypi
        if size="$(computed_size)"; then
            say_size "$size" "computed from the index, less what is cached" "7 GB"
        elif [[ "$system" == Darwin ]]; then
            say_size 400000000 "a rough figure" "2 GB"
        else
            say_size 3200000000 "a rough figure, on Linux" "7 GB"
        fi
        ;;
    */cpu) new_wheels=cpu && say_size 400000000 "a rough figure" "2 GB" ;;
    *) new_wheels=rocm && say_size 5000000000 "a guess: ROCm's wheels differ in size" "15 GB" ;;
esac
SECONDS=0
rm -f "$stamp" "$dev_stamp"
if [[ -n "$torch_index" ]]; then
    mapfile -t torches < <(grep -E '^torch(vision)?[>=]' requirements.txt)
    install --index-url "$torch_index" "${torches[@]}"
fi
# Before the rest: what was begun with one torch is not gone on with as if it had another.
echo "$new_wheels" >"$wheels_file"
install -r requirements.txt
if [[ "$dev" == true ]]; then
    install -e '.[dev]'
    echo "$fingerprint" >"$dev_stamp"
fi
echo "$fingerprint" >"$stamp"
echo "Installed in $SECONDS s. \`python -m dojo.doctor\` says what torch sees of this machine."
