"""A pen for cartoons: solid shapes in a frame of their own that can be placed, scaled, tilted and mirrored.

Everything is drawn on a 256 x 256 canvas and shrunk to 128 x 128 at the end, which smooths the edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

CANVAS = 256  # pixels; the finished picture is half of that
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Subject:
    """One individual: a point of a continuous family. Two drawings of the same Subject show the same dog.

    Colours are RGB, 0..255. `width`, `height`, `detail`, `detail2` are proportions in [0, 1], free for each kind to use
    (0.5 is average); `variant` (0, 1 or 2) picks a shape (ears, handle); `marking` is one of MARKINGS.
    """

    kind: str
    main: Color
    second: Color  # belly, muzzle, band, sole, ...
    accent: Color  # collar, ribbon, label, ...
    marking: str = "plain"
    width: float = 0.5
    height: float = 0.5
    detail: float = 0.5
    detail2: float = 0.5
    variant: int = 0


MARKINGS = ("plain", "patch", "spots", "stripes", "split")


def shade(color: Color, factor: float) -> Color:
    """`color` made darker (factor < 1) or lighter (factor > 1, towards white)."""
    if factor <= 1:
        return tuple(round(channel * factor) for channel in color)
    return tuple(round(255 - (255 - channel) * (2 - factor)) for channel in color)


class Pen:
    """Draws on `image` in a frame whose origin is the subject's feet, y up; 1.0 is `scale` canvas pixels.

    `tilt` turns the frame counter-clockwise in degrees; `flip` mirrors it left to right.
    """

    def __init__(self, image: Image.Image, x: float, y: float, scale: float, tilt: float = 0.0, flip: bool = False):
        self.draw = ImageDraw.Draw(image)
        self.x, self.y, self.scale, self.flip = x, y, scale, flip
        self.cos, self.sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The canvas pixel of a point of the frame."""
        x = -x if self.flip else x
        return (
            self.x + self.scale * (x * self.cos - y * self.sin),
            self.y - self.scale * (x * self.sin + y * self.cos),
        )

    def polygon(self, points: list[tuple[float, float]], fill: Color) -> None:
        self.draw.polygon([self.place(x, y) for x, y in points], fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color, angle: float = 0.0) -> None:
        """An ellipse about (x, y), turned counter-clockwise by `angle` degrees."""
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn = [(rx * math.cos(a), ry * math.sin(a)) for a in (i * math.tau / 36 for i in range(36))]
        self.polygon([(x + u * c - v * s, y + u * s + v * c) for u, v in turn], fill)

    def line(self, points: list[tuple[float, float]], fill: Color, width: float) -> None:
        """A round-jointed line, `width` in units of the frame."""
        pixels = max(1, round(width * self.scale))
        self.draw.line([self.place(x, y) for x, y in points], fill=fill, width=pixels, joint="curve")

    def arc(
        self, x: float, y: float, rx: float, ry: float, start: float, end: float, fill: Color, width: float
    ) -> None:
        """The part of an ellipse's outline from `start` to `end` degrees, counter-clockwise from the right."""
        angles = [math.radians(start + (end - start) * i / 24) for i in range(25)]
        self.line([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], fill, width)

    def box(self, left: float, bottom: float, right: float, top: float, fill: Color, round_by: float = 0.0) -> None:
        """A rectangle with rounded corners."""
        r = min(round_by, (right - left) / 2, (top - bottom) / 2)
        points = []
        for x, y, start in (
            (right - r, top - r, 0),
            (left + r, top - r, 90),
            (left + r, bottom + r, 180),
            (right - r, bottom + r, 270),
        ):
            points += [
                (x + r * math.cos(math.radians(start + 15 * i)), y + r * math.sin(math.radians(start + 15 * i)))
                for i in range(7)
            ]
        self.polygon(points, fill)
