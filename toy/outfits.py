"""Clothes that fit any of the animals: DreamBench's ten, and those of the paper's figure on outfits.

Each function draws one garment on an animal of the given anatomy, in the pen's frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from toy.draw import (
    BLACK,
    BLUE,
    GOLD,
    GREEN,
    NAVY,
    PURPLE,
    RED,
    WHITE,
    Color,
    Outline,
    Pen,
    oval,
    part,
    slab,
    star,
)

RAINBOW = ((228, 50, 50), (250, 170, 40), (60, 180, 80), (60, 110, 220))


class Ellipse(NamedTuple):
    """An ellipse of the body: its centre and half axes."""

    x: float
    y: float
    rx: float
    ry: float


class Anatomy(NamedTuple):
    """Where the head and the body of one individual are."""

    head: Ellipse
    body: Ellipse

    @property
    def neck(self) -> float:
        return self.head.y - self.head.ry * 0.86

    @property
    def crown(self) -> float:
        """Where a hat sits."""
        return self.head.y + self.head.ry * 0.68


class Outfit(NamedTuple):
    behind: Callable[[Pen, Anatomy], None] | None = None
    body: Callable[[Pen, Anatomy], None] | None = None
    head: Callable[[Pen, Anatomy], None] | None = None


def collar(pen: Pen, a: Anatomy, color: Color, tag: bool = True) -> None:
    w, y = a.head.rx * 0.66, a.neck - 0.03
    pen.line([(-w, y + 0.02), (0, y - 0.04), (w, y + 0.02)], color, 0.12)
    if tag:
        pen.ellipse(0, y - 0.1, 0.055, 0.055, GOLD)


# On the body


def jacket(pen: Pen, a: Anatomy, color: Color) -> None:
    """A garment over the body, with short sleeves."""
    x, y, rx, ry = a.body
    sleeves = (oval(side * rx * 0.95, y + 0.04, 0.08, 0.12, turn=side * 24) for side in (-1, 1))
    part(pen, color, oval(x, y + 0.01, rx * 1.06, ry * 0.9), *sleeves)


def cross(pen: Pen, x: float, y: float, size: float, color: Color) -> None:
    pen.box(x - size, y - size / 3, x + size, y + size / 3, color)
    pen.box(x - size / 3, y - size, x + size / 3, y + size, color)


def chef_coat(pen: Pen, a: Anatomy) -> None:
    jacket(pen, a, WHITE)
    for x in (-0.075, 0.075):
        for y in (0.12, 0.24):
            pen.ellipse(x, y, 0.035, 0.035, (70, 70, 84))


def firefighter_coat(pen: Pen, a: Anatomy) -> None:
    jacket(pen, a, (80, 66, 56))
    for y in (0.11, 0.27):
        pen.box(-a.body.rx * 0.92, y - 0.04, a.body.rx * 0.92, y + 0.04, (232, 240, 70))


def police_coat(pen: Pen, a: Anatomy) -> None:
    jacket(pen, a, NAVY)
    pen.polygon(star(-a.body.rx * 0.5, 0.29, 0.1), GOLD)
    pen.box(-a.body.rx * 0.9, 0.08, a.body.rx * 0.9, 0.16, BLACK)
    pen.box(-0.06, 0.07, 0.06, 0.17, GOLD)


def nurse_dress(pen: Pen, a: Anatomy) -> None:
    jacket(pen, a, (150, 216, 232))
    pen.box(-a.body.rx * 0.6, 0.04, a.body.rx * 0.6, 0.33, WHITE, 0.06)
    cross(pen, 0, 0.2, 0.1, RED)


def hero_suit(pen: Pen, a: Anatomy) -> None:
    jacket(pen, a, BLUE)
    part(pen, GOLD, [(-0.14, 0.33), (0.14, 0.33), (0, 0.12)])
    pen.ellipse(0, 0.26, 0.05, 0.05, RED)


def cape(pen: Pen, a: Anatomy) -> None:
    part(pen, RED, [(-0.3, a.neck), (0.3, a.neck), (a.body.rx + 0.24, 0.02), (-a.body.rx - 0.24, 0.02)])


def wings(pen: Pen, a: Anatomy) -> None:
    """Three feathers a side, and a halo."""
    for side in (-1, 1):
        x, y = side * (a.body.rx + 0.12), 0.36
        feathers = ((0.05, 0.06, 0.24, 40), (0.04, -0.04, 0.2, 15), (-0.02, -0.12, 0.16, -15))
        part(pen, WHITE, *(oval(x + side * dx, y + dy, r, 0.085, turn=side * t) for dx, dy, r, t in feathers))


def halo(pen: Pen, a: Anatomy) -> None:
    pen.line(oval(0, a.crown + 0.2, 0.2, 0.06), GOLD, 0.05)


def scarf(pen: Pen, a: Anatomy) -> None:
    w, y = a.head.rx * 0.85, a.neck
    for i, color in enumerate(RAINBOW):
        pen.line([(-w, y + 0.05 - 0.05 * i), (0, y - 0.05 * i), (w, y + 0.05 - 0.05 * i)], color, 0.055)
        pen.box(0.05 + 0.05 * i, 0.06, 0.1 + 0.05 * i, y - 0.12, color)


def robe(pen: Pen, a: Anatomy, color: Color, badge: Color) -> None:
    jacket(pen, a, color)
    pen.polygon(star(0, 0.19, 0.12), badge)


# On the head


def brim(pen: Pen, a: Anatomy, color: Color, reach: float = 1.0) -> None:
    part(pen, color, slab(-a.head.rx * reach, a.crown - 0.04, a.head.rx * reach, a.crown + 0.04, 0.04))


def dome(a: Anatomy, height: float = 0.22, width: float = 0.72) -> Outline:
    return oval(0, a.crown, a.head.rx * width, height, 0, 180)


def red_hat(pen: Pen, a: Anatomy) -> None:
    part(pen, RED, dome(a))
    brim(pen, a, (190, 30, 36), 1.05)


def santa_hat(pen: Pen, a: Anatomy) -> None:
    y, rx = a.crown, a.head.rx
    bent = [(-rx * 0.72, y), (rx * 0.72, y), (rx * 0.7, y + 0.16), (rx * 1.0, y + 0.16), (rx * 0.25, y + 0.3)]
    part(pen, RED, bent)
    part(pen, WHITE, oval(rx * 1.02, y + 0.13, 0.075, 0.075))
    part(pen, WHITE, slab(-rx * 0.8, y - 0.05, rx * 0.8, y + 0.05, 0.05))


def top_hat_and_monocle(pen: Pen, a: Anatomy) -> None:
    y, rx = a.crown, a.head.rx
    part(pen, BLACK, slab(-rx * 0.58, y, rx * 0.58, y + 0.3, 0.02))
    pen.box(-rx * 0.58, y + 0.05, rx * 0.58, y + 0.13, (190, 40, 50))
    brim(pen, a, BLACK)
    eye = (-rx * 0.44, a.head.y + a.head.ry * 0.22)
    pen.line(oval(*eye, 0.1, 0.1), GOLD, 0.04)
    pen.line([(eye[0] - 0.08, eye[1] - 0.05), (-rx * 0.85, a.neck)], GOLD, 0.035)


def chef_hat(pen: Pen, a: Anatomy) -> None:
    y, rx = a.crown, a.head.rx
    puffs = (oval(rx * x, y + rise, rx * 0.42, 0.11) for x, rise in ((-0.5, 0.2), (0.5, 0.2), (0, 0.25)))
    part(pen, WHITE, slab(-rx * 0.6, y - 0.03, rx * 0.6, y + 0.2, 0.02), *puffs)


def helmet(pen: Pen, a: Anatomy) -> None:
    part(pen, (232, 70, 30), dome(a, 0.24, 0.78))
    brim(pen, a, (200, 46, 24), 1.12)
    x, y = 0.08, a.crown
    part(pen, GOLD, [(-x, y + 0.05), (x, y + 0.05), (x, y + 0.14), (0, y + 0.2), (-x, y + 0.14)])


def police_cap(pen: Pen, a: Anatomy) -> None:
    y, rx = a.crown, a.head.rx
    part(pen, NAVY, [(-rx * 0.7, y), (rx * 0.7, y), (rx * 1.0, y + 0.15), (0, y + 0.22), (-rx * 1.0, y + 0.15)])
    brim(pen, a, BLACK, 0.75)
    pen.polygon(star(0, y + 0.12, 0.09), GOLD)


def nurse_cap(pen: Pen, a: Anatomy) -> None:
    y, rx = a.crown, a.head.rx
    part(pen, WHITE, [(-rx * 0.6, y - 0.04), (rx * 0.6, y - 0.04), (rx * 0.75, y + 0.17), (-rx * 0.75, y + 0.17)])
    cross(pen, 0, y + 0.07, 0.08, RED)


def hero_mask(pen: Pen, a: Anatomy) -> None:
    """A band over the brow with holes for the eyes."""
    y, rx = a.head.y + a.head.ry * 0.22, a.head.rx
    pen.box(-rx * 0.98, y - 0.1, rx * 0.98, y + 0.1, RED, 0.08)
    for side in (-1, 1):
        pen.ellipse(side * rx * 0.44, y, 0.075, 0.065, WHITE)
        pen.ellipse(side * rx * 0.44, y, 0.045, 0.05, BLACK)


def pink_glasses(pen: Pen, a: Anatomy) -> None:
    y, pink = a.head.y + a.head.ry * 0.22, (255, 60, 160)
    pen.line([(-a.head.rx, y + 0.03), (a.head.rx, y + 0.03)], pink, 0.045)
    for side in (-1, 1):
        pen.ellipse(side * a.head.rx * 0.46, y, 0.125, 0.115, pink)
        pen.ellipse(side * a.head.rx * 0.46, y, 0.08, 0.07, WHITE)
        pen.ellipse(side * a.head.rx * 0.46, y, 0.05, 0.055, BLACK)


def pointed_hat(pen: Pen, a: Anatomy, color: Color, badge: Callable[[Pen, float], None]) -> None:
    y, rx = a.crown, a.head.rx
    part(pen, color, [(-rx * 0.7, y), (rx * 0.7, y), (0.06, y + 0.36)])
    badge(pen, y)
    brim(pen, a, color, 1.15)


def wizard_hat(pen: Pen, a: Anatomy) -> None:
    pointed_hat(pen, a, PURPLE, lambda pen, y: pen.polygon(star(0, y + 0.14, 0.1), GOLD))


def witch_hat(pen: Pen, a: Anatomy) -> None:
    pointed_hat(pen, a, BLACK, lambda pen, y: pen.box(-0.19, y + 0.04, 0.19, y + 0.13, (250, 130, 30)))


def beret(pen: Pen, a: Anatomy) -> None:
    part(pen, GREEN, oval(0.04, a.crown + 0.05, a.head.rx * 0.8, 0.11), oval(0.05, a.crown + 0.16, 0.03, 0.03))


def green_jacket(pen: Pen, a: Anatomy) -> None:
    jacket(pen, a, GREEN)
    pen.box(-0.03, 0.05, 0.03, 0.42, (26, 90, 40))


CHEF, POLICE = Outfit(None, chef_coat, chef_hat), Outfit(None, police_coat, police_cap)
FIREFIGHTER = Outfit(None, firefighter_coat, helmet)
OUTFITS = {
    "wearing a red hat": Outfit(head=red_hat),
    "wearing a santa hat": Outfit(head=santa_hat),
    "wearing a rainbow scarf": Outfit(body=scarf),
    "wearing a black top hat and a monocle": Outfit(head=top_hat_and_monocle),
    "in a chef outfit": CHEF,
    "in a firefighter outfit": FIREFIGHTER,
    "in a police outfit": POLICE,
    "wearing pink glasses": Outfit(head=pink_glasses),
    "wearing a yellow shirt": Outfit(body=lambda pen, a: jacket(pen, a, (252, 218, 40))),
    "in a purple wizard outfit": Outfit(None, lambda pen, a: robe(pen, a, PURPLE, GOLD), wizard_hat),
    "wearing a green outfit": Outfit(None, green_jacket, beret),
    "wearing a chef outfit": CHEF,
    "wearing a firefighter outfit": FIREFIGHTER,
    "wearing a police outfit": POLICE,
    "wearing a nurse outfit": Outfit(None, nurse_dress, nurse_cap),
    "wearing a superhero outfit": Outfit(cape, hero_suit, hero_mask),
    "wearing a witch outfit": Outfit(None, lambda pen, a: robe(pen, a, BLACK, (250, 130, 30)), witch_hat),
    "wearing angel wings": Outfit(wings, None, halo),
}
