"""A site for one user: who may ask, what a browser may do with the answers, how it is served.

Everything below /api/ needs the token that is printed in the address. It stands behind the `#`,
which a browser keeps for itself: it reaches neither a server's log nor a proxy. The page's script
sends it as bearer token, which no other page can.

The header Host must name this machine, or a page of somebody else's, whose name is made to point
here (DNS rebinding), could read the answers. The content security policy lets the pages load
nothing from anywhere else.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dojo.cli import UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STATIC = Path(__file__).parent / "static"
MAX_BODY = 2**16  # bytes of a request
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # Pictures come as blobs, since an address of a picture would have to hold the token.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Endpoint = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Door:
    """Who may ask."""

    host: str = "127.0.0.1"
    """address that is listened on"""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    """what the user's page shows"""

    def admits(self, host: str) -> bool:
        """Whether the header Host names this machine as the user may have written it."""
        name = _name_of(host)
        if name in ("localhost", self.host.lower()):
            return True
        try:
            literal = ipaddress.ip_address(name)
        except ValueError:  # any name can be made to point here
            return not is_loopback(self.host) and name == socket.gethostname().lower()
        # An address cannot be made to point elsewhere; who listens to all has several.
        return literal.is_loopback or not is_loopback(self.host)

    def knows(self, authorization: str) -> bool:
        """Whether a request's header holds the token."""
        return hmac.compare_digest(authorization.encode(), f"Bearer {self.token}".encode())


def _name_of(host: str) -> str:
    """A Host header without its port and brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make(door: Door, page: str, api: Mapping[str, Endpoint]) -> ASGIApp:
    """The application: a page, its files, and what its script asks.

    Args:
        page: name of the page in `static`, shown at /.
        api: endpoints by "GET /name" or "POST /name", below /api.
    """
    routes = [Route("/", _file(page)), *(Route(f"/{p.name}", _file(p.name)) for p in _shared(page))]
    for name, endpoint in api.items():
        method, _, path = name.partition(" ")
        routes.append(Route(f"/api{path}", endpoint, methods=[method]))
    return _Guard(Starlette(routes=routes, exception_handlers={Refused: _refuse}), door)


def _shared(page: str) -> list[Path]:
    """The files that a page may ask for: what all share, and its own script."""
    own = Path(page).stem
    return [STATIC / name for name in ("page.css", "page.js", "charts.js", f"{own}.js")]


def _file(name: str) -> Endpoint:
    path = STATIC / name
    content, kind = path.read_bytes(), _KINDS[path.suffix]

    async def answer(_: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


async def _refuse(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, Refused) else 500
    said = str(error).encode("utf-8", "replace").decode()  # half a surrogate pair of a request's
    return JSONResponse({"error": said}, status)


class _Guard:
    """Lets through what may pass, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no sockets, and nothing to do at the start
            raise RuntimeError(f"{scope['type']} is not served")

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        reason = self._refusal(scope)
        app = JSONResponse({"error": reason[1]}, reason[0]) if reason else self.app
        await app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        if not self.door.admits(headers.get("host", "")):
            return 421, "the header Host names another machine"
        if not scope["path"].startswith("/api/"):
            return None
        if not self.door.knows(headers.get("authorization", "")):
            return 401, "the token is missing or wrong: open the address that was printed"
        if scope["method"] != "POST":
            return None
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "the body must be application/json"
        length = headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return 413, f"the body must tell its length and hold at most {MAX_BODY} bytes"
        return None


async def body_of(request: Request) -> dict[str, Any]:
    """The table that a request's body holds.

    Raises:
        Refused: it is something else.
    """
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object")
    return body


# -- serving ----------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """Takes a port; 0 is any that is free.

    Raises:
        UserError: it is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} on {host}: {error}; --port 0 takes a free one") from error


def address(listening: socket.socket, door: Door) -> str:
    """What the user opens, with the token."""
    port = listening.getsockname()[1]
    host = f"[{door.host}]" if ":" in door.host else door.host
    return f"http://{host}:{port}/#token={door.token}"


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        listening.close()
