"""The seconds that importing big libraries takes, and those that a process takes to end.

A run imports some five thousand modules, a million objects that stay until the process ends. Python
looks for circles among its objects each time they have become a quarter more, and once more when it
ends: that is a fifth of the time before a small run's first step and nearly all of that after its
last one. So nothing is looked for while libraries are imported, and what they made is then taken
out of later searches.

That is done only until a run has its libraries: it would keep a network that is in a circle just
then (accelerate's hooks make such) for ever.

Until then parts of scipy wait too, five hundred modules: transformers and diffusers import them for
losses of detection and for schedules of noise that no training script computes with.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# What every training script needs: all networks of diffusers, adapters, tokenizers; SD3's schedule,
# which is written with a result.
LIBRARIES = (
    "diffusers.models.autoencoders",
    "peft",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
)
# What these libraries import before anybody needs it, and the functions that they take from it.
_LATER = {"scipy.integrate": (), "scipy.optimize": ("linear_sum_assignment",), "scipy.stats": ()}


@dataclass
class _State:
    starting: bool = False
    """whether a run is at its beginning, before there is a network"""
    compiled: bool = True
    """whether bitsandbytes is imported as it comes"""


_state = _State()


@contextmanager
def loading() -> Iterator[None]:
    """While something big is imported: no search for circles of objects."""
    if not gc.isenabled():  # within another such import, or somebody wants it so
        yield
        return
    starting = _state.starting
    if starting:
        gc.collect()  # what is garbage by now is not kept
    gc.disable()
    try:
        with _waiting(_LATER if starting and find_spec("scipy") else {}):
            yield
    finally:
        if starting:
            gc.freeze()
        gc.enable()


class _Later(ModuleType):
    """Stands for a module that is imported when something is asked of it.

    Some functions can be had without it, and import it when they are called.
    """

    def __init__(self, name: str, functions: Collection[str]) -> None:
        super().__init__(name)
        self._functions = functions

    def __getattr__(self, name: str) -> object:
        if name in self._functions:
            return _later(self.__name__, name)
        if name.startswith("__"):  # what Python itself asks of any module
            raise AttributeError(name)
        _end_waiting(self.__name__)
        return getattr(importlib.import_module(self.__name__), name)


def _later(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    call.__name__ = name
    return call


@contextmanager
def _waiting(modules: Mapping[str, Collection[str]]) -> Iterator[None]:
    """For a while these modules are not imported by who does not use them.

    Others find them as ever, then and afterwards: nothing says that they are not there.
    """
    for name, functions in modules.items():
        sys.modules.setdefault(name, _Later(name, functions))
    try:
        yield
    finally:
        for name in modules:
            _end_waiting(name)


def _end_waiting(name: str) -> bool:
    """Lets a module be imported as ever, and says whether it was not before."""
    waited = isinstance(sys.modules.get(name), _Later)
    if waited:
        del sys.modules[name]
    return waited


def load(name: str) -> ModuleType:
    """Imports a module of a big library.

    Raises:
        ImportError: it is not there.
    """
    with loading():
        if not _state.compiled and name.partition(".")[0] in ("diffusers", "peft"):
            _import_uncompiled("bitsandbytes")
        try:
            return importlib.import_module(name)
        except (ImportError, RuntimeError):  # diffusers and transformers make the one of the other
            if not any([_end_waiting(each) for each in _LATER]):
                raise
        return importlib.import_module(name)  # by one that imports a part of what was to wait


def _import_uncompiled(name: str) -> None:
    """Imports a library, if there is one, whose functions are not to be compiled."""
    if name in sys.modules or find_spec(name) is None:
        return
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module(name)
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def begin(*, bitsandbytes: bool) -> None:
    """A run begins: what is imported from here to `settle` stays until the process ends.

    Args:
        bitsandbytes: whether the run computes with this library, which diffusers and peft import
            wherever it is installed. It then has the back end of torch's compiler (inductor) in
            wait for some of its functions, six hundred modules and up to a second; a run that calls
            none of them gets it without. The compiler's front end (torch._dynamo) comes in any
            case: torch's optimizers import it.
    """
    _state.starting, _state.compiled = True, bitsandbytes


def settle() -> None:
    """The run will train: imports the libraries for it, the last that are there to stay."""
    for name in LIBRARIES:
        if name not in sys.modules:
            load(name)
    _state.starting = False


def end_quickly() -> None:
    """Lets the process end without a last search for circles, whose memory ends with it anyway."""
    atexit.register(gc.freeze)
