"""Runs a training script and writes down where the time of its steps goes: for `bench step`.

    python -m dojo.bench.profiled SPENT.json WARMUP STEPS train_lora_sd3.py --output_dir ...

The script is as it is; functions that begin a part of a step are wrapped. The steps that count are
timed by the clock alone; one more is under torch's profiler, whose own work makes a step longer,
and says which operators compute. Then the process ends, without a result.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dojo.bench.watched import wrap
from dojo.lazy import torch

# The parts of a step, and the functions whose time is theirs, as module:name. Forward passes are
# all that the network is asked, with and without a gradient.
PARTS: Mapping[str, tuple[str, ...]] = {
    "forward": (
        "diffusers:SD3Transformer2DModel.forward",
        "diffusers:UNet2DConditionModel.forward",
    ),
    "backward": ("accelerate:Accelerator.backward",),
    "optimizer": (
        "dojo.run.learner:Learner._measured",
        "accelerate.optimizer:AcceleratedOptimizer.step",
        "dojo.run.replicas:Replicas.zero_grad",
    ),
    "other networks": ("diffusers:AutoencoderKL.decode",),
}
# These are named by the script itself: `Run.phase`.
PHASES = {"data": "data", "reward": "other networks"}
REST = "rest"  # noise, loss, bookkeeping: the script's own lines, and what is called between
# Where a step ends: an iterator of the loop around it.
LOOPS = ("dojo.run.run:Run.batches", "dojo.run.run:Run.epochs")
# Parts of operators' names: sums of products. Attention is two of them and what is between.
PRODUCTS = ("mm", "convolution", "attention", "conv2d", "linear")
_MARK = "dojo: "  # of our ranges among the profiler's


class Over(SystemExit):
    """The last step is measured."""


@dataclass
class Meter:
    """The seconds of every step by part; a part within another is not the other's time.

    Args:
        file: what is written at the end.
        warmup, steps: how many steps do not count, and how many do.
        wait: until the device has done what it was told.
        clock: seconds from any beginning on.
    """

    file: Path
    warmup: int
    steps: int
    wait: Callable[[], None]
    device: str = "cpu"
    clock: Callable[[], float] = time.perf_counter
    found: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    _open: list[str] = field(default_factory=lambda: [REST])
    _now: dict[str, float] = field(default_factory=dict[str, float])
    _since: float = 0.0
    _count: int = 0
    _profiler: Any = None
    _thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time inside belongs to a part, in this thread alone: others work beside it."""
        if threading.get_ident() != self._thread:
            yield
            return
        with torch.profiler.record_function(_MARK + name):
            self._change()
            self._open.append(name)
            try:
                yield
            finally:
                self._change()
                self._open.pop()

    def _change(self) -> None:
        """Gives the time until now to the innermost part."""
        self.wait()
        now, name = self.clock(), self._open[-1]
        self._now[name] = self._now.get(name, 0.0) + now - self._since
        self._since = now

    def turn(self) -> None:
        """A step ends, and the next begins.

        Raises:
            Over: it was the last.
        """
        self._change()
        spent, self._now = self._now, {}
        if self.warmup < self._count <= self.warmup + self.steps:
            self.found.append(spent)
        self._count += 1
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            operators = _operators(self._profiler, self.device)
            self.file.write_text(json.dumps({"steps": self.found, "operators": operators}))
            raise Over(0)
        if self._count > self.warmup + self.steps:
            kinds = torch.profiler.ProfilerActivity
            chosen = [kinds.CPU, *([kinds.CUDA] if self.device == "cuda" else [])]
            self._profiler = torch.profiler.profile(activities=chosen)
            self._profiler.__enter__()
            self._since = self.clock()  # its start is no step's

    # -- what is put in the place of functions ------------------------------------------------

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is a part's."""

        @functools.wraps(function)
        def act(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return act

    def turning(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The iterator, of whose items each begins a step."""

        @functools.wraps(function)
        def act(*args: Any) -> Iterator[Any]:
            for item in function(*args):
                self.turn()
                yield item

        return act

    def phased(
        self, function: Callable[..., AbstractContextManager[None]]
    ) -> Callable[..., AbstractContextManager[None]]:
        """`Run.phase`, which names some parts."""

        @contextmanager
        def act(run: Any, name: str, **options: Any) -> Iterator[None]:
            with ExitStack() as stack:
                if name in PHASES:
                    stack.enter_context(self.part(PHASES[name]))
                stack.enter_context(function(run, name, **options))
                yield

        return act


def install(meter: Meter) -> None:
    """Wraps the functions of all parts."""
    for name, paths in PARTS.items():
        for path in paths:
            wrap(path, functools.partial(meter.counted, name))
    for path in LOOPS:
        wrap(path, meter.turning)
    wrap("dojo.run.run:Run.phase", meter.phased)


def _operators(profiler: Any, device: str) -> dict[str, dict[str, Any]]:
    """Calls and own seconds of each operator, the longest first.

    On a GPU an operator's are those of the kernels that it starts, which are listed too.
    """
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = {
        one.key: {"calls": one.count, "seconds": getattr(one, kind) / 1e6}
        for one in profiler.key_averages()
        if not one.key.startswith(_MARK)
        and getattr(one, kind) > 0
        and one.device_type == torch.autograd.DeviceType.CPU  # not the kernels themselves
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))


def main(words: list[str]) -> None:
    """Runs the script until the last step is measured."""
    file, warmup, steps, script, *flags = words
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else lambda: None
    meter = Meter(Path(file), int(warmup), int(steps), wait, "cuda" if cuda else "cpu")
    install(meter)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except Over:
        sys.stdout.flush()
        os._exit(0)  # workers of the loader and of rewards end with it


if __name__ == "__main__":
    main(sys.argv[1:])
