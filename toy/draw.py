"""A pen for cartoons: solid shapes in a local frame that can be placed, scaled, tilted and mirrored.

Shapes are outlines, lists of points, that can be filled, get a rim, and clip a marking. All is drawn on a canvas of
256 x 256 pixels and shrunk to 128 x 128 at the end, which smooths the edges.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

CANVAS = 256  # pixels; the finished picture is half of that
RIM = 0.018  # width of the dark rim that separates a thing from a background of its colour, in units of the frame
Color = tuple[int, int, int]
Outline = list[tuple[float, float]]


@dataclass(frozen=True)
class Subject:
    """One individual: two drawings of the same Subject show the same dog.

    Colours are RGB in 0 .. 255. `width`, `height`, `detail` and `detail2` are proportions in [0, 1], 0.5 is average;
    each kind decides what they change. `variant` is 0, 1 or 2 and selects a shape, such as the ears or the handle.
    `marking` is one of MARKINGS.
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
    """`color` made darker (factor below 1) or lighter (above 1; 2 is white)."""
    if factor <= 1:
        return tuple(round(channel * factor) for channel in color)
    return tuple(round(255 - (255 - channel) * (2 - factor)) for channel in color)


class Pen:
    """Draws on `image` in a frame with its origin at canvas pixel (x, y), y up; 1.0 is `scale` canvas pixels.

    `tilt` rotates the frame counter-clockwise, in degrees; `flip` mirrors it left to right.
    """

    def __init__(self, image: Image.Image, x: float, y: float, scale: float, tilt: float = 0.0, flip: bool = False):
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.x, self.y, self.scale, self.flip = x, y, scale, flip
        self.cos, self.sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The canvas pixel of a point of the frame."""
        x = -x if self.flip else x
        return (
            self.x + self.scale * (x * self.cos - y * self.sin),
            self.y - self.scale * (x * self.sin + y * self.cos),
        )

    def polygon(self, points: Outline, fill: Color) -> None:
        """A filled outline."""
        self.draw.polygon([self.place(x, y) for x, y in points], fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color, angle: float = 0.0) -> None:
        """An ellipse with centre (x, y) and half axes rx and ry, rotated counter-clockwise by `angle` degrees."""
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn = [(rx * math.cos(a), ry * math.sin(a)) for a in (i * math.tau / 36 for i in range(36))]
        self.polygon([(x + u * c - v * s, y + u * s + v * c) for u, v in turn], fill)

    def line(self, points: Outline, fill: Color, width: float) -> None:
        """A line with round joints; `width` is in units of the frame."""
        pixels = max(1, round(width * self.scale))
        self.draw.line([self.place(x, y) for x, y in points], fill=fill, width=pixels, joint="curve")

    def arc(
        self, x: float, y: float, rx: float, ry: float, start: float, end: float, fill: Color, width: float
    ) -> None:
        """Part of an ellipse's outline, from `start` to `end` degrees, counter-clockwise from the right."""
        self.line(oval(x, y, rx, ry, start, end), fill, width)

    def box(self, left: float, bottom: float, right: float, top: float, fill: Color, round_by: float = 0.0) -> None:
        """A rectangle with rounded corners."""
        self.polygon(slab(left, bottom, right, top, round_by), fill)


# Outlines


def oval(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> Outline:
    """An ellipse with centre (x, y), or its part from `start` to `end` degrees, counter-clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / 24) for i in range(25)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def slab(left: float, bottom: float, right: float, top: float, r: float) -> Outline:
    """A rectangle whose corners are rounded by `r`."""
    r = min(r, (right - left) / 2, (top - bottom) / 2)
    corners = ((right - r, top - r), (left + r, top - r), (left + r, bottom + r), (right - r, bottom + r))
    return [p for i, (x, y) in enumerate(corners) for p in oval(x, y, r, r, 90 * i, 90 * i + 90)[::4]]


def smooth(points: Outline, closed: bool = True) -> Outline:
    """A Catmull-Rom curve through `points`; a point given twice is a corner."""
    around = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    curve = [points[0]]
    for a, b, c, d in zip(around, around[1:], around[2:], around[3:], strict=False):
        for t in (0.25, 0.5, 0.75, 1.0) if b != c else ():
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            curve.append(tuple(sum(w * p[i] for w, p in zip(weights, (a, b, c, d), strict=True)) / 2 for i in (0, 1)))
    return curve


def fit(points: Outline, x: float, y: float, rx: float, ry: float) -> Outline:
    """The smooth closed curve through `points`, scaled by rx and ry and moved by (x, y)."""
    return smooth([(x + u * rx, y + v * ry) for u, v in points])


def lathe(profile: Outline) -> Outline:
    """A symmetric outline, such as a vase: a smooth right side from bottom to top, and its mirror image."""
    right = smooth(profile, closed=False)
    return right + [(-x, y) for x, y in reversed(right)]


# Painting


def part(pen: Pen, color: Color, *outlines: Outline) -> None:
    """Fill the union of `outlines`, with a darker rim."""
    rim = shade(color, 0.68)
    for outline in outlines:
        pen.line([*outline, *outline[:2]], rim, 2 * RIM)
    for outline in outlines:
        pen.polygon(outline, color)


def tube(pen: Pen, color: Color, points: Outline, width: float) -> None:
    """A line with a rim and round ends: handles, straps, legs."""
    for ink, w in ((shade(color, 0.68), width + 2 * RIM), (color, width)):
        pen.line(points, ink, w)
        for x, y in (points[0], points[-1]):
            pen.ellipse(x, y, w / 2, w / 2, ink)


def inside(pen: Pen, outlines: tuple[Outline, ...], paint: Callable[[Pen], None]) -> None:
    """Call `paint` with a pen that only draws inside the union of `outlines`."""
    layer, mask = pen.image.copy(), Image.new("L", pen.image.size)
    stencil, ink = ImageDraw.Draw(mask), copy.copy(pen)
    for outline in outlines:
        stencil.polygon([pen.place(x, y) for x, y in outline], fill=255)
    ink.image, ink.draw = layer, ImageDraw.Draw(layer)
    paint(ink)
    pen.image.paste(layer, (0, 0), mask)
