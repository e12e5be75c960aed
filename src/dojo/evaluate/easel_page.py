"""What the page of `demo.py --web` asks: the model, what has been drawn, a new picture."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from starlette.responses import JSONResponse, Response

from dojo.cli.masking import hide
from dojo.evaluate.easel import Easel, Full, Job, Wish
from dojo.evaluate.picture import DrawArgs
from dojo.web import site
from dojo.web.site import Refused

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

MOST = {"num_inference_steps": 500, "height": 4096, "width": 4096, "guidance_scale": 100.0}
MAX_TEXT = 10_000  # characters of a prompt
MAX_SCALE = 10.0
MAX_SEED = 2**63 - 1


class Page:
    """The page.

    Args:
        easel: draws.
        title: the model's name.
        drawing: how pictures are drawn: what is not asked on the page, and what it proposes.
        prompts: that it proposes.
        seed: that it proposes; None is a new one for each picture.
        scales: of the LoRA, that it proposes.
    """

    def __init__(
        self,
        easel: Easel,
        title: str,
        drawing: DrawArgs,
        prompts: Sequence[str],
        seed: int | None,
        scales: Sequence[float],
    ) -> None:
        self.easel, self.drawing = easel, drawing
        self.about = {
            "model": hide(title),
            "loras": [hide(name) for name in easel.loras],
            "scales": [*scales],
            "prompts": [*prompts],
            "seed": seed,
            "drawing": {name: getattr(drawing, name) for name in ("negative_prompt", *MOST)},
        }

    def app(self, door: site.Door) -> ASGIApp:
        """The site."""
        api = {
            "GET /model": self._model,
            "GET /jobs": self._jobs,
            "GET /picture": self._picture,
            "POST /draw": self._draw,
            "POST /cancel": self._cancel,
        }
        return site.make(door, "draw.html", api)

    async def _model(self, _: Request) -> Response:
        return JSONResponse(self.about)

    async def _jobs(self, _: Request) -> Response:
        return JSONResponse({"jobs": [_told(job) for job in self.easel.jobs()]})

    async def _picture(self, request: Request) -> Response:
        job = self.easel.job(_number(request.query_params.get("job")))
        png = job.pictures.get(request.query_params.get("side", "")) if job else None  # pyright: ignore[reportArgumentType, reportCallIssue]
        if png is None:
            raise Refused(404, "there is no such picture any more")
        return Response(png, media_type="image/png")

    async def _draw(self, request: Request) -> Response:
        wish = self.wish(await site.body_of(request))
        try:
            return JSONResponse({"job": await to_thread.run_sync(self.easel.ask, wish)})
        except Full as error:
            raise Refused(429, str(error)) from error

    async def _cancel(self, request: Request) -> Response:
        self.easel.cancel(_number((await site.body_of(request)).get("job")))
        return JSONResponse({})

    def wish(self, body: dict[str, Any]) -> Wish:
        """What a request asks for.

        Raises:
            Refused: it is no such wish; it names what is wrong.
        """
        prompt = _text(body, "prompt")
        seed = body.get("seed")
        if seed is None:
            seed = secrets.randbits(31)
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            raise Refused(400, "seed: a whole number from 0")
        scales = body.get("scales", self.about["scales"])
        if not isinstance(scales, list) or len(scales) != len(self.easel.loras):
            raise Refused(400, "scales: a number for each LoRA")
        for scale in scales:
            if not _is_number(scale) or abs(scale) > MAX_SCALE:
                raise Refused(400, f"scales: numbers from -{MAX_SCALE:g} to {MAX_SCALE:g}")
        changed: dict[str, Any] = {"negative_prompt": _text(body, "negative_prompt") or None}
        for name, most in MOST.items():
            value = body.get(name, getattr(self.drawing, name))
            whole = name != "guidance_scale"
            if value is not None:
                if not _is_number(value) or value > most or (whole and type(value) is not int):
                    raise Refused(400, f"{name}: a number up to {most:g}")
                changed[name] = value if whole else float(value)
        try:
            drawing = replace(self.drawing, **changed)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        return Wish(prompt=prompt, seed=seed, scales=tuple(map(float, scales)), drawing=drawing)


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name) or ""
    if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
        raise Refused(400, f"{name}: a text of at most {MAX_TEXT} characters")
    # On a command line it would be taken for a flag: so it is drawn with the space, too.
    return f" {value}" if value.startswith("-") else value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _number(value: Any) -> int:
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 10 else -1


def _told(job: Job) -> dict[str, Any]:
    """A job as the page shows it."""
    return {
        "number": job.number,
        "state": job.state,
        "done": job.done,
        "steps": job.steps,
        "error": hide(job.error),
        "seconds": round(job.seconds, 1),
        "prompt": job.wish.prompt,
        "seed": job.wish.seed,
        "scales": list(job.wish.scales),
        "sides": {
            side: {"there": side in job.pictures, "command": text}
            for side, text in job.commands.items()
        },
    }
