"""Drawing one picture after the other at a user's wish: with a base, and with LoRA beside it.

    easel = Easel(pipeline, tuned_scheduler, loras, command)
    number = easel.ask(Wish(prompt="a red star", seed=7, scales=(0.8,), drawing=DrawArgs()))

One thread draws; who asks does not wait. Pictures are kept in memory, the newest `KEPT` wishes'.
"""

from __future__ import annotations

import io
import shlex
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from dojo.cli import UserError
from dojo.evaluate import pipelines
from dojo.evaluate.picture import DrawArgs, draw
from dojo.files.records import read_pictures

KEPT = 60  # wishes
WAITING = 8  # wishes that are not drawn yet

Side = Literal["base", "lora"]
State = Literal["waiting", "drawing", "done", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What shall be drawn."""

    prompt: str
    seed: int
    scales: tuple[float, ...]
    """strength of each LoRA"""
    drawing: DrawArgs


@dataclass
class Job:
    """A wish, and what has become of it."""

    number: int
    wish: Wish
    commands: dict[Side, str]
    """what draws the picture of each side again"""
    steps: int
    """of all sides that have to be drawn"""
    done: int = 0
    state: State = "waiting"
    error: str = ""
    seconds: float = 0.0
    pictures: dict[Side, bytes] = field(default_factory=dict)
    """PNG files"""


class Full(Exception):
    """Too many wishes wait."""


class _Cancelled(Exception):
    pass


class Easel:
    """A pipeline that draws with and without its LoRA.

    Args:
        pipeline: on its device; its scheduler is the base's.
        tuned_scheduler: the one to draw with LoRA with.
        loras: their paths, as `pipelines.load_loras` got them.
        command: what draws a wish again, with LoRA or without.
    """

    def __init__(
        self,
        pipeline: Any,
        tuned_scheduler: Any,
        loras: Sequence[str],
        command: Callable[[Wish, bool], str],
    ) -> None:
        self.pipeline, self.loras, self._command = pipeline, list(loras), command
        self._schedulers: dict[Side, Any] = {"base": pipeline.scheduler, "lora": tuned_scheduler}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._count = 0

    @property
    def sides(self) -> list[Side]:
        """The base, and the LoRA where there is one."""
        return ["base", "lora"] if self.loras else ["base"]

    def ask(self, wish: Wish) -> int:
        """Takes a wish; returns its number.

        Raises:
            Full: too many wait already.
        """
        with self._lock:
            jobs = list(self._jobs.values())
            if sum(job.state == "waiting" for job in jobs) >= WAITING:
                raise Full(f"{WAITING} pictures wait already")
            over = [job.number for job in jobs if job.state not in ("waiting", "drawing")]
            for number in over[: max(0, len(jobs) + 1 - KEPT)]:
                del self._jobs[number]
            self._count += 1
            commands: dict[Side, str] = {
                side: self._command(wish, side == "lora") for side in self.sides
            }
            job = Job(self._count, wish, commands, wish.drawing.num_inference_steps)
            # The base does not hang on the strength of the LoRA.
            known = [old.pictures for old in jobs if old.commands["base"] == commands["base"]]
            known = [pictures for pictures in known if "base" in pictures]
            if known:
                job.pictures["base"] = known[-1]["base"]
            job.steps *= len(self.sides) - len(job.pictures)
            self._jobs[job.number] = job
        self._thread.submit(self._work, job)
        return job.number

    def jobs(self) -> list[Job]:
        """All that are kept, the newest first."""
        with self._lock:
            return list(self._jobs.values())[::-1]

    def job(self, number: int) -> Job | None:
        """One of them."""
        with self._lock:
            return self._jobs.get(number)

    def cancel(self, number: int) -> None:
        """Gives up a wish that is not done yet."""
        job = self.job(number)
        if job is not None:
            self._move(job, ("waiting", "drawing"), "cancelled")

    def _move(self, job: Job, before: Collection[State], after: State) -> bool:
        """Changes a job's state, unless it is another one by now."""
        with self._lock:
            found = job.state in before
            if found:
                job.state = after
        return found

    def close(self) -> None:
        """Gives up everything, and waits for the step that is being taken."""
        for job in self.jobs():
            self.cancel(job.number)
        self._thread.shutdown(wait=True)

    # -- in the drawing thread ------------------------------------------------------------------

    def _work(self, job: Job) -> None:
        if not self._move(job, ("waiting",), "drawing"):
            return
        began = time.monotonic()
        try:
            for side in self.sides:
                if side not in job.pictures:
                    job.pictures[side] = self._draw(job, side)
            self._move(job, ("drawing",), "done")
        except _Cancelled:
            pass
        except UserError as error:
            job.state, job.error = "failed", str(error)
        except Exception as error:  # out of memory and the like: the next wish may be smaller
            traceback.print_exc()
            job.state, job.error = "failed", f"{type(error).__name__}: {error}"
        job.seconds = time.monotonic() - began

    def _draw(self, job: Job, side: Side) -> bytes:
        def on_step() -> None:
            job.done += 1
            if job.state == "cancelled":
                raise _Cancelled

        if self.loras:
            if side == "lora":
                self.pipeline.enable_lora()
                pipelines.set_scales(self.pipeline, job.wish.scales)
            else:
                self.pipeline.disable_lora()
        self.pipeline.scheduler = self._schedulers[side]
        wish = job.wish
        (image,) = draw(self.pipeline, wish.drawing, wish.prompt, [wish.seed], on_step)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()


def prompts_of(lora: str) -> list[str]:
    """The prompts of the pictures of the run that a LoRA folder, or its checkpoint, comes from."""
    folder = Path(lora) if Path(lora).is_dir() else Path(lora).parent
    for place in (folder, folder.parent):
        rows = read_pictures(place / "validation")
        if rows:
            return list(dict.fromkeys(str(row.get("prompt") or row["label"]) for row in rows))
    return []


def command(script: str, args: Any, *, leave_out: Collection[str] = ()) -> str:
    """The command line of a script with these options, as a shell takes it.

    Args:
        args: a dataclass of options, which may hold groups of such; defaults are left out.
        leave_out: names of options that are left out too.
    """
    return shlex.join(["python", script, *_words(args, leave_out)])


def _words(args: Any, leave_out: Collection[str]) -> Iterator[str]:
    for one in fields(args):
        value = getattr(args, one.name)
        if is_dataclass(value):
            yield from _words(value, leave_out)
        elif value != _default(one) and one.name not in leave_out:
            yield from _flag(f"--{one.name}", value)


def _flag(flag: str, value: Any) -> list[str]:
    if value is True:
        return [flag]
    values = [str(item) for item in (value if isinstance(value, tuple | list) else [value])]
    return [flag, *values]


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default
