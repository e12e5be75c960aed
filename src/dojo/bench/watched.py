"""Runs a training script and writes down how much memory every phase took: for `bench memory`.

    python -m dojo.bench.watched PEAKS.json train_lora_sd3.py --output_dir ...

The script is as it is; functions of the library that begin a phase are wrapped. A phase that ends
gives back to the one around it; training and scoring last until another one begins, as what comes
between two steps belongs to them. With `--dry_run` the file gets what the run computes instead.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dojo.lazy import torch
from dojo.run import machine, phases

# The functions that begin a phase, as module:name, and whether it ends with them. Several of one
# phase: each by itself begins it.
BEGINNINGS: Mapping[str, tuple[tuple[str, bool], ...]] = {
    "text cache": (("dojo.inputs.texts:_fill", True),),
    "latent cache": (
        ("dojo.inputs.pictures:latents_of", True),
        ("dojo.inputs.pretraining_pictures:Pretraining.prepare", True),
        ("dojo.inputs.pairs:prepare", True),
    ),
    "class pictures": (("dojo.inputs.class_pictures:_draw", True),),
    "training": (("dojo.run.learner:Learner.accumulate", False),),
    "validation": (("dojo.evaluate.validator:Validator.__call__", True),),
    "scoring": (
        ("dojo.maths.rollout:sample", False),
        ("dojo.maths.denoising:sample", False),
        ("dojo.methods.rl.episodes:Scoring.submit", False),
    ),
}
# An evaluation is a phase of its own too, which one its rewards say.
EVALUATION = "dojo.evaluate.held_out:Evaluator._evaluate"
OUTSIDE = "loading"  # what comes before the first phase, and between those that end


@dataclass
class Watch:
    """The peaks of the phases so far, in bytes.

    Args:
        file: is written whenever a phase has ended.
        peak: the most bytes in use since `reset`.
    """

    file: Path
    peak: Callable[[], int]
    reset: Callable[[], None]
    current: str = OUTSIDE
    peaks: dict[str, int] = field(default_factory=dict)

    def change(self, name: str) -> str:
        """Begins a phase, and returns the one that it ends."""
        before, self.current = self.current, name
        self._note(before)
        self.reset()
        return before

    def _note(self, name: str) -> None:
        """Keeps a phase's peak, in a file that is whole whenever we are killed."""
        self.peaks[name] = max(self.peaks.get(name, 0), self.peak())
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.peaks))
        partial.replace(self.file)

    def wrapped(self, name: str, function: Callable[..., Any], ends: bool) -> Callable[..., Any]:
        """The function, as a beginning of a phase."""

        @functools.wraps(function)
        def act(*args: Any, **kwargs: Any) -> Any:
            before = self.change(name) if self.current != name or ends else name
            try:
                return function(*args, **kwargs)
            finally:
                if ends:
                    self.change(before)
                elif self.current == name:
                    self._note(name)

        return act

    def evaluating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """An evaluation: scoring where it has rewards, validation where it draws alone."""
        scored, drawn = (
            self.wrapped(name, function, ends=True) for name in (phases.SCORING, phases.VALIDATION)
        )

        @functools.wraps(function)
        def act(evaluator: Any, *args: Any) -> Any:
            return (scored if evaluator.rewards else drawn)(evaluator, *args)

        return act


def wrap(path: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts `make(function)` in the place of a function or method, as module:name."""
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, last = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    setattr(owner, last, make(getattr(owner, last)))


def watch(file: Path, device: torch.device) -> Watch:
    """Wraps every beginning of a phase."""
    made = Watch(file, *_meter(device))
    for name, beginnings in BEGINNINGS.items():
        for path, ends in beginnings:
            wrap(path, functools.partial(made.wrapped, name, ends=ends))
    wrap(EVALUATION, made.evaluating)
    return made


def _meter(device: torch.device) -> tuple[Callable[[], int], Callable[[], None]]:
    """How the most bytes in use are read and reset; without a GPU, what is in use now."""
    if device.type != "cuda":
        return (lambda: round(machine.used_memory_gib(device) * 2**30)), (lambda: None)

    def reset() -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)

    return (lambda: torch.cuda.max_memory_allocated(device)), reset


def catch_computed(file: Path) -> None:
    """Lets a dry run write what it computes into the file, in GiB by phase."""
    compute = phases.compute

    @functools.wraps(compute)
    def act(needs: phases.Needs, held: phases.Held) -> list[phases.Phase]:
        found = compute(needs, held)
        file.write_text(json.dumps({phase.name: phase.size / 2**30 for phase in found}))
        return found

    phases.compute = act


def main(words: list[str]) -> None:
    """Runs the script."""
    file, script, *flags = words
    if "--dry_run" in flags:
        catch_computed(Path(file))
    else:
        watch(Path(file), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
