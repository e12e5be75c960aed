"""Writes report.html into a run's output folder; of several, says how they differ.

python -m dojo.report outputs/quickstart
python -m dojo.report outputs/a outputs/b outputs/c
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dojo.cli import UserError, trouble_with_place
from dojo.files import outputs
from dojo.report.page import write
from dojo.report.several import compared


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when the folder holds no run."""
    parser = argparse.ArgumentParser(
        prog="python -m dojo.report",
        description="Writes report.html into a run's output folder. Of several folders, prints a "
        "table of what differs in their options and of how they ended.",
    )
    parser.add_argument(
        "folders", type=Path, metavar="FOLDER", nargs="+", help="output folder of a run"
    )
    folders: list[Path] = parser.parse_args(argv).folders
    try:
        if len(folders) > 1:
            print("\n".join(compared(folders)))
            return 0
        outputs.join(folders[0])
        path = write(folders[0])
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
