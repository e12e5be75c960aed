"""Who writes captions: BLIP on this machine, or a vision-language model behind a server.

Of a vision-language model a caption is the answer to a question about the picture, and may be
talked into something by text in the picture: look through what is written (`python -m dojo.look`).
"""

from __future__ import annotations

import base64
import io
import os
import re
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from dojo.cli import UserError
from dojo.cli.masking import hide
from dojo.data.images import BadSample
from dojo.rewards import vlm, wire

QUESTION = (
    "Describe this picture in one sentence, as the caption that an image generator would be given "
    "to draw it. Name what is to be seen, its look and its surroundings, and nothing else."
)
"""What a server is asked without --prompt."""

_ABOUT_THE_REQUEST = (400, 413, 415, 422)  # HTTP's: another picture may be taken
_PATIENCE = 3  # pictures in a row, from the first, that may get no caption from a server
_THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)
_QUOTED = re.compile(r"^([\"“'])(.*)[\"”']$", re.DOTALL)


class Writer(Protocol):
    """Writes captions; may be called from several threads."""

    at_once: int
    """pictures of a call"""
    threads: int
    """calls at a time"""

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str | BadSample]:
        """A caption of each picture in RGB, or why there is none."""
        ...


def tidy(text: str) -> str:
    """An answer as a caption: on one line, without thoughts before it and quotes around it."""
    words = " ".join(_THOUGHTS.sub("", text).split())
    if words.startswith("<think>"):  # cut before their end
        return ""
    words = words.encode("utf-8", "replace").decode()  # half a surrogate pair fits into no file
    quoted = _QUOTED.match(words)
    return quoted[2].strip() if quoted and quoted[1] not in quoted[2] else words


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """The picture, its longer side at most so many pixels."""
    if max(picture.size) <= side:
        return picture
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return picture


class Served:
    """A model behind a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, ...).

    Its key is read from the environment (DOJO_VLM_API_KEY).
    """

    at_once = 1

    def __init__(
        self,
        server: str,
        model: str,
        question: str,
        *,
        max_tokens: int,
        timeout: float,
        retries: int,
        workers: int,
    ) -> None:
        self.url = wire.joined(server, "/chat/completions")
        self.model = model
        self.question = question
        self.max_tokens = max_tokens
        self.limits: dict[str, Any] = {"timeout": timeout, "retries": retries, "flag": "--server"}
        self.threads = workers
        self.cut = 0
        """answers that were as long as they may be"""
        self._refused, self._answered = 0, False
        self._lock = threading.Lock()

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str | BadSample]:
        return [self._ask(picture) for picture in pictures]

    def _ask(self, picture: Image.Image) -> str | BadSample:
        try:
            answer = wire.chat(
                *(self.url, self.model, _uri(picture), self.question),
                wish={"max_tokens": self.max_tokens},
                token=os.environ.get(vlm.KEY),
                **self.limits,
            )
        except wire.Refused as error:
            with self._lock:
                self._refused += 1
                hopeless = not self._answered and self._refused >= _PATIENCE
            if hopeless or error.code not in _ABOUT_THE_REQUEST:
                raise
            return BadSample(str(error).removeprefix("--server: "))
        try:
            choice = answer["choices"][0]
            text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
            text = tidy(text or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            return self._without_text(answer)
        with self._lock:
            self._answered |= bool(text)
            self.cut += cut and bool(text)
        if not text:
            return self._without_text(answer, cut=cut)
        return text

    def _without_text(self, answer: Any, *, cut: bool = False) -> BadSample:
        """What is said of an answer that is no caption.

        Raises:
            UserError: no answer was one so far, so that none may ever be.
        """
        why = "the model answered nothing"
        if cut:
            why = f"the model had not begun its answer when --max_tokens {self.max_tokens} cut it"
        elif isinstance(answer, dict) and answer.get("error"):
            why = hide(f"the answer is an error: {answer['error']}")[:500]
        with self._lock:
            self._refused += 1
            hopeless = not self._answered and self._refused >= _PATIENCE
        if hopeless:
            raise UserError(
                f"--server: the answer of {self.model} has no text (choices[0].message.content): "
                f"{why}"
            )
        return BadSample(why)


def _uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


class Blip:
    """BLIP (Li et al. 2022, arXiv:2201.12086) on this machine, without sampling."""

    threads = 1  # of one network; it computes with all cores, or on the GPU

    def __init__(self, model: str, prompt: str | None, *, max_tokens: int, batch_size: int) -> None:
        import torch
        from transformers import AutoConfig, AutoProcessor, BlipForConditionalGeneration

        from dojo.models import loaded
        from dojo.rewards import weights

        where = weights.locate(model)
        try:
            kind = AutoConfig.from_pretrained(where, trust_remote_code=False).model_type
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--model: {model} cannot be read ({reason})") from None
        if kind != "blip":
            raise UserError(
                f"--model {model} is of kind {kind}, and BLIP alone is run here; serve it (vllm "
                "serve, llama-server, ...) and name its address by --server http://host:port/v1"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = loaded.network(
            BlipForConditionalGeneration, where, flag="--model", use_safetensors=True
        )
        self.network: Any = network.requires_grad_(False).eval().to(self.device)
        self.processor: Any = AutoProcessor.from_pretrained(where, trust_remote_code=False)
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.at_once = batch_size

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str | BadSample]:
        import torch

        words = {"text": [self.prompt] * len(pictures)} if self.prompt else {}
        inputs = self.processor(images=list(pictures), **words, return_tensors="pt")
        with torch.no_grad():
            ids = self.network.generate(
                **inputs.to(self.device), max_new_tokens=self.max_tokens, do_sample=False
            )
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [tidy(text) or BadSample("the model wrote nothing") for text in texts]
