"""The scenes of the toy world in nature and in water, one function each; toy/scenes.py lists them."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw
from PIL.ImageDraw import ImageDraw as Draw

from toy.backdrop import GRASS, SKY, WHITE, WOOD, Scene, backdrop, cloud, disc, polar, rug, tint, waves
from toy.draw import CANVAS, Color, Pen, shade


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
    for i in range(9):  # big ears in a row, and a strip of stubble in front
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
    bend = rng.choice((-1, 1)) * rng.uniform(40, 70)  # a bend, so that the subject does not hide the road
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


def purple_rug_in_forest(image: Image.Image, rng: random.Random) -> Scene:
    ground = rng.uniform(214, 222)
    draw = backdrop(image, rng, (186, 220, 150), (104, 150, 70), 168)
    for i in range(5):
        x = 14 + 57 * i + rng.uniform(-8, 8)
        draw.rectangle((x - 10, 30, x + 10, 178), fill=(118, 80, 52))
        disc(draw, x, 22, 42, rng.uniform(34, 46), tint((60, 150, 65), rng, 16))
    rug(image, ground, tint((140, 62, 190), rng), (205, 150, 235))
    return Scene(ground)


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
