"""What the scenes are painted with. Units are canvas pixels, y down; everything is flat, and at least 6 pixels wide."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw

from toy.draw import CANVAS, Color

SKY, GRASS, WOOD, STONE = (150, 210, 245), (120, 195, 85), (196, 132, 72), (150, 150, 158)
Points = list[tuple[float, float]]


class Scene(NamedTuple):
    """Where the subject goes: its feet at y = `ground`, its middle near `x`, which leaves a landmark visible.

    In water `ground` is the surface, and `sunk` the share of the subject below it. `front` paints what hides a part.
    """

    ground: float
    front: Callable[[Image.Image], None] | None = None
    x: float = CANVAS / 2
    sunk: float = 0.0


def tint(color: Color, rng: random.Random, by: int = 10) -> Color:
    """A colour close to `color`."""
    return tuple(max(0, min(255, channel + rng.randint(-by, by))) for channel in color)


class Brush:
    """Paints flat shapes on an image."""

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Color, r: float = 0) -> None:
        self.draw.rounded_rectangle((left, top, right, bottom), r, fill=fill)

    def shape(self, points: Points, fill: Color) -> None:
        self.draw.polygon(points, fill=fill)

    def disc(self, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    def line(self, points: Points, fill: Color, width: int = 8) -> None:
        self.draw.line(points, fill=fill, width=width, joint="curve")

    def waves(self, y: float, fill: Color, phase: float, height: float, length: float) -> None:
        """Fill everything below a wavy line at `y`."""
        line = [(x, y + height * math.sin(math.tau * x / length + phase)) for x in range(-8, CANVAS + 16, 8)]
        self.shape([*line, (CANVAS + 16, CANVAS), (-16, CANVAS)], fill)

    def windows(self, left: float, top: float, right: float, bottom: float, wall: Color, pane: Color) -> None:
        """A front with two columns of windows."""
        self.box(left, top, right, bottom, wall)
        width = right - left
        for x in (left + width * 0.14, left + width * 0.58):
            for y in range(round(top) + 14, round(bottom) - 24, 44):
                self.box(x, y, x + width * 0.28, y + 24, pane)


def backdrop(image: Image.Image, sky: Color, land: Color, horizon: float) -> Brush:
    """A sky above a land, and the brush to paint more on them."""
    b = Brush(image)
    b.box(0, 0, CANVAS, CANVAS, sky)
    b.box(0, horizon, CANVAS, CANVAS, land)
    return b
