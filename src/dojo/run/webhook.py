"""Word of a run to a server of the user's: it began, it drew, it is over, it failed.

`--webhook URL`, or DOJO_WEBHOOK in the environment, which other users of the machine do not see.
One process tells, in a thread of its own, from a queue that holds few messages: a server that is
slow, dead or full of errors costs the run nothing but what waits in the queue, and is named once.
Discord and Slack get their own forms, everybody else one JSON object:

    {"event": "start" | "validation" | "end" | "stop" | "failure", "text": ..., "content": ...,
     "run": ..., "script": ..., "step": ..., "num_steps": ..., "metrics": {...},
     "picture": {"name": ..., "media_type": "image/jpeg", "base64": ...}}

The address is a secret: whoever has it may write there. It is in no file and no line of a run, and
what is sent is masked as the doctor's report is.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import queue
import secrets
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from PIL import Image

from dojo.cli import UserError, masking
from dojo.doctor import masked
from dojo.launch.interrupt import Interrupted

Event = Literal["start", "validation", "end", "stop", "failure"]

VARIABLE = "DOJO_WEBHOOK"
TIMEOUT = 10.0  # seconds that a server has for each answer
ROOM = 16  # messages that wait; further ones are dropped
PATIENCE = 10.0  # seconds that the end of a run waits for the last of them
MOST_PIXELS = 512  # of a picture's longer side
MOST_BYTES = 256 * 1024  # of a picture
_MOST_LETTERS = 1800  # Discord takes 2,000


@dataclass(frozen=True, kw_only=True)
class Message:
    """What is told."""

    event: Event
    text: str
    about: Mapping[str, Any]
    """run, script, step, num_steps"""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    picture: tuple[str, bytes] | None = None
    """name and JPEG"""


def address(given: str | None) -> str | None:
    """Where to tell: what was given, or what the environment says; None is nowhere.

    Raises:
        UserError: it is no address.
    """
    found, whence = (given, "--webhook") if given else (os.environ.get(VARIABLE), VARIABLE)
    if not found:
        return None
    masking.keep(found)
    if not is_address(found):
        raise UserError(f"{whence} must be an address that begins with https:// or http://")
    return found


def is_address(text: str) -> bool:
    """Whether a text names a web server."""
    with suppress(ValueError):
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    return False


class Webhook:
    """Tells one server about one run.

    Args:
        url: of the server.
        about: what every message says of the run.
        step: where the run stands.
        say: prints a line.
        timeout: seconds that the server has for an answer.
        room: messages that may wait.
    """

    def __init__(
        self,
        url: str,
        about: Mapping[str, Any],
        step: Callable[[], int],
        say: Callable[[str], None],
        *,
        timeout: float = TIMEOUT,
        room: int = ROOM,
    ) -> None:
        self.url, self.about, self.step, self.say = url, about, step, say
        self.timeout = timeout
        self.host = urlsplit(url).hostname or ""
        self._waiting: queue.Queue[Message | None] = queue.Queue(room)
        self._told = False  # that the server is lost
        self._thread = threading.Thread(target=self._work, daemon=True, name="webhook")
        self._thread.start()
        _open.append(self)

    def tell(
        self,
        event: Event,
        text: str,
        *,
        metrics: Mapping[str, float] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Hands a message over, or drops it where too many wait; never blocks, never fails.

        Args:
            folder: whose pictures are shown, the first few of them side by side.
        """
        try:
            message = Message(
                event=event,
                text=_clean(text),
                about={**self.about, "step": self.step()},
                metrics=dict(metrics or {}),
                picture=thumbnail(folder) if folder else None,
            )
            self._waiting.put_nowait(message)
        except queue.Full:
            self._complain(f"{self._waiting.maxsize} messages wait for it, so some are dropped")
        except Exception as error:  # a run is worth more than word of it
            self._complain(f"a message could not be made ({type(error).__name__})")

    def close(self, patience: float = PATIENCE) -> None:
        """Waits a little for what is still to be told; what is then left is never told."""
        if self in _open:
            _open.remove(self)
        with suppress(queue.Full):
            self._waiting.put(None, timeout=patience / 2)
            self._thread.join(patience)

    def _work(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                self._send(message)
            except urllib.error.HTTPError as error:
                self._complain(f"it answers {error.code} {error.reason}")
            except (OSError, HTTPException, ValueError) as error:
                self._complain(str(getattr(error, "reason", error)) or type(error).__name__)

    def _send(self, message: Message) -> None:
        kind, body = shaped(self.host, message)
        request = urllib.request.Request(self.url, body, method="POST")
        request.add_header("Content-Type", kind)
        request.add_header("User-Agent", "sd-dojo")  # Discord's door refuses Python's own
        with urllib.request.urlopen(request, timeout=self.timeout):
            pass

    def _complain(self, why: str) -> None:
        if not self._told:
            self._told = True
            with suppress(Exception):
                self.say(_clean(f"--webhook {self.host}: {why} (said once; the run goes on)"))


class Going(Protocol):
    """The run that is told of."""

    args: Any
    """with the run's `name`"""
    step: int
    num_steps: int
    resumed: Path | None

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        ...

    def say(self, text: str) -> None:
        """Prints on one process only."""
        ...


class Teller:
    """Tells the server of a run, where there is one, how the run goes.

    Args:
        url: of the server; None is none.
    """

    def __init__(self, run: Going, url: str | None) -> None:
        self.run, self._url = run, url
        self._webhook: Webhook | None = None

    def begin(self) -> None:
        """The run begins or goes on."""
        run = self.run
        if self._url is None or not run.main:
            return
        script = Path(sys.argv[0]).name
        about = {"run": run.args.name, "script": script, "num_steps": run.num_steps}
        self._webhook = Webhook(self._url, about, lambda: run.step, run.say)
        verb = f"goes on from {run.resumed.name}" if run.resumed else "begins"
        self._webhook.tell("start", f"{run.args.name} {verb}: {script}, {run.num_steps} steps")

    def validation(self, folder: Path, row: Mapping[str, float]) -> None:
        """What a validation found.

        Args:
            folder: of its pictures.
            row: its numbers.
        """
        if self._webhook is None or not (row or any(folder.glob("*.png"))):
            return
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        text = f"{self.run.args.name}, step {self.run.step} of {self.run.num_steps}"
        text += f": {numbers}" if numbers else ""
        self._webhook.tell("validation", text, metrics=row, folder=folder)

    def end(self) -> None:
        """The run is done."""
        if self._webhook is not None:
            self._webhook.tell("end", f"{self.run.args.name} is done: {self.run.step} steps")
            self._webhook.close()


_open: list[Webhook] = []  # of this process's run, while it goes


@contextmanager
def failure_told() -> Iterator[None]:
    """Tells what ends a run before its end, to whom it was said that it began."""
    try:
        yield
    except BaseException as error:
        for one in list(_open):
            _tell_end(one, error)
        raise


def _tell_end(hook: Webhook, error: BaseException) -> None:
    name, at = hook.about.get("run", "the run"), f"at step {hook.step()}"
    if isinstance(error, Interrupted | KeyboardInterrupt):
        hook.tell("stop", f"{name} was stopped {at}")
    else:
        words = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {words[0] if words else ''}".rstrip(": ")
        hook.tell("failure", f"{name} failed {at}: {why}")
    hook.close(PATIENCE / 2)


# -- what is sent -------------------------------------------------------------------------------


def shaped(host: str, message: Message) -> tuple[str, bytes]:
    """Content type and body of a message, as the server of that name takes it."""
    if _is_of(host, "discord.com", "discordapp.com"):
        # Nobody is called by a prompt that says @everyone.
        table = {"content": message.text, "allowed_mentions": {"parse": []}}
        if message.picture is None:
            return _json(table)
        return _form(table, *message.picture)
    if _is_of(host, "slack.com"):
        text = message.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return _json({"text": text})
    table = {
        "event": message.event,
        "text": message.text,
        "content": message.text,
        **message.about,
        "metrics": {
            name: value if math.isfinite(value) else None for name, value in message.metrics.items()
        },
    }
    if message.picture is not None:
        name, data = message.picture
        coded = base64.b64encode(data).decode()
        table["picture"] = {"name": name, "media_type": "image/jpeg", "base64": coded}
    return _json(table)


def _is_of(host: str, *names: str) -> bool:
    return any(host == name or host.endswith(f".{name}") for name in names)


def _json(table: Mapping[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(table, ensure_ascii=False, allow_nan=False).encode()


def _form(table: Mapping[str, Any], name: str, data: bytes) -> tuple[str, bytes]:
    """A message with a file, as Discord takes it (multipart/form-data)."""
    mark = secrets.token_hex(16)
    head = f'--{mark}\r\nContent-Disposition: form-data; name="payload_json"\r\n'
    head += f"Content-Type: application/json\r\n\r\n{json.dumps(table)}\r\n"
    head += f'--{mark}\r\nContent-Disposition: form-data; name="files[0]"; filename="{name}"\r\n'
    head += "Content-Type: image/jpeg\r\n\r\n"
    body = head.encode() + data + f"\r\n--{mark}--\r\n".encode()
    return f"multipart/form-data; boundary={mark}", body


def thumbnail(folder: Path, most: int = 4) -> tuple[str, bytes] | None:
    """The first pictures of a folder side by side as one small JPEG; None where there are none."""
    paths = sorted(folder.glob("*.png"))[:most]
    if not paths:
        return None
    side = MOST_PIXELS // len(paths) if len(paths) < 3 else MOST_PIXELS // 2
    tiles: list[Image.Image] = []
    for path in paths:
        with Image.open(path) as picture:
            tile = picture.convert("RGB")
        tile.thumbnail((side, side))
        tiles.append(tile)
    columns = min(len(tiles), 2)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (side * columns, side * rows), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * side, i // columns * side))
    for quality in (85, 60, 30):
        data = io.BytesIO()
        sheet.save(data, "jpeg", quality=quality)
        if data.tell() <= MOST_BYTES:
            return f"{folder.name}.jpg", data.getvalue()
    return None


def _clean(text: str) -> str:
    """Without secrets, and not too long."""
    text = str(masked(text, os.environ))
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"
