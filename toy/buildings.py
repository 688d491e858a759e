"""The scenes of the toy world in streets and with landmarks, one function each; toy/scenes.py lists them."""

from __future__ import annotations

import random
from itertools import pairwise

from PIL import Image, ImageDraw
from PIL.ImageDraw import ImageDraw as Draw

from toy.backdrop import GRASS, WHITE, Scene, backdrop, cloud, disc, polar, tint, waves
from toy.draw import CANVAS, Color, Pen, shade


def house(draw: Draw, left: float, right: float, top: float, foot: float, wall: Color, pane: Color) -> None:
    """A facade with two columns of windows."""
    draw.rectangle((left, top, right, foot), fill=wall)
    width = right - left
    for x in (left + width * 0.14, left + width * 0.58):
        for y in range(round(top) + 14, round(foot) - 24, 42):
            draw.rectangle((x, y, x + width * 0.28, y + 22), fill=pane)


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
    """The wall on a far ridge and on a near one, each with a watchtower."""
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
