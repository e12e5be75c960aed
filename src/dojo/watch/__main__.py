"""Opens a page on which the runs below a folder can be watched, compared and asked to stop.

python -m dojo.watch outputs/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dojo import web
from dojo.cli import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C; returns the exit code: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m dojo.watch",
        description="Opens a page on which the runs below a folder can be watched.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folders, or one run's")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; another than 127.0.0.1 is open to the network, unencrypted",
    )
    parser.add_argument("--port", type=int, default=7007, help="0 takes a free one")
    flags = parser.parse_args(argv)
    try:
        _serve(flags.folder, flags.host, flags.port)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(folder: Path, host: str, port: int) -> None:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")

    def make() -> web.Page:
        from dojo.watch.app import Watcher  # needs Starlette

        return Watcher(folder)

    web.open_page(f"watching {folder}", make, host=host, port=port)


if __name__ == "__main__":
    sys.exit(main())
