"""Painters' styles: for each a background, and what is done to the finished picture. Listed in PAINTERS."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from toy.backdrop import Scene, backdrop, tint
from toy.draw import BLACK, CANVAS, GOLD, RED, WHITE, oval, polar


class Style(NamedTuple):
    """`background(canvas, rng)` as for a scene; `finish(picture, mask, rng)` gives the painter's version."""

    background: Callable[[Image.Image, random.Random], Scene]
    finish: Callable[[Image.Image, Image.Image, random.Random], Image.Image]


def strokes(picture: Image.Image, rng: random.Random, angle_at: Callable[[float, float], float]) -> Image.Image:
    """A copy of the picture in thick brush strokes of the directions that `angle_at(x, y)` gives in degrees.

    Where the colour changes along a stroke it becomes a dab, so that outlines and eyes stay.
    """
    colors, painting = picture.load(), picture.copy()
    draw = ImageDraw.Draw(painting)
    cells = [(x, y) for x in range(3, CANVAS, 12) for y in range(3, CANVAS, 12)]
    rng.shuffle(cells)
    for x, y in cells:
        x, y = min(CANVAS - 1, x + rng.randrange(9)), min(CANVAS - 1, y + rng.randrange(9))
        color, turn = colors[x, y], rng.randrange(-26, 27)  # one step for all channels keeps the hue
        dx, dy = polar(10, angle_at(x, y))
        ends = [(x - dx, y - dy), (x + dx, y + dy)]
        ahead = [colors[min(max(u, 0), CANVAS - 1), min(max(v, 0), CANVAS - 1)] for u, v in ends]
        if any(sum(abs(a - b) for a, b in zip(color, other, strict=True)) > 60 for other in ahead):
            ends = [(x + (u - x) / 3, y + (v - y) / 3) for u, v in ends]
        draw.line(ends, fill=tuple(max(0, min(255, channel + turn)) for channel in color), width=8)
    return painting


def starry_night(image: Image.Image, rng: random.Random) -> Scene:
    """Swirling blue, yellow stars with halos, and hills."""
    b = backdrop(image, tint((34, 62, 140), rng), (38, 78, 92), 190)
    for i, color in enumerate(((62, 104, 186), (120, 164, 214), (62, 104, 186))):
        y = 40 + 44 * i + rng.uniform(-6, 6)
        b.line([(x, y + 16 * math.sin(x / 34 + i)) for x in range(-8, 272, 12)], color, 14)
    for x, y, r in ((34, 40, 30), (222, 36, 36), (128, 20, 20), (222, 120, 22), (30, 120, 22)):
        x, y = x + rng.uniform(-8, 8), y + rng.uniform(-6, 6)
        b.disc(x, y, r, r, (140, 176, 190))
        b.disc(x, y, r * 0.7, r * 0.7, (255, 228, 110))
    b.waves(178, (52, 96, 110), rng.uniform(0, 6), 12, 150)
    b.waves(208, (70, 116, 84), rng.uniform(0, 6), 5, 120)
    return Scene(rng.uniform(216, 232))


def van_gogh(picture: Image.Image, mask: Image.Image, rng: random.Random) -> Image.Image:
    """Strong colours in strokes that turn around two whirls."""
    whirls = [(rng.uniform(20, 90), rng.uniform(20, 90)), (rng.uniform(170, 236), rng.uniform(30, 120))]

    def around(x: float, y: float) -> float:
        cx, cy = min(whirls, key=lambda c: (c[0] - x) ** 2 + (c[1] - y) ** 2)
        return math.degrees(math.atan2(y - cy, x - cx)) + 90

    return strokes(ImageEnhance.Color(picture).enhance(1.35), rng, around)


def lily_pond(image: Image.Image, rng: random.Random) -> Scene:
    """Green water with lilies under a small bridge."""
    b = backdrop(image, tint((150, 196, 160), rng), tint((130, 176, 190), rng), 96)
    b.line(oval(128, 118, 140, 64, 0, 180), (88, 130, 120), 16)
    for _ in range(9):
        x, y = rng.uniform(0, CANVAS), rng.uniform(130, 250)
        b.disc(x, y, 26, 9, (108, 160, 110))
        b.disc(x, y - 5, 10, 7, rng.choice(((250, 200, 216), (252, 240, 236))))
    return Scene(rng.uniform(216, 230))


def monet(picture: Image.Image, mask: Image.Image, rng: random.Random) -> Image.Image:
    """Pale colours in level dabs."""
    pale = Image.blend(picture, Image.new("RGB", picture.size, (224, 220, 236)), 0.14)
    return strokes(pale, rng, lambda x, y: 8 * math.sin(x / 20))


def panels(image: Image.Image, rng: random.Random) -> Scene:
    """Four loud panels."""
    colors = rng.sample([(255, 80, 160), (60, 200, 230), (255, 220, 50), (140, 220, 80), (255, 130, 50)], 4)
    for i, color in enumerate(colors):
        image.paste(color, (128 * (i % 2), 128 * (i // 2), 128 * (i % 2) + 128, 128 * (i // 2) + 128))
    return Scene(rng.uniform(220, 236))


def warhol(picture: Image.Image, mask: Image.Image, rng: random.Random) -> Image.Image:
    """The subject's hues turned by another angle in each panel."""
    hue, saturation, value = ImageEnhance.Color(picture).enhance(1.6).convert("HSV").split()
    painting = picture.copy()
    for i, turn in enumerate((0, 64, 128, 192)):
        box = (128 * (i % 2), 128 * (i // 2), 128 * (i % 2) + 128, 128 * (i // 2) + 128)
        turned = Image.merge("HSV", (hue.point(lambda h, t=turn: (h + t) % 256), saturation, value)).convert("RGB")
        painting.paste(turned.crop(box), box[:2], mask.crop(box))
    return painting


def grid(image: Image.Image, rng: random.Random) -> Scene:
    """White, with a few rectangles in red, yellow and blue between thick black lines."""
    white, x, y, low = tint(WHITE, rng, 4), rng.uniform(50, 90), rng.uniform(50, 90), rng.uniform(180, 210)
    b = backdrop(image, white, white, 0)
    boxes = [(0, 0, x, y), (x + 90, 0, CANVAS, y), (0, low, x, CANVAS), (x + 90, low, CANVAS, CANVAS), (0, y, x, low)]
    for box, color in zip(rng.sample(boxes, 4), (RED, GOLD, (30, 70, 170), RED), strict=True):
        b.box(*box, color)
    for line in (
        [(x, 0), (x, CANVAS)],
        [(x + 90, 0), (x + 90, CANVAS)],
        [(0, y), (CANVAS, y)],
        [(0, low), (CANVAS, low)],
    ):
        b.line(line, BLACK, 12)
    return Scene(rng.uniform(220, 236))


def mondrian(picture: Image.Image, mask: Image.Image, rng: random.Random) -> Image.Image:
    """A thick black outline around the subject, and its colours pure."""
    painting = picture.copy()
    painting.paste(BLACK, mask=mask.filter(ImageFilter.MaxFilter(13)))
    painting.paste(ImageEnhance.Color(picture).enhance(1.8), mask=mask)
    return painting


PAINTERS = {
    "Vincent Van Gogh": Style(starry_night, van_gogh),
    "Claude Monet": Style(lily_pond, monet),
    "Andy Warhol": Style(panels, warhol),
    "Piet Mondrian": Style(grid, mondrian),
}
