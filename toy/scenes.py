"""The scenes of the toy world, by their phrases in DreamBench's and RPO's prompts: the table SCENES, and some of them.

The other scenes are in toy/nature.py and toy/buildings.py. Each is a function that paints the background and returns
where the subject stands. Shapes are few, flat and large, so that a small VAE and U-Net can learn them. Units are canvas
pixels, y down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw, ImageEnhance

from toy import buildings, nature
from toy.backdrop import WHITE, WOOD, Scene, backdrop, disc, polar, rug, tint, waves
from toy.draw import CANVAS, shade

# ---- rooms and cloths ----


def pink_fabric(image: Image.Image, rng: random.Random) -> Scene:
    draw = ImageDraw.Draw(image)
    pink, phase = tint((250, 150, 190), rng), rng.uniform(0, 6)
    draw.rectangle((0, 0, CANVAS, CANVAS), fill=pink)
    for i in range(8):  # folds: broad vertical bands that spread out where the cloth lies on the floor
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
        """Paint the subject upside down on the glass; the empty room is not reflected."""
        above = (0, 2 * ground - CANVAS, CANVAS, ground)
        subject = (
            ImageChops.difference(target.crop(above), empty.crop(above)).convert("L").point(lambda v: 255 * (v > 4))
        )
        subject = subject.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        seen = ImageChops.multiply(subject, glass.crop((0, ground, CANVAS, CANVAS)))
        target.paste(target.crop(above).transpose(Image.Transpose.FLIP_TOP_BOTTOM), (0, ground), seen)

    return Scene(ground, reflect)


# ---- studio and style ----


def studio(image: Image.Image, rng: random.Random) -> Scene:
    """A plain wall and floor, for captions without a place."""
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
    """A copy of a finished 256 x 256 RGB picture, in thick curved brush strokes around two whirls."""
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
            ends = [(x + (u - x) / 3, y + (v - y) / 3) for u, v in ends]  # short: outlines and eyes stay visible
        fill = tuple(max(0, min(255, channel + turn)) for channel in color)
        draw.line(ends, fill=fill, width=6)
    return painting


PLAIN = [studio]

SCENES: dict[str, Callable[[Image.Image, random.Random], Scene]] = {
    "in the jungle": nature.jungle,
    "in the snow": nature.snow,
    "on the beach": nature.beach,
    "on a cobblestone street": buildings.cobblestones,
    "on top of pink fabric": pink_fabric,
    "on top of a wooden floor": wooden_floor,
    "with a city in the background": buildings.city,
    "with a mountain in the background": nature.mountain,
    "with a blue house in the background": buildings.blue_house,
    "on top of a purple rug in a forest": nature.purple_rug_in_forest,
    "with a wheat field in the background": nature.wheat_field,
    "with a tree and autumn leaves in the background": nature.autumn_tree,
    "with the Eiffel Tower in the background": buildings.eiffel_tower,
    "floating on top of water": nature.water,
    "floating in an ocean of milk": nature.milk,
    "on top of green grass with sunflowers around it": nature.sunflowers,
    "on top of a mirror": mirror,
    "on top of the sidewalk in a crowded street": buildings.crowded_street,
    "on top of a dirt road": nature.dirt_road,
    "on top of a white rug": white_rug,
    "with a China Great Wall in the background": buildings.great_wall,
    "on top of wooden roof": buildings.wooden_roof,
    "with the Statue of Liberty in the background": buildings.liberty,
    "with a volcano in the background": nature.volcano,
    "on a subway platform": buildings.subway,
    "on the Moon": nature.moon,
    "is swimming in a pool": nature.pool,
}
