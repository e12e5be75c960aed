"""The seconds that importing big libraries takes, and those that a process takes to end.

A run imports some five thousand modules, a million objects that stay until the process ends. Python
looks for circles among its objects each time they have become a quarter more, and once more when it
ends: that is a fifth of the time before a small run's first step and nearly all of that after its
last one. So nothing is looked for while libraries are imported, and what they made is then taken
out of later searches.

That is done only until a run has its libraries: it would keep a network that is in a circle just
then (accelerate's hooks make such) for ever.

Until then requests and parts of scipy and torchvision wait too, seven hundred modules: transformers
and diffusers import them for pictures behind addresses, for losses of detection, for schedules of
noise and with an enumeration beside them that is all they need. Which distribution a package came
in is found out when somebody asks: diffusers reads the lists of files of all that is installed, for
three packages that few have. And transformers' table of its models is read from their files once,
not twice.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections import UserDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
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
_LATER = {
    "requests": (),
    "scipy.integrate": (),
    "scipy.optimize": ("linear_sum_assignment",),
    "scipy.stats": (),
    "torchvision.datasets": (),
    "torchvision.models": (),
}


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
        with _waiting(_LATER if starting else {}), _packages_later(), _read_once():
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
        if find_spec(name.partition(".")[0]) is not None:
            sys.modules.setdefault(name, _Later(name, functions))
    try:
        yield
    finally:
        for name in modules:
            _end_waiting(name)


class _OneReading:
    """Finds the module of transformers that reads 1,700 files of models, in 550 folders.

    It remembers 128 folders, by the order in which it goes through them never one that it asks for
    again, and reads all of them twice (findings/transformers-models-read-twice.sh); here it
    remembers every one.
    """

    module = "transformers.utils.import_utils"
    function = "create_import_structure_from_path"

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == self.module else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            read: Any = getattr(module, self.function, None)
            if hasattr(read, "cache_info"):
                setattr(module, self.function, cache(read.__wrapped__))

        spec.loader.exec_module = exec_module
        return spec


@contextmanager
def _read_once() -> Iterator[None]:
    """For a while transformers is imported so."""
    finder = _OneReading()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Packages(UserDict[str, list[str]]):
    """The distributions of packages, as `packages_distributions` finds them when one is asked."""

    def __init__(self, find: Callable[[], Mapping[str, list[str]]]) -> None:
        self._find = find

    @cached_property
    def data(self) -> dict[str, list[str]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return dict(self._find())


@contextmanager
def _packages_later() -> Iterator[None]:
    """For a while the lists of all installed files are not read by who looks nothing up in them."""
    find = metadata.packages_distributions
    metadata.packages_distributions = lambda: _Packages(find)
    try:
        yield
    finally:
        metadata.packages_distributions = find


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
