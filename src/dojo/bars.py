"""Bars that show how far something is: drawn anew on a terminal, lines in a log.

Where standard error is no terminal, a line comes every half minute and one at the end of a bar that
stays: a file has no carriage returns, and a short bar that does not stay leaves nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from dojo.lazy import diffusers, transformers

if TYPE_CHECKING:
    _Base = tqdm
else:

    class _Base(tqdm):
        def __class_getitem__(cls, _: Any) -> type:
            return cls


T = TypeVar("T")
SECONDS = 30.0  # between two lines of a log
clock = time.monotonic


class Bar(_Base[T]):
    """A bar of tqdm's, with its options.

    Args:
        left: the seconds that are left, where that is known better than from the pace of the last
            units; None while nothing is known.
    """

    def __init__(
        self,
        iterable: Iterable[T] | None = None,
        desc: str | None = None,
        total: float | None = None,
        *,
        left: Callable[[], float | None] | None = None,
        **options: Any,
    ) -> None:
        self._left = left
        self._told = clock()
        if left is not None:
            options["bar_format"] = (
                "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"
            )
        super().__init__(iterable, desc, total, **options)  # pyright: ignore

    @property
    def _plain(self) -> bool:
        return not self.fp.isatty()

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """What tqdm formats; `left` besides."""
        found = dict(super().format_dict)
        seconds = self._left() if self._left else None
        found["left"] = "?" if seconds is None else self.format_interval(seconds)
        return found

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Shows the bar; in a log, its line without the end that `close` adds."""
        if not self._plain:
            return super().display(msg, pos)  # pyright: ignore
        if msg is None:
            left = "{left}" if self._left else "{remaining}"
            title = f"{self.desc.removesuffix(': ')}: " if self.desc else ""
            line = f"{{n_fmt}}/{{total_fmt}} [{{elapsed}}<{left}, {{rate_fmt}}{{postfix}}]"
            known = {**self.format_dict, "bar_format": line, "ncols": None}
            self.fp.write(title + self.format_meter(**known))
        return False

    def clear(self, nolock: bool = False) -> None:
        """Makes room for a message; in a log there is nothing to be cleared."""
        if not self.disable and not self._plain:
            super().clear(nolock)

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> Any:
        """Draws the bar anew; in a log, when the last line is old enough."""
        if self.disable or not self._plain:
            return super().refresh(nolock, lock_args)
        if clock() - self._told >= SECONDS:
            self._told = clock()
            self.display()
            self.fp.write("\n")
            self.fp.flush()
        return True


def leave_out_others() -> None:
    """Lets diffusers and transformers draw no bars of their own from here on.

    They draw one for every part that they load, a second long, and into a log too.
    """
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()


def leave_out_others_in_logs() -> None:
    """The same where standard error is no terminal."""
    if not sys.stderr.isatty():
        leave_out_others()
