"""Values of options that make no sense, or that nothing reads, refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def check(
    args: object,
    names: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuses options out of their range, and NaN wherever there is one.

    Args:
        args: holds the options as attributes: a number, a tuple of them, or None, which is unset.
        names: of the options, separated by spaces.
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.
    Raises:
        ValueError: naming the flag, its value and its range.
    """
    words = {"at least": least, "above": above, "at most": most, "below": below}
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)
    for name in names.split():
        value = getattr(args, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or isinstance(number, str):
                continue
            inside = (
                (least is None or number >= least)
                and (above is None or number > above)
                and (most is None or number <= most)
                and (below is None or number < below)
            )
            if not inside or number != number:
                raise ValueError(f"--{name} {number:g} must be {wanted}")


def check_seed(args: object, names: str) -> None:
    """The same for seeds, which random generators take as 63 bits."""
    check(args, names, least=0, below=2**63)


def check_choice(args: Any, choice: str, own: Mapping[str, str]) -> None:
    """Refuses options that were changed though only another choice than the one taken reads them.

    Args:
        args: a dataclass that holds the options.
        choice: name of the option that chooses.
        own: by its value, the options that it alone reads, separated by spaces.
    Raises:
        ValueError: naming the flag, and the choice that it is for.
    """
    taken = getattr(args, choice)
    for value, names in own.items():
        if value != taken:
            check_unread(args, names, f"with --{choice} {taken}: it is for {value}")


def check_unread(args: Any, names: str, why: str) -> None:
    """Refuses options that were changed though nothing reads them.

    Args:
        args: a dataclass that holds the options.
        names: of the options, separated by spaces.
        why: ends the sentence "--option does nothing ..".
    Raises:
        ValueError: naming the flag.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name in names.split():
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"--{name} does nothing {why}; leave it out")
