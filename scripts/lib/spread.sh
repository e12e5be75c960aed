# Sourced by the proofs: how a training of the pocket models is started on this machine.
# Small tensors gain little from threads, so that on a machine without a GPU two processes share a
# batch. Sets `processes`, by which batch sizes are to be divided, and defines `start`.
# shellcheck shell=bash

processes=1
cores="$(getconf _NPROCESSORS_ONLN)"
if [[ "$cores" -ge 2 ]] && ! command -v nvidia-smi >/dev/null; then
    processes=2
    export ACCELERATE_USE_CPU=true
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / processes))}"
fi

# start SCRIPT FLAGS...
start() {
    if [[ "$processes" -gt 1 ]]; then
        python -m torch.distributed.run --standalone --nproc_per_node "$processes" "$@"
    else
        python "$@"
    fi
}
