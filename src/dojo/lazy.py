"""Big libraries, imported when they are first used.

torch, diffusers and transformers take seconds to import; `--help`, a misspelt flag and a missing
folder need none of them. A module of this package therefore takes them from here,

    from dojo.lazy import F, nn, torch

and uses them in functions as ever; type checkers see the libraries themselves. What a module needs
of them while it is imported (a base class, a table of dtypes) loads them, so a module with such
classes is `late` itself. Names for annotations come from the library, under `if TYPE_CHECKING:`.

The objects stand for nothing but the import: they are not in `sys.modules`, other packages import
as they always do.
"""

from __future__ import annotations

import sys
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from dojo.loading import load, loading

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


def _real(name: str) -> ModuleType:
    # The dictionary first: importlib's own way there costs ten times as much, at every use. It is
    # the one that waits where another thread is at the import.
    found = sys.modules.get(name)
    if found is None or getattr(found.__spec__, "_initializing", False):
        return load(name)
    return found


class _Late(ModuleType):
    """A module that is imported when something is asked of it."""

    @property
    def __dict__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return vars(_real(self.__name__))

    def __dir__(self) -> list[str]:
        return dir(_real(self.__name__))

    def __getattr__(self, name: str) -> object:
        real = _real(self.__name__)
        try:
            return vars(real)[name]
        except KeyError:
            with loading():  # diffusers and transformers import a class when it is asked for
                return getattr(real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(_real(self.__name__), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(_real(self.__name__), name)


def late(name: str) -> Any:
    """A module that is imported when something is asked of it.

    For one of this package that derives classes from a big library's:

        if TYPE_CHECKING:
            from dojo.run import fused
        else:
            fused = late("dojo.run.fused")
    """
    return _Late(name)


if TYPE_CHECKING:
    import accelerate as accelerate
    import bitsandbytes as bitsandbytes  # pyright: ignore[reportMissingImports]
    import diffusers as diffusers
    import peft as peft
    import safetensors.torch as safetensors_torch
    import torch as torch
    import torch.nn.functional as F
    import torchvision.transforms.functional as TF
    import transformers as transformers
    from torch import nn as nn
else:
    accelerate = late("accelerate")
    bitsandbytes = late("bitsandbytes")
    diffusers = late("diffusers")
    peft = late("peft")
    safetensors_torch = late("safetensors.torch")
    torch = late("torch")
    F = late("torch.nn.functional")
    TF = late("torchvision.transforms.functional")
    transformers = late("transformers")
    nn = late("torch.nn")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` around every call of `function`, as a decorator that loads nothing."""

    @wraps(function)
    def without(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without
