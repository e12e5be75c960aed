"""Writes report.html into a run's output folder.

python -m dojo.report outputs/quickstart
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dojo.cli import UserError, trouble_with_place
from dojo.files import outputs
from dojo.report.page import write


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when the folder holds no run."""
    parser = argparse.ArgumentParser(
        prog="python -m dojo.report", description="Writes report.html into a run's output folder."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of a run")
    args = parser.parse_args(argv)
    try:
        outputs.join(args.folder)
        path = write(args.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (text := trouble_with_place(error)) is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
