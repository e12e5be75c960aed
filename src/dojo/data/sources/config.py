"""The file of ``--data_config``: several folders of pictures, each with options of its own.

    - path: pictures            # a folder, from this file's own folder on, or a hub id
      resolution: [512, 768]
      repeats: 4
    - path: class
      instance_prompt: a photo of a dog
      is_regularisation: true
      weight: 0.5

What an entry does not say comes from the flags; what it says also switches off the flags that
contradict it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dojo.cli import UserError
from dojo.data.options import DataArgs

# What each key takes, for the check and for the message.
_TEXT, _SWITCH, _COUNT, _NUMBER, _COUNTS = (
    "text",
    "true or false",
    "a whole number",
    "a number",
    "a whole number or a list of them",
)
_KEYS = {
    "path": _TEXT,
    "split": _TEXT,
    "repeats": _COUNT,
    "repeats_from_folder_names": _SWITCH,
    "weight": _NUMBER,
    "is_regularisation": _SWITCH,
    "resolution": _COUNTS,
    "height": _COUNT,
    "width": _COUNT,
    "center_crop": _SWITCH,
    "random_crop": _SWITCH,
    "random_flip": _SWITCH,
    "aspect_buckets": _SWITCH,
    "caption_strategy": _TEXT,
    "caption_column": _TEXT,
    "image_column": _TEXT,
    "instance_prompt": _TEXT,
    "mask_dir": _TEXT,
    "mask_from_alpha": _SWITCH,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One folder of a data_config."""

    place: str
    """What messages call it: the file, the entry's number, its path."""
    location: str
    """Folder or hub id."""
    args: DataArgs
    """The flags as this entry changes them."""
    weight: float
    """Of its samples' loss."""
    is_regularisation: bool
    """Pictures of the class."""


def read_config(path: Path, flags: DataArgs) -> list[Entry]:
    """The entries of a data_config file.

    Args:
        path: of a .yaml, .yml or .json file: a list of entries, or {"sources": [...]}.
        flags: what an entry does not say.

    Raises:
        UserError: naming the file, the entry and the key that is wrong.
    """
    content = _parse(path)
    if isinstance(content, dict):
        _refuse_unknown(f"{path}", content, ("sources",))
        content = content.get("sources")
    if not isinstance(content, list):
        raise UserError(f"{path}: a list of entries is expected, or 'sources:' with such a list")
    if not content:
        raise UserError(f"{path} has no entries")
    entries = [_entry(path, number, said, flags) for number, said in enumerate(content, start=1)]
    if not any(entry.args.aspect_buckets for entry in entries):
        for name in ("bucket_step", "bucket_min", "bucket_max"):
            if getattr(flags, name) is not None:
                raise UserError(f"--{name}: no entry of {path} has aspect_buckets")
    masked = any(entry.args.mask_dir or entry.args.mask_from_alpha for entry in entries)
    if flags.masked_loss_weight > 0.0 and not masked:
        raise UserError(f"--masked_loss_weight: no entry of {path} has masks")
    return entries


def args_for(flags: DataArgs, location: str, said: Mapping[str, Any]) -> DataArgs:
    """The flags for one place, changed by what is said of it.

    Args:
        flags: of the command line.
        location: of the place.
        said: fields of DataArgs. They win over the flags, and over those that contradict them.

    Raises:
        ValueError: what is said contradicts itself, or what is left of the flags.
    """
    dropped: dict[str, Any] = {
        "data_config": None,
        "train_data_dir": None,
        "instance_data_dir": None,
        "masked_loss_weight": 0.0,  # of the run as a whole, and refused without masks
    }
    if "resolution" in said or said.get("aspect_buckets"):
        dropped |= {"height": None, "width": None}
    if not said.get("aspect_buckets", flags.aspect_buckets):
        dropped |= {"bucket_step": None, "bucket_min": None, "bucket_max": None}
    if said.get("random_crop"):
        dropped["center_crop"] = False
    if said.get("center_crop"):
        dropped["random_crop"] = False
    if said.get("random_flip"):
        dropped["no_hflip"] = False
    if said.get("mask_from_alpha"):
        dropped["mask_dir"] = None
    if said.get("mask_dir"):
        dropped["mask_from_alpha"] = False
    strategy = said.get("caption_strategy")
    if strategy == "instance" or "instance_prompt" in said:
        dropped["caption_column"] = None
    elif strategy in ("column", "sidecar", "filename", "folder") or "caption_column" in said:
        dropped["instance_prompt"] = None
        if strategy in ("sidecar", "filename", "folder"):
            dropped["caption_column"] = None
    if strategy is None and {"instance_prompt", "caption_column"} & said.keys():
        dropped["caption_strategy"] = "auto"
    return replace(flags, **{**dropped, "dataset_name": location, **said})


def _entry(path: Path, number: int, said: object, flags: DataArgs) -> Entry:
    place = f"{path} entry {number}"
    if not isinstance(said, dict):
        raise UserError(f"{place}: keys and values are expected, got {said!r}")
    _refuse_unknown(place, said, tuple(_KEYS))
    if "path" not in said:
        raise UserError(f"{place} has no path")
    for key, value in said.items():
        if not _fits(value, _KEYS[key]):
            raise UserError(f"{place}: {key} must be {_KEYS[key]}, got {value!r}")
    said = dict(said)
    location = _located(path, said.pop("path"))
    place = f"{place} ({location})"
    weight = said.pop("weight", 1.0)
    if not (weight > 0.0 and math.isfinite(weight)):
        raise UserError(f"{place}: weight must be a finite number above 0, got {weight}")
    is_regularisation = said.pop("is_regularisation", False)
    if "split" in said:
        said["dataset_split"] = said.pop("split")
    if isinstance(resolution := said.get("resolution"), int | list):
        said["resolution"] = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    if said.get("mask_dir"):
        said["mask_dir"] = _located(path, said["mask_dir"])
    try:
        args = args_for(flags, location, said)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    return Entry(
        place=place,
        location=location,
        args=args,
        weight=float(weight),
        is_regularisation=is_regularisation,
    )


def _located(config: Path, location: str) -> str:
    """A path from the config file's folder on where that exists, else as it stands."""
    beside = config.parent / Path(location).expanduser()
    return str(beside) if beside.exists() else location


def _fits(value: object, kind: str) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_count = is_number and isinstance(value, int)
    if kind == _COUNTS and isinstance(value, list):
        return bool(value) and all(_fits(one, _COUNT) for one in value)
    return {
        _TEXT: isinstance(value, str),
        _SWITCH: isinstance(value, bool),
        _COUNT: is_count,
        _NUMBER: is_number,
        _COUNTS: is_count,
    }[kind]


def _refuse_unknown(place: str, said: Mapping[Any, object], known: tuple[str, ...]) -> None:
    for key in said:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{place}: unknown key {key!r}; {hint}")


class _Loader(yaml.SafeLoader):
    """YAML in which no key may stand twice: plain YAML would take the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=_twice(key), problem_mark=key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _parse(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"--data_config {path}: there is no such file")
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UserError(f"--data_config {path}: a .yaml, .yml or .json file is expected")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, _Loader)  # a SafeLoader
    except (ValueError, yaml.YAMLError) as error:  # ValueError: JSON, UTF-8, a key twice
        raise UserError(f"{path} cannot be read: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    for number, (key, _) in enumerate(pairs):
        if key in dict(pairs[:number]):
            raise ValueError(_twice(key))
    return dict(pairs)


def _twice(key: object) -> str:
    return f"the key {key!r} stands twice in one entry"
