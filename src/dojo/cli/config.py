"""Options from a file: `--config run.yaml|json|toml`, as words of a command line.

A file says what flags would say, by their names: flat, or under the names of their groups, as the
args.json of a run has them, which is such a file too. It is turned into words that stand before
the user's own, so that every check and every refusal is that of the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from dojo.cli import foreign
from dojo.cli.masking import MASK

FLAG = "--config"
SCRIPT, GRID, RECORD = "script", "grid", "args"
"""Keys beside the options: whose they are, what a sweep varies, the options of an args.json."""
ENDINGS = (".yaml", ".yml", ".json", ".toml")

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_SHOWN = 5  # options that one message names


class ConfigError(ValueError):
    """A file of options that cannot be taken, in one sentence that names it."""


@dataclass(frozen=True)
class Given:
    """One option as a file gives it."""

    name: str
    """the flag without dashes"""
    value: Any
    """None, a bool, a number, a text, or a list of these; texts of YAML are as they were typed"""
    where: str
    """file and key, for messages"""

    def words(self, hint: Any) -> list[str]:
        """The words of a command line that mean the same.

        Args:
            hint: the option's type.
        Raises:
            ConfigError: the value is no such thing.
        """
        if hint is bool:
            return [f"--{self.name}", str(self._truth())]
        if isinstance(self.value, list):
            if not _is_list(hint):
                raise ConfigError(f"{self.where} takes one value, not a list of {len(self.value)}")
            return [f"--{self.name}", *map(self._word, self.value)]
        return [f"--{self.name}", self._word(self.value)]

    def _truth(self) -> bool:
        word = str(self.value).lower()
        if word not in (*_TRUE, *_FALSE):
            raise ConfigError(f"{self.where} must be true or false, not {_brief(self.value)}")
        return word in _TRUE

    def _word(self, value: Any) -> str:
        if isinstance(value, list | dict):
            raise ConfigError(f"{self.where} holds {_brief(value)}, which is no single value")
        word = str(value)
        if word.startswith("--"):
            raise ConfigError(f"{self.where}: a value cannot begin with two dashes ({word!r})")
        if MASK in word and "://" in word:
            raise ConfigError(
                f"{self.where}: its password or key was left out of the record; give it as a flag "
                "instead"
            )
        return word


@dataclass(frozen=True)
class Config:
    """What a file says."""

    path: Path
    content: Mapping[str, Any]
    """its options as they stand there, in groups or not"""
    script: str | None
    """of which they are, where it says so"""
    grid: Any
    """what a sweep varies, where it says so"""
    record: bool
    """it is the args.json of a run"""

    def given(self, args_type: type) -> Iterator[Given]:
        """The options that it gives a command.

        Those of a record that have their default's value are left out: nobody chose them.

        Raises:
            ConfigError: it is another script's or a sweep's, or has an option that the command does
                not know.
        """
        if self.grid is not None:
            raise ConfigError(
                f"{self.path}: {GRID} is for a sweep: python -m dojo.sweep {self.path} makes a run "
                "of each combination"
            )
        defaults = dict(_defaults(args_type))
        groups = [name for name, hint in get_type_hints(args_type).items() if _is_group(hint)]
        found = list(self._flat(groups))
        self._refuse_script(args_type, [one for one in found if one.name not in defaults])
        for one in found:
            if one.name not in defaults:
                raise ConfigError(_unknown(one, list(defaults)))
            if not (_same(one.value, defaults[one.name]) and (self.record or one.value is None)):
                yield one

    def value(self, name: str) -> Any:
        """What it says of an option, in whatever group; None where it says nothing."""
        groups = [value for value in self.content.values() if isinstance(value, dict)]
        return next((group[name] for group in (self.content, *groups) if name in group), None)

    def _flat(self, groups: Sequence[str]) -> Iterator[Given]:
        seen: dict[str, str] = {}
        for key, value in self.content.items():
            inner = {key: value}
            if isinstance(value, dict):
                if key not in groups and not self.record:
                    near = _nearest(key, groups)
                    raise ConfigError(
                        f"{self.path}: {key}: there is no such group of options{near}"
                    )
                inner = value
            for name, one in inner.items():
                where = (
                    f"{self.path}: {name}" if inner is not value else f"{self.path}: {key}.{name}"
                )
                option = name.removeprefix("--").replace("-", "_")
                if option in seen:
                    raise ConfigError(f"{where} is given twice, as {seen[option]} too")
                seen[option] = where
                yield Given(option, one, where)

    def _refuse_script(self, args_type: type, foreign_ones: Sequence[Given]) -> None:
        """
        Raises:
            ConfigError: the file says that it is another script's.
        """
        own = script_of(args_type)
        if self.script is None or Path(self.script).name == own:
            return
        names = [f"--{one.name}" for one in foreign_ones]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            differs = f"which does not have {', '.join(names[:_SHOWN])}{more}"
        else:
            differs = f"which has all of its options: say {SCRIPT}: {own} there if you mean it"
        raise ConfigError(f"{self.path} is of {self.script} and not of {own}, {differs}")


def script_of(args_type: type) -> str:
    """The name of the file that a command's options are defined in."""
    return Path(inspect.getfile(args_type)).name


def split(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that `--config` names, the last one of several, and the other words.

    Raises:
        ConfigError: no file is named.
    """
    path: Path | None = None
    rest: list[str] = []
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag != FLAG:
            rest.append(word)
            continue
        value = value if equals else next(left, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{FLAG} needs a file ({', '.join(ENDINGS)})")
        path = Path(value)
    return path, rest


def words_of(given: Sequence[Given], args_type: type) -> list[str]:
    """The words that stand for options of a file.

    Raises:
        ConfigError: a value cannot be taken.
    """
    hints = dict(_hints(args_type))
    return [word for one in given for word in one.words(hints[one.name])]


# -- files ----------------------------------------------------------------------------------------


def read(path: Path) -> Config:
    """Reads a file of options.

    Raises:
        ConfigError: there is none, or it is none.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{FLAG} {path}: a file {', '.join(ENDINGS)} is expected")
    if not path.is_file():
        raise ConfigError(f"{FLAG} {path}: there is no such file")
    try:
        content = _parsed(path.suffix.lower(), path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{FLAG} {path} cannot be read: {told}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{FLAG} {path}: options by name are expected, like 'rank: 16'")
    script, grid = content.pop(SCRIPT, None), content.pop(GRID, None)
    script = None if script is None else str(script)
    options = content.get(RECORD)
    if isinstance(options, dict) and "started" in content:
        return Config(path, _resolved(options, content), script, None, record=True)
    return Config(path, content, script, grid, record=False)


def _resolved(options: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run with what it settled itself: the seed that was drawn, the precision."""
    made = {
        group: dict(values) if isinstance(values, dict) else values
        for group, values in options.items()
    }
    for name in ("seed", "mixed_precision"):
        for values in made.values():
            if isinstance(values, dict) and name in values and values[name] is None:
                values[name] = record.get(name)
    return made


def _parsed(kind: str, text: str) -> Any:
    if kind == ".json":
        return json.loads(text, object_pairs_hook=_unique)
    if kind == ".toml":
        return tomllib.loads(text)
    node = yaml.compose(text, yaml.SafeLoader)
    return {} if node is None else _typed(node)


def _typed(node: yaml.Node) -> Any:
    """YAML's content with scalars as they were typed: `no`, 1e-4 and 010 mean what flags mean."""
    if isinstance(node, yaml.MappingNode):
        return _unique([(str(_typed(key)), _typed(value)) for key, value in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [_typed(one) for one in node.value]
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} stands there twice")
        found[key] = value
    return found


def written(script: str, options: Mapping[str, Any]) -> str:
    """A YAML file that gives a script options, by their flat names."""
    plain = {name: _plain(value) for name, value in {SCRIPT: script, **options}.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def _plain(value: Any) -> Any:
    """Without the quotes that YAML would put around a whole number that is a text."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    is_number = isinstance(value, str) and re.fullmatch(r"0|-?[1-9]\d*", value)
    return int(value) if is_number else str(value) if isinstance(value, Path) else value


# -- options --------------------------------------------------------------------------------------


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _hints(args_type: type) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(args_type).items():
        yield from _hints(hint) if _is_group(hint) else [(name, hint)]


def _defaults(args_type: type) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(args_type)
    for field in dataclasses.fields(args_type):
        if _is_group(hints[field.name]):
            yield from _defaults(hints[field.name])
        else:
            yield field.name, field.default


def _same(value: Any, default: Any) -> bool:
    """Whether a value of a record is an option's default."""
    if isinstance(default, tuple):
        return value == [str(one) if isinstance(one, Path) else one for one in default]
    return value == (str(default) if isinstance(default, Path) else default)


def _is_list(hint: Any) -> bool:
    return any(get_origin(one) is tuple for one in (hint, *get_args(hint)))


def _unknown(one: Given, known: Sequence[str]) -> str:
    """What is wrong with an unknown name: another trainer's, or a misspelt one."""
    answer = foreign.answer(one.name, known)
    if answer is not None:
        return f"{one.where}: {answer}"
    return f"{one.where}: there is no --{one.name}{_nearest(one.name, known, '--')}"


def _nearest(name: str, known: Sequence[str], before: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {before}{near[0]}?" if near else ""


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
