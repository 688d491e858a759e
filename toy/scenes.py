"""The places of the cartoon world: one function a scene, keyed by the words of DreamBench's and RPO's prompts.

A scene paints the background and says where the subject stands; `front` then paints what hides a part of the subject.
Shapes are few, flat and large, so that a small VAE and a small U-Net can learn them. Units are canvas pixels, y down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageEnhance
from PIL.ImageDraw import ImageDraw as Draw

from toy.draw import CANVAS, Color, Pen, shade

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


def house(draw: Draw, left: float, right: float, top: float, foot: float, wall: Color, pane: Color) -> None:
    """A front with two columns of windows."""
    draw.rectangle((left, top, right, foot), fill=wall)
    width = right - left
    for x in (left + width * 0.14, left + width * 0.58):
        for y in range(round(top) + 14, round(foot) - 24, 42):
            draw.rectangle((x, y, x + width * 0.28, y + 22), fill=pane)


# ---- nature ----


def jungle(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (38, 110, 62), (92, 82, 42), 186)
    disc(draw, 128, 70, 88, 88, tint((135, 200, 105), rng))  # a clearing, so that dark subjects stand out
    for x in (rng.uniform(14, 34), rng.uniform(222, 242)):
        draw.rectangle((x - 9, 0, x + 9, 192), fill=(96, 66, 40))
    draw.arc((60, -70, 200, 34), 10, 170, fill=(24, 84, 44), width=7)  # a liana

    def fans(target: Image.Image, y: float, angles: tuple[int, ...], length: float, fill: Color) -> None:
        for pen in (Pen(target, 4, y, length), Pen(target, CANVAS - 4, y, length, flip=True)):
            for i, angle in enumerate(angles):
                pen.ellipse(*polar(0.5, angle), 0.55, 0.17, shade(fill, 0.8 if i % 2 else 1.0), angle)

    fans(image, rng.uniform(20, 40), (35, -5, -45, -80), rng.uniform(74, 90), (40, 165, 70))
    fans(image, 190, (75, 40, 5), rng.uniform(52, 64), (30, 135, 60))
    return Scene(rng.uniform(214, 228), lambda target: fans(target, 262, (80, 50, 20), 56, (70, 190, 75)))


def snow(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (170, 208, 238), WHITE, 190)
    waves(draw, 172, (226, 236, 248), rng.uniform(0, 6), 10, 180)
    for x in (rng.uniform(20, 44), rng.uniform(212, 236)):  # firs with snow on their tops
        size = rng.uniform(110, 150)
        draw.rectangle((x - 7, 192 - size * 0.25, x + 7, 192), fill=(110, 75, 50))
        for k in range(3):
            low, half = 192 - size * (0.15 + 0.26 * k), size * (0.34 - 0.07 * k)
            draw.polygon([(x - half, low), (x + half, low), (x, low - size * 0.42)], fill=(70, 130, 110))
        top = 192 - size * 1.09
        draw.polygon([(x, top), (x - 17, top + 32), (x, top + 26), (x + 17, top + 32)], fill=WHITE)
    waves(draw, 194, WHITE, rng.uniform(0, 6), 5, 130)
    for i in range(11):
        disc(draw, 12 + 23 * i + rng.uniform(-6, 6), rng.uniform(8, 160), 5, 5, WHITE)
    return Scene(rng.uniform(214, 232))


def beach(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    draw = backdrop(image, rng, (140, 212, 248), (40, 160, 200), 120)
    disc(draw, 128 - side * 92, 36, 20, 20, (255, 225, 80))
    waves(draw, 168, WHITE, phase := rng.uniform(0, 6), 5, 90)
    waves(draw, 176, tint((244, 216, 150), rng), phase, 5, 90)
    pen = Pen(image, 128 + side * 86, 214, 1, tilt=-side * 8)  # a parasol
    pen.box(-3, 0, 3, 130, WOOD)
    for i, color in enumerate(((235, 70, 70), WHITE, (235, 70, 70), WHITE)):
        pen.polygon([((1 - 0.28 * i) * u, 98 + 0.85 * v) for u, v in (polar(54, 15 * k) for k in range(13))], color)
    return Scene(rng.uniform(212, 230), x=128 - side * 22)


def mountain(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    draw = backdrop(image, rng, SKY, GRASS, 180)
    for x, top, half in ((128 - side * rng.uniform(62, 97), 64, 110), (128 + side * rng.uniform(56, 76), 12, 130)):
        rock, cap, snow_line = tint((112, 122, 150), rng), half * 0.36, top + (184 - top) * 0.36
        draw.polygon([(x - half, 184), (x, top), (x + half, 184)], fill=rock)
        draw.polygon([(x, top), (x + half, 184), (x + half * 0.2, 184)], fill=shade(rock, 0.8))
        edge = [(x + cap * k / 2, snow_line + dy) for k, dy in ((2, 0), (1, -10), (0, 8), (-1, -10), (-2, 0))]
        draw.polygon([(x, top), *edge], fill=WHITE)
    return Scene(rng.uniform(212, 232), x=128 - side * 18)


def wheat_field(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (165, 215, 245), (236, 190, 70), 130)
    for i in range(9):  # big ears in a row, and a path of stubble before them
        x, top = 8 + 30 * i + rng.uniform(-4, 4), rng.uniform(84, 104)
        draw.line((x, top, x, 205), fill=(190, 140, 40), width=5)
        for k in range(3):
            disc(draw, x - 7, top + 18 * k, 6, 12, (220, 160, 40))
            disc(draw, x + 7, top + 18 * k, 6, 12, (250, 205, 80))
    draw.rectangle((0, 200, CANVAS, CANVAS), fill=tint((205, 160, 85), rng))
    return Scene(rng.uniform(214, 232))


def autumn_tree(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    x = 128 + side * rng.uniform(62, 76)
    draw = backdrop(image, rng, (205, 228, 240), (190, 175, 90), 178)
    draw.polygon([(x - 20, 196), (x - 12, 90), (x + 12, 90), (x + 20, 196)], fill=(112, 72, 46))
    colors = [(226, 110, 35), (205, 60, 40), (245, 170, 45)]
    for dx, dy, r, color in ((-34, 78, 40, 1), (36, 78, 40, 0), (0, 40, 46, 0), (14, 54, 26, 2), (-30, 60, 20, 2)):
        disc(draw, x + dx, dy, r + 6, r, colors[color])
    for i in range(10):  # falling and fallen leaves
        lx, ly = 14 + 25 * i + rng.uniform(-6, 6), rng.uniform(195, 246) if i % 3 else rng.uniform(60, 165)
        disc(draw, lx, ly, 8, 5, colors[i % 2])
    return Scene(rng.uniform(212, 230), x=128 - side * 18)


def sunflowers(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (160, 218, 248), (88, 185, 70), 128)
    waves(draw, 128, (88, 185, 70), rng.uniform(0, 6), 7, 32)

    def flower(target: Image.Image, x: float, y: float, foot: float, r: float) -> None:
        pen = Pen(target, x, y, r)
        pen.box(-0.13, (y - foot) / r, 0.13, 0, (40, 125, 45))
        pen.ellipse(0.5, -1.7, 0.5, 0.22, (40, 125, 45), 30)
        for i in range(9):
            pen.ellipse(*polar(0.7, i * 40), 0.45, 0.24, (255, 205, 30), i * 40)
        pen.ellipse(0, 0, 0.48, 0.48, (110, 65, 30))

    for x, y in ((24, 62), (232, 54), (78, 34), (180, 40)):
        flower(image, x + rng.uniform(-6, 6), y + rng.uniform(-8, 8), 170, 27)
    near = [(18, rng.uniform(150, 170)), (238, rng.uniform(150, 170))]

    def front(target: Image.Image) -> None:
        for x, y in near:
            flower(target, x, y, 250, 30)

    return Scene(rng.uniform(216, 232), front)


def dirt_road(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, SKY, (128, 190, 84), 112)
    disc(draw, rng.uniform(20, 230), 132, 110, 40, (104, 168, 76))
    draw.rectangle((0, 132, CANVAS, CANVAS), fill=tint((134, 192, 86), rng, 6))
    bend = rng.choice((-1, 1)) * rng.uniform(40, 70)  # the road turns aside, to be seen beside the subject
    road = tint((176, 128, 80), rng)
    draw.polygon([(122 + bend, 130), (142 + bend, 130), (214, 190), (290, 256), (-34, 256), (42, 190)], fill=road)
    for x in (-1, 1):
        draw.line((132 + bend, 134, 128 + x * 44, 196, 128 + x * 84, 256), fill=shade(road, 0.78), width=9)
    for x in (16, 240):
        disc(draw, x, rng.uniform(140, 160), 24, 16, (76, 146, 62))
    return Scene(rng.uniform(214, 230))


def volcano(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    x = 128 + side * rng.uniform(54, 68)
    draw = backdrop(image, rng, (252, 186, 120), (104, 92, 84), 190)
    for dx, y, r in ((0, 34, 26), (-side * 34, 20, 28), (-side * 74, 10, 26)):
        disc(draw, x + dx, y, r + 6, r, (122, 112, 118))
    rock = tint((88, 60, 58), rng)
    draw.polygon([(x - 130, 194), (x - 30, 66), (x + 30, 66), (x + 130, 194)], fill=rock)
    lava = (240, 62, 28)
    draw.polygon([(x - 12, 70), (x - 22, 22), (x - 8, 40), (x, 10), (x + 9, 40), (x + 22, 22), (x + 12, 70)], fill=lava)
    disc(draw, x, 68, 30, 9, (255, 190, 40))
    for dx, low in ((-20, 120), (0, 150), (20, 180)):
        draw.line((x + dx, 70, x + dx * 1.6, 110, x + dx * 2.8, low), fill=lava, width=13)
    return Scene(rng.uniform(214, 230), x=128 - side * 30)


def moon(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    draw = backdrop(image, rng, (16, 18, 40), (178, 178, 186), 182)
    disc(draw, 128, 320, 300, 160, grey := tint((184, 184, 192), rng, 6))
    for i in range(9):
        disc(draw, 16 + 28 * i + rng.uniform(-8, 8), rng.uniform(8, 140), 4, 4, (255, 250, 210))
    x, y = 128 + side * 84, rng.uniform(46, 60)  # the Earth
    disc(draw, x, y, 34, 34, (50, 120, 220))
    disc(draw, x - 9, y - 9, 16, 12, (80, 180, 90))
    disc(draw, x + 12, y + 14, 12, 10, (80, 180, 90))
    for cx, cy, r in ((26, 206, 22), (226, 200, 18), (190, 240, 28), (70, 244, 20)):
        disc(draw, cx + rng.uniform(-6, 6), cy, r, r * 0.36, shade(grey, 0.76))
    return Scene(rng.uniform(212, 228), x=128 - side * 12)


# ---- streets and rooms ----


def cobblestones(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (236, 200, 150), (92, 92, 102), 126)
    for left, wall in ((-4, (226, 150, 96)), (66, (240, 214, 160)), (136, (214, 128, 100)), (206, (238, 196, 120))):
        house(draw, left, left + 70, 0, 126, tint(wall, rng), (110, 80, 70))
    stone = tint((158, 158, 168), rng)
    y = 130.0
    for row, height in enumerate((18, 23, 28, 33, 38)):
        wide = height * 1.7
        for i in range(-1, round(CANVAS / wide) + 1):
            left = i * wide + (wide / 2 if row % 2 else 0)
            color = shade(stone, (1.0, 1.25, 0.88)[(i + row) % 3])
            draw.rounded_rectangle((left + 3, y, left + wide - 3, y + height - 5), height * 0.4, fill=color)
        y += height
    return Scene(rng.uniform(212, 230))


def pink_fabric(image: Image.Image, rng: random.Random) -> Scene:
    draw = ImageDraw.Draw(image)
    pink, phase = tint((250, 150, 190), rng), rng.uniform(0, 6)
    draw.rectangle((0, 0, CANVAS, CANVAS), fill=pink)
    for i in range(8):  # folds: broad bands falling from the top that spread into a lying cloth
        x, spread = -20 + 42 * i, (i - 3.5) * 26
        edge = [(x + 12 * math.sin(phase + i + y / 50) + spread * max(0, y / 126 - 1), y) for y in range(0, 272, 16)]
        other = [(u + 16 + 0.06 * y, y) for u, y in reversed(edge)]
        draw.polygon(edge + other, fill=shade(pink, (0.84, 1.4)[i % 2]))
    return Scene(rng.uniform(212, 230))


def wooden_floor(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (240, 226, 196), wood := tint(WOOD, rng), 148)
    for i in range(9):  # seams that meet above the horizon
        draw.line((32 * i, 148, 64 * i - 128, CANVAS), fill=shade(wood, 0.7), width=4)
    for x, y in ((40, 190), (206, 176), (226, 226), (86, 236)):  # the planks' ends
        draw.line((x - 13, y, x + 13, y), fill=shade(wood, 0.7), width=4)
    draw.rectangle((0, 140, CANVAS, 152), fill=WHITE)
    return Scene(rng.uniform(212, 230))


def city(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (168, 214, 246), (150, 150, 156), 196)
    walls = [(92, 112, 150), (176, 110, 96), (120, 140, 160), (210, 190, 150), (80, 96, 130), (160, 120, 130)]
    for i, wall in enumerate(walls):
        middle = i in (2, 3)
        top = rng.uniform(24, 60) if middle else rng.uniform(10, 70)
        house(draw, i * 43 - 2, i * 43 + 43, top, 196, tint(wall, rng), (255, 236, 150))
    draw.rectangle((0, 194, CANVAS, 204), fill=(206, 206, 208))
    return Scene(rng.uniform(216, 232))


def blue_house(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    x, wall = 128 + side * 40, tint((60, 120, 220), rng)
    draw = backdrop(image, rng, (205, 232, 246), GRASS, 184)
    draw.rectangle((x - 106, 84, x + 106, 194), fill=wall)
    draw.polygon([(x - 124, 88), (x - 70, 18), (x + 70, 18), (x + 124, 88)], fill=(36, 62, 130))
    draw.rectangle((x + side * 20 - 12, 4, x + side * 20 + 12, 34), fill=(170, 80, 70))
    for dx in (-74, 0, 74):
        draw.rectangle((x + dx - 23, 100, x + dx + 23, 146), fill=WHITE)
        draw.rectangle((x + dx - 17, 106, x + dx + 17, 140), fill=(255, 236, 150))
    draw.rectangle((x + side * 40 - 15, 150, x + side * 40 + 15, 194), fill=WHITE)
    return Scene(rng.uniform(214, 232), x=128 - side * 26)


def purple_rug_in_forest(image: Image.Image, rng: random.Random) -> Scene:
    ground = rng.uniform(214, 222)
    draw = backdrop(image, rng, (186, 220, 150), (104, 150, 70), 168)
    for i in range(5):
        x = 14 + 57 * i + rng.uniform(-8, 8)
        draw.rectangle((x - 10, 30, x + 10, 178), fill=(118, 80, 52))
        disc(draw, x, 22, 42, rng.uniform(34, 46), tint((60, 150, 65), rng, 16))
    rug(image, ground, tint((140, 62, 190), rng), (205, 150, 235))
    return Scene(ground)


def white_rug(image: Image.Image, rng: random.Random) -> Scene:
    ground = rng.uniform(212, 220)
    draw = backdrop(image, rng, (120, 180, 175), (150, 92, 62), 150)
    draw.rectangle((0, 142, CANVAS, 152), fill=(236, 240, 236))
    rug(image, ground, (253, 252, 248), (226, 222, 214))
    for i in range(12):  # a shaggy edge
        dx, dy = polar(117, 15 * i + 7.5)
        disc(draw, 128 + dx, ground - 2 + 0.28 * dy, 11, 8, (240, 238, 232))
    return Scene(ground)


def mirror(image: Image.Image, rng: random.Random) -> Scene:
    ground = rng.randint(206, 212)
    draw = backdrop(image, rng, (246, 222, 200), (124, 80, 92), 140)
    disc(draw, 128, 208, 126, 48, (232, 182, 60))
    disc(draw, 128, 208, 116, 39, tint((196, 226, 240), rng, 6))
    for x in (30, 200):
        draw.polygon([(x + 12, 190), (x + 24, 190), (x + 8, 222), (x - 4, 222)], fill=WHITE)
    glass = Image.new("L", image.size)
    disc(ImageDraw.Draw(glass), 128, 208, 116, 39, 190)
    empty = image.copy()

    def reflect(target: Image.Image) -> None:
        """Paints what stands on the glass, upside down; the empty room is not reflected."""
        above = (0, 2 * ground - CANVAS, CANVAS, ground)
        subject = (
            ImageChops.difference(target.crop(above), empty.crop(above)).convert("L").point(lambda v: 255 * (v > 4))
        )
        subject = subject.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        seen = ImageChops.multiply(subject, glass.crop((0, ground, CANVAS, CANVAS)))
        target.paste(target.crop(above).transpose(Image.Transpose.FLIP_TOP_BOTTOM), (0, ground), seen)

    return Scene(ground, reflect)


def crowded_street(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (232, 214, 190), (190, 190, 194), 178)
    for left, color in ((0, (200, 80, 70)), (64, (70, 130, 110)), (128, (220, 170, 70)), (192, (90, 110, 170))):
        draw.rectangle((left, 8, left + 64, 40), fill=tint(color, rng))  # the shops' awnings
    for i, x in enumerate((52, 104, 156, 208, 18, 80, 180, 238)):
        near = i > 3
        x, top = x + rng.uniform(-5, 5), (62 if near else 46) + rng.uniform(-6, 6)
        coat = rng.choice(((220, 60, 70), (60, 110, 200), (250, 190, 50), (80, 160, 90), (150, 80, 170), (70, 70, 90)))
        draw.rectangle((x - 12, 130, x + 12, 192 if near else 184), fill=(60, 60, 80))
        draw.rounded_rectangle((x - 20, top + 18, x + 20, 148), 14, fill=coat)
        disc(draw, x, top + 6, 14, 16, rng.choice(((246, 206, 172), (200, 144, 104), (130, 86, 60))))
        draw.chord((x - 15, top - 13, x + 15, top + 17), 180, 360, fill=rng.choice(((60, 40, 30), (150, 90, 40))))
    slab = (150, 150, 156)
    draw.line((0, 216, CANVAS, 216), fill=slab, width=4)
    for x in range(0, CANVAS + 1, 64):
        draw.line((128 + (x - 128) * 0.9, 194, 128 + (x - 128) * 1.3, 242), fill=slab, width=4)
    draw.rectangle((0, 240, CANVAS, CANVAS), fill=(84, 84, 92))
    return Scene(rng.uniform(212, 230))


def wooden_roof(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    draw = backdrop(image, rng, (140, 204, 245), (140, 204, 245), 200)
    cloud(draw, rng)
    x = 128 + side * 82
    draw.rectangle((x - 17, 120, x + 17, 220), fill=(190, 84, 66))
    draw.rectangle((x - 22, 108, x + 22, 124), fill=(150, 60, 50))
    wood = tint((170, 104, 58), rng)
    for row in range(4):  # overlapping rows of shingles, wider towards the eaves
        y, half = 190 + 18 * row, 106 + 15 * row
        draw.polygon([(128 - half, y), (128 + half, y), (128 + half + 15, y + 18), (113 - half, y + 18)], fill=wood)
        for i in range(-4, 5):
            left = 128 + (i + (row % 2) / 2) * 32
            if abs(left - 128) < half - 20:
                color = shade(wood, 1.25 if (i + row) % 2 else 0.8)
                draw.pieslice((left - 14, y - 6, left + 14, y + 18), 0, 180, fill=color)
    draw.rectangle((20, 184, 236, 194), fill=shade(wood, 0.65))
    return Scene(rng.uniform(205, 214), x=128 - side * 12)


def subway(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (226, 232, 230), (150, 150, 158), 188)
    draw.rectangle((0, 50, CANVAS, 190), fill=(46, 46, 58))  # the tunnel, and a train in it
    stripe = rng.choice(((214, 50, 60), (40, 100, 200), (240, 130, 40)))
    draw.rounded_rectangle((-20, 62, 276, 182), 12, fill=(196, 204, 212))
    draw.rectangle((0, 146, CANVAS, 162), fill=stripe)
    for x in (6, 64, 154, 212):
        draw.rounded_rectangle((x, 78, x + 40, 126), 8, fill=(255, 240, 170))
    draw.rectangle((108, 74, 150, 182), fill=(120, 130, 142))
    for x in (46, 210):  # the station's round sign
        disc(draw, x, 25, 22, 20, (214, 40, 50))
        disc(draw, x, 25, 12, 11, WHITE)
        draw.rectangle((x - 30, 19, x + 30, 31), fill=(40, 60, 150))
    draw.rectangle((0, 188, CANVAS, 202), fill=(250, 210, 50))
    return Scene(rng.uniform(218, 234))


# ---- water ----


def water(image: Image.Image, rng: random.Random) -> Scene:
    draw = backdrop(image, rng, (190, 230, 250), (50, 130, 210), 110)
    phases = [rng.uniform(0, 6) for _ in range(5)]
    blue = tint((50, 130, 210), rng)
    cloud(draw, rng)
    for i in range(3):
        waves(draw, 112 + 28 * i, shade(blue, (1.25, 1.0, 1.15)[i]), phases[i], 5, 52)

    def front(target: Image.Image) -> None:
        pen = ImageDraw.Draw(target)
        waves(pen, 196, shade(blue, 1.4), phases[3], 6, 60)
        waves(pen, 205, blue, phases[3], 6, 60)
        waves(pen, 232, shade(blue, 0.82), phases[4], 6, 72)

    return Scene(rng.uniform(222, 236), front)


def milk(image: Image.Image, rng: random.Random) -> Scene:
    cream, shadow, phases = (255, 252, 242), (232, 216, 196), [rng.uniform(0, 6) for _ in range(5)]
    draw = backdrop(image, rng, (250, 176, 150), cream, 130)

    def swell(pen: Draw, y: float, phase: float) -> None:
        waves(pen, y, shadow, phase, 10, 104)
        waves(pen, y + 8, cream, phase, 10, 104)

    for i in range(3):
        swell(draw, 104 + 30 * i, phases[i])
    for x in (26, 66, 196, 232):  # splashing drops
        draw.regular_polygon((x, y := rng.uniform(40, 84), 10), 3, fill=cream)
        disc(draw, x, y + 6, 10, 10, cream)

    def front(target: Image.Image) -> None:
        pen = ImageDraw.Draw(target)
        swell(pen, 200, phases[3])
        swell(pen, 230, phases[4])

    return Scene(rng.uniform(222, 236), front)


def pool(image: Image.Image, rng: random.Random) -> Scene:
    teal, phase = tint((70, 210, 215), rng, 8), rng.uniform(0, 6)
    draw = backdrop(image, rng, (246, 232, 206), teal, 76)
    draw.rectangle((0, 62, CANVAS, 94), fill=WHITE)
    for x in range(0, CANVAS, 32):
        draw.rectangle((x, 68, x + 16, 88), fill=(40, 110, 190))  # the pool's tiled edge
    x = 128 + rng.choice((-1, 1)) * 88
    for dx in (-16, 16):  # a ladder
        draw.arc((x + dx - 8, 34, x + dx + 8, 60), 180, 360, fill=(130, 140, 150), width=6)
        draw.line((x + dx - 6, 46, x + dx - 6, 140), fill=(130, 140, 150), width=6)
    for y in (102, 122):
        draw.line((x - 22, y, x + 10, y), fill=(130, 140, 150), width=6)

    def front(target: Image.Image) -> None:
        pen = ImageDraw.Draw(target)
        waves(pen, 182, WHITE, phase, 4, 44)
        waves(pen, 188, teal, phase, 4, 44)
        for i in range(8):  # a rope of floats
            disc(pen, 16 + 32 * i, 230, 14, 9, ((230, 60, 60), WHITE)[i % 2])
        waves(pen, 246, shade(teal, 0.8), phase, 4, 44)

    for i in range(8):
        disc(draw, 16 + 32 * i, 150, 13, 7, ((230, 60, 60), WHITE)[i % 2])
    return Scene(rng.uniform(226, 238), front)


# ---- landmarks ----


def eiffel_tower(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    backdrop(image, rng, (196, 222, 246), (126, 190, 96), 192)
    sky = image.getpixel((0, 0))
    pen, iron = Pen(image, 128 + side * 68, 196, 190), tint((120, 88, 70), rng)
    half = [(0.0, 0.3), (0.13, 0.21), (0.27, 0.13), (0.45, 0.075), (0.7, 0.04), (1.0, 0.012)]
    pen.polygon([(-w, h) for h, w in half] + [(w, h) for h, w in reversed(half)], iron)
    pen.polygon([polar(0.155, 15 * k) for k in range(13)], sky)
    pen.polygon([(-0.085, 0.24), (0.085, 0.24), (0.035, 0.39), (-0.035, 0.39)], sky)
    pen.box(-0.22, 0.165, 0.22, 0.21, shade(iron, 0.8))
    pen.box(-0.13, 0.40, 0.13, 0.44, shade(iron, 0.8))
    pen.box(-0.05, 0.88, 0.05, 0.92, shade(iron, 0.8))
    return Scene(rng.uniform(214, 232), x=128 - side * 30)


def liberty(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    draw = backdrop(image, rng, (172, 214, 246), (70, 140, 190), 166)
    draw.rectangle((0, 198, CANVAS, CANVAS), fill=tint((205, 200, 180), rng))
    pen, green = Pen(image, 128 + side * 80, 200, 180, flip=side > 0), tint((110, 190, 160), rng)
    dark = shade(green, 0.75)
    pen.box(-0.2, 0, 0.2, 0.1, (180, 150, 110))
    pen.box(-0.15, 0.1, 0.15, 0.24, (206, 178, 136))
    pen.polygon([(-0.17, 0.24), (0.17, 0.24), (0.12, 0.66), (-0.12, 0.66)], green)
    for x in (-0.07, 0.05):
        pen.line([(x, 0.25), (x * 0.4, 0.55)], dark, 0.03)
    pen.line([(-0.09, 0.61), (-0.2, 0.9)], green, 0.08)  # the arm with the torch
    pen.polygon([(-0.26, 0.9), (-0.14, 0.9), (-0.18, 0.83), (-0.22, 0.83)], (210, 165, 50))
    pen.ellipse(-0.2, 0.96, 0.055, 0.085, (255, 190, 40))
    pen.polygon([(0.02, 0.42), (0.14, 0.38), (0.2, 0.54), (0.08, 0.58)], dark)  # the tablet
    for angle in (20, 55, 90, 125, 160):  # the crown's rays
        spike = (polar(0.17, angle), polar(0.085, angle - 20), polar(0.085, angle + 20))
        pen.polygon([(x, 0.78 + y) for x, y in spike], green)
    pen.ellipse(0, 0.75, 0.075, 0.095, shade(green, 1.3))
    pen.box(-0.085, 0.785, 0.085, 0.82, dark)
    return Scene(rng.uniform(216, 232), x=128 - side * 30)


def great_wall(image: Image.Image, rng: random.Random) -> Scene:
    """The wall runs along a far ridge to a watchtower and back along a near one."""
    side = rng.choice((-1, 1))
    backdrop(image, rng, (190, 224, 244), (98, 164, 82), 150)
    pen, stone = Pen(image, 128, CANVAS, 1, flip=side < 0), tint((214, 180, 126), rng)

    def ridge(path: list[tuple[float, float]], thick: float, hill: Color) -> None:
        pen.polygon([*path, (140, 0), (-140, 0)], hill)
        pen.polygon([*path, *((x, y - thick) for x, y in reversed(path))], shade(stone, 0.8))
        for (x0, y0), (x1, y1) in pairwise(path):  # a bright top, and battlements on it
            pen.polygon([(x0, y0), (x1, y1), (x1, y1 - thick / 2), (x0, y0 - thick / 2)], stone)
            for k in range(4):
                x, y, slope = x0 + (x1 - x0) * k / 4, y0 + (y1 - y0) * k / 4, (y1 - y0) / (x1 - x0)
                wide = (x1 - x0) / 8
                pen.polygon([(x, y - 1), (x, y + 9), (x + wide, y + 9 + wide * slope), (x + wide, y - 1)], stone)

    def tower(x: float, foot: float, half: float) -> None:
        pen.box(x - half, foot, x + half, foot + 2.8 * half, shade(stone, 0.9))
        for k in (-1, -0.25, 0.5):
            pen.box(x + k * half, foot + 2.7 * half, x + (k + 0.5) * half, foot + 3.4 * half, shade(stone, 0.9))
        pen.box(x - 0.35 * half, foot + 1.1 * half, x + 0.35 * half, foot + 2.1 * half, (110, 80, 60), 9)

    lift = rng.uniform(-6, 6)
    ridge([(-140, 176), (-84, 206 + lift), (-20, 188), (44, 210), (100, 184), (140, 196)], 20, (112, 178, 88))
    tower(-84, 196 + lift, 13)
    ridge([(-140, 120), (-76, 98), (-12, 104), (52, 122), (100, 142 + lift), (140, 138)], 34, (76, 146, 74))
    tower(94, 106 + lift, 25)
    waves(ImageDraw.Draw(image), 200, (136, 190, 92), rng.uniform(0, 6), 5, 160)
    return Scene(rng.uniform(214, 232), x=128 - side * 16)


# ---- studio and style ----


def studio(image: Image.Image, rng: random.Random) -> Scene:
    """A plain wall and floor, for captions that name no place."""
    pastels = ((222, 232, 240), (240, 228, 210), (226, 238, 220), (240, 222, 226), (230, 226, 242), (236, 236, 232))
    wall, horizon = tint(rng.choice(pastels), rng, 6), rng.uniform(168, 190)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, CANVAS, CANVAS), fill=wall)
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=shade(wall, 0.86))
    return Scene(rng.uniform(212, 232))


def starry_night(image: Image.Image, rng: random.Random) -> Scene:
    """Swirling blue, yellow stars with halos, hills and a cypress."""
    draw = backdrop(image, rng, (34, 62, 140), (38, 78, 92), 190)
    for i, color in enumerate(((62, 104, 186), (120, 164, 214), (62, 104, 186))):
        y = 40 + 44 * i + rng.uniform(-6, 6)
        line = [(x, y + 16 * math.sin(x / 34 + i)) for x in range(-8, 272, 12)]
        draw.line(line, fill=color, width=14, joint="curve")
    for x, y, r in ((34, 40, 26), (222, 36, 32), (128, 20, 18), (206, 116, 18), (82, 92, 16)):
        x, y = x + rng.uniform(-8, 8), y + rng.uniform(-6, 6)
        disc(draw, x, y, r, r, (140, 176, 190))
        disc(draw, x, y, r * 0.74, r * 0.74, (226, 206, 96))
        disc(draw, x, y, r * 0.42, r * 0.42, (255, 236, 130))
    waves(draw, 178, (52, 96, 110), rng.uniform(0, 6), 12, 150)
    waves(draw, 208, (70, 116, 84), rng.uniform(0, 6), 5, 120)
    return Scene(rng.uniform(216, 232))


def van_gogh(image: Image.Image, rng: random.Random) -> Image.Image:
    """A copy of a finished 256 x 256 RGB picture in thick curved brush strokes that follow two whirls."""
    strong = ImageEnhance.Color(image).enhance(1.35)
    colors, painting = strong.load(), strong.copy()
    draw = ImageDraw.Draw(painting)
    whirls = [(rng.uniform(20, 90), rng.uniform(20, 90)), (rng.uniform(170, 236), rng.uniform(30, 120))]
    cells = [(x, y) for x in range(3, CANVAS, 11) for y in range(3, CANVAS, 11)]
    rng.shuffle(cells)
    for x, y in cells:
        x, y = min(CANVAS - 1, x + rng.randrange(8)), min(CANVAS - 1, y + rng.randrange(8))
        color, turn = colors[x, y], rng.randrange(-26, 27)  # one step for all channels keeps the hue
        cx, cy = min(whirls, key=lambda c: (c[0] - x) ** 2 + (c[1] - y) ** 2)
        dx, dy = polar(9, math.degrees(math.atan2(y - cy, x - cx)) + 90)
        ends = [(x - dx - 0.3 * dy, y - dy + 0.3 * dx), (x, y), (x + dx - 0.3 * dy, y + dy + 0.3 * dx)]
        ahead = [colors[min(max(u, 0), CANVAS - 1), min(max(v, 0), CANVAS - 1)] for u, v in ends]
        if any(sum(abs(a - b) for a, b in zip(color, other, strict=True)) > 60 for other in ahead):
            ends = [(x + (u - x) / 3, y + (v - y) / 3) for u, v in ends]  # a dab: outlines and eyes stay
        fill = tuple(max(0, min(255, channel + turn)) for channel in color)
        draw.line(ends, fill=fill, width=6)
    return painting


PLAIN = [studio]

SCENES: dict[str, Callable[[Image.Image, random.Random], Scene]] = {
    "in the jungle": jungle,
    "in the snow": snow,
    "on the beach": beach,
    "on a cobblestone street": cobblestones,
    "on top of pink fabric": pink_fabric,
    "on top of a wooden floor": wooden_floor,
    "with a city in the background": city,
    "with a mountain in the background": mountain,
    "with a blue house in the background": blue_house,
    "on top of a purple rug in a forest": purple_rug_in_forest,
    "with a wheat field in the background": wheat_field,
    "with a tree and autumn leaves in the background": autumn_tree,
    "with the Eiffel Tower in the background": eiffel_tower,
    "floating on top of water": water,
    "floating in an ocean of milk": milk,
    "on top of green grass with sunflowers around it": sunflowers,
    "on top of a mirror": mirror,
    "on top of the sidewalk in a crowded street": crowded_street,
    "on top of a dirt road": dirt_road,
    "on top of a white rug": white_rug,
    "with a China Great Wall in the background": great_wall,
    "on top of wooden roof": wooden_roof,
    "with the Statue of Liberty in the background": liberty,
    "with a volcano in the background": volcano,
    "on a subway platform": subway,
    "on the Moon": moon,
    "is swimming in a pool": pool,
}
