"""Lines of text files, and the options that kohya's sample prompts carry at their ends.

a red star --n blurry --w 768 --h 512 --d 1 --s 20 --l 7.5
"""

from __future__ import annotations

import re
from typing import Any

_LINE_END = re.compile(r"\r?\n")
# A letter by itself: the other options that stand behind prompts have longer names.
_OPTION = re.compile(r"(?:^|\s)--(?=[nwhdsl](?:\s|$))")
_KEYS: dict[str, tuple[str, type]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("num_inference_steps", int),
    "l": ("guidance_scale", float),
}


def split_lines(text: str) -> list[str]:
    """Lines of a text, without those that are blank and without blanks around them.

    Only a line feed, or a carriage return before one, ends a line: `str.splitlines` would also cut
    prompts at a form feed, U+0085 and U+2028.
    """
    return [line.strip() for line in _LINE_END.split(text) if line.strip()]


def split_options(line: str) -> tuple[str, dict[str, Any]]:
    """The prompt of a line and the options behind it, by their names in the prompt library.

    Raises:
        ValueError: an option lacks its value, has a wrong one, or stands twice; or there is no
            prompt before them.
    """
    prompt, *parts = _OPTION.split(line)
    options: dict[str, Any] = {}
    for part in parts:
        letter, value = part[0], part[1:].strip()
        name, kind = _KEYS[letter]
        if name in options:
            raise ValueError(f"--{letter} stands twice")
        try:
            options[name] = kind(value)
        except ValueError:
            raise ValueError(f"--{letter} {value} is no {kind.__name__}") from None
        if value == "":
            raise ValueError(f"--{letter} has no value")
    if parts and not prompt.strip():
        raise ValueError("there is no prompt before the options")
    return prompt.strip(), options


def named(options: dict[str, Any]) -> str:
    """The options as they stood in the line: ``--w, --h``."""
    return ", ".join(f"--{letter}" for letter, (name, _) in _KEYS.items() if name in options)
