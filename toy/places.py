"""The scenes of the toy world with a horizon: nature, streets and landmarks. toy/scenes.py lists them."""

from __future__ import annotations

import random
from itertools import pairwise

from PIL import Image

from toy.backdrop import GRASS, SKY, STONE, WOOD, Scene, backdrop, tint
from toy.draw import CANVAS, RED, WHITE, Pen, oval, polar, shade


def jungle(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, (38, 110, 62), (92, 82, 42), 186)
    b.disc(128, 80, 96, 92, tint((135, 200, 105), rng))  # a clearing, so that dark subjects stand out
    for x in (rng.uniform(14, 30), rng.uniform(226, 242)):
        b.box(x - 10, 0, x + 10, 192, (96, 66, 40))

    def fans(target: Image.Image, y: float, angles: tuple[int, ...], length: float) -> None:
        for pen in (Pen(target, 4, y, length), Pen(target, CANVAS - 4, y, length, flip=True)):
            for i, angle in enumerate(angles):
                pen.ellipse(*polar(0.5, angle), 0.55, 0.2, ((36, 140, 62), (58, 178, 78))[i % 2], angle)

    fans(image, rng.uniform(20, 40), (35, -10, -55), rng.uniform(74, 90))
    return Scene(rng.uniform(214, 228), lambda target: fans(target, 262, (80, 45, 15), 60))


def snow(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, tint((170, 208, 238), rng), WHITE, 190)
    b.waves(172, (226, 236, 248), rng.uniform(0, 6), 10, 180)
    for x in (rng.uniform(20, 40), rng.uniform(216, 236)):  # firs with snow on their tops
        size = rng.uniform(110, 150)
        for k in range(3):
            low, half = 196 - size * 0.26 * k, size * (0.34 - 0.07 * k)
            b.shape([(x - half, low), (x + half, low), (x, low - size * 0.42)], (70, 130, 110))
        top = 196 - size * 0.94
        b.shape([(x, top), (x - 17, top + 32), (x, top + 24), (x + 17, top + 32)], WHITE)
    b.waves(194, WHITE, rng.uniform(0, 6), 5, 130)
    for i in range(9):
        b.disc(14 + 28 * i + rng.uniform(-6, 6), rng.uniform(8, 120), 6, 6, WHITE)
    return Scene(rng.uniform(214, 232))


def beach(image: Image.Image, rng: random.Random) -> Scene:
    side, phase = rng.choice((-1, 1)), rng.uniform(0, 6)
    b = backdrop(image, (140, 212, 248), (40, 160, 200), 120)
    b.disc(128 - side * 92, 36, 22, 22, (255, 225, 80))
    b.waves(168, WHITE, phase, 5, 90)
    b.waves(178, tint((244, 216, 150), rng), phase, 5, 90)
    pen = Pen(image, 128 + side * 88, 214, 1, tilt=-side * 8)  # a parasol
    pen.box(-4, 0, 4, 130, WOOD)
    for i, color in enumerate((RED, WHITE, RED, WHITE)):
        pen.polygon(oval(0, 98, (1 - 0.28 * i) * 54, 46, 0, 180), color)
    return Scene(rng.uniform(212, 230), x=128 - side * 22)


def mountain(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    b = backdrop(image, tint(SKY, rng), tint(GRASS, rng), 180)
    for x, top, half in ((128 - side * rng.uniform(62, 97), 64, 110), (128 + side * rng.uniform(56, 76), 12, 130)):
        rock, cap, line = tint((112, 122, 150), rng), half * 0.36, top + (184 - top) * 0.36
        b.shape([(x - half, 184), (x, top), (x + half, 184)], rock)
        b.shape([(x, top), (x + half, 184), (x + half * 0.2, 184)], shade(rock, 0.8))
        b.shape([(x, top), (x + cap, line), (x + cap / 2, line - 10), (x, line + 8), (x - cap, line)], WHITE)
    return Scene(rng.uniform(212, 232), x=128 - side * 18)


def wheat_field(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, (165, 215, 245), (236, 190, 70), 130)
    for i in range(9):  # big ears in a row
        x, top = 8 + 30 * i + rng.uniform(-4, 4), rng.uniform(76, 96)
        b.box(x - 3, top, x + 3, 205, (190, 140, 40))
        for k in range(3):
            b.disc(x - 7, top + 20 * k, 7, 13, (220, 160, 40))
            b.disc(x + 7, top + 20 * k, 7, 13, (250, 205, 80))
    b.box(0, 200, CANVAS, CANVAS, tint((205, 160, 85), rng))
    return Scene(rng.uniform(214, 232))


def autumn_tree(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    x, leaves = 128 + side * rng.uniform(62, 76), [(226, 110, 35), (205, 60, 40), (245, 170, 45)]
    b = backdrop(image, (205, 228, 240), (190, 175, 90), 178)
    b.shape([(x - 20, 196), (x - 12, 90), (x + 12, 90), (x + 20, 196)], (112, 72, 46))
    for dx, y, r, i in ((-34, 78, 44, 1), (36, 78, 44, 0), (0, 40, 50, 0), (10, 60, 28, 2)):
        b.disc(x + dx, y, r, r, leaves[i])
    for i in range(9):  # falling and fallen leaves
        b.disc(14 + 28 * i, rng.uniform(195, 246) if i % 3 else rng.uniform(60, 165), 9, 6, leaves[i % 2])
    return Scene(rng.uniform(212, 230), x=128 - side * 18)


def sunflowers(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, tint((160, 218, 248), rng), (88, 185, 70), 128)

    def flower(target: Image.Image, x: float, y: float, foot: float, r: float) -> None:
        pen = Pen(target, x, y, r)
        pen.box(-0.15, (y - foot) / r, 0.15, 0, (40, 125, 45))
        for i in range(8):
            pen.ellipse(*polar(0.7, i * 45), 0.45, 0.28, (255, 205, 30), i * 45)
        pen.ellipse(0, 0, 0.5, 0.5, (110, 65, 30))

    b.waves(128, (88, 185, 70), rng.uniform(0, 6), 7, 64)
    for x, y in ((24, 66), (232, 58), (78, 36), (180, 42)):
        flower(image, x + rng.uniform(-6, 6), y + rng.uniform(-8, 8), 180, 30)
    near = [(16, rng.uniform(160, 180)), (240, rng.uniform(160, 180))]
    return Scene(rng.uniform(216, 232), lambda target: [flower(target, x, y, 256, 30) for x, y in near])


def dirt_road(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, tint(SKY, rng), tint((134, 192, 86), rng), 132)
    b.disc(rng.uniform(20, 230), 140, 110, 40, (104, 168, 76))
    b.box(0, 140, CANVAS, CANVAS, (134, 192, 86))
    bend = rng.choice((-1, 1)) * rng.uniform(40, 70)  # the road turns aside, to be seen next to the subject
    road = tint((176, 128, 80), rng)
    b.shape([(118 + bend, 138), (142 + bend, 138), (214, 190), (290, 256), (-34, 256), (42, 190)], road)
    for x in (-1, 1):
        b.line([(132 + bend, 140), (128 + x * 44, 196), (128 + x * 84, 256)], shade(road, 0.78), 9)
        b.disc(128 + x * 112, rng.uniform(140, 160), 26, 18, (76, 146, 62))
    return Scene(rng.uniform(214, 230))


def volcano(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    x, lava = 128 + side * rng.uniform(54, 68), (240, 62, 28)
    b = backdrop(image, (252, 186, 120), (104, 92, 84), 190)
    for dx, y in ((0, 34), (-side * 34, 20), (-side * 74, 10)):
        b.disc(x + dx, y, 32, 26, (122, 112, 118))
    b.shape([(x - 130, 194), (x - 30, 66), (x + 30, 66), (x + 130, 194)], tint((88, 60, 58), rng))
    b.shape([(x - 14, 70), (x - 24, 22), (x - 8, 40), (x, 10), (x + 9, 40), (x + 24, 22), (x + 14, 70)], lava)
    b.disc(x, 68, 30, 10, (255, 190, 40))
    for dx, low in ((-20, 120), (0, 150), (20, 180)):
        b.line([(x + dx, 70), (x + dx * 1.6, 110), (x + dx * 2.8, low)], lava, 13)
    return Scene(rng.uniform(214, 230), x=128 - side * 30)


def moon(image: Image.Image, rng: random.Random) -> Scene:
    side, grey = rng.choice((-1, 1)), tint((184, 184, 192), rng, 6)
    b = backdrop(image, (16, 18, 40), grey, 200)
    b.disc(128, 320, 300, 160, grey)
    for i in range(8):
        b.disc(16 + 32 * i + rng.uniform(-8, 8), rng.uniform(8, 140), 5, 5, (255, 250, 210))
    x, y = 128 + side * 84, rng.uniform(46, 60)  # the Earth
    b.disc(x, y, 36, 36, (50, 120, 220))
    b.disc(x - 9, y - 9, 18, 13, (80, 180, 90))
    b.disc(x + 12, y + 14, 14, 11, (80, 180, 90))
    for cx, cy, r in ((26, 206, 24), (226, 200, 20), (190, 242, 28), (70, 244, 22)):
        b.disc(cx + rng.uniform(-6, 6), cy, r, r * 0.36, shade(grey, 0.76))
    return Scene(rng.uniform(212, 228), x=128 - side * 12)


# Streets


def cobblestones(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, (236, 200, 150), (92, 92, 102), 126)
    for i, wall in enumerate(((226, 150, 96), (240, 214, 160), (214, 128, 100), (238, 196, 120))):
        b.windows(70 * i - 4, 0, 70 * i + 66, 126, tint(wall, rng), (110, 80, 70))
    stone, y = tint((158, 158, 168), rng), 130.0
    for row, height in enumerate((22, 28, 34, 42)):
        wide = height * 1.7
        for i in range(-1, round(CANVAS / wide) + 1):
            left = (i + row % 2 / 2) * wide
            b.box(left + 3, y, left + wide - 3, y + height - 6, shade(stone, (1.0, 1.2, 0.88)[(i + row) % 3]), 10)
        y += height
    return Scene(rng.uniform(212, 230))


def city(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, tint((168, 214, 246), rng), STONE, 196)
    walls = [(92, 112, 150), (176, 110, 96), (120, 140, 160), (210, 190, 150), (80, 96, 130), (160, 120, 130)]
    for i, wall in enumerate(walls):
        b.windows(i * 43 - 2, rng.uniform(10, 70), i * 43 + 43, 196, tint(wall, rng), (255, 236, 150))
    b.box(0, 194, CANVAS, 204, (206, 206, 208))
    return Scene(rng.uniform(216, 232))


def blue_house(image: Image.Image, rng: random.Random) -> Scene:
    side = rng.choice((-1, 1))
    x = 128 + side * 40
    b = backdrop(image, (205, 232, 246), tint(GRASS, rng), 184)
    b.box(x - 106, 84, x + 106, 194, tint((60, 120, 220), rng))
    b.box(x + side * 20 - 12, 4, x + side * 20 + 12, 40, (170, 80, 70))
    b.shape([(x - 124, 88), (x - 70, 18), (x + 70, 18), (x + 124, 88)], (36, 62, 130))
    for dx in (-74, 0, 74):
        b.box(x + dx - 23, 100, x + dx + 23, 146, WHITE)
        b.box(x + dx - 16, 107, x + dx + 16, 139, (255, 236, 150))
    b.box(x + side * 40 - 15, 150, x + side * 40 + 15, 194, WHITE)
    return Scene(rng.uniform(214, 232), x=128 - side * 26)


def crowded_street(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, (232, 214, 190), (190, 190, 194), 178)
    for left, color in ((0, (200, 80, 70)), (64, (70, 130, 110)), (128, (220, 170, 70)), (192, (90, 110, 170))):
        b.box(left, 8, left + 64, 40, tint(color, rng))  # the shops' awnings
    coats = ((220, 60, 70), (60, 110, 200), (250, 190, 50), (80, 160, 90), (150, 80, 170), (70, 70, 90))
    for i, x in enumerate((52, 128, 204, 16, 92, 164, 240)):
        x, top = x + rng.uniform(-5, 5), (62 if i > 2 else 46) + rng.uniform(-6, 6)
        b.box(x - 13, 130, x + 13, 192, (60, 60, 80))
        b.box(x - 22, top + 18, x + 22, 150, rng.choice(coats), 14)
        b.disc(x, top - 2, 17, 16, rng.choice(((60, 40, 30), (150, 90, 40))))
        b.disc(x, top + 8, 14, 14, rng.choice(((246, 206, 172), (200, 144, 104), (130, 86, 60))))
    b.line([(0, 216), (CANVAS, 216)], STONE, 6)
    for x in range(0, CANVAS + 1, 64):
        b.line([(128 + (x - 128) * 0.9, 194), (128 + (x - 128) * 1.3, 242)], STONE, 6)
    b.box(0, 240, CANVAS, CANVAS, (84, 84, 92))
    return Scene(rng.uniform(212, 230))


def wooden_roof(image: Image.Image, rng: random.Random) -> Scene:
    side, wood = rng.choice((-1, 1)), tint((170, 104, 58), rng)
    b = backdrop(image, tint((140, 204, 245), rng), (110, 170, 220), 220)
    x = 128 + side * 86
    b.box(x - 18, 120, x + 18, 200, (190, 84, 66))
    b.box(x - 24, 106, x + 24, 124, (150, 60, 50))
    for row in range(4):  # overlapping rows of shingles, wider towards the eaves
        y, half = 184 + 20 * row, 108 + 16 * row
        b.shape([(128 - half, y), (128 + half, y), (128 + half + 16, y + 20), (112 - half, y + 20)], wood)
        for i in range(-3, 4):
            b.disc(128 + (i + row % 2 / 2) * 40, y + 4, 16, 13, shade(wood, 1.2 if (i + row) % 2 else 0.82))
    b.box(20, 180, 236, 190, shade(wood, 0.65))
    return Scene(rng.uniform(206, 216), x=128 - side * 12)


def subway(image: Image.Image, rng: random.Random) -> Scene:
    b = backdrop(image, (226, 232, 230), STONE, 188)
    b.box(0, 50, CANVAS, 190, (46, 46, 58))  # the tunnel, and a train in it
    b.box(-20, 62, 276, 182, (196, 204, 212), 12)
    b.box(0, 146, CANVAS, 162, rng.choice(((214, 50, 60), (40, 100, 200), (240, 130, 40))))
    for x in (6, 64, 154, 212):
        b.box(x, 78, x + 40, 126, (255, 240, 170), 8)
    for x in (46, 210):  # the station's round sign
        b.disc(x, 25, 22, 21, (214, 40, 50))
        b.disc(x, 25, 12, 11, WHITE)
        b.box(x - 32, 19, x + 32, 31, (40, 60, 150))
    b.box(0, 188, CANVAS, 202, (250, 210, 50))
    return Scene(rng.uniform(218, 234))


# Landmarks


def eiffel_tower(image: Image.Image, rng: random.Random) -> Scene:
    side, sky, iron = rng.choice((-1, 1)), tint((196, 222, 246), rng), tint((120, 88, 70), rng)
    backdrop(image, sky, tint((126, 190, 96), rng), 192)
    pen = Pen(image, 128 + side * 72, 196, 190)
    half = [(0.0, 0.3), (0.13, 0.21), (0.27, 0.13), (0.45, 0.075), (0.7, 0.04), (1.0, 0.015)]
    pen.polygon([(-w, h) for h, w in half] + [(w, h) for h, w in reversed(half)], iron)
    pen.polygon(oval(0, 0, 0.155, 0.155, 0, 180), sky)
    pen.polygon([(-0.08, 0.24), (0.08, 0.24), (0.035, 0.38), (-0.035, 0.38)], sky)
    for w, y in ((0.22, 0.19), (0.13, 0.42), (0.06, 0.9)):
        pen.box(-w, y - 0.025, w, y + 0.025, shade(iron, 0.8))
    return Scene(rng.uniform(214, 232), x=128 - side * 30)


def liberty(image: Image.Image, rng: random.Random) -> Scene:
    side, green = rng.choice((-1, 1)), tint((110, 190, 160), rng)
    b = backdrop(image, tint((172, 214, 246), rng), (70, 140, 190), 166)
    b.box(0, 198, CANVAS, CANVAS, tint((205, 200, 180), rng))
    pen = Pen(image, 128 + side * 82, 200, 180, flip=side > 0)
    pen.box(-0.2, 0, 0.2, 0.24, (206, 178, 136))
    pen.polygon([(-0.17, 0.24), (0.17, 0.24), (0.12, 0.66), (-0.12, 0.66)], green)
    pen.line([(-0.09, 0.61), (-0.2, 0.9)], green, 0.08)  # the arm with the torch
    pen.ellipse(-0.2, 0.95, 0.06, 0.085, (255, 190, 40))
    pen.polygon([(0.02, 0.42), (0.14, 0.38), (0.2, 0.54), (0.08, 0.58)], shade(green, 0.75))  # the tablet
    for angle in (20, 55, 90, 125, 160):  # the crown's rays
        spike = (polar(0.17, angle), polar(0.085, angle - 20), polar(0.085, angle + 20))
        pen.polygon([(x, 0.78 + y) for x, y in spike], green)
    pen.ellipse(0, 0.75, 0.08, 0.095, shade(green, 1.3))
    return Scene(rng.uniform(216, 232), x=128 - side * 30)


def great_wall(image: Image.Image, rng: random.Random) -> Scene:
    """A wall with battlements over green hills, and a watchtower on it."""
    side, stone, lift = rng.choice((-1, 1)), tint((214, 180, 126), rng), rng.uniform(-6, 6)
    backdrop(image, tint((190, 224, 244), rng), (98, 164, 82), 150)
    pen = Pen(image, 128, CANVAS, 1, flip=side < 0)
    far = [(-140, 160), (-84, 206 + lift), (-20, 184), (44, 206), (140, 176)]
    near = [(-140, 120), (-76, 98), (-12, 108), (52, 124), (100, 142 + lift), (140, 138)]
    for path, thick, hill in ((far, 22, (122, 186, 96)), (near, 36, (76, 146, 74))):
        pen.polygon([*path, (140, 0), (-140, 0)], hill)
        pen.polygon([*path, *((x, y - thick) for x, y in reversed(path))], stone)
        for (x0, y0), (x1, y1) in pairwise(path):
            for t in (0.1, 0.5):
                x, y, wide = x0 + (x1 - x0) * t, y0 + (y1 - y0) * t, 14
                pen.box(x, y - 6, x + wide, y + 11, stone)
    pen.box(68, 90, 122, 180 + lift, shade(stone, 0.88))
    for x in (68, 87, 106):
        pen.box(x, 176 + lift, x + 16, 196 + lift, shade(stone, 0.88))
    pen.box(86, 136, 104, 164, (110, 80, 60), 9)
    return Scene(rng.uniform(214, 232), x=128 - side * 20)
