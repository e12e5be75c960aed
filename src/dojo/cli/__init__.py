"""Turns a script's frozen dataclass `Args` into flat `--snake_case` flags.

The only package that knows tyro; it also says how a mistake of the user's ends a script.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import select
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro

from dojo import loading
from dojo.bars import Bar
from dojo.cli import config, foreign, help, masking
from dojo.cli.masking import hide

_UNREAD = 128 + 13  # what shells say of a process that SIGPIPE ended
ArgsT = TypeVar("ArgsT")
DefaultT = TypeVar("DefaultT")

# Nested option groups become flat flags; a boolean is a bare flag without a negated twin.
_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
_REGISTRY = tyro.constructors.ConstructorRegistry()
_TRUTH = {"true": True, "false": False}


# The disk is full or cannot be written, the user may not, a file is where a folder should be.
_PLACES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


class UserError(ValueError):
    """Something that the user can mend: shown as one message without a traceback, exit code 2."""


class TrainingStopped(RuntimeError):
    """A run that had to stop (a loss that is not finite): one message, exit code 1."""

    exit_code = 1


def option(default: DefaultT, *, common: bool = False, incidental: bool = False) -> DefaultT:
    """The default of an option of a dataclass, with marks; its docstring stands below as ever.

    An override in a subclass states its own marks. An option without a default is marked by
    `field(metadata=marks(...))`.

    Args:
        common: `--help` shows it; it shows the others' groups only.
        incidental: a run may be continued with another value of it.
    """
    return field(default=default, metadata=marks(common=common, incidental=incidental))


def marks(*, common: bool = False, incidental: bool = False) -> dict[str, bool]:
    """The metadata of a dataclass's field that `option` sets; what the marks mean stands there."""
    return {"common": common, "incidental": incidental}


def incidental(group: type[ArgsT]) -> type[ArgsT]:
    """Marks a whole group of options: a run may be continued with another value of any."""
    group.__incidental__ = True  # pyright: ignore[reportAttributeAccessIssue]
    return group


def incidental_options(groups: Mapping[str, Any]) -> set[str]:
    """The options that a run may be continued with another value of, as `group.name`.

    By group, since two groups may have an option of one name that means two things.

    Args:
        groups: dataclasses or their values by the names of their groups.
    """
    return {
        f"{name}.{option.name}"
        for name, group in groups.items()
        for option in fields(group)
        if getattr(group, "__incidental__", False) or option.metadata.get("incidental")
    }


def parse(args_type: type[ArgsT], doc: str | None, argv: Sequence[str] | None = None) -> ArgsT:
    """Parses `argv` (the process's own when None) into `args_type`; `doc` heads the help.

    Of a flag that is given twice the last one counts, of a list too, which is one flag with several
    values. A bare flag also takes True or False, a choice is found in any case of its letters, and
    a number has to be finite. A wrong flag or value ends the process with exit code 2 and a
    suggestion, another trainer's flag with ours, and so does a `ValueError` from the dataclass's
    own checks. What `--help` shows stands in `dojo.cli.help`, how `--config FILE` gives options in
    `dojo.cli.config`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    masking.keep_flagged(words)
    if (topic := help.asked(words)) is not None:
        _help(args_type, doc, topic)

    def read(words: list[str]) -> ArgsT:
        return _read(args_type, doc, words)

    words = _with_config(args_type, words)
    masking.keep_flagged(words)  # a file's secrets too
    return _naming_origins(lambda: _without_secrets(read, _settled(args_type, words)))


def typed(words: Sequence[str]) -> frozenset[str]:
    """The names of the options on a command line and in its file, as fields have them."""
    return _flags(words) | _origins.keys()


def options(args_type: type) -> Iterator[tuple[str, Any]]:
    """Names and types of the options of a command, those of nested groups included."""
    return _options(args_type)


def _flags(words: Sequence[str]) -> frozenset[str]:
    flags = (word.partition("=")[0] for word in words if word.startswith("--"))
    return frozenset(flag.removeprefix("--").replace("-", "_") for flag in flags)


# The options that came from a file: file and key by name, of the last command line that was parsed.
_origins: dict[str, str] = {}


def _with_config(args_type: type, words: list[str]) -> list[str]:
    """The words with those of the file before them that `--config` names; what is typed wins."""
    _origins.clear()
    if "config" in dict(_options(args_type)):  # a command's own
        return words
    try:
        path, words = config.split(words)
        if path is None:
            return words
        read = config.read(path)
        own = _flags(words)
        given = list(read.given(args_type))
        taken = [one for one in given if one.name not in own]
        added = config.words_of(taken, args_type)
    except config.ConfigError as error:
        _end(f"error: {error}", 2)
    _say_overridden(path, [one.name for one in given if one.name in own])
    _origins.update((one.name, one.where) for one in taken)
    return [*added, *words]


def _say_overridden(path: Path, names: Sequence[str]) -> None:
    """A launcher gives flags of its own: which options of the file do not count must be seen."""
    if names and os.environ.get("RANK", "0") == "0":
        flags = ", ".join(f"--{name}" for name in names)
        print(f"{flags}: the command line counts, not {path}", file=sys.stderr)


def _naming_origins(act: Callable[[], ArgsT]) -> ArgsT:
    """`act()`; where it prints a refusal of options from a file, file and key are said below."""
    if not _origins:
        return act()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return act()
    finally:
        told = printed.getvalue()
        lines = _from_files(told) if isinstance(sys.exc_info()[1], SystemExit) else []
        sys.stderr.write("".join([told, *(f"{line}\n" for line in lines)]))


def _from_files(message: str) -> list[str]:
    """A line for each option in a message that a file gave."""
    named = dict.fromkeys(re.findall(r"--([A-Za-z0-9_]+)", message))
    return [f"(--{name} stands in {_origins[name]})" for name in named if name in _origins]


def _program() -> str | None:
    """What a usage line calls a module that was started with `python -m`; unset is the file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("dojo."):
        return None
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _read(args_type: type[ArgsT], doc: str | None, words: list[str]) -> ArgsT:
    return tyro.cli(
        args_type,
        prog=_program(),
        description=doc,
        args=words,
        use_underscores=True,
        config=_CONFIG,
        registry=_REGISTRY,
    )


def _help(args_type: type, doc: str | None, topic: str) -> NoReturn:
    """Prints the help that is asked for, and ends the process."""

    def draw(shown: type, doc: str | None) -> None:
        _read(shown, doc, ["--help"])

    try:
        help.show(args_type, doc, topic, draw)
    except ValueError as error:
        _end(f"error: {error}", 2)
    sys.exit(0)


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
    with _while_read():
        for flag, text in (instead or {}).items():
            if flag in sys.argv[1:]:
                print(text())
                return
        args = parse(args_type, doc)
    loading.end_quickly()
    try:
        main(args)
    except UserError as error:
        _end(f"error: {error}", 2)
    except OSError as error:
        if (text := trouble_with_place(error)) is None:
            raise
        _end(f"error: {text}", 2)
    except TrainingStopped as error:
        text = str(error)
        _end(f"stopped: {text}" if text else "", error.exit_code)
    except KeyboardInterrupt:
        sys.exit(_interrupted())


def trouble_with_place(error: OSError) -> str | None:
    """A sentence, if an error is about where the user wants something; None if it may be ours."""
    if error.errno not in _PLACES or error.filename is None:
        return None
    return f"{error.filename} cannot be written or read: {error.strerror}"


def ended(main: Callable[[], int | None]) -> int:
    """The exit code of a command with a parser of its own, that of Ctrl-C without a traceback."""
    try:
        with _while_read():
            return main() or 0
    except KeyboardInterrupt:
        return _interrupted()


@contextlib.contextmanager
def _while_read() -> Generator[None]:
    """Ends the process without a word when whoever read its output has gone, as `| head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _has_lost_its_reader():  # another pipe broke
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest
        sys.exit(_UNREAD)


def _has_lost_its_reader() -> bool:
    """Whether nobody is there to read standard output."""
    try:
        asked = select.poll()
        asked.register(sys.stdout.fileno(), select.POLLOUT)
    except (AttributeError, OSError):  # Windows; no file
        return False
    return any(event & select.POLLERR for _, event in asked.poll(0))


def _interrupted() -> int:
    print("\ninterrupted", file=sys.stderr)
    return 130


def _end(message: str, code: int) -> NoReturn:
    """Ends the process with a message on a line of its own, also behind a half-drawn bar."""
    for bar in list(getattr(Bar, "_instances", ())):
        bar.close()
    if message:
        print("\n".join([hide(message), *_from_files(message)]), file=sys.stderr)
    sys.exit(code)


def _without_secrets(read: Callable[[list[str]], ArgsT], words: list[str]) -> ArgsT:
    """`read(words)`, whose complaint repeats no password of an address among the words.

    tyro shows the words that it does not take, broken into lines; so it is asked again with masked
    ones when it has refused those that were given.
    """
    shown = [hide(word) for word in words]
    if shown == words:
        return read(words)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return read(words)
    except SystemExit:
        read(shown)
        raise


@_REGISTRY.primitive_rule  # pyright: ignore[reportUnknownMemberType]
def _finite_numbers(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[float] | None:
    """Floats as tyro reads them, without the ones that are no numbers, in every option."""
    if info.type is not float:  # pyright: ignore[reportUnknownMemberType]
        return None

    def read(words: list[str]) -> float:
        value = float(words[0])
        if not math.isfinite(value):
            raise ValueError(f"{words[0]} is not a finite number")
        return value

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, float) or (isinstance(value, int) and "~"),
        str_from_instance=lambda value: [str(value)],
    )


def _settled(args_type: type, words: list[str]) -> list[str]:
    """The words as tyro takes them: each flag at most once, every value in its own spelling."""
    hints = dict(_options(args_type))
    entries: list[list[str]] = [[]]  # each: a flag with the words behind it
    for word in words:
        if word.startswith("--"):
            entries.append(word.split("=", 1))
        else:
            entries[-1].append(word)
    last: dict[str, int] = {}
    for place, (name, values) in _named(entries):
        if name not in hints:
            _refuse_foreign(entries[place][0], name, hints)
            continue
        hint = hints[name]
        if name in last and _is_list(hint):
            _say_replaced(entries[last[name]], entries[place])
            entries[last[name]] = []
        elif name in last and hint is bool:
            # What may stand behind a bare flag belongs to the command.
            entries[last[name]] = entries[last[name]][1:]
        last[name] = place
        if hint is bool and values and values[0].lower() in _TRUTH:
            entries[place] = [*entries[place][: _TRUTH[values[0].lower()]], *values[1:]]
        choices = _choices(hint)
        if choices and _is_list(hint):  # a,b as well as a b
            values = [one for value in values for one in value.split(",") if one]
            entries[place] = [entries[place][0], *values]
        for i, value in enumerate(values if choices else ()):
            entries[place][1 + i] = choices.get(value.lower(), value)
    return [word for entry in entries for word in entry]


def _named(entries: list[list[str]]) -> Iterator[tuple[int, tuple[str, list[str]]]]:
    """Place, name and values of every flag."""
    for place, entry in enumerate(entries):
        if entry and entry[0].startswith("--"):
            yield place, (entry[0][2:].replace("-", "_"), entry[1:])


def _refuse_foreign(flag: str, name: str, hints: Mapping[str, Any]) -> None:
    answer = foreign.answer(name, hints) or foreign.script_of(name, Path(sys.argv[0]))
    if answer is not None:
        _end(f"error: {flag}: {answer}", 2)


def _say_replaced(before: list[str], after: list[str]) -> None:
    if before[1:] != after[1:] and os.environ.get("RANK", "0") == "0":
        print(
            hide(
                f"{after[0]} is given twice: {' '.join(after[1:])} counts, not "
                f"{' '.join(before[1:])} (several values stand behind one flag)"
            ),
            file=sys.stderr,
        )


def _options(args_type: type) -> Iterator[tuple[str, Any]]:
    """Names and types of the options, those of nested groups included."""
    for name, hint in get_type_hints(args_type).items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _options(hint)
        else:
            yield name, hint


def _is_list(hint: Any) -> bool:
    """Whether an option holds a tuple of any length."""
    return any(
        get_origin(option) is tuple and get_args(option)[-1:] == (...,)
        for option in (hint, *get_args(hint))
    )


def _choices(hint: Any) -> dict[str, str]:
    """The words that an option chooses from, by their small letters; none where it is free."""
    found: dict[str, str] = {}
    for option in (hint, *get_args(hint)):
        if get_origin(option) is Literal:
            found |= {str(choice).lower(): str(choice) for choice in get_args(option)}
        elif option is str:
            return {}
    return found
