"""What `--shard` refuses, which is asked of every run: `sharding` does the work, and is late."""

from __future__ import annotations

from typing import Any

from dojo import launch
from dojo.cli import UserError
from dojo.run.replicas import check_options

# What works on a weight's numbers one by one, or (prodigy) adds up over all processes.
OPTIMIZERS = ("adamw", "lion", "prodigy", "schedulefree")
_WHY_NOT = {
    "adafactor": "it needs the sums of whole rows and columns",
    "stableadamw": "it needs the norm of a whole weight's step",
}
_ADVICE = "add --shard to the script's options and start it with scripts/accelerate/multi_gpu.yaml"
# Gradients of fewer weights than this share stay whole until all micro-batches are through.
FEW = 0.1
# Options, and the value at which they change nothing.
_UNTRIED: dict[str, object] = {
    "train_text_encoder": False,
    "new_tokens": (),
    "torch_compile": False,
    "base_precision": "bf16",
    "blocks_on_cpu": 0,
    "activations_on_cpu": False,
    "fused_backward": False,
}


def refuse_others() -> None:
    """Refuses what the launcher was told to do in place of `--shard`; on a CPU it would do nothing.

    Raises:
        UserError: FSDP was asked for, by the environment, the command line or a configuration.
    """
    if launch.asks_for_fsdp():
        raise UserError(
            "accelerate's FSDP is not supported: it reduces gradients in bfloat16, and a run could "
            f"not be resumed exactly; {_ADVICE}"
        )


def check(args: Any, mixed_precision: str) -> None:
    """Refuses before the work on the data what could not be sharded.

    Args:
        args: the script's options.
        mixed_precision: as it was settled.
    Raises:
        UserError: naming the flag.
    """
    if not args.run.shard:
        return
    kind = args.optim.kind
    if kind not in OPTIMIZERS:
        why = _WHY_NOT.get(kind, "its state is packed in blocks that do not follow the parts")
        raise UserError(
            f"--optimizer {kind} cannot be sharded: {why}; with --shard use {', '.join(OPTIMIZERS)}"
        )
    if mixed_precision == "fp16":
        raise UserError("--shard has no loss scaler: use --mixed_precision bf16 in place of fp16")
    check_options(args, _UNTRIED, "--shard")
