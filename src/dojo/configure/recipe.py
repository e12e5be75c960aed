"""The options of a method's launcher, which holds its recipe, and options as a file has them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dojo.cli import UserError
from dojo.cli.scripts import ROOT

Options = dict[str, Any]
"""Options by flat name; a list where a flag has several values or none."""

# In place of the interpreter: says what it would have been started with.
_STAND_IN = "#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n"


def of_launcher(script: Path, variables: Mapping[str, str]) -> Options:
    """What the launcher of a script would give it.

    Args:
        variables: of the launcher's environment, such as MODEL_NAME.
    Raises:
        UserError: the launcher refuses them.
    """
    launcher = ROOT / "scripts" / f"{script.stem}.sh"
    with tempfile.TemporaryDirectory() as place:
        program = Path(place) / "python"
        program.write_text(_STAND_IN)
        program.chmod(0o755)
        path = f"{place}{os.pathsep}{os.environ['PATH']}"
        inherited = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        environment = {**inherited, "PATH": path, "VIRTUAL_ENV": place, **variables}
        done = subprocess.run(
            ["bash", str(launcher)], env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    words = done.stdout.split("\0")[:-1]
    return from_words(words[words.index(script.name) + 1 :])


def from_words(words: list[str]) -> Options:
    """The words of a command line by option; a bare flag is True."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = []
        else:
            found[name].append(word)
    return {
        name: values[0] if len(values) == 1 else values or True for name, values in found.items()
    }


def to_words(options: Mapping[str, Any]) -> list[str]:
    """The words of a command line; an option that is None is left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return words


def chosen(args: Any) -> Options:
    """The options of a script that have another value than their default."""
    found: Options = {}
    for group in vars(args).values():
        for one in fields(group):
            value = getattr(group, one.name)
            if value != one.default and not one.name.endswith("_token"):
                found[one.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
