"""Rows of metrics.jsonl to charts: SVG whose colours come from the page's style sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

from dojo.report.html import number

MAX_POINTS = 300  # of a curve: as many as its width shows
MAX_MARKED = 20  # points that get a dot and a tooltip

Curve = list[tuple[float, float]]  # step, value


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    names: Mapping[str, str]
    """keys of metrics.jsonl and what the legend calls them"""
    smooth: bool = False


def charts(rows: Sequence[Mapping[str, Any]]) -> str:
    """All charts for which the rows have numbers, as HTML."""
    curves: dict[str, Curve] = {}
    for row in rows:
        for key, value in row.items():
            # NaN and infinity have no place on an axis.
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(key, []).append((row["step"], value))
    figures = []
    for chart in choose(curves):
        there = {name: curves[key] for key, name in chart.names.items() if key in curves}
        if there:
            figures.append(_figure(chart, there))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def choose(keys: Iterable[str]) -> list[Chart]:
    """Which curves stand together; what is not known here gets a chart of its own."""
    found = {key for key in keys if key not in ("step", "epoch", "eta_s") and key[:8] != "seconds_"}
    strata = sorted((key for key in found if "_sigma_" in key), key=_last_number)
    levels = {key: f"level {_last_number(key)}" for key in strata}
    if len(strata) > 1:
        levels |= {strata[0]: f"{levels[strata[0]]}, least noise"}
        levels |= {strata[-1]: f"{levels[strata[-1]]}, most noise"}
    parts = sorted({key.partition("/")[2] for key in found if "reward/" in key})
    guided = "held out, guided"
    sides = {"reward": "sampled", "eval_reward": "held out", "eval_guided_reward": guided}
    distances = {"kl": "KL in training", "eval_kl": "held out", "eval_guided_kl": guided}
    known = [
        Chart("Reward", sides),
        *(Chart(f"Reward: {name}", {f"{k}/{name}": v for k, v in sides.items()}) for name in parts),
        Chart("Distance from the base model", distances),
        Chart("Diversity of the pictures of a prompt", {"diversity": "diversity"}),
        Chart("Share of ratios clipped", {f"clip_fraction_{x}": x for x in ("high", "low")}),
        Chart("Training loss", {"loss": "loss"}, smooth=True),
        Chart("Eval loss", {"eval_loss": "held out", "train_eval_loss": "training pictures"}),
        Chart("Eval loss by noise level", levels),
        Chart("CLIP score of the validation pictures", {"clip_score": "CLIP score"}),
        Chart("Learning rate", {"lr": "learning rate"}),
        Chart("Gradient norm", {"grad_norm": "gradient norm"}),
        Chart("Speed, images/s", {"images_per_s": "images/s"}),
        Chart("Peak memory, GiB", {"memory_gib": "GiB"}),
    ]
    # The distance, and the sum, of two curves that are drawn already.
    left = found - {key for chart in known for key in chart.names} - {"eval_gap", "clip_fraction"}
    return known + [Chart(key, {key: key}) for key in sorted(left)]


def _last_number(key: str) -> int:
    digits = re.search(r"(\d+)$", key)
    return int(digits[1]) if digits else 0


def _figure(chart: Chart, curves: Mapping[str, Curve]) -> str:
    """A chart with its title and, below it, the legend or the numbers that matter most."""
    drawn: list[tuple[str, Curve]] = []
    words = []
    for i, (name, curve) in enumerate(curves.items()):
        reach = max(1, len(curve) // 30)
        if chart.smooth and len(curve) > 8:
            drawn.append(("faint", _thin(curve)))
            words.append(f"smoothed over {2 * reach + 1} rows; ")
            curve = smoothed(curve, reach)
        drawn.append((f"c{i % 6}", _thin(curve)))
        values = [value for _, value in curve]
        if len(curves) > 1:
            last = f"{escape(name)}: {number(values[-1])}"
            words.append(f'<span class="key c{i % 6}">{last}</span>')
        else:
            words.append(f"first {number(values[0])}, last {number(values[-1])}")
            words.append(f", lowest {number(min(values))}, highest {number(max(values))}")
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{_svg(chart.title, drawn)}"
        f'<p class="legend">{"".join(words)}</p></figure>'
    )


def smoothed(curve: Curve, reach: int) -> Curve:
    """Means over `reach` points to either side; at the ends over those that are there."""
    sums = [0.0, *accumulate(value for _, value in curve)]
    result: Curve = []
    for i, (step, _) in enumerate(curve):
        first, last = max(0, i - reach), min(len(curve), i + reach + 1)
        result.append((step, (sums[last] - sums[first]) / (last - first)))
    return result


def _thin(curve: Curve) -> Curve:
    """About MAX_POINTS points: lowest and highest of neighbours, so that no peak is lost."""
    if len(curve) <= MAX_POINTS:
        return curve
    size = math.ceil(2 * len(curve) / MAX_POINTS)
    kept: Curve = [curve[0]]
    for i in range(0, len(curve), size):
        part = sorted(curve[i : i + size], key=lambda point: point[1])
        kept += sorted([part[0], part[-1]])
    return [*kept, curve[-1]]


_WIDTH, _HEIGHT = 360, 190  # about a phone's width, so that the letters keep their size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 22, 8, 24  # of the frame, from the sides


def _svg(title: str, curves: Sequence[tuple[str, Curve]]) -> str:
    """Lines over a grid with ticks; each comes with the class that gives it its colour."""
    steps = [step for _, curve in curves for step, _ in curve]
    values = [value for _, curve in curves for _, value in curve]
    y_ticks = _ticks(min(values), max(values), 4)
    x_ticks = [tick for tick in _ticks(min(steps), max(steps), 5) if tick <= max(steps)]
    x_low, y_low, y_high = min(steps), y_ticks[0], y_ticks[-1]
    x_unit = (_WIDTH - _LEFT - _RIGHT) / ((max(steps) - x_low) or 1)
    y_unit = (_HEIGHT - _TOP - _BOTTOM) / (y_high - y_low)

    def x(step: float) -> str:
        return f"{_LEFT + (step - x_low) * x_unit:.1f}"

    def y(value: float) -> str:
        return f"{_TOP + (y_high - value) * y_unit:.1f}"

    parts = []
    for tick in y_ticks:
        ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick)}" dy="4" class="y">{number(tick)}</text>')
    for tick in x_ticks:
        if tick >= x_low:
            parts.append(f'<text x="{x(tick)}" y="{_HEIGHT - 6}">{number(tick)}</text>')
    for style, curve in curves:
        points = " ".join(f"{x(step)},{y(value)}" for step, value in curve)
        parts.append(f'<polyline class="{style}" points="{points}"/>')
        if len(curve) <= MAX_MARKED:
            parts += [
                f'<circle class="{style}" cx="{x(step)}" cy="{y(value)}" r="2.5">'
                f"<title>step {step:g}: {number(value)}</title></circle>"
                for step, value in curve
            ]
    label, inside = escape(title, quote=True), "".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{inside}</svg>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Two or more round numbers, from `low` or below to `high` or above."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, to the rounding
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]
