"""What the page of `python -m dojo.watch` asks: the list of runs, curves, pictures, one run."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import to_thread
from starlette.responses import FileResponse, JSONResponse

from dojo.launch.interrupt import FILES
from dojo.report.curves import choose, smoothed
from dojo.watch.metrics import MetricsFile
from dojo.watch.runs import KINDS, Root, Run
from dojo.watch.thinned import Thinned
from dojo.web import site
from dojo.web.site import Refused

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

Answer = TypeVar("Answer")

AT_ONCE = 0.3  # seconds that rows are read for before an answer goes out
KEPT = 40  # runs whose curves are kept in memory
MAX_POINTS = 600  # of a curve


class Watcher:
    """The folder, and the curves of the runs that were looked at last."""

    def __init__(self, folder: Path) -> None:
        self.root = Root(folder)
        self._files: OrderedDict[str, MetricsFile] = OrderedDict()
        self._nothing = MetricsFile(folder / "none")  # of a run that has no rows yet
        self._turn = threading.Lock()  # requests read one after the other

    def app(self, door: site.Door) -> ASGIApp:
        """The site."""
        api = {
            "GET /runs": self._answer(lambda request: self.runs()),
            "GET /curves": self._answer(self._curves),
            "GET /run": self._answer(lambda request: self.detail(_asked(request, "run"))),
            "GET /pictures": self._answer(self._pictures),
            "GET /picture": self._picture,
            "POST /control": self._control,
        }
        return site.make(door, "watch.html", api)

    def _answer(self, give: Callable[[Request], dict[str, Any]]) -> site.Endpoint:
        async def answer(request: Request) -> Response:
            return JSONResponse(await to_thread.run_sync(give, request))

        return answer

    def run(self, name: str) -> Run:
        """The run of a name.

        Raises:
            Refused: there is none in the folder.
        """
        run = self.root.runs().get(name)
        if run is None:
            raise Refused(404, f"there is no run {name}")
        return run

    # -- answers ------------------------------------------------------------------------------

    def runs(self) -> dict[str, Any]:
        """The list."""
        found = self.root.runs()
        return {
            "folder": str(self.root.folder),
            "now": time.time(),
            "runs": [run.summary(name) for name, run in found.items()],
        }

    def detail(self, name: str) -> dict[str, Any]:
        """All about one run but its curves."""
        run = self.run(name)
        with self._turn:
            curves = self._file(name, run).curves
            phases = {
                key.removeprefix("seconds_"): curve.total
                for key, curve in curves.items()
                if key.startswith("seconds_")
            }
        return {
            **run.summary(name),
            "facts": run.facts,
            "options": run.options,
            "phases": dict(sorted(phases.items(), key=lambda item: -item[1])),
            "pictures": run.picture_sets(),
            "log": run.log(),
        }

    def _curves(self, request: Request) -> dict[str, Any]:
        names = list(dict.fromkeys(request.query_params.getlist("run")))[:KEPT]
        said = [part.rpartition(":") for part in request.query_params.getlist("have")]
        have = {name: state for name, _, state in said}
        points = request.query_params.get("points", "300")
        if not points.isdecimal() or not 20 <= int(points) <= MAX_POINTS:
            raise Refused(400, f"points: a number from 20 to {MAX_POINTS}")
        return self.curves(names, int(points), have)

    def curves(
        self, names: list[str], points: int, have: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The curves of runs, as far as their rows have been read; each call reads on.

        Args:
            points: of each curve, about.
            have: the versions that the page has already; a run that is as it was is left out.
        """
        until = time.monotonic() + AT_ONCE
        found = self.root.runs()
        answer: dict[str, Any] = {}
        keys: dict[str, None] = {}
        with self._turn:
            files = {name: self._file(name, found[name]) for name in names if name in found}
            for name, file in files.items():
                if file.whole or time.monotonic() < until:
                    file.read(until)
                keys |= dict.fromkeys(file.curves)
                version = f"{file.number}-{file.version}-{points}"
                if (have or {}).get(name) != version:
                    drawn = {key: _drawn(file.curves[key], points) for key in _shown(file.curves)}
                    answer[name] = {"version": version, "read": file.share, "curves": drawn}
            reading = any(not file.whole for file in files.values())
        charts = [
            {"title": chart.title, "smooth": chart.smooth, "curves": there}
            for chart in choose(_shown(keys))
            if (there := {key: name for key, name in chart.names.items() if key in keys})
        ]
        return {"runs": answer, "charts": charts, "reading": reading}

    def _file(self, name: str, run: Run) -> MetricsFile:
        """The rows of a run, which are then those looked at last."""
        if not self.root.holds(run.metrics):  # none yet, or a link that leads out
            return self._nothing
        file = self._files.pop(name, None) or MetricsFile(run.metrics)
        self._files[name] = file
        while len(self._files) > KEPT:
            self._files.popitem(last=False)
        return file

    def _pictures(self, request: Request) -> dict[str, Any]:
        step = _asked(request, "step").lstrip("-")
        if not step.isdecimal() or len(step) > 12:
            raise Refused(400, "step: a number")
        number = -1 if _asked(request, "step").startswith("-") else int(step)
        run = self.run(_asked(request, "run"))
        return {"pictures": run.pictures(_asked(request, "set"), number)}

    async def _picture(self, request: Request) -> Response:
        run = await to_thread.run_sync(self.run, _asked(request, "run"))
        file = run.picture(_asked(request, "file"))
        if file is None:
            raise Refused(404, "there is no such picture")
        return FileResponse(file, media_type=KINDS[file.suffix])

    async def _control(self, request: Request) -> Response:
        body = await site.body_of(request)
        name, what = str(body.get("run")), str(body.get("what"))
        if what not in FILES:
            raise Refused(400, f"what: {', '.join(FILES)}")
        await to_thread.run_sync(partial(self.ask, name, what))
        return JSONResponse({"asked": what})

    def ask(self, name: str, what: str) -> None:
        """Asks a run to stop, to save or to draw, by a file in its folder.

        Raises:
            Refused: it is not at work, or the file cannot be written.
        """
        run = self.run(name)
        if run.state != "running":
            raise Refused(409, f"{name} is not at work")
        try:
            run.ask(what)
        except OSError as error:
            raise Refused(409, f"{what} in {name}: {error.strerror}") from error


def _asked(request: Request, name: str) -> str:
    return request.query_params.get(name, "")


def _shown(keys: Any) -> list[str]:
    """The keys that are drawn as curves; phases are told as totals."""
    apart = ("epoch", "eta_s")
    return [key for key in keys if not key.startswith("seconds_") and key not in apart]


def _drawn(curve: Thinned, points: int) -> dict[str, Any]:
    """A curve as the page draws it: points, the smoothed line, and the numbers that matter."""
    low, high = curve.extremes()
    means = curve.means()
    smooth = smoothed(means, max(1, len(means) // 30)) if len(means) > 8 else []
    return {
        "points": [_short(point) for point in curve.line(points)],
        "smooth": [_short(point) for point in smooth[:: max(1, 2 * len(smooth) // points)]],
        "first": curve.first,
        "last": curve.last,
        "low": low,
        "high": high,
    }


def _short(point: tuple[float, float]) -> list[float]:
    """A point with as many digits as a screen shows."""
    return [round(point[0], 3), float(f"{point[1]:.6g}")]
