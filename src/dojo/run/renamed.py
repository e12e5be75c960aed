"""Options that had another name once, so that a run from before still goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The name of then -> the name of now, and what the values are called now.
_RENAMED: Mapping[str, tuple[str, Mapping[Any, Any]]] = {
    "use_lora": ("finetune", {True: "lora", False: "full"}),
}


def as_named_now(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an earlier run, by name, as they would be given today."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        now, values = _RENAMED.get(name, (name, None))
        found[now] = value if values is None else values.get(value, value)
    return found
