"""Axes, lines and cells as SVG. Colours are the page's own CSS variables, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """Values from low to high on pixels from `start` to `end`; log: by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def spanning(values: Sequence[float], start: float, end: float, margin: float, log: bool = False) -> Scale:
    """A scale with `margin` of its span free at both ends; around a single value there is room."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** margin if high > low else 2.0
        return Scale(low / room, high * room, start, end, True)
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, end)


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round values between low and high, at most `most`; whole: only integers."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in STEPS if power * factor >= rough * (1 - 1e-9))
    if whole:
        step = float(max(1, math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick's value, short."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    digits, _, power = f"{value:g}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


def text(x: float, y: float, words: str, anchor: str) -> str:
    """Words at a place; anchor: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def frame(x: Scale, y: Scale, x_ticks: list[float], x_label: str) -> list[str]:
    """Lines across at round values, their names, and what lies along the bottom."""
    parts: list[str] = []
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 6, at + 4, label(value), "end"))
    for value in x_ticks:
        parts.append(text(x(value), HEIGHT - BOTTOM + 16, label(value), "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle"))
    return parts


def line(points: Sequence[tuple[float, float]], color: int, width: float, opacity: float = 1.0) -> str:
    """Points joined."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{path}" style="fill: none; stroke: var(--c{color}); stroke-width: {width}; opacity: {opacity:g}"/>'


def dots(points: Sequence[tuple[float, float]], color: int, radius: float, opacity: float = 1.0) -> str:
    """Points as discs."""
    discs = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in points)
    return f'<g style="fill: var(--c{color}); opacity: {opacity:g}">{discs}</g>'


def cell(x: float, y: float, width: float, height: float, opacity: float) -> str:
    """A rectangle, the stronger the more opaque."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} style="fill: var(--c1); opacity: {opacity:g}"/>'


def drawing(parts: list[str], said: str) -> Markup:
    """The whole picture. said: what it shows, for those who hear it."""
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">'
    return Markup(head + "".join(parts) + "</svg>")
