"""The prompt library: a file with the prompts of the validation pictures.

An entry is a prompt, or a table with the key `prompt` and any of the others:

    prompt                  what to draw
    name                    what files and labels call it instead of the prompt
    negative                negative prompt, instead of --validation_negative_prompt
    width, height           in pixels; or size: 768x512 (width x height), or 512 for a square
    seed                    of the first picture, instead of --validation_seed
    guidance_scale          instead of --validation_guidance_scale
    num_inference_steps     instead of --validation_inference_steps

JSON and YAML hold a list of entries, or a table from names to entries; JSONL one entry per line;
CSV one per row below a header with the keys (an empty cell is not set); a text file one prompt per
line, behind which the options of kohya's sample prompts may stand: --n for negative, --w and --h,
--d for seed, --s for num_inference_steps and --l for guidance_scale.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dojo.cli import UserError
from dojo.data import cells
from dojo.data.lines import split_lines, split_options

KINDS = (".json", ".jsonl", ".yaml", ".yml", ".csv", ".txt")
KEYS = (
    *("prompt", "name", "negative", "size", "width", "height"),
    *("seed", "guidance_scale", "num_inference_steps"),
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A prompt and what it wants otherwise than the options say; None is not set."""

    prompt: str
    name: str | None = None
    negative: str | None = None
    size: tuple[int, int] | None = None
    """height and width in pixels"""
    seed: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None


def parse_size(text: str) -> tuple[int, int]:
    """ "768x512" (width x height) or "512" to (height, width).

    Raises:
        ValueError: it is neither, or a side is zero.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX×]\s*(\d+)\s*)?", text)
    if match is None or int(match[1]) == 0 or int(match[2] or 1) == 0:
        raise ValueError(f"{text!r} is no size: write 512, or 768x512 for width x height")
    return int(match[2] or match[1]), int(match[1])


def read_prompts(path: Path) -> list[Entry]:
    """The entries of a prompt library, in their order.

    Raises:
        UserError: the file cannot be read, or an entry has an unknown key or a wrong value.
    """
    flag = "--validation_prompts_file"
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{flag}: {path} is none of {' '.join(KINDS)}")
    try:
        rows = _rows(path.read_text(encoding="utf-8-sig"), path.suffix.lower())
    except (OSError, ValueError, yaml.YAMLError, csv.Error) as error:
        raise UserError(f"{flag}: {path} cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{flag}: {path} holds no prompt")
    entries = []
    for number, row in enumerate(rows, 1):
        try:
            entries.append(_entry(row))
        except ValueError as error:
            raise UserError(f"{flag}: {path}, entry {number}: {error}") from error
    return entries


def _rows(text: str, kind: str) -> list[Any]:
    """The entries of a file as they stand: texts, or tables from keys to values."""
    if kind == ".txt":
        return [_of_line(line) for line in split_lines(text)]
    if kind == ".csv":
        # A cell beyond the header's last comes under the key None.
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return [
            {str(key or "(no key)"): value or None for key, value in row.items()} for row in rows
        ]
    if kind == ".jsonl":
        return [json.loads(line) for line in split_lines(text)]
    content = json.loads(text) if kind == ".json" else yaml.safe_load(text)
    if isinstance(content, Mapping) and "prompt" not in content:
        return [_named(name, row) for name, row in content.items()]
    if isinstance(content, Mapping):
        return [content]
    if not isinstance(content, list):
        raise ValueError("it is neither a list of prompts nor a table of them")
    return content


def _of_line(line: str) -> dict[str, Any]:
    """An entry of a text file."""
    try:
        prompt, options = split_options(line)
    except ValueError as error:
        raise ValueError(f"{line!r}: {error}") from None
    return {"prompt": prompt, **options}


def _named(name: object, row: object) -> dict[str, Any]:
    """An entry of a table from names to entries."""
    if isinstance(row, Mapping):
        return {"name": name, **row}
    return {"name": name, "prompt": row}


def _entry(row: object) -> Entry:
    """Checks and converts one entry; every complaint is a ValueError."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"{row!r} is neither a prompt nor a table with one")
    row = {str(key).strip(): value for key, value in row.items()}
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(KEYS)}"
            raise ValueError(f"the key {key!r} is not known: {hint}")
    values = {key: value for key, value in row.items() if value is not None}
    for key in ("prompt", "negative"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"{key} {values[key]!r} is not text (put it in quotes)")
    if "prompt" not in values:
        raise ValueError("it has no prompt")
    numbers = {key: _number(key, values[key]) for key in KEYS[4:] if key in values}
    width, height = numbers.pop("width", None), numbers.pop("height", None)
    size = parse_size(str(values["size"])) if "size" in values else None
    if (width is None) != (height is None) or (size and width):
        raise ValueError("give width and height, or size, or none of them")
    if width and height:
        size = int(height), int(width)
    return Entry(
        prompt=values["prompt"],
        name=str(values["name"]) if "name" in values else None,
        negative=values.get("negative"),
        size=size,
        **numbers,  # pyright: ignore[reportArgumentType]
    )


def _number(key: str, value: object) -> int | float:
    """A value of the file as the number that its key wants."""
    is_whole = key != "guidance_scale"
    lowest = 0 if key in ("seed", "guidance_scale") else 1
    wrong = ValueError(f"{key} {value!r} is no {'integer' if is_whole else 'number'}")
    if isinstance(value, bool):
        raise wrong
    found: float | None
    if isinstance(value, int) or re.fullmatch(r"\s*\d+\s*", str(value)):
        found = int(str(value))  # exactly, which floats are up to 2^53
    else:
        try:
            found = cells.number(value)
        except ValueError:
            raise wrong from None
    if found is None or found < lowest:
        raise ValueError(f"{key} must be at least {lowest}, not {value}")
    if is_whole and found != int(found):
        raise wrong
    return int(found) if is_whole else found  # pandas writes 28 as 28.0 beside empty cells
