"""Turns a script's frozen dataclass `Args` into flat `--snake_case` flags.

The only file that knows tyro; it also says how a mistake of the user's ends a script.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TypeVar, get_args, get_origin, get_type_hints

import tyro

ArgsT = TypeVar("ArgsT")

# Nested option groups become flat flags; a boolean is a bare flag without a negated twin.
_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


# The disk is full or cannot be written, the user may not, a file is where a folder should be.
_PLACES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


class UserError(ValueError):
    """Something that the user can mend: shown as one message without a traceback, exit code 2."""


class TrainingStopped(RuntimeError):
    """A run that had to stop (a loss that is not finite): one message, exit code 1."""


def parse(args_type: type[ArgsT], doc: str | None, argv: Sequence[str] | None = None) -> ArgsT:
    """Parses `argv` (the process's own when None) into `args_type`; `doc` heads the help.

    A list option takes `--flag a b` and `--flag a --flag b` alike. A wrong flag or value ends the
    process with exit code 2 and a suggestion, and so does a `ValueError` from the dataclass's own
    checks.
    """
    words = _joined(args_type, list(sys.argv[1:] if argv is None else argv))
    return tyro.cli(args_type, description=doc, args=words, use_underscores=True, config=_CONFIG)


def run(
    main: Callable[[ArgsT], None],
    args_type: type[ArgsT],
    doc: str | None,
    instead: Mapping[str, Callable[[], str]] | None = None,
) -> None:
    """Parses the command line and calls `main`; ends the process cleanly on a user's mistake.

    Args:
        instead: flags that print a text and do nothing else, whatever else is missing.
    """
    for flag, text in (instead or {}).items():
        if flag in sys.argv[1:]:
            print(text())
            return
    args = parse(args_type, doc)
    try:
        main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (text := trouble_with_place(error)) is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except TrainingStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)


def trouble_with_place(error: OSError) -> str | None:
    """A sentence, if an error is about where the user wants something; None if it may be ours."""
    if error.errno not in _PLACES or error.filename is None:
        return None
    return f"{error.filename} cannot be written or read: {error.strerror}"


def _joined(args_type: type, words: list[str]) -> list[str]:
    """Gathers a repeated list option's values at its first place; tyro would keep the last only."""
    lists = _list_flags(args_type)
    kept: list[list[str]] = [[]]  # each entry: a flag with its values
    for word in words:
        if word.startswith("--"):
            kept.append(word.split("=", 1))
        else:
            kept[-1].append(word)
    joined: dict[str, list[str]] = {}
    out: list[list[str]] = []
    for entry in kept:
        name = entry[0].replace("-", "_").lstrip("_") if entry else ""
        if name in joined:
            joined[name].extend(entry[1:])
            continue
        out.append(entry)
        if name in lists:
            joined[name] = entry
    return [word for entry in out for word in entry]


def _list_flags(args_type: type) -> set[str]:
    """Names of the fields, also of nested groups, that hold a tuple of any length."""
    names: set[str] = set()
    for name, hint in get_type_hints(args_type).items():
        if is_dataclass(hint) and isinstance(hint, type):
            names |= _list_flags(hint)
        elif any(
            get_origin(option) is tuple and get_args(option)[-1:] == (...,)
            for option in (hint, *get_args(hint))
        ):
            names.add(name)
    return names
