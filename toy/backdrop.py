"""Shapes and colours that several scenes of the toy world use. Units are canvas pixels, y down."""

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
    """Where the subject stands: its feet at y = `ground`, its middle near `x`, so that a landmark stays visible.

    front: paints what hides a part of the subject, after the subject.
    """

    ground: float
    front: Callable[[Image.Image], None] | None = None
    x: float = CANVAS / 2


def tint(color: Color, rng: random.Random, by: int = 10) -> Color:
    """A similar colour: each channel changes by at most `by`."""
    return tuple(max(0, min(255, channel + rng.randint(-by, by))) for channel in color)


def backdrop(image: Image.Image, rng: random.Random, sky: Color, land: Color, horizon: float) -> Draw:
    """Sky above `horizon`, land below."""
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, CANVAS, CANVAS), fill=tint(sky, rng))
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=tint(land, rng))
    return draw


def polar(radius: float, degrees: float) -> tuple[float, float]:
    """Polar to Cartesian coordinates."""
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def disc(draw: Draw, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
    """An ellipse with centre (x, y) and half axes rx and ry."""
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def waves(draw: Draw, y: float, fill: Color, phase: float, height: float, length: float) -> None:
    """Fill everything below a wavy line at `y`."""
    line = [(x, y + height * math.sin(math.tau * x / length + phase)) for x in range(-8, CANVAS + 16, 8)]
    draw.polygon([*line, (CANVAS + 16, CANVAS), (-16, CANVAS)], fill=fill)


def cloud(draw: Draw, rng: random.Random, fill: Color = WHITE) -> None:
    """A small cloud in the sky, left or right of the middle."""
    x, y = rng.choice((rng.uniform(20, 80), rng.uniform(176, 236))), rng.uniform(22, 42)
    disc(draw, x, y, 30, 11, fill)
    disc(draw, x - 4, y - 8, 15, 13, fill)


def rug(image: Image.Image, ground: float, fill: Color, border: Color) -> None:
    """A round rug with a border, under a subject whose feet are at `ground`."""
    draw = ImageDraw.Draw(image)
    disc(draw, 128, ground - 4, 122, 36, border)
    disc(draw, 128, ground - 4, 111, 28, fill)
