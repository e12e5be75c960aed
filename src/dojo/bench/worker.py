"""The process of a step of `python -m dojo.bench check`: imports little but what the step does.

python -m dojo.bench.worker MODULE:FUNCTION REPORT.json WORK_DIR [--pocket]
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from dojo.bench.report import Place, Report, Skip
from dojo.cli import TrainingStopped, UserError


def work(act: str, file: Path, place: Place) -> None:
    """Calls the function of a step, and keeps what it finds."""
    found = Report(file)
    module, _, name = act.partition(":")
    try:
        getattr(importlib.import_module(module), name)(found, place)
    except Skip as why:
        found.skip(str(why))
    except (UserError, TrainingStopped) as error:
        sys.exit(f"stopped: {error}")
    except Exception as error:
        traceback.print_exc()
        # torch's own; torch is not imported for its name
        if type(error).__name__ == "OutOfMemoryError":
            sys.exit("stopped: out of GPU memory; are other programs on this GPU?")
        sys.exit(1)


def main(words: Sequence[str]) -> None:
    """Does what the words say."""
    act, file, folder, *more = words
    work(act, Path(file), Place(Path(folder), pocket=bool(more)))


if __name__ == "__main__":
    main(sys.argv[1:])
