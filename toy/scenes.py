"""The scenes of the toy world, keyed by the words of DreamBench's and RPO's prompts: floors and water here, and all.

A scene paints the background and says where the subject stands. Shapes are few, flat and large.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageChops

from toy import places
from toy.backdrop import WOOD, Brush, Scene, backdrop, tint
from toy.draw import CANVAS, RED, WHITE, Color, polar, shade


def studio(image: Image.Image, rng: random.Random) -> Scene:
    """A plain wall and floor, for captions that name no place."""
    pastels = ((222, 232, 240), (240, 228, 210), (226, 238, 220), (240, 222, 226), (230, 226, 242), (236, 236, 232))
    wall = tint(rng.choice(pastels), rng, 6)
    backdrop(image, wall, shade(wall, 0.86), rng.uniform(168, 190))
    return Scene(rng.uniform(212, 232))


# Floors


def pink_fabric(image: Image.Image, rng: random.Random) -> Scene:
    pink, phase = tint((250, 150, 190), rng), rng.uniform(0, 6)
    b = backdrop(image, pink, pink, 0)
    for i in range(6):  # folds: broad bands falling from the top that spread into a lying cloth
        x, spread = -10 + 52 * i, (i - 2.5) * 30
        edge = [(x + 12 * math.sin(phase + i + y / 50) + spread * max(0, y / 126 - 1), y) for y in range(0, 272, 16)]
        b.shape(edge + [(u + 20 + 0.06 * y, y) for u, y in reversed(edge)], shade(pink, (0.84, 1.4)[i % 2]))
    return Scene(rng.uniform(212, 230))


def wooden_floor(image: Image.Image, rng: random.Random) -> Scene:
    wood = tint(WOOD, rng)
    b = backdrop(image, tint((240, 226, 196), rng), wood, 148)
    for i in range(9):  # planks whose seams meet above the horizon
        b.line([(32 * i, 148), (64 * i - 128, CANVAS)], shade(wood, 0.74), 6)
    b.box(0, 140, CANVAS, 152, WHITE)
    return Scene(rng.uniform(212, 230))


def white_rug(image: Image.Image, rng: random.Random) -> Scene:
    b, ground = backdrop(image, tint((120, 180, 175), rng), (150, 92, 62), 150), rng.uniform(212, 220)
    b.box(0, 142, CANVAS, 152, (236, 240, 236))
    for i in range(16):  # a shaggy edge
        dx, dy = polar(112, 22.5 * i)
        b.disc(128 + dx, ground - 4 + 0.27 * dy, 18, 11, (232, 228, 220))
    b.disc(128, ground - 4, 114, 30, (253, 252, 248))
    return Scene(ground)


def purple_rug_in_forest(image: Image.Image, rng: random.Random) -> Scene:
    b, ground = backdrop(image, (186, 220, 150), (104, 150, 70), 168), rng.uniform(214, 222)
    for i in range(5):
        x = 14 + 57 * i + rng.uniform(-8, 8)
        b.box(x - 11, 30, x + 11, 178, (118, 80, 52))
        b.disc(x, 22, 42, rng.uniform(34, 46), tint((60, 150, 65), rng, 16))
    b.disc(128, ground - 4, 124, 38, (205, 150, 235))
    b.disc(128, ground - 4, 111, 28, tint((140, 62, 190), rng))
    return Scene(ground)


def mirror(image: Image.Image, rng: random.Random) -> Scene:
    """A round mirror lies on the floor; what stands on it is seen in it upside down."""
    b, ground = backdrop(image, (246, 222, 200), (124, 80, 92), 140), rng.randint(206, 212)
    b.disc(128, 208, 126, 48, (232, 182, 60))
    b.disc(128, 208, 116, 39, tint((196, 226, 240), rng, 6))
    for x in (30, 200):
        b.shape([(x + 12, 190), (x + 24, 190), (x + 8, 222), (x - 4, 222)], WHITE)
    glass, empty = Image.new("L", image.size), image.copy()
    Brush(glass).disc(128, 208, 116, 39, 190)

    def reflect(target: Image.Image) -> None:
        above = (0, 2 * ground - CANVAS, CANVAS, ground)
        standing = ImageChops.difference(target.crop(above), empty.crop(above)).convert("L")
        standing = standing.point(lambda v: 255 * (v > 4)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        seen = ImageChops.multiply(standing, glass.crop((0, ground, CANVAS, CANVAS)))
        target.paste(target.crop(above).transpose(Image.Transpose.FLIP_TOP_BOTTOM), (0, ground), seen)

    return Scene(ground, reflect)


# Water: the subject's lower part is under it


def sea(image: Image.Image, rng: random.Random) -> Scene:
    blue, phases = tint((50, 130, 210), rng), [rng.uniform(0, 6) for _ in range(5)]
    b, x = backdrop(image, (190, 230, 250), blue, 110), rng.choice((rng.uniform(20, 80), rng.uniform(176, 236)))
    b.disc(x, 34, 32, 12, WHITE)  # a cloud
    b.disc(x - 4, 26, 17, 15, WHITE)
    for i in range(3):
        b.waves(112 + 28 * i, shade(blue, (1.25, 1.0, 1.15)[i]), phases[i], 5, 64)

    def front(target: Image.Image) -> None:
        for y, color, phase in ((196, shade(blue, 1.4), 3), (206, blue, 3), (234, shade(blue, 0.82), 4)):
            Brush(target).waves(y, color, phases[phase], 6, 64)

    return Scene(200, front, sunk=rng.uniform(0.08, 0.2))


def milk(image: Image.Image, rng: random.Random) -> Scene:
    cream, phases = (255, 252, 242), [rng.uniform(0, 6) for _ in range(5)]
    b = backdrop(image, tint((250, 176, 150), rng), cream, 130)

    def swell(brush: Brush, y: float, phase: float) -> None:
        brush.waves(y, (232, 216, 196), phase, 10, 104)
        brush.waves(y + 10, cream, phase, 10, 104)

    for i in range(3):
        swell(b, 104 + 30 * i, phases[i])
    for x in (26, 66, 196, 232):  # splashing drops
        y = rng.uniform(40, 84)
        b.shape([(x - 9, y + 4), (x, y - 14), (x + 9, y + 4)], cream)
        b.disc(x, y + 6, 11, 11, cream)

    def front(target: Image.Image) -> None:
        swell(Brush(target), 200, phases[3])
        swell(Brush(target), 230, phases[4])

    return Scene(200, front, sunk=rng.uniform(0.08, 0.2))


def pool(image: Image.Image, rng: random.Random) -> Scene:
    teal, phase, steel = tint((70, 210, 215), rng, 8), rng.uniform(0, 6), (130, 140, 150)
    b, x = backdrop(image, (246, 232, 206), teal, 76), 128 + rng.choice((-1, 1)) * 88
    b.box(0, 62, CANVAS, 94, WHITE)
    for left in range(0, CANVAS, 32):
        b.box(left, 68, left + 16, 88, (40, 110, 190))  # the pool's tiled edge
    b.line([(x - 16, 140), (x - 16, 40), (x + 16, 40), (x + 16, 140)], steel)  # a ladder
    b.line([(x - 16, 112), (x + 16, 112)], steel)

    def rope(brush: Brush, y: float, color: Color = RED) -> None:
        for i in range(8):
            brush.disc(16 + 32 * i, y, 14, 9, (color, WHITE)[i % 2])

    def front(target: Image.Image) -> None:
        brush = Brush(target)
        brush.waves(182, WHITE, phase, 4, 44)
        brush.waves(190, teal, phase, 4, 44)
        rope(brush, 232)

    rope(b, 150)
    return Scene(186, front, sunk=rng.uniform(0.15, 0.28))


SCENES: dict[str, Callable[[Image.Image, random.Random], Scene]] = {
    "in the jungle": places.jungle,
    "in the snow": places.snow,
    "on the beach": places.beach,
    "on a cobblestone street": places.cobblestones,
    "on top of pink fabric": pink_fabric,
    "on top of a wooden floor": wooden_floor,
    "with a city in the background": places.city,
    "with a mountain in the background": places.mountain,
    "with a blue house in the background": places.blue_house,
    "on top of a purple rug in a forest": purple_rug_in_forest,
    "with a wheat field in the background": places.wheat_field,
    "with a tree and autumn leaves in the background": places.autumn_tree,
    "with the Eiffel Tower in the background": places.eiffel_tower,
    "floating on top of water": sea,
    "floating in an ocean of milk": milk,
    "on top of green grass with sunflowers around it": places.sunflowers,
    "on top of a mirror": mirror,
    "on top of the sidewalk in a crowded street": places.crowded_street,
    "on top of a dirt road": places.dirt_road,
    "on top of a white rug": white_rug,
    "with a China Great Wall in the background": places.great_wall,
    "on top of wooden roof": places.wooden_roof,
    "with the Statue of Liberty in the background": places.liberty,
    "with a volcano in the background": places.volcano,
    "on a subway platform": places.subway,
    "on the Moon": places.moon,
    "is swimming in a pool": pool,
}
