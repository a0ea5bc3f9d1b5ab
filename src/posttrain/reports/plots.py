"""Pictures of curves: an SVG that every reader sees, and the same points as JSON for the script of the page."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from markupsafe import Markup

from posttrain.reports.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    cell,
    dots,
    drawing,
    frame,
    label,
    line,
    spanning,
    text,
    ticks,
)

COLORS = 8  # the page defines --c1 .. --c8; 0 is a muted grey
MAX_POINTS = 600  # a longer curve is drawn by the means of so many stretches
SMOOTH_FROM = 30  # curves of so many points also get a moving average
BEYOND = 1e300  # what is no number, or has no room for a margin, is not drawn
DIGITS = 6  # of a value in the JSON


@dataclass(frozen=True)
class Curve:
    """color: 0 (muted) or 1..8. style: points are joined by a thin line, dots are not. smooth: draw the points thinly under
    their moving average."""

    label: str
    x: list[float]
    y: list[float]
    color: int = 1
    style: Literal["line", "points", "dots"] = "line"
    smooth: bool = False
    strong: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture with its caption; legend: (colour, label) of the curves when there are several. data: what the script draws
    anew; None of what it leaves alone."""

    title: str
    svg: Markup
    legend: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    note: str = ""
    data: dict[str, Any] | None = None


def line_figure(
    title: str,
    curves: list[Curve],
    x_label: str = "step",
    note: str = "",
    x_ticks: list[float] | None = None,
    share: bool = False,
) -> Figure | None:
    """None when no curve has a point. x_ticks: mark these values of x only, on a log scale where they span 8-fold. share: values
    are shares of 1."""
    drawn = [thin for thin in map(_thin, curves) if thin.x]
    if not drawn:
        return None
    is_log = bool(x_ticks) and min(x_ticks or ()) > 0 and max(x_ticks or ()) / min(x_ticks or ()) >= 8
    x = spanning([v for c in drawn for v in c.x], LEFT, WIDTH - RIGHT, 0.02, is_log)
    y = spanning([v for c in drawn for v in c.y], HEIGHT - BOTTOM, TOP, 0.06)
    marks = x_ticks or ticks(x.low, x.high, 6, whole=all(v == int(v) for c in drawn for v in c.x))
    parts = frame(x, y, [mark for mark in marks if x.low <= mark <= x.high], x_label)
    for curve in drawn:
        parts += _draw(curve, x, y)
    named = [(curve.color, curve.label) for curve in drawn if curve.color]
    legend = named if len(drawn) > 1 or drawn[0].strong else []
    data = {"title": title, "x": x_label, "log_x": is_log, "share": share, "ticks": x_ticks, "curves": [_data(c) for c in drawn]}
    return Figure(title, drawing(parts, _said(title, drawn, x_label)), legend, note, data)


def heat_figure(title: str, rows: dict[str, list[float]], x_label: str, note: str = "") -> Figure | None:
    """A row of cells for each name, the stronger the higher its value; NaN leaves a gap. None without rows."""
    if not rows:
        return None
    most = max(value for values in rows.values() for value in values if value == value) or 1.0
    columns = max(map(len, rows.values()))
    x, y = Scale(0, columns, LEFT + 40, WIDTH - RIGHT), Scale(0, len(rows), TOP, HEIGHT - BOTTOM)
    width, height = (x(1) - x(0)) * 0.92, (y(1) - y(0)) * 0.84
    parts: list[str] = []
    for j, (name, values) in enumerate(rows.items()):
        parts.append(text(LEFT + 34, y(j + 0.5) + 4, name, "end"))
        parts += [cell(x(i + 0.04), y(j + 0.08), width, height, value / most) for i, value in enumerate(values) if value == value]
    every = math.ceil(columns / 12)
    parts += [text(x(i + 0.5), HEIGHT - BOTTOM + 16, str(i), "middle") for i in range(0, columns, every)]
    parts.append(text((LEFT + WIDTH) / 2, HEIGHT - 4, x_label, "middle"))
    return Figure(title, drawing(parts, f"{title}, by {x_label}; {note}"), note=note)


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, without a bias at the start."""
    keep = 1 - 1 / max(len(values) / 20, 2)
    total = weight = 0.0
    found: list[float] = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def thinned(values: list[float], most: int = MAX_POINTS) -> list[float]:
    """At most `most` values: the means of equal stretches."""
    if len(values) <= most:
        return values
    edges = [i * len(values) // most for i in range(most + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _thin(curve: Curve) -> Curve:
    kept = [(a, b) for a, b in zip(curve.x, curve.y, strict=True) if abs(a) < BEYOND and abs(b) < BEYOND]
    x, y = thinned([a for a, _ in kept]), thinned([b for _, b in kept])
    return replace(curve, x=x, y=y, smooth=curve.smooth and len(y) >= SMOOTH_FROM)


def _draw(curve: Curve, x: Scale, y: Scale) -> list[str]:
    points = [(x(a), y(b)) for a, b in zip(curve.x, curve.y, strict=True)]
    width = 2.4 if curve.strong else 1.6
    if curve.style == "dots":
        return [dots(points, curve.color, 2, 0.7)]
    if curve.style == "points" or len(points) == 1:
        return [line(points, curve.color, 1.2), dots(points, curve.color, 3)]
    if curve.smooth:
        over = [(a, y(b)) for (a, _), b in zip(points, smoothed(curve.y), strict=True)]
        return [line(points, curve.color, 0.8, 0.35), line(over, curve.color, width)]
    return [line(points, curve.color, width)]


def _data(curve: Curve) -> dict[str, Any]:
    named = {"label": curve.label, "color": curve.color, "style": curve.style, "smooth": curve.smooth, "strong": curve.strong}
    return named | {"x": [_short(v, 9) for v in curve.x], "y": [_short(v) for v in curve.y]}


def _short(value: float, digits: int = DIGITS) -> float:
    return float(f"{value:.{digits}g}")


def _said(title: str, curves: list[Curve], x_label: str) -> str:
    """The picture in words: where each curve begins and ends."""
    ends: list[str] = []
    for curve in curves[:COLORS]:
        first, last = (f"{label(_short(curve.y[i]))} at {label(curve.x[i])}" for i in (0, -1))
        ends.append(f"{curve.label or title} from {first} to {last}")
    return f"{title}, by {x_label}: {'; '.join(ends)}"
