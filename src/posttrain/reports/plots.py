"""Pictures as inline SVG. Their colours are the page's own CSS variables, so that they follow light and dark."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

COLORS = 8  # the page defines --c1 .. --c8; 0 is a muted grey
MAX_POINTS = 600  # a longer curve is drawn by the means of so many stretches
SMOOTH_FROM = 30  # curves of so many points also get a moving average

# Colours that nobody would choose: each stands for a CSS variable until the SVG is written.
_INK, _GRID = "#0a0b0d", "#0a0b0c"
_VARIABLES = {_INK: "var(--muted)", _GRID: "var(--line)"} | {f"#0a0b{i:02d}": f"var(--c{i})" for i in range(COLORS + 1)}


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
    """A picture with its caption; legend: (colour, label) of the curves when there are several."""

    title: str
    svg: Markup
    legend: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    note: str = ""


def line_figure(
    title: str, curves: list[Curve], x_label: str = "step", note: str = "", x_ticks: list[float] | None = None
) -> Figure | None:
    """None when no curve has a point. x_ticks: mark these values of x only, on a log scale where they span 8-fold."""
    drawn = [curve for curve in curves if curve.x]
    if not drawn:
        return None
    figure, axes = _axes()
    for curve in drawn:
        _draw(axes, curve)
    if x_ticks:
        _mark(axes, x_ticks)
    else:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel(x_label)
    legend = [(curve.color, curve.label) for curve in drawn if curve.color]
    return Figure(title, _svg(figure, title), legend if len(drawn) > 1 or drawn[0].strong else [], note)


def heat_figure(title: str, rows: dict[str, list[float]], x_label: str, note: str = "") -> Figure | None:
    """A row of cells for each name, the stronger the higher its value; NaN leaves a gap. None without rows."""
    if not rows:
        return None
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import NullFormatter, NullLocator

    figure, axes = _axes()
    most = max(value for values in rows.values() for value in values if value == value) or 1.0
    for y, values in enumerate(rows.values()):
        for x, value in enumerate(values):
            if value == value:
                axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color="#0a0b01", alpha=value / most, linewidth=0))
    axes.set_xlim(-0.6, max(map(len, rows.values())) - 0.4)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(NullLocator())
    axes.yaxis.set_major_formatter(NullFormatter())
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel(x_label)
    return Figure(title, _svg(figure, title), note=note)


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


def _draw(axes: Any, curve: Curve) -> None:
    color = f"#0a0b{curve.color:02d}"
    x, y = thinned(curve.x), thinned(curve.y)
    width, over = (2.4, 4) if curve.strong else (1.6, 3)
    if curve.style == "dots":
        axes.plot(curve.x, curve.y, color=color, linewidth=0, marker="o", markersize=3.5, alpha=0.7)
    elif curve.style == "points" or len(x) == 1:
        axes.plot(x, y, color=color, linewidth=1.2, marker="o", markersize=5)
    elif curve.smooth and len(x) >= SMOOTH_FROM:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(x, smoothed(y), color=color, linewidth=width)
    else:
        axes.plot(x, y, color=color, linewidth=width, zorder=over)


def _mark(axes: Any, ticks: list[float]) -> None:
    from matplotlib.ticker import NullLocator

    if min(ticks) > 0 and max(ticks) / min(ticks) >= 8:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Canvas(figsize=(5.2, 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelcolor=_INK, labelsize=9, length=0, pad=5)
    axes.xaxis.label.set(color=_INK, size=9)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if abs(value) < 1e4 else f"{value:,.0f}"))
    axes.margins(x=0.02, y=0.08)
    return figure, axes


def _svg(figure: Any, title: str) -> Markup:
    """The <svg> element alone: text stays text, no metadata, no ids but those that it refers to itself."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+[A-Za-z.0-9]*_\d+"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return Markup(text)  # matplotlib has escaped every text in it
