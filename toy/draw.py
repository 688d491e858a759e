"""A pen for cartoons: solid shapes with a dark rim, in a frame that is placed, scaled, tilted and mirrored.

A shape is an outline, that is a list of points: it can be filled, rimmed, and used to clip a marking. Everything is
drawn on a 256 x 256 canvas and shrunk to 128 x 128 at the end, which smooths the edges.

The networks see a picture through 16 x 16 latents, one for each 8 x 8 pixels. A subject is about 100 pixels tall, so
0.08 units of its frame are one latent: what makes an individual should be at least that wide, and no line thinner
than RIM, 3 pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

CANVAS = 256  # pixels; the finished picture is half of that
RIM, RIM_SHADE = 0.03, 0.66  # in units of the frame; a darker rim looks crisper, and costs the autoencoder 1 dB
Color = tuple[int, int, int]
Outline = list[tuple[float, float]]

BLACK, WHITE, PINK, GOLD = (30, 28, 34), (252, 250, 246), (244, 140, 160), (250, 204, 60)
RED, GREEN, BLUE, PURPLE, NAVY = (220, 40, 44), (52, 164, 76), (52, 108, 220), (126, 60, 180), (34, 50, 116)
MARKINGS = ("plain", "patch", "spots", "stripes", "split")


@dataclass(frozen=True)
class Subject:
    """One individual: a point of a continuous family. Two drawings of the same Subject show the same dog.

    Colours are RGB, 0..255. `width`, `height`, `detail`, `detail2` are proportions in [0, 1], free for each kind to use
    (0.5 is average); `variant` (0, 1 or 2) picks a shape (ears, handle); `marking` is one of MARKINGS.
    """

    kind: str
    main: Color
    second: Color  # marking, belly, muzzle, sole, ...
    accent: Color  # collar, ribbon, label, ...
    marking: str = "plain"
    width: float = 0.5
    height: float = 0.5
    detail: float = 0.5
    detail2: float = 0.5
    variant: int = 0


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
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.x, self.y, self.scale, self.flip = x, y, scale, flip
        self.cos, self.sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The canvas pixel of a point of the frame."""
        x = -x if self.flip else x
        across, up = x * self.cos - y * self.sin, x * self.sin + y * self.cos
        return self.x + self.scale * across, self.y - self.scale * up

    def polygon(self, points: Outline, fill: Color) -> None:
        self.draw.polygon([self.place(x, y) for x, y in points], fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color, turn: float = 0.0) -> None:
        self.polygon(oval(x, y, rx, ry, turn=turn), fill)

    def line(self, points: Outline, fill: Color, width: float = RIM) -> None:
        """A line with round joints and ends, `width` in units of the frame."""
        self.draw.line(
            [self.place(x, y) for x, y in points], fill=fill, width=max(1, round(width * self.scale)), joint="curve"
        )
        for x, y in (points[0], points[-1]):
            self.ellipse(x, y, width / 2, width / 2, fill)

    def box(self, left: float, bottom: float, right: float, top: float, fill: Color, round_by: float = 0.0) -> None:
        self.polygon(slab(left, bottom, right, top, round_by), fill)


# Outlines


def polar(radius: float, degrees: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def oval(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, turn: float = 0) -> Outline:
    """An ellipse about (x, y), or its part from `start` to `end` degrees; `turn` turns it counter-clockwise."""
    c, s = polar(1, turn)
    around = [polar(1, start + (end - start) * i / 32) for i in range(33)]
    return [(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in around]


def slab(left: float, bottom: float, right: float, top: float, r: float) -> Outline:
    """A rectangle whose corners are rounded by `r`."""
    r = min(r, (right - left) / 2, (top - bottom) / 2)
    corners = ((right - r, top - r), (left + r, top - r), (left + r, bottom + r), (right - r, bottom + r))
    return [p for i, (x, y) in enumerate(corners) for p in oval(x, y, r, r, 90 * i, 90 * i + 90)[::4]]


def smooth(points: Outline, closed: bool = True) -> Outline:
    """A Catmull-Rom curve through `points`; a point given twice stays a corner."""
    around = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    curve = [points[0]]
    for a, b, c, d in zip(around, around[1:], around[2:], around[3:], strict=False):
        for t in (0.25, 0.5, 0.75, 1.0) if b != c else ():
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            curve.append(tuple(sum(w * p[i] for w, p in zip(weights, (a, b, c, d), strict=True)) / 2 for i in (0, 1)))
    return curve


def lathe(profile: Outline) -> Outline:
    """A pot as if turned on a wheel: a smooth right side from bottom to top, and its mirror image."""
    right = smooth(profile, closed=False)
    return right + [(-x, y) for x, y in reversed(right)]


def star(x: float, y: float, size: float) -> Outline:
    spikes = [polar(r, 90 + 36 * i) for i, r in enumerate((size, size * 0.45) * 5)]
    return [(x + u, y + v) for u, v in spikes]


# Painting


def part(pen: Pen, color: Color, *outlines: Outline) -> None:
    """Fill the union of `outlines` and give it a darker rim, outside."""
    rim = shade(color, RIM_SHADE)
    for outline in outlines:
        pen.line([*outline, *outline[:2]], rim, 2 * RIM)
    for outline in outlines:
        pen.polygon(outline, color)


def tube(pen: Pen, color: Color, points: Outline, width: float) -> None:
    """A rimmed line with round ends: handles, straps, legs, tails."""
    pen.line(points, shade(color, RIM_SHADE), width + 2 * RIM)
    pen.line(points, color, width)


def inside(pen: Pen, outlines: Sequence[Outline], paint: Callable[[Pen], None]) -> None:
    """Let `paint` draw with a pen whose ink shows only inside the union of `outlines`."""
    layer, mask = pen.image.copy(), Image.new("L", pen.image.size)
    stencil, ink = ImageDraw.Draw(mask), copy.copy(pen)
    for outline in outlines:
        stencil.polygon([pen.place(x, y) for x, y in outline], fill=255)
    ink.image, ink.draw = layer, ImageDraw.Draw(layer)
    paint(ink)
    pen.image.paste(layer, (0, 0), mask)


def coat(pen: Pen, subject: Subject, *outlines: Outline, marking: str | None = None) -> None:
    """The union of `outlines` in the subject's main colour, with its marking in the second colour clipped to it."""
    part(pen, subject.main, *outlines)
    if (marking := marking or subject.marking) == "plain":
        return
    xs, ys = zip(*(point for outline in outlines for point in outline), strict=True)
    x, y, rx, ry = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2, (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2

    def paint(ink: Pen) -> None:
        if marking == "patch":
            ink.ellipse(x + 0.5 * rx, y + 0.35 * ry, 0.5 * rx, 0.75 * ry, subject.second, 15)
        elif marking == "spots":
            for u, v in ((-0.62, 0.6), (0.5, 0.72), (0.78, -0.2), (-0.74, -0.32), (0.1, -0.75)):
                ink.ellipse(x + u * rx, y + v * ry, 0.075, 0.075, subject.second)
        elif marking == "stripes":
            for u in (-0.7, 0, 0.7):  # slanted, so that they are not taken for a band
                ink.line(
                    [(x + (u - 0.15) * rx, y - 1.1 * ry), (x + (u + 0.15) * rx, y + 1.1 * ry)], subject.second, 0.1
                )
        else:
            ink.box(x, y - 2 * ry, x + 2 * rx, y + 2 * ry, subject.second)

    inside(pen, outlines, paint)
