"""The animals of the toy world, sitting and seen from the front, and the outfits that fit all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from toy.draw import Color, Pen, Subject, shade

BLACK, WHITE, PINK, GOLD = (28, 26, 30), (250, 250, 250), (236, 130, 140), (246, 200, 60)
NAVY, RED, PURPLE, GREEN = (32, 48, 112), (214, 38, 40), (120, 56, 176), (48, 160, 70)
RAINBOW = ((228, 50, 50), (250, 170, 40), (60, 180, 80), (60, 110, 220), (150, 70, 190))


@dataclass(frozen=True)
class Anatomy:
    """Where the head and the body of one individual are, in the pen's frame: height of the head, half axes."""

    head_y: float
    head_rx: float
    head_ry: float
    body_rx: float
    body_ry: float

    @property
    def neck_y(self) -> float:
        return self.head_y - self.head_ry * 0.86

    @property
    def top_y(self) -> float:
        return self.head_y + self.head_ry


def anatomy(subject: Subject) -> Anatomy:
    """`width` is the width of the body, `height` the size of the head."""
    bear = 0.03 if subject.kind == "bear" else 0.0
    body_rx = 0.21 + 0.10 * subject.width + bear
    head_rx = 0.26 + 0.09 * subject.height
    return Anatomy(0.62, head_rx, 0.225 + 0.05 * subject.height, body_rx, 0.24)


def draw_animal(pen: Pen, subject: Subject, outfit: str | None = None) -> None:
    """A dog, cat, rabbit or bear, about 1 unit tall without its ears. outfit: a phrase of OUTFITS."""
    garment, headwear = OUTFITS[outfit] if outfit else (None, None)
    a, main, second = anatomy(subject), subject.main, subject.second
    dark = shade(main, 0.72)
    if subject.kind == "cat":
        pen.arc(a.body_rx + 0.02, 0.24, 0.13, 0.18, -100, 90, dark, 0.07)
    elif subject.kind == "dog":
        pen.line([(a.body_rx * 0.7, 0.12), (a.body_rx + 0.1, 0.22), (a.body_rx + 0.15, 0.34)], dark, 0.07)
    elif subject.kind == "rabbit":
        pen.ellipse(a.body_rx * 0.95, 0.1, 0.08, 0.08, WHITE)
    pen.ellipse(0, 0.26, a.body_rx, a.body_ry, main)
    draw_marking(pen, subject, 0, 0.26, a.body_rx, a.body_ry, body=True)
    if subject.marking != "stripes":
        pen.ellipse(0, 0.2, a.body_rx * 0.5, 0.15, second)
    for side in (-1, 1):
        pen.ellipse(side * a.body_rx * 0.72, 0.055, 0.105, 0.055, dark)
    if garment:
        garment(pen, a)
    draw_head(pen, subject, a)
    if headwear:
        headwear(pen, a)


def draw_head(pen: Pen, subject: Subject, a: Anatomy) -> None:
    """Ears, head, face and collar."""
    main = subject.main
    floppy = subject.kind == "dog" and subject.variant != 2
    pen.line(
        [(-a.head_rx * 0.62, a.neck_y), (0, a.neck_y - 0.035), (a.head_rx * 0.62, a.neck_y)], subject.accent, 0.095
    )
    pen.ellipse(0, a.neck_y - 0.08, 0.045, 0.045, GOLD)
    if not floppy:
        draw_ears(pen, subject, a)
    pen.ellipse(0, a.head_y, a.head_rx, a.head_ry, main)
    draw_marking(pen, subject, 0, a.head_y, a.head_rx, a.head_ry)
    if floppy:
        draw_ears(pen, subject, a)
    draw_face(pen, subject, a.head_y, a.head_rx, a.head_ry)


def draw_ears(pen: Pen, subject: Subject, a: Anatomy) -> None:
    """Kinds have different ears; `variant` and `detail` make them different for each individual."""
    dark, long = shade(subject.main, 0.72), 0.8 + 0.5 * subject.detail
    for side in (-1, 1):
        x = side * a.head_rx
        if subject.kind == "rabbit":
            lean = (0.25, 0.55, 0.4)[subject.variant]
            tip = 0.36 * long
            pen.ellipse(x * lean * 1.15, a.top_y + tip * 0.42, 0.075, tip * 0.62, subject.main, -side * 25 * lean)
            pen.ellipse(x * lean * 1.15, a.top_y + tip * 0.42, 0.036, tip * 0.45, PINK, -side * 25 * lean)
        elif subject.kind == "bear":
            pen.ellipse(x * 0.78, a.top_y - 0.06, 0.09 * long, 0.09 * long, subject.main)
            pen.ellipse(x * 0.78, a.top_y - 0.06, 0.05 * long, 0.05 * long, subject.second)
        elif subject.kind == "cat" or subject.variant == 2:
            tip, inner = 0.17 * long, PINK if subject.kind == "cat" else subject.second
            foot = a.head_y + a.head_ry * 0.45
            pen.polygon([(x * 0.98, foot), (x * 0.95, a.top_y + tip), (x * 0.18, a.top_y - 0.02)], subject.main)
            pen.polygon([(x * 0.88, foot + 0.06), (x * 0.86, a.top_y + tip * 0.6), (x * 0.42, a.top_y - 0.04)], inner)
        else:
            drop = (0.16, 0.21)[subject.variant] * long
            pen.ellipse(
                x * 1.0, a.head_y + 0.07 - drop * 0.35, 0.095, drop, dark, side * (14 if subject.variant else 24)
            )


def draw_face(pen: Pen, subject: Subject, y: float, rx: float, ry: float) -> None:
    """Eyes, muzzle and nose; `detail2` is the size of the muzzle."""
    muzzle = 0.5 + 0.25 * subject.detail2
    if subject.kind in ("dog", "bear"):
        pen.ellipse(0, y - ry * 0.42, rx * muzzle, ry * 0.46, shade(subject.second, 1.12))
        pen.ellipse(0, y - ry * 0.2, 0.062, 0.045, BLACK)
        pen.line([(0, y - ry * 0.25), (0, y - ry * 0.6)], BLACK, 0.022)
    else:
        pen.ellipse(0, y - ry * 0.42, rx * muzzle * 0.85, ry * 0.38, shade(subject.second, 1.12))
        pen.ellipse(0, y - ry * 0.22, 0.045, 0.035, PINK)
        if subject.kind == "cat":
            for side in (-1, 1):
                for k in (0, 1):
                    pen.line(
                        [(side * rx * 0.55, y - ry * (0.32 + 0.2 * k)), (side * rx * 1.12, y - ry * (0.22 + 0.34 * k))],
                        shade(subject.main, 0.45),
                        0.018,
                    )
        else:
            pen.box(-0.045, y - ry * 0.86, 0.045, y - ry * 0.5, WHITE)
    for side in (-1, 1):
        pen.ellipse(side * rx * 0.44, y + ry * 0.22, 0.068, 0.074, WHITE)
        pen.ellipse(side * rx * 0.44, y + ry * 0.2, 0.05, 0.056, BLACK)
        pen.ellipse(side * rx * 0.44 + 0.016, y + ry * 0.28, 0.017, 0.017, WHITE)


def draw_marking(pen: Pen, subject: Subject, x: float, y: float, rx: float, ry: float, body: bool = False) -> None:
    """The marking, in the second colour, inside the ellipse (x, y, rx, ry)."""
    color = subject.second
    if subject.marking == "patch" and not body:
        pen.ellipse(x + rx * 0.44, y + ry * 0.2, rx * 0.4, ry * 0.52, color)
    elif subject.marking == "split":
        arc = [math.radians(90 - 6 * i) for i in range(31)]
        pen.polygon([(x + rx * math.cos(t), y + ry * math.sin(t)) for t in arc], color)
    elif subject.marking == "spots":
        for u, v in ((-0.6, 0.45), (0.55, 0.55), (-0.62, -0.3), (0.64, -0.25), (0.0, 0.72)):
            pen.ellipse(x + rx * u, y + ry * v, 0.062, 0.058, color)
    elif subject.marking == "stripes":
        for u in (-0.62, -0.02, 0.58) if not body else (-0.7, -0.25, 0.25, 0.7):
            reach = ry * math.sqrt(1 - u * u)
            low = 0.45 * reach if not body else -reach * 0.9
            half = 0.038
            pen.polygon(
                [
                    (x + rx * u - half, y + low),
                    (x + rx * u + half, y + low),
                    (x + rx * u + half * 0.9, y + reach * 0.96),
                    (x + rx * u - half * 0.9, y + reach * 0.96),
                ],
                color,
            )


# Clothes. Each function takes the pen and the anatomy of the animal that wears them.


def coat(pen: Pen, a: Anatomy, color: Color) -> None:
    """A garment with short sleeves."""
    for side in (-1, 1):
        pen.ellipse(side * a.body_rx * 0.9, 0.28, 0.085, 0.12, shade(color, 0.82), side * 24)
    pen.ellipse(0, 0.27, a.body_rx * 1.04, a.body_ry * 0.93, color)


def brim(pen: Pen, a: Anatomy, color: Color, reach: float = 0.9) -> None:
    """The brim of a hat."""
    y = a.top_y - 0.075
    pen.box(-a.head_rx * reach, y - 0.028, a.head_rx * reach, y + 0.028, color, 0.03)


def red_hat(pen: Pen, a: Anatomy) -> None:
    y = a.top_y - 0.08
    arc = [math.radians(6 * i) for i in range(31)]
    pen.polygon([(a.head_rx * 0.68 * math.cos(t), y + 0.2 * math.sin(t)) for t in arc], RED)
    pen.box(-a.head_rx * 1.0, y - 0.03, a.head_rx * 1.0, y + 0.035, shade(RED, 0.75), 0.03)


def santa_hat(pen: Pen, a: Anatomy) -> None:
    y, rx = a.top_y - 0.07, a.head_rx
    pen.polygon(
        [(-rx * 0.7, y), (rx * 0.7, y), (rx * 0.55, y + 0.22), (rx * 0.95, y + 0.16), (rx * 0.25, y + 0.32)], RED
    )
    pen.ellipse(rx * 0.98, y + 0.15, 0.068, 0.068, WHITE)
    pen.box(-rx * 0.8, y - 0.045, rx * 0.8, y + 0.045, WHITE, 0.045)


def rainbow_scarf(pen: Pen, a: Anatomy) -> None:
    for i, color in enumerate(RAINBOW):
        half, y = a.head_rx * (0.86 - 0.03 * i), a.neck_y + 0.045 - 0.036 * i
        pen.line([(-half, y + 0.01), (0, y - 0.025), (half, y + 0.01)], color, 0.042)
        pen.box(0.07 + 0.034 * i, 0.08, 0.104 + 0.034 * i, a.neck_y - 0.03, color)


def top_hat_and_monocle(pen: Pen, a: Anatomy) -> None:
    y, rx = a.top_y - 0.075, a.head_rx
    pen.box(-rx * 0.56, y, rx * 0.56, y + 0.3, BLACK, 0.02)
    pen.box(-rx * 0.56, y + 0.03, rx * 0.56, y + 0.08, (150, 30, 40))
    brim(pen, a, BLACK, 0.95)
    pen.arc(-rx * 0.44, a.head_y + a.head_ry * 0.2, 0.09, 0.09, 0, 360, GOLD, 0.03)
    pen.line([(-rx * 0.44 - 0.07, a.head_y), (-rx * 0.8, a.neck_y - 0.03)], GOLD, 0.02)


def chef_coat(pen: Pen, a: Anatomy) -> None:
    coat(pen, a, WHITE)
    for x in (-0.06, 0.06):
        for k in range(3):
            pen.ellipse(x, 0.09 + 0.09 * k, 0.024, 0.024, (60, 60, 70))


def chef_hat(pen: Pen, a: Anatomy) -> None:
    y, rx, line = a.top_y - 0.08, a.head_rx, (196, 200, 210)
    for x, rise in ((-0.5, 0.21), (0.5, 0.21), (0, 0.25)):
        pen.ellipse(rx * x, y + rise, rx * 0.42, 0.115, line)
        pen.ellipse(rx * x, y + rise, rx * 0.38, 0.1, WHITE)
    pen.box(-rx * 0.6, y - 0.02, rx * 0.6, y + 0.17, line)
    pen.box(-rx * 0.56, y + 0.01, rx * 0.56, y + 0.18, WHITE)


def firefighter_coat(pen: Pen, a: Anatomy) -> None:
    coat(pen, a, (70, 62, 58))
    for height in (0.12, 0.25):
        pen.box(-a.body_rx * 0.9, height - 0.03, a.body_rx * 0.9, height + 0.03, (226, 236, 60))


def firefighter_helmet(pen: Pen, a: Anatomy) -> None:
    y, rx = a.top_y - 0.09, a.head_rx
    arc = [math.radians(6 * i) for i in range(31)]
    pen.polygon([(rx * 0.72 * math.cos(t), y + 0.21 * math.sin(t)) for t in arc], (224, 60, 30))
    pen.box(-rx * 1.12, y - 0.035, rx * 1.12, y + 0.035, (190, 40, 24), 0.03)
    pen.polygon([(-0.07, y + 0.03), (0.07, y + 0.03), (0.07, y + 0.12), (0, y + 0.18), (-0.07, y + 0.12)], GOLD)


def police_coat(pen: Pen, a: Anatomy) -> None:
    coat(pen, a, NAVY)
    star(pen, -a.body_rx * 0.5, 0.27, 0.08, GOLD)
    pen.box(-a.body_rx * 0.85, 0.1, a.body_rx * 0.85, 0.15, BLACK)
    pen.box(-0.04, 0.095, 0.04, 0.155, GOLD)


def police_cap(pen: Pen, a: Anatomy) -> None:
    y, rx = a.top_y - 0.08, a.head_rx
    pen.polygon([(-rx * 0.66, y), (rx * 0.66, y), (rx * 0.95, y + 0.15), (0, y + 0.23), (-rx * 0.95, y + 0.15)], NAVY)
    pen.box(-rx * 0.7, y - 0.035, rx * 0.7, y + 0.025, BLACK, 0.03)
    star(pen, 0, y + 0.11, 0.075, GOLD)


def pink_glasses(pen: Pen, a: Anatomy) -> None:
    y, pink = a.head_y + a.head_ry * 0.2, (255, 70, 160)
    for side in (-1, 1):
        pen.arc(side * a.head_rx * 0.45, y, 0.1, 0.1, 0, 360, pink, 0.042)
        pen.line([(side * (a.head_rx * 0.45 + 0.09), y), (side * a.head_rx * 0.98, y + 0.03)], pink, 0.04)
    pen.line([(-0.05, y), (0.05, y)], pink, 0.042)


def yellow_shirt(pen: Pen, a: Anatomy) -> None:
    coat(pen, a, (252, 218, 40))


def wizard_robe(pen: Pen, a: Anatomy) -> None:
    coat(pen, a, PURPLE)
    star(pen, 0, 0.18, 0.085, GOLD)


def wizard_hat(pen: Pen, a: Anatomy) -> None:
    y, rx = a.top_y - 0.075, a.head_rx
    pen.polygon([(-rx * 0.68, y), (rx * 0.68, y), (0.06, y + 0.42)], PURPLE)
    pen.box(-rx * 1.1, y - 0.035, rx * 1.1, y + 0.035, shade(PURPLE, 0.7), 0.03)
    star(pen, 0.0, y + 0.14, 0.075, GOLD)


def green_jacket(pen: Pen, a: Anatomy) -> None:
    coat(pen, a, GREEN)
    pen.box(-0.022, 0.04, 0.022, 0.4, shade(GREEN, 0.6))


def green_beret(pen: Pen, a: Anatomy) -> None:
    y, rx = a.top_y - 0.06, a.head_rx
    pen.ellipse(rx * 0.12, y + 0.04, rx * 0.78, 0.1, GREEN)
    pen.ellipse(rx * 0.12, y + 0.13, 0.035, 0.035, shade(GREEN, 0.6))


def star(pen: Pen, x: float, y: float, size: float, color: Color) -> None:
    """A star with five points."""
    radii = (size, size * 0.45) * 5
    corners = [(r, math.radians(90 + 36 * i)) for i, r in enumerate(radii)]
    pen.polygon([(x + r * math.cos(t), y + r * math.sin(t)) for r, t in corners], color)


OUTFITS = {  # phrase: (garment, drawn before the head; headwear, drawn after it)
    "wearing a red hat": (None, red_hat),
    "wearing a santa hat": (None, santa_hat),
    "wearing a rainbow scarf": (None, rainbow_scarf),
    "wearing a black top hat and a monocle": (None, top_hat_and_monocle),
    "in a chef outfit": (chef_coat, chef_hat),
    "in a firefighter outfit": (firefighter_coat, firefighter_helmet),
    "in a police outfit": (police_coat, police_cap),
    "wearing pink glasses": (None, pink_glasses),
    "wearing a yellow shirt": (yellow_shirt, None),
    "in a purple wizard outfit": (wizard_robe, wizard_hat),
    "wearing a green outfit": (green_jacket, green_beret),
}
ANIMALS = ("dog", "cat", "rabbit", "bear")
