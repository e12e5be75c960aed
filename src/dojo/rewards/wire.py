"""What the clients of reward servers share: pictures as text, and requests that give up in time."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dojo.cli import TrainingStopped, UserError
from dojo.pictures import to_pil

MAX_PIXELS = 4096 * 4096  # of one picture
MAX_ANSWER = 64 * 2**20  # bytes
LONGEST_WAIT = 30.0  # seconds between two tries


def encode(images: Tensor) -> list[str]:
    """[B, 3, H, W] in [0, 1] as PNG files in base64: no loss beyond the 8 bits of a file."""
    texts = []
    for picture in to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", compress_level=1)
        texts.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return texts


def decode(texts: Sequence[Any], max_pixels: int = MAX_PIXELS) -> Tensor:
    """The way back: float32 [B, 3, H, W].

    Raises:
        ValueError: something is no PNG, too large, or of another size than the first.
    """
    pictures = []
    for i, text in enumerate(texts):
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
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    retries: int = 5,
) -> Any:
    """Sends a JSON request (GET without a body) and returns the JSON of the answer.

    What may pass (no connection, no answer in `timeout` seconds, status 429 or 5xx) is tried
    `retries` more times, after 1, 2, 4, ... seconds.

    Raises:
        UserError: the server refuses the request.
        TrainingStopped: it gave no answer in any try.
    """
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if is_loopback(urllib.parse.urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine
    opener = urllib.request.build_opener(*handlers)
    reason = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(2.0 ** (attempt - 1), LONGEST_WAIT))
        try:
            message = urllib.request.Request(url, data=data, headers=headers)
            with opener.open(message, timeout=timeout) as response:
                return json.loads(response.read(MAX_ANSWER))
        except urllib.error.HTTPError as error:
            with error:
                reason = f"HTTP {error.code}: {_told(error.read(10_000))}"
            if error.code < 500 and error.code != 429:
                raise UserError(f"--reward: {url} refuses ({reason})") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise TrainingStopped(f"{url} gave no answer in {retries + 1} tries (the last: {reason})")


def _told(body: bytes) -> str:
    """The reason in the body of a refusal."""
    try:
        return str(json.loads(body)["error"])[:500]
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:200].strip()
