"""Serves a reward over HTTP, so that scorers may live in another environment or on another GPU.

    GET  /health     {"status": "ok"}
    GET  /info       {"rewards": [names]}
    POST /v1/score   {"prompts": [...], "images": [PNG in base64, all of one size],
                      "metadata": [...] or absent, "reward": a name or absent for the sum}
                  -> {"scores": [number or null], "valid": [...], "components": {name: [...]}}

Nothing is unpickled. With DOJO_REWARD_TOKEN set, every request but /health needs it as bearer
token; without it only this machine is served. There is no encryption: put a tunnel around it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from dojo.cli import UserError
from dojo.rewards import wire
from dojo.rewards.remote import TOKEN
from dojo.rewards.reward import Component, Reward

MAX_BODY = 256 * 2**20  # bytes
SOCKET_TIMEOUT = 60.0  # seconds that a client may be silent


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Gone(Exception):
    """The client went away in the middle of its request."""


class Server(ThreadingHTTPServer):
    """Scores one request after the other; `serve_forever()` starts it, `shutdown()` ends it.

    Args:
        reward: what is served, its sum and each component.
        address: host and port; port 0 takes a free one, told by `server_address`.
    Raises:
        UserError: other machines would be served without a token, or the port is taken.
    """

    daemon_threads = True

    def __init__(
        self,
        reward: Reward,
        address: tuple[str, int],
        *,
        max_body: int = MAX_BODY,
        max_pixels: int = wire.MAX_PIXELS,
    ) -> None:
        self.token = os.environ.get(TOKEN)
        if not self.token and not wire.is_loopback(address[0]):
            raise UserError(
                f"--host {address[0]} is open to other machines: set {TOKEN} to a secret for the "
                "server and its clients, or serve 127.0.0.1"
            )
        self.reward = reward
        # A component alone has weight 1: its raw scores.
        self.alone = {
            one.name: Reward(
                [Component(name=one.name, scorer=one.scorer)], batch_size=reward.batch_size
            )
            for one in reward.components
        }
        self.max_body, self.max_pixels = max_body, max_pixels
        self.busy = threading.Lock()
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise UserError(f"--port {address[1]} on {address[0]}: {error}") from error

    def score(self, body: Any) -> dict[str, Any]:
        """Answers the body of one request.

        Raises:
            Refused: it is not of the form that is described above.
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
        try:
            pictures = wire.decode(images, self.max_pixels)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        try:
            with self.busy, torch.no_grad():
                output = reward(pictures, prompts, metadata)
        except UserError as error:
            raise Refused(400, str(error)) from None
        return {
            "scores": _listed(output.scores.masked_fill(~output.valid, torch.nan)),
            "valid": output.valid.tolist(),
            "components": {key: _listed(column) for key, column in output.components.items()},
        }


def _listed(scores: Tensor) -> list[float | None]:
    """Numbers as JSON has them, which knows no NaN."""
    return [value if value == value else None for value in scores.tolist()]


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = SOCKET_TIMEOUT
    protocol_version = "HTTP/1.0"  # one request per connection: a silent client holds nothing

    def do_GET(self) -> None:
        self._answer({"/health": self._health, "/info": self._info})

    def do_POST(self) -> None:
        self._answer({"/v1/score": self._score})

    def _answer(self, routes: dict[str, Any]) -> None:
        try:
            if self.path != "/health":
                self._check_token()
            if self.path not in routes:
                raise Refused(404, f"there is no {self.path}")
            status, content = 200, routes[self.path]()
        except Refused as error:
            status, content = error.status, {"error": str(error)}
        except Gone:
            return
        except Exception:
            traceback.print_exc()  # the client learns no more than that it failed
            status, content = 500, {"error": "scoring failed; the server's log says why"}
        data = json.dumps(content).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _check_token(self) -> None:
        if not self.server.token:
            return
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            raise Refused(401, f"a bearer token is needed: set {TOKEN}")

    def _health(self) -> dict[str, Any]:
        return {"status": "ok"}

    def _info(self) -> dict[str, Any]:
        return {"rewards": list(self.server.alone)}

    def _score(self) -> dict[str, Any]:
        # No web page can send this type across origins without asking first.
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the body must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "the request must tell its length")
        if int(length) > self.server.max_body:
            raise Refused(413, f"the body is larger than {self.server.max_body} bytes")
        try:
            data = self.rfile.read(int(length))
        except OSError:
            raise Gone from None
        if len(data) < int(length):
            raise Gone
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON: {error}") from None
        return self.server.score(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a run asks thousands of times."""
