"""Pages for a user's own browser: the server's doors (`site`) and the files of the pages.

Both pages, `python -m dojo.watch` and `demo.py --web`, stand on Starlette and uvicorn:
`pip install "sd-dojo[web]"`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from dojo.cli import UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from dojo.web.site import Door


class Page(Protocol):
    """What is served."""

    def app(self, door: Door) -> ASGIApp:
        """The site behind a door."""
        ...


def open_page(what: str, make: Callable[[], Page], *, port: int, host: str = "127.0.0.1") -> None:
    """Serves a page until Ctrl-C, and prints its address.

    Args:
        what: goes on in it, for the line with the address.
        make: the page; called when the port is taken, and may take long.
    Raises:
        UserError: Starlette or uvicorn is missing, or the port is taken.
    """
    try:
        from dojo.web import site
    except ImportError as error:
        raise UserError(
            f"the page needs the packages starlette and uvicorn ({error}); install them with "
            '`pip install "sd-dojo[web]"`'
        ) from error
    door = site.Door(host=host)
    listening = site.listen(host, port)
    try:
        app = make().app(door)
    except BaseException:
        listening.close()
        raise
    print(f"{what} on {site.address(listening, door)} (Ctrl-C ends it)", flush=True)
    site.serve(app, listening)
