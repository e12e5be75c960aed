"""What `--help` shows: all options of a small command; of a large one those that matter first.

A command is large when some of its options are marked as common (`dojo.cli.option`). Its `--help`
shows what is required, the common options, and the groups by name; `--help all` shows everything,
`--help GROUP` one group.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, get_type_hints

import tyro

EVERYTHING = "all"

# Draws the whole help of a dataclass under a heading; its end is a SystemExit.
Draw = Callable[[type, str | None], object]


def asked(words: Sequence[str]) -> str | None:
    """The word behind `--help` or `-h`, empty if it stands alone; None without either."""
    for place, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in ("--help", "-h"):
            behind = [word for word in words[place + 1 : place + 2] if not word.startswith("-")]
            return value or "".join(behind)
    return None


def show(args_type: type, doc: str | None, topic: str, draw: Draw) -> None:
    """Prints the help that `topic` (see `asked`) wants.

    Raises:
        ValueError: there is no group of that name.
    """
    groups = dict(_groups(args_type))
    common = [option for option in _options(args_type) if option[1].metadata.get("common")]
    shown = args_type
    if not common or topic == EVERYTHING:
        groups = {}
    elif topic in groups:
        shown, doc, groups = _dataclass([(topic, groups[topic])]), None, {}
    elif topic:
        known = ", ".join([EVERYTHING, *groups])
        raise ValueError(f"--help {topic}: there is no such group of options (known: {known})")
    else:
        shown = _first(args_type, common)
    with contextlib.suppress(SystemExit):
        draw(shown, doc)
    if groups:
        print("\n".join(_listed(args_type, groups)))
    if topic in ("", EVERYTHING):
        print("Options from a file, by the same names: --config run.yaml (docs/config.md)")


_Option = tuple[type, dataclasses.Field[Any], Any]  # its class, its field, its type


def _options(args_type: type) -> Iterator[_Option]:
    """The options, those of nested groups included."""
    hints = get_type_hints(args_type, include_extras=True)
    for field in dataclasses.fields(args_type):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options(hint)
        else:
            yield args_type, field, hint


def _groups(args_type: type) -> Iterator[tuple[str, type]]:
    for name, hint in get_type_hints(args_type).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield name, hint


def _first(args_type: type, common: Sequence[_Option]) -> type:
    """Two groups, of the required options and of the common ones."""
    required = [option for option in _options(args_type) if _is_required(option[1])]
    common = [option for option in common if not _is_required(option[1])]
    groups = {"required": required, "common": common}
    return _dataclass([(name, _copied(chosen)) for name, chosen in groups.items() if chosen])


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _copied(options: Sequence[_Option]) -> type:
    """A group of options out of others."""
    return _dataclass([_copy(*option) for option in options])


def _copy(owner: type, field: dataclasses.Field[Any], hint: Any) -> tuple[str, Any, Any]:
    explained = Annotated[hint, tyro.conf.arg(help=_brief(owner, field.name))]
    return field.name, explained, copy.copy(field)


def _dataclass(fields: Sequence[tuple[str, Any] | tuple[str, Any, Any]]) -> type:
    """A dataclass without a word of its own in the help."""
    return dataclasses.make_dataclass("Options", fields, kw_only=True, namespace={"__doc__": ""})


def _brief(owner: type, name: str) -> str:
    """The first sentence, or part of one, of the docstring below a field."""
    text = next((texts[name] for texts in map(_texts, owner.__mro__) if name in texts), "")
    return textwrap.shorten(re.split(r"[;.] ", text)[0].rstrip("."), 90, placeholder=" ...")


def _texts(owner: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass, each in one line."""
    if not dataclasses.is_dataclass(owner):
        return {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
            case _:
                pass
    return found


def _listed(args_type: type, groups: dict[str, type]) -> Iterator[str]:
    """A line per group: its name, how many options it has, what it is about."""
    total = len(list(_options(args_type)))
    yield f"All {total} options: --help {EVERYTHING}." + (" A group: --help NAME" if groups else "")
    width = max(map(len, groups), default=0)
    for name, group in groups.items():
        start = f"  {name:{width}} {len(list(_options(group))):3}  "
        first = (inspect.getdoc(group) or "").split("\n\n")[0]
        room = shutil.get_terminal_size().columns - len(start)
        yield start + textwrap.shorten(first, max(room, 20), placeholder=" ...")
