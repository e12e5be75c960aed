"""Prepares data that no disk has to hold.

python -m dojo.data cache --help     latents and embeddings as a folder that scripts train from
python -m dojo.data index --help     where the samples of .tar files lie, written beside them
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dojo import cli
from dojo.cli import UserError
from dojo.data.streams.places import files_at
from dojo.data.streams.stream import INDEX, write_index


@dataclass(frozen=True, kw_only=True)
class IndexArgs:
    """The tars."""

    dataset_name: str
    """folder of .tar files on this machine, or a pattern of them"""
    output_dir: Path | None = None
    """where the indices go; unset: beside the tars, where they are looked for"""


def index(args: IndexArgs) -> None:
    """Writes an index for every tar, so that a training need not read them before it begins."""
    places = files_at(args.dataset_name)
    if places[0].is_remote or not places[0].name.endswith(".tar"):
        raise UserError(
            f"--dataset_name {args.dataset_name}: an index is written of .tar files on this "
            "machine; upload it beside them"
        )
    for place in places:
        folder = args.output_dir or Path(place.path).parent
        folder.mkdir(parents=True, exist_ok=True)
        print(write_index(place, folder), flush=True)
    print(f"done: {len(places)} indices (*{INDEX})", flush=True)


def main(argv: Sequence[str]) -> None:
    """Runs one of the commands."""
    name, *words = argv or ["--help"]
    sys.argv = [f"python -m dojo.data {name}", *words]
    if name == "cache":
        from dojo.inputs import caching

        caching.run()
    elif name == "index":
        cli.run(index, IndexArgs, index.__doc__)
    elif name in ("-h", "--help"):
        print(__doc__)
    else:
        print(f"error: {name}: there are cache and index", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
