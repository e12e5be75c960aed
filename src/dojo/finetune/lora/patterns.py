"""Names of layers as the expressions that peft looks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def any_of(layers: Iterable[str]) -> str:
    """An expression that matches exactly these names, whole."""
    return f"^(?:{'|'.join(re.escape(name) for name in layers)})"


def by_value(values: Mapping[str, float]) -> dict[str, float]:
    """One expression for all layers of one value: peft tries every expression on every layer."""
    groups: dict[float, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return {any_of(group): value for value, group in groups.items()}
