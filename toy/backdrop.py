"""What the scenes of the cartoon world are painted with. Units are canvas pixels, y down.

A scene paints the background and says where the subject stands; `front` then paints what hides a part of the subject.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw
from PIL.ImageDraw import ImageDraw as Draw

from toy.draw import CANVAS, Color

WHITE, SKY, GRASS, WOOD = (252, 252, 252), (150, 210, 245), (120, 195, 85), (196, 132, 72)


class Scene(NamedTuple):
    """Where the subject goes: its feet at y = `ground`, its middle near `x`, which leaves a landmark visible."""

    ground: float
    front: Callable[[Image.Image], None] | None = None
    x: float = CANVAS / 2


def tint(color: Color, rng: random.Random, by: int = 10) -> Color:
    """A colour close to `color`."""
    return tuple(max(0, min(255, channel + rng.randint(-by, by))) for channel in color)


def backdrop(image: Image.Image, rng: random.Random, sky: Color, land: Color, horizon: float) -> Draw:
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, CANVAS, CANVAS), fill=tint(sky, rng))
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=tint(land, rng))
    return draw


def polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def disc(draw: Draw, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def waves(draw: Draw, y: float, fill: Color, phase: float, height: float, length: float) -> None:
    """Fills everything below a wavy line at `y`."""
    line = [(x, y + height * math.sin(math.tau * x / length + phase)) for x in range(-8, CANVAS + 16, 8)]
    draw.polygon([*line, (CANVAS + 16, CANVAS), (-16, CANVAS)], fill=fill)


def cloud(draw: Draw, rng: random.Random, fill: Color = WHITE) -> None:
    x, y = rng.choice((rng.uniform(20, 80), rng.uniform(176, 236))), rng.uniform(22, 42)
    disc(draw, x, y, 30, 11, fill)
    disc(draw, x - 4, y - 8, 15, 13, fill)


def rug(image: Image.Image, ground: float, fill: Color, border: Color) -> None:
    draw = ImageDraw.Draw(image)
    disc(draw, 128, ground - 4, 122, 36, border)
    disc(draw, 128, ground - 4, 111, 28, fill)
