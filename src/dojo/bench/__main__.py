"""Measures the speed of training.

python -m dojo.bench supervised --help     times a training script
python -m dojo.bench rl --help             times one that learns from rewards
python -m dojo.bench limits --help         what arithmetic alone allows
python -m dojo.bench peers --help          our scripts and diffusers' examples side by side
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from dojo import cli


def main(argv: Sequence[str]) -> None:
    """Runs one of the commands; what follows `--` goes to the training script."""
    words = list(argv)
    name = words.pop(0) if words else "--help"
    extra: list[str] = []
    if "--" in words:
        place = words.index("--")
        words, extra = words[:place], words[place + 1 :]
    sys.argv = [f"python -m dojo.bench {name}", *words]
    if name == "supervised":
        from dojo.bench import supervised

        cli.run(
            partial(supervised.main, extra=extra), supervised.SupervisedArgs, supervised.__doc__
        )
    elif name == "rl":
        from dojo.bench import rl

        cli.run(partial(rl.main, extra=extra), rl.RlArgs, rl.__doc__)
    elif name == "limits":
        from dojo.bench import limits

        cli.run(limits.main, limits.LimitArgs, limits.__doc__)
    elif name == "peers":
        from dojo.bench import peers

        cli.run(peers.main, peers.PeerArgs, peers.__doc__)
    elif name in ("-h", "--help"):
        print(__doc__)
    else:
        print(f"error: {name}: there are supervised, rl, limits and peers", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
