"""Measures the speed of training.

python -m dojo.bench supervised --help     times a training script
python -m dojo.bench rl --help             times one that learns from rewards
python -m dojo.bench step --help           where the time of a training step goes
python -m dojo.bench caches --help         times the work before training: pictures to latents
python -m dojo.bench limits --help         what arithmetic alone allows
python -m dojo.bench check --help          what tests can only claim on a CPU, on a GPU
python -m dojo.bench memory --help         predicted against measured memory
python -m dojo.bench cards --help          which card holds which run, and with which options
python -m dojo.bench sharded --help        --shard and plain data parallelism side by side
python -m dojo.bench peers --help          our scripts and diffusers' examples side by side
python -m dojo.bench starts --help         start, end and --help of two checkouts side by side
python -m dojo.bench common_share --help   what the groups' gradients have in common, by objective
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial

from dojo import cli

# By command, which is a module with a `main` too: its options.
COMMANDS = {
    "supervised": "SupervisedArgs",
    "rl": "RlArgs",
    "step": "StepArgs",
    "caches": "CacheBenchArgs",
    "limits": "LimitArgs",
    "check": "CheckArgs",
    "memory": "MemoryArgs",
    "cards": "CardArgs",
    "sharded": "ShardArgs",
    "peers": "PeerArgs",
    "starts": "StartArgs",
    "common_share": "CommonShareArgs",
}
# These hand on what follows `--` to the training script.
_HAND_ON = ("supervised", "rl", "step", "memory")


def main(argv: Sequence[str]) -> None:
    """Runs one of the commands."""
    words = list(argv)
    name = words.pop(0) if words else "--help"
    extra: list[str] = []
    if "--" in words:
        place = words.index("--")
        words, extra = words[:place], words[place + 1 :]
    sys.argv = [f"python -m dojo.bench {name}", *words]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name in COMMANDS:
        module = importlib.import_module(f"dojo.bench.{name}")
        act = partial(module.main, extra=extra) if name in _HAND_ON else module.main
        cli.run(act, getattr(module, COMMANDS[name]), module.__doc__)
    else:
        print(f"error: {name}: there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
