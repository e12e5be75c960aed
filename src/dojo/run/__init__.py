"""One training run: its processes, folder, numbers, checkpoints, optimizer and cost.

What scripts take from here is loaded when it is asked for: the parts of the library that need one
of the smaller modules alone would wait for all the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dojo.run.averaging import EmaArgs
    from dojo.run.dry_run import print_plan
    from dojo.run.folders import options
    from dojo.run.learner import Learner
    from dojo.run.optim import OptimArgs
    from dojo.run.run import Key, Run, RunArgs, start

_HOMES = {
    "EmaArgs": "averaging",
    "print_plan": "dry_run",
    "options": "folders",
    "Learner": "learner",
    "OptimArgs": "optim",
    "Key": "run",
    "Run": "run",
    "RunArgs": "run",
    "start": "run",
}

__all__ = [
    "EmaArgs",
    "Key",
    "Learner",
    "OptimArgs",
    "Run",
    "RunArgs",
    "options",
    "print_plan",
    "start",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
