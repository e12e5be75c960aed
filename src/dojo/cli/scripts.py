"""The training scripts beside the library: found by name, and loaded to know their options."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def every() -> list[Path]:
    """All training scripts, and demo.py."""
    return [*sorted(ROOT.glob("train_*.py")), *ROOT.glob("demo.py")]


def find(name: str) -> Path | None:
    """A script of ours by its file's name, or a user's own by its path; None if there is none."""
    return next((one for one in (ROOT / name, Path(name)) if one.is_file()), None)


def load(script: Path) -> Any:
    """A script as a module; `Args` are its options, `main` takes them."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None, script
    assert spec.loader is not None, script
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module
