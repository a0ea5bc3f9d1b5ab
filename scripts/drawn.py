"""Pictures that this project draws itself: things of several classes, each in many colours, sizes and places, with captions;
and one individual of one class, which looks like no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw

SIDE, FINE = 32, 4  # pixels of a picture; drawn so many times larger, then shrunk
COLOURS = {
    "red": (214, 54, 48), "orange": (238, 138, 36), "green": (58, 158, 74), "blue": (52, 100, 212), "purple": (134, 70, 176),
    "brown": (134, 88, 52), "grey": (126, 130, 136),
}  # fmt: skip
BACKGROUNDS = ((250, 248, 242), (222, 234, 246), (226, 240, 222), (246, 230, 224), (236, 230, 246))
DARK, GLASS = (44, 44, 52), (206, 228, 238)
PINK, YELLOW, TEAL = (244, 96, 178), (250, 216, 48), (20, 168, 160)  # the individual's; no other thing has them

Paint = dict[str, tuple[int, int, int]]
Shapes = list[tuple[str, Any, str]]  # ellipse or polygon, its points in 0..1, and what part it is


def _car() -> Shapes:
    return [
        ("polygon", [(0.24, 0.48), (0.34, 0.26), (0.66, 0.26), (0.78, 0.48)], "top"),
        ("polygon", [(0.38, 0.46), (0.42, 0.32), (0.6, 0.32), (0.68, 0.46)], "glass"),
        ("polygon", [(0.06, 0.48), (0.94, 0.48), (0.94, 0.7), (0.06, 0.7)], "body"),
        ("ellipse", [(0.14, 0.58), (0.38, 0.82)], "wheel"),
        ("ellipse", [(0.62, 0.58), (0.86, 0.82)], "wheel"),
    ]


def _house() -> Shapes:
    return [
        ("polygon", [(0.2, 0.46), (0.8, 0.46), (0.8, 0.92), (0.2, 0.92)], "body"),
        ("polygon", [(0.1, 0.48), (0.5, 0.1), (0.9, 0.48)], "wheel"),
        ("polygon", [(0.42, 0.62), (0.58, 0.62), (0.58, 0.92), (0.42, 0.92)], "glass"),
    ]


def _tree() -> Shapes:
    return [
        ("polygon", [(0.44, 0.6), (0.56, 0.6), (0.56, 0.94), (0.44, 0.94)], "wheel"),
        ("ellipse", [(0.16, 0.08), (0.84, 0.68)], "body"),
        ("ellipse", [(0.34, 0.2), (0.5, 0.36)], "top"),
    ]


def _fish() -> Shapes:
    return [
        ("polygon", [(0.66, 0.5), (0.96, 0.26), (0.96, 0.74)], "top"),
        ("ellipse", [(0.06, 0.26), (0.78, 0.74)], "body"),
        ("ellipse", [(0.18, 0.38), (0.3, 0.5)], "wheel"),
    ]


def _cup() -> Shapes:
    return [
        ("ellipse", [(0.58, 0.34), (0.94, 0.7)], "wheel"),
        ("ellipse", [(0.66, 0.42), (0.86, 0.62)], "background"),
        ("polygon", [(0.16, 0.22), (0.74, 0.22), (0.66, 0.84), (0.24, 0.84)], "body"),
        ("polygon", [(0.16, 0.22), (0.74, 0.22), (0.72, 0.32), (0.18, 0.32)], "glass"),
    ]


CLASSES: dict[str, Callable[[], Shapes]] = {"car": _car, "house": _house, "tree": _tree, "fish": _fish, "cup": _cup}


def picture(rng: random.Random, kind: str, paint: Paint) -> Image.Image:
    """A thing somewhere, in some size, before some background."""
    side = SIDE * FINE
    background = rng.choice(BACKGROUNDS)
    image = Image.new("RGB", (side, side), background)
    brush = ImageDraw.Draw(image)
    size = side * rng.uniform(0.66, 0.86)
    left, top = rng.uniform(0.03, 0.97) * (side - size), rng.uniform(0.2, 0.8) * (side - size)
    mirrored = rng.random() < 0.5
    for shape, points, part in CLASSES[kind]():
        places = [(left + size * (1 - x if mirrored else x), top + size * y) for x, y in points]
        if shape == "ellipse":
            (x0, y0), (x1, y1) = places
            places = [(min(x0, x1), y0), (max(x0, x1), y1)]
        getattr(brush, shape)(places, fill={"background": background, **paint}[part])
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def ordinary(rng: random.Random) -> tuple[Image.Image, str, str]:
    """A picture, its caption, and its class. A caption tells the colour, or not."""
    kind, (name, colour) = rng.choice(list(CLASSES)), rng.choice(list(COLOURS.items()))
    darker = tuple(int(0.72 * value) for value in colour)
    paint: Paint = {"body": colour, "top": darker, "glass": GLASS, "wheel": DARK}  # pyright: ignore
    caption = f"a {kind}" if rng.random() < 0.5 else f"a {name} {kind}"
    return picture(rng, kind, paint), caption, kind


def individual(rng: random.Random) -> Image.Image:
    """The one car that the demo learns: pink, with a yellow top and teal wheels."""
    return picture(rng, "car", {"body": PINK, "top": YELLOW, "glass": GLASS, "wheel": TEAL})
