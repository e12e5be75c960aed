"""What the clients of reward servers share: pictures as text, and requests that give up in time."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import json
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dojo.cli import TrainingStopped, UserError
from dojo.cli.masking import hide, secrets, without_user
from dojo.files.pictures import to_pil
from dojo.lazy import torch
from dojo.rewards import spec

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 4096 * 4096  # of one picture
_HEAD = 44  # characters of base64 that hold the 33 bytes of a PNG's signature and header
MAX_ANSWER = 64 * 2**20  # bytes
LONGEST_WAIT = 30.0  # seconds between two tries
RETRIES = 8  # two minutes of pauses: a server that is started again loads its networks in that time


def encode(images: Tensor) -> list[str]:
    """[B, 3, H, W] in [0, 1] as PNG files in base64: no loss beyond the 8 bits of a file."""
    texts = []
    for picture in to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", compress_level=1)
        texts.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return texts


def size_of(number: int, text: Any) -> tuple[int, int]:
    """Width and height of a PNG file in base64; only its first bytes are looked at.

    Args:
        number: of the picture, for the error.

    Raises:
        ValueError: it is none.
    """
    try:
        head = base64.b64decode(text[:_HEAD], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"image {number} is no PNG in base64: {error}") from None
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or len(head) < 24:
        raise ValueError(f"image {number} is no PNG in base64")
    width, height = struct.unpack(">II", head[16:24])
    if not width or not height:
        raise ValueError(f"image {number} has no pixels")
    return width, height


def decode(texts: Sequence[Any], max_pixels: int = MAX_PIXELS, *, first: int = 0) -> Tensor:
    """The way back: float32 [B, 3, H, W].

    Args:
        first: number of the first picture, for the error.

    Raises:
        ValueError: something is no PNG, too large, or of another size than the first.
    """
    pictures = []
    for i, text in enumerate(texts, first):
        try:
            data = base64.b64decode(text, validate=True)
            # Only PNG's decoder is let near data from outside; the size is read before the pixels.
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                if picture.width * picture.height > max_pixels:
                    raise ValueError(f"it has more than {max_pixels} pixels")
                pictures.append(np.array(picture.convert("RGB")))
        except (
            *(binascii.Error, OSError, SyntaxError, TypeError, ValueError),
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(f"image {i} is no PNG in base64 that is read here: {error}") from None
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError("the images of one request must have one size")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(255)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Refused(UserError):
    """A server refuses a request, and would do so again."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code
        """HTTP's status"""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def request(
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    token: str | None = None,
    timeout: float = 60.0,
    retries: int = RETRIES,
    flag: str = "--reward",
) -> Any:
    """Sends a JSON request (GET without a body) and returns the JSON of the answer.

    What may pass (no connection, no answer in `timeout` seconds, status 408, 429 or 5xx) is tried
    `retries` more times, after 1, 2, 4, ... seconds, or as many as the server asks for.

    Args:
        url: a name and password in it go out as basic authorization, unless there is a token.
        flag: the option that named the address, for the errors.

    Raises:
        Refused: the server refuses the request.
        UserError: `url` is no address.
        TrainingStopped: it gave no answer in any try.
    """
    known = [*secrets(url), *([token] if token else [])]
    shown = hide(url)
    url, user = without_user(url)
    headers = {"Content-Type": "application/json"}
    if token or user:
        headers["Authorization"] = f"Bearer {token}" if token else _basic(user)
    data = None if body is None else json.dumps(body).encode()
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if is_loopback(_host(url, shown, flag)):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine
    opener = urllib.request.build_opener(*handlers)
    reason, asked = "", 0.0
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(max(2.0 ** (attempt - 1), asked), LONGEST_WAIT))
        asked = 0.0
        try:
            message = urllib.request.Request(url, data=data, headers=headers)
            with opener.open(message, timeout=timeout) as response:
                return json.loads(response.read(MAX_ANSWER))
        except urllib.error.HTTPError as error:
            with error:
                reason = hide(f"HTTP {error.code}: {_told(error)}", known)
                asked = _seconds(error.headers.get("Retry-After"))
            if error.code < 500 and error.code not in (408, 429):
                raise Refused(f"{flag}: {shown} refuses ({reason})", error.code) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = hide(str(error) or type(error).__name__, known)
    raise TrainingStopped(f"{shown} gave no answer in {retries + 1} tries (the last: {reason})")


def chat(
    url: str,
    model: str,
    picture: str,
    text: str,
    instruction: str | None = None,
    *,
    wish: Mapping[str, Any],
    **limits: Any,
) -> Any:
    """The answer of a server that speaks OpenAI's protocol to a text about a picture.

    Args:
        url: up to and with /chat/completions.
        picture: a data URI.
        instruction: what the model is told before.
        wish: how it is to answer (max_tokens, logprobs, ...).
        limits: what `request` takes.
    """
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": text},
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if instruction is not None:
        messages.insert(0, {"role": "system", "content": instruction})
    body = {"model": model, "messages": messages, "temperature": 0, **wish}
    return request(url, body, **limits)


def joined(url: str, path: str) -> str:
    """An address with something behind its path, before its query."""
    place, mark, query = url.partition("?")
    return f"{place.rstrip('/')}{path}{mark}{query}"


def limits(timeout: str, retries: str, where: str) -> dict[str, Any]:
    """The options of a reward that is asked for over the net, as `request` takes them.

    Raises:
        UserError: one is no such number; it names `where`.
    """
    try:
        found = {"timeout": spec.number(timeout, where), "retries": int(retries)}
    except ValueError as error:
        raise UserError(f"--reward: {where}: {error}") from None
    if found["timeout"] <= 0 or found["retries"] < 0:
        raise UserError(f"--reward: {where}: timeout must be above 0, retries 0 or more")
    return found


def _basic(user: str) -> str:
    name, _, password = user.partition(":")
    words = f"{urllib.parse.unquote(name)}:{urllib.parse.unquote(password)}"
    return f"Basic {base64.b64encode(words.encode()).decode('ascii')}"


def _host(url: str, shown: str, flag: str) -> str:
    """The host of an address.

    Raises:
        UserError: it has none, or its port is no number; it names `shown`.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:
        pass
    raise UserError(f"{flag}: {shown} is no address of the form http://host:port") from None


def _seconds(text: str | None) -> float:
    """Of a Retry-After; 0 where it is not there, or is a date."""
    return float(text) if text and text.isdecimal() else 0.0


def _told(answer: urllib.error.HTTPError) -> str:
    """The reason in the body of a refusal."""
    try:
        body = answer.read(10_000)
    except (OSError, http.client.HTTPException):
        return answer.reason
    try:
        return str(json.loads(body)["error"])[:500]
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:200].strip()
