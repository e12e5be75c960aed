"""Serves a reward over HTTP, so that scorers may live in another environment or on another GPU.

    GET  /health     {"status": "ok"}
    GET  /info       {"rewards": [names]}
    POST /v1/score   {"prompts": [...], "images": [PNG in base64, all of one size],
                      "metadata": [...] or absent, "reward": a name or absent for the sum}
                  -> {"scores": [number or null], "valid": [...], "components": {name: [...]}}

Requests are scored one after the other; those that wait hold no more than their bytes, and pictures
are decoded a few at a time, after their sizes have been read. What is too large is answered with
413, what comes too slowly with 408, and what cannot be served in time with 503 and Retry-After.

Nothing is unpickled. With DOJO_REWARD_TOKEN set, every request but /health needs it as bearer
token; without it only this machine is served. There is no encryption: put a tunnel around it.

It stands on uvicorn and Starlette: `pip install "sd-dojo[serve]"`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from dojo.cli import UserError
from dojo.lazy import torch
from dojo.rewards import wire
from dojo.rewards.remote import TOKEN
from dojo.rewards.reward import Component, Reward
from dojo.rewards.scorer import RewardFailed

if TYPE_CHECKING:
    from torch import Tensor

BACKLOG = 128  # connections that the system keeps until they are taken
AT_ONCE = 2**24  # pixels that are decoded at a time, if that is more than one picture
SLOWEST = 2**20  # bytes a second that a body must come with
DRAINED = 10.0  # seconds that the rest of a refused body is read, so that the answer is


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may cost, and how long a client may take."""

    body: int = 256 * 2**20
    """bytes"""
    bodies: int = 2
    """bodies of the largest size that may be in memory"""
    values: int = 1_000_000
    """numbers, texts, lists and objects in a body"""
    pictures: int = 1024
    """of one request"""
    picture_pixels: int = wire.MAX_PIXELS
    """of one picture"""
    pixels: int = 2**27
    """of all pictures of a request: 128 of 1024 x 1024, 8 of 4096 x 4096"""
    connections: int = 256
    """at a time, those that wait included"""
    header_seconds: float = 10.0
    """from the connection to the end of the header"""
    body_seconds: float = 20.0
    """for the body, and a second more for each MiB"""
    wait_seconds: float = 30.0
    """for its turn, after which a client is told to come again"""


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Server:
    """Scores one request after the other; `serve_forever()` starts it, `shutdown()` ends it.

    It listens from the first: who comes before `serve_forever` waits.

    Args:
        reward: what is served, its sum and each component.
        address: host and port; port 0 takes a free one, told by `server_address`.
    Raises:
        UserError: other machines would be served without a token, or the port is taken.
    """

    def __init__(
        self, reward: Reward, address: tuple[str, int], limits: Limits | None = None
    ) -> None:
        self.token = os.environ.get(TOKEN)
        if not self.token and not wire.is_loopback(address[0]):
            raise UserError(
                f"--host {address[0]} is open to other machines: set {TOKEN} to a secret for the "
                "server and its clients, or serve 127.0.0.1"
            )
        self.reward, self.limits = reward, limits or Limits()
        # A component alone has weight 1: its raw scores.
        self.alone = {
            one.name: Reward(
                [Component(name=one.name, scorer=one.scorer)], batch_size=reward.batch_size
            )
            for one in reward.components
        }
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            self.socket = socket.create_server(address, family=family, backlog=BACKLOG)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {address[1]} on {address[0]}: {error}") from error
        self.server_address: tuple[str, int] = self.socket.getsockname()[:2]
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._ended = threading.Event()
        self._ended.set()
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._app(),
                http=_protocol(self.limits.header_seconds),
                ws="none",
                lifespan="off",
                log_config=None,  # quiet: a run asks thousands of times
                log_level="warning",
                access_log=False,
                server_header=False,
                headers=[("Connection", "close")],  # a silent client holds nothing
                backlog=BACKLOG,
                limit_concurrency=self.limits.connections,
                timeout_graceful_shutdown=30,
            )
        )

    def serve_forever(self) -> None:
        """Serves until `shutdown`, or SIGINT or SIGTERM if this is the main thread.

        A request that is being scored is answered before it ends; those that wait are told to come
        again.
        """
        self._ended.clear()
        try:
            asyncio.run(self._serve())
        finally:
            self._ended.set()

    async def _serve(self) -> None:
        self.turn, self.room = anyio.Lock(), _Room(self.limits.bodies * self.limits.body)
        await self.uvicorn.serve(sockets=[self.socket])

    def shutdown(self) -> None:
        """Ends `serve_forever` in another thread, and waits until it has."""
        self.uvicorn.should_exit = True
        self._ended.wait()

    def server_close(self) -> None:
        """Gives the port back."""
        self.socket.close()
        self.thread.shutdown(wait=False)

    # -- requests -----------------------------------------------------------------------------

    def _app(self) -> Starlette:
        async def health(request: Request) -> Response:
            return JSONResponse({"status": "ok"})

        async def info(request: Request) -> Response:
            self._check_token(request)
            return JSONResponse({"rewards": list(self.alone)})

        async def score(request: Request) -> Response:
            self._check_token(request)
            return await self._score(request)

        async def nowhere(request: Request) -> Response:
            self._check_token(request)
            raise Refused(404, f"there is no {request.url.path}")

        routes = [
            Route("/health", _refusing(health)),
            Route("/info", _refusing(info)),
            Route("/v1/score", _refusing(score), methods=["POST"]),
            Route("/{path:path}", _refusing(nowhere), methods=["GET", "POST"]),
        ]
        return Starlette(routes=routes)

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("Authorization", "")
        if self.token and not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Refused(401, f"a bearer token is needed: set {TOKEN}")

    async def _score(self, request: Request) -> Response:
        # No web page can send this type across origins without asking first.
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "the body must be application/json")
        told = request.headers.get("Content-Length", "")
        if not told.isdecimal():
            raise Refused(411, "the request must tell its length")
        length = int(told)
        if length > self.limits.body:
            raise Refused(413, f"the body is larger than {self.limits.body} bytes")
        busy = Refused(503, "the server is busy: come again")
        try:
            with anyio.fail_after(self.limits.wait_seconds):
                await self.room.take(length)
        except TimeoutError:
            raise busy from None
        try:
            data = await self._body(request, length)
            try:
                with anyio.fail_after(self.limits.wait_seconds):
                    await self.turn.acquire()
            except TimeoutError:
                raise busy from None
            try:
                if self.uvicorn.should_exit:
                    raise Refused(503, "the server is about to end")
                if await request.is_disconnected():
                    raise ClientDisconnect
                work = asyncio.get_running_loop().run_in_executor(self.thread, self._scored, data)
                status, content = await work
            finally:
                self.turn.release()
        finally:
            self.room.give(length)
        return JSONResponse(content, status)

    async def _body(self, request: Request, length: int) -> bytearray:
        """The body, before it is too late."""
        data = bytearray()
        seconds = self.limits.body_seconds + length / SLOWEST
        try:
            with anyio.fail_after(seconds):
                async for chunk in request.stream():
                    data += chunk
        except TimeoutError:
            raise Refused(408, f"the body did not come within {seconds:.0f} seconds") from None
        return data

    # -- scoring, in a thread of its own --------------------------------------------------------

    def _scored(self, data: bytearray) -> tuple[int, dict[str, Any]]:
        """Status and content of the answer to a body."""
        try:
            if sum(map(data.count, (b"[", b"{", b","))) > self.limits.values:
                raise Refused(413, f"the body holds more than {self.limits.values} values")
            try:
                body = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise Refused(400, f"the body is no JSON: {error}") from None
            return 200, self.score(body)
        except Refused as error:
            return error.status, {"error": str(error)}
        except RewardFailed as error:
            print(error, file=sys.stderr, flush=True)
        except UserError as error:
            return 400, {"error": str(error)}
        except BaseException:  # a scorer must not end the server
            traceback.print_exc()
        # The client learns no more than that it failed.
        return 500, {"error": "scoring failed; the server's log says why"}

    def score(self, body: Any) -> dict[str, Any]:
        """Answers the body of one request.

        Raises:
            Refused: it is not of the form that is described above, or too large.
        """
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object")
        images, prompts, metadata = body.get("images"), body.get("prompts"), body.get("metadata")
        if not (isinstance(images, list) and images):
            raise Refused(400, "images must be a list and not empty")
        if not (isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)):
            raise Refused(400, "prompts must be a list of texts")
        rows_fit = metadata is None or (
            isinstance(metadata, list)
            and len(metadata) == len(images)
            and all(isinstance(row, dict) for row in metadata)
        )
        if len(prompts) != len(images) or not rows_fit:
            raise Refused(400, "every image needs one prompt, and one object if there is metadata")
        name = body.get("reward")
        reward = self.reward if name is None else self.alone.get(str(name))
        if reward is None:
            raise Refused(404, f"there is no reward {name} (there are {', '.join(self.alone)})")
        return self._in_parts(reward, images, prompts, metadata, self._pixels(images))

    def _pixels(self, images: list[Any]) -> int:
        """The pixels of each picture, by their headers.

        Raises:
            Refused: they are too large or too many, of several sizes, or no pictures.
        """
        limits = self.limits
        if len(images) > limits.pictures:
            raise Refused(413, f"more than {limits.pictures} images; send fewer at a time")
        try:
            sizes = [wire.size_of(i, text) for i, text in enumerate(images)]
        except ValueError as error:
            raise Refused(400, str(error)) from None
        for i, (width, height) in enumerate(sizes):
            if width * height > limits.picture_pixels:
                raise Refused(413, f"image {i} has more than {limits.picture_pixels} pixels")
        if len(set(sizes)) > 1:
            raise Refused(400, "the images of one request must have one size")
        pixels = sizes[0][0] * sizes[0][1]
        if pixels * len(images) > limits.pixels:
            raise Refused(
                413,
                f"{len(images)} images of {pixels} pixels are more than {limits.pixels} pixels: "
                f"send {limits.pixels // pixels} at a time (--reward_batch_size)",
            )
        return pixels

    def _in_parts(
        self,
        reward: Reward,
        images: list[Any],
        prompts: list[str],
        metadata: list[Any] | None,
        pixels: int,
    ) -> dict[str, Any]:
        """Scores a few pictures at a time, so that the others stay as small as they came."""
        size = max(1, min(reward.batch_size, AT_ONCE // pixels))
        found: dict[str, Any] = {"scores": [], "valid": [], "components": {}}
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            try:
                pictures = wire.decode(images[part], self.limits.picture_pixels, first=start)
            except ValueError as error:
                raise Refused(400, str(error)) from None
            with torch.no_grad():
                rows = None if metadata is None else metadata[part]
                output = reward(pictures, prompts[part], rows)
            found["scores"] += _listed(output.scores.masked_fill(~output.valid, torch.nan))
            found["valid"] += output.valid.tolist()
            for name, column in output.components.items():
                found["components"].setdefault(name, []).extend(_listed(column))
        return found


def _listed(scores: Tensor) -> list[float | None]:
    """Numbers as JSON has them, which knows no NaN."""
    return [value if value == value else None for value in scores.tolist()]


Endpoint = Callable[[Request], Awaitable[Response]]


def _refusing(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose refusals are answers, which the client gets to read."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refused as error:
            if error.status not in (408, 503):
                await _drain(request)
            headers = {"Retry-After": "5"} if error.status == 503 else None
            return JSONResponse({"error": str(error)}, error.status, headers)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    return answer


async def _drain(request: Request) -> None:
    """Reads what is still to come, for a while: a closed connection would reset the client while it
    sends, and the answer would be lost."""
    with anyio.move_on_after(DRAINED):
        try:
            async for _ in request.stream():
                pass
        except (ClientDisconnect, RuntimeError):  # gone, or read already
            pass


class _Room:
    """Bytes of bodies that may be in memory; who finds no room waits."""

    def __init__(self, size: int) -> None:
        self.free = size
        self.given = anyio.Event()

    async def take(self, size: int) -> None:
        """Waits until there is room, and takes it."""
        while self.free < size:
            await self.given.wait()
        self.free -= size

    def give(self, size: int) -> None:
        """Gives it back, and wakes those that wait."""
        self.free += size
        self.given.set()
        self.given = anyio.Event()


def _protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which waits for a request's header for ever, with a limit."""

    class Patient(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self.patience = self.loop.call_later(seconds, self.give_up)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle:  # a request has come
                self.patience.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self.patience.cancel()
            super().connection_lost(exc)

        def give_up(self) -> None:
            if not self.transport.is_closing():
                text = json.dumps({"error": f"no request within {seconds:g} seconds"})
                self.transport.write(
                    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
                    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s"
                    % (len(text), text.encode())
                )
                self.transport.close()

    return Patient
