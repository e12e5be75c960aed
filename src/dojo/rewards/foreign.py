"""A user's own function as a scorer: whatever goes wrong in it is one sentence that names it.

    def redness(images, prompts, metadata):       # [B, 3, H, W] in [0, 1], B texts, B mappings
        return images[:, 0].mean((1, 2))          # B numbers: [B] or [B, 1], or (numbers, info)

It gets copies, so that it may change what it is given. It says `redness.differentiable = True` if
gradients pass it. No exception of it ends the process, `sys.exit` neither; Ctrl-C does.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

import dojo
from dojo.cli import UserError
from dojo.cli.masking import hide
from dojo.lazy import torch
from dojo.rewards.scorer import Metadata, Place, RewardFailed, RewardOutput, Scorer

_OURS = Path(dojo.__file__).parent
_LONGEST = 300  # characters of a user's own message


class Function(Scorer):
    """A user's function, `package.module:function` or `file.py:function`."""

    def __init__(self, place: Place, source: str) -> None:
        super().__init__(place)
        self.name = source.rpartition(":")[2]
        self.function, self.home = _find(source)
        # An instance's own value in place of the class's.
        vars(self)["differentiable"] = bool(getattr(self.function, "differentiable", False))

    def score(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> torch.Tensor:
        """See `Scorer.score`.

        Raises:
            RewardFailed: the function raised, or returned something else than B numbers.
        """
        wanted = self.differentiable and torch.is_grad_enabled()
        given = images.clone() if wanted else images.detach().clone()
        rows = None if metadata is None else [copy.deepcopy(dict(row)) for row in metadata]
        # The mode is given back, whatever the function has set.
        with torch.set_grad_enabled(wanted):
            output = self._called(given, list(prompts), rows)
        try:
            scores = numbers(output, len(images))
        except ValueError as error:
            raise RewardFailed(
                f"--reward: {self._place()} returned {error}; a reward returns one number for each "
                f"picture, [{len(images)}] or [{len(images)}, 1]"
            ) from None
        if wanted and images.requires_grad and not scores.requires_grad:
            raise RewardFailed(
                f"--reward: {self._place()} has differentiable = True, but no gradient leads from "
                "its scores to the pictures (detach, numpy, item or no_grad cut it off)"
            )
        return scores

    def _place(self, error: BaseException | None = None) -> str:
        """The function with the file and the line of the user's code where something happened."""
        return f"{self.name} ({_line(error, self.home, self.function)})"

    def _called(self, *given: Any) -> Any:
        try:
            return self.function(*given)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too
            where = self._place(error)
            raise RewardFailed(f"--reward: {where} raised {_words(error)}") from error


def numbers(output: Any, count: int) -> torch.Tensor:
    """What a function returned as float32 [count]; gradients stay.

    Args:
        output: a tensor, array or list of numbers, [count] or [count, 1], a list of tensors of one
            number (None in a list is no score), a `RewardOutput`, or one of these with a second
            thing beside it, `(scores, info)`.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if isinstance(output, RewardOutput):
        output = torch.where(output.valid, output.scores, torch.nan)
    elif isinstance(output, tuple) and len(output) == 2 and not _is_number(output[0]):
        output = output[0]
    if isinstance(output, np.ndarray):
        if output.dtype.kind not in "biuf":
            raise ValueError(f"an array of {output.dtype}")
        output = torch.from_numpy(output.astype(np.float64))
    elif isinstance(output, list | tuple):
        output = _stacked(output)
    if not isinstance(output, torch.Tensor):
        raise ValueError(_described(output))
    if output.is_complex():
        raise ValueError("complex numbers")
    if output.shape == (count, 1):
        output = output[:, 0]
    if output.shape != (count,):
        raise ValueError(f"numbers of shape {list(output.shape)} for {count} pictures")
    return output.float()


def _stacked(items: Sequence[Any]) -> torch.Tensor:
    """A list of numbers, or of lists, arrays and tensors of one number each: [len]."""
    columns: list[torch.Tensor | float] = []
    for item in items:
        while isinstance(item, list | tuple) and len(item) == 1:
            (item,) = item
        if isinstance(item, np.ndarray) and item.size == 1:
            item = item.item()
        if isinstance(item, torch.Tensor) and item.numel() == 1:
            columns.append(item.reshape(()))
        elif item is None:
            columns.append(math.nan)
        elif _is_number(item):
            columns.append(float(cast(float, item)))
        else:
            raise ValueError(f"a list with {_described(item)} in it")
    if any(isinstance(one, torch.Tensor) for one in columns):
        device = next(one.device for one in columns if isinstance(one, torch.Tensor))
        return torch.stack([torch.as_tensor(one, device=device).float() for one in columns])
    return torch.tensor(columns, dtype=torch.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) and not isinstance(
        value, np.complexfloating
    )


def _described(value: Any) -> str:
    """What something is that is no number."""
    if value is None:
        return "None"
    if isinstance(value, str | bytes):
        return f"text ({_short(repr(value), 40)})"
    if _is_number(value):
        return "a single number"
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"an array of shape {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"a mapping ({_short(', '.join(map(str, value)), 60)})"
    return f"a {type(value).__name__}"


# -- where it is, and where it went wrong -------------------------------------------------------


def _find(source: str) -> tuple[Callable[..., Any], Path | None]:
    """The function of a reward's text, and the file that it stands in.

    Raises:
        UserError: there is none, or its file cannot be imported.
    """
    home, _, name = source.rpartition(":")
    module = _from_file(Path(home)) if home.endswith(".py") else _from_path(home, source)
    file = Path(module.__file__) if module.__file__ else None
    function = getattr(module, name, None)
    if not callable(function):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        known = f" (it has {', '.join(own[:8])})" if own else ""
        raise UserError(f"--reward: {home} has no function {name}{known}")
    return function, file


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"--reward: there is no file {path}")
    # Two files of one name are two modules.
    number = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    name = f"dojo_reward_{path.stem}_{number}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UserError(f"--reward: {path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    try:
        found.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        sys.modules.pop(name, None)
        raise _broken(path, error, path) from error
    return module


def _from_path(home: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(home)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if error.name and f"{home}.".startswith(f"{error.name}."):  # it, or a package above it
            raise UserError(f"--reward: {source}: {error}") from error
        raise _broken(home, error, _file_of(home)) from error
    except BaseException as error:
        raise _broken(home, error, _file_of(home)) from error


def _file_of(home: str) -> Path | None:
    try:
        found = importlib.util.find_spec(home)
    except Exception:  # a package above it cannot be imported
        return None
    return Path(found.origin) if found and found.origin else None


def _broken(home: str | Path, error: BaseException, file: Path | None) -> UserError:
    where = f" ({_line(error, file, None)})" if file else ""
    return UserError(f"--reward: {home} cannot be imported: it raised {_words(error)}{where}")


def _line(error: BaseException | None, home: Path | None, function: Any) -> str:
    """`mine.py, line 7`: the last line of the user's own code on the way to an error; the first one
    of the function, where there is no error or none of its lines was on the way."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{Path(error.filename).name}, line {error.lineno}"
    if error is not None and home is not None:
        folder = home.resolve().parent
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            file = Path(frame.filename).resolve()
            inside = file.is_relative_to(folder) and not file.is_relative_to(_OURS)
            if inside and "site-packages" not in file.relative_to(folder).parts:
                return f"{file.name}, line {frame.lineno}"
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    if code is None and function is not None:  # an object with __call__
        code = getattr(getattr(type(function), "__call__", None), "__code__", None)  # noqa: B004
    if code is not None:
        return f"{Path(code.co_filename).name}, line {code.co_firstlineno}"
    return home.name if home else "of no file"


def _words(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, SystemExit):
        return f"SystemExit (sys.exit({'' if error.code is None else error.code}))"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {_short(text, _LONGEST)}" if text else type(error).__name__


def _short(text: str, most: int) -> str:
    line = hide(" ".join(text.split()))
    return line if len(line) <= most else f"{line[:most]}..."
