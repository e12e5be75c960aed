"""Values of options that lie outside of what makes sense, refused by name."""

from __future__ import annotations


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
