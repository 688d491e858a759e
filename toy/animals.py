"""The living subjects: a dog, cat, rabbit or bear from the front, the side or the back, in any mood, or crossed.

Ears tell the kinds apart; colours, marking, collar, the ears' shape and the proportions tell individuals apart.
The phrases are those of the paper's figures on expressions, views and hybrids.
"""

from __future__ import annotations

from typing import NamedTuple

from toy.draw import BLACK, GOLD, PINK, WHITE, Color, Pen, Subject, coat, oval, part, shade, slab, star, tube
from toy.outfits import OUTFITS, Anatomy, Ellipse, collar

ANIMALS = ("dog", "cat", "rabbit", "bear")
MOODS = ("depressed", "joyous", "sleepy", "screaming")
VIEWS = ("back view", "side view", "looking up at the camera", "looking down at the camera")
GAZE = {"looking up at the camera": 0.38, "looking down at the camera": -0.3}  # how far the face moves, of half a head


class Cross(NamedTuple):
    """What a hybrid has of the other animal."""

    ear: Color
    muzzle: Color
    mane: Color | None = None
    eye_patch: Color | None = None
    nose: float = 1.0


CROSSES = {
    "bear": Cross((120, 76, 44), (222, 180, 130)),
    "koala": Cross((150, 156, 170), (216, 218, 226), nose=2.0),
    "lion": Cross((214, 150, 60), (250, 226, 170), mane=(176, 92, 30)),
    "panda": Cross(BLACK, WHITE, eye_patch=BLACK),
}


def anatomy(s: Subject) -> Anatomy:
    """A sitting animal, 0.9 to 1 unit tall without its ears."""
    wide = 0.03 if s.kind == "bear" else 0.0
    head = Ellipse(0, 0.63, 0.29 + 0.07 * s.height, 0.24 + 0.04 * s.detail2)
    return Anatomy(head, Ellipse(0, 0.25, 0.22 + 0.1 * s.width + wide, 0.25))


def draw_animal(
    pen: Pen,
    s: Subject,
    outfit: str | None = None,
    mood: str | None = None,
    view: str | None = None,
    cross: str | None = None,
) -> None:
    """One animal sitting, with at most one of OUTFITS, MOODS, VIEWS and CROSSES."""
    if view == "side view":
        draw_from_the_side(pen, s)
        return
    a, other, back = anatomy(s), CROSSES.get(cross), view == "back view"
    clothes = OUTFITS.get(outfit)
    if clothes and clothes.behind:
        clothes.behind(pen, a)
    if not back:
        draw_tail(pen, s, a.body.rx * 0.8)
    coat(pen, s, oval(*a.body))
    if not back and s.marking in ("plain", "patch"):
        pen.ellipse(0, 0.2, a.body.rx * 0.55, 0.16, s.second)
    for side in (-1, 1):
        part(pen, other.ear if other and other.eye_patch else shade(s.main, 0.85), oval(side * 0.16, 0.05, 0.1, 0.055))
    if back:
        draw_tail(pen, s, 0)
    if clothes and clothes.body:
        clothes.body(pen, a)
    else:
        collar(pen, a, s.accent, tag=not back)
    draw_head(pen, s, a.head, mood, GAZE.get(view, 0.0), other, back)
    if clothes and clothes.head:
        clothes.head(pen, a)


def draw_tail(pen: Pen, s: Subject, x: float) -> None:
    color = shade(s.main, 0.85)
    if s.kind == "cat":
        tube(pen, color, oval(x + 0.06, 0.24, 0.15, 0.19, -90, 100), 0.075)
    elif s.kind == "dog":
        tube(pen, color, [(x, 0.12), (x + 0.14, 0.2), (x + 0.17, 0.36)], 0.085)
    else:
        part(pen, WHITE if s.kind == "rabbit" else color, oval(x, 0.13, 0.1, 0.1))


def draw_head(
    pen: Pen,
    s: Subject,
    head: Ellipse,
    mood: str | None = None,
    gaze: float = 0.0,
    other: Cross | None = None,
    back: bool = False,
) -> None:
    """Mane, ears, skull and face; `gaze` is how far the face looks up (> 0) or down."""
    if other and other.mane:
        scallops = (oval(head.x, head.y, head.rx, head.ry, a, a + 1)[0] for a in range(0, 360, 30))
        part(pen, other.mane, *(oval(x, y, 0.13, 0.13) for x, y in scallops))
    floppy = s.kind == "dog" and s.variant != 2 and not other
    if not floppy:
        draw_ears(pen, s, head, other)
    coat(pen, s, oval(*head), marking="plain" if other and other.eye_patch else None)
    if floppy:
        draw_ears(pen, s, head, other)
    if not back:
        draw_face(pen, s, Ellipse(head.x, head.y + gaze * head.ry, head.rx, head.ry), mood, gaze, other)


def draw_ears(pen: Pen, s: Subject, head: Ellipse, other: Cross | None = None, sides: tuple = (-1, 1)) -> None:
    """Two ears, or from the side one; `variant` and `detail` make them long or short, upright or hanging."""
    x, y, rx, ry = head
    long = 0.75 + 0.5 * s.detail
    for side in sides:
        u, top = x + side * rx, y + ry
        if other:  # the round ears of the other animal
            size = 0.17 if other.nose > 1 else 0.115
            part(pen, other.ear, oval(u * 0.85, top - 0.08, size, size))
            pen.ellipse(u * 0.85, top - 0.08, size * 0.5, size * 0.5, shade(other.ear, 1.5))
        elif s.kind == "rabbit":
            lean, tip = (8, 30, 18)[s.variant], 0.17 * long
            u = x + side * rx * (0.4, 0.62, 0.5)[s.variant]
            part(pen, s.main, oval(u, top + tip * 0.7, 0.085, tip, turn=-side * lean))
            pen.ellipse(u, top + tip * 0.7, 0.042, tip * 0.72, PINK, -side * lean)
        elif s.kind == "bear":
            part(pen, s.main, oval(x + 0.8 * side * rx, top - 0.06, 0.115 * long, 0.115 * long))
            pen.ellipse(x + 0.8 * side * rx, top - 0.06, 0.06 * long, 0.06 * long, s.second)
        elif s.kind == "cat" or s.variant == 2:
            u, tip, foot = side * rx, top + 0.17 * long, y + ry * 0.35
            part(pen, s.main, [(x + u * 0.98, foot), (x + u * 0.92, tip), (x + u * 0.15, top - 0.03)])
            inner = PINK if s.kind == "cat" else s.second
            pen.polygon([(x + u * 0.84, foot + 0.07), (x + u * 0.83, tip - 0.07), (x + u * 0.45, top - 0.05)], inner)
        else:
            drop, lean = (0.15, 0.22)[s.variant] * long, (40, 14)[s.variant]
            color = s.second if s.marking in ("spots", "patch") else shade(s.main, 0.7)
            part(pen, color, oval(x + side * rx, y + 0.1 - drop * 0.4, 0.095, drop, turn=side * lean))


def draw_face(pen: Pen, s: Subject, head: Ellipse, mood: str | None, gaze: float, other: Cross | None) -> None:
    """Muzzle, nose, eyes and mouth."""
    x, y, rx, ry = head
    broad = s.kind in ("dog", "bear")
    muzzle = other.muzzle if other else shade(s.second, 1.12)
    pen.ellipse(x, y - ry * 0.45, rx * (0.6 if broad else 0.5), ry * (0.46 if broad else 0.38), muzzle)
    for side in (-1, 1):
        if other and other.eye_patch:
            pen.ellipse(x + side * rx * 0.46, y + ry * 0.16, 0.11, 0.14, other.eye_patch, side * -30)
        if s.kind == "cat":  # whiskers
            for drop in (0.28, 0.62):
                start, end = (x + side * rx * 0.6, y - ry * drop), (x + side * rx * 1.25, y - ry * (1.5 * drop - 0.15))
                pen.line([start, end], shade(s.main, 0.4) if sum(s.main) > 300 else WHITE)
    draw_mouth(pen, s, x, y - ry * 0.52, mood)
    size = other.nose if other else 1.0
    nose = PINK if s.kind in ("cat", "rabbit") and not other else BLACK
    pen.ellipse(x, y - ry * 0.2, 0.06, 0.045 * size, nose)
    for side in (-1, 1):
        draw_eye(pen, x + side * rx * 0.44, y + ry * 0.22, side, mood, 0.02 if gaze > 0 else -0.02 if gaze < 0 else 0)


def draw_eye(pen: Pen, x: float, y: float, side: int, mood: str | None, lift: float) -> None:
    if mood in ("joyous", "sleepy"):  # closed: an arch, or a hanging lid
        pen.ellipse(x, y, 0.085, 0.08, WHITE)
        arch = oval(x, y - 0.03, 0.06, 0.06, 0, 180) if mood == "joyous" else oval(x, y + 0.02, 0.065, 0.05, 180, 360)
        pen.line(arch, BLACK, 0.045)
        return
    wide = 0.1 if mood == "screaming" else 0.08
    pen.ellipse(x, y, wide, wide, WHITE)
    pupil, fall = (0.035, 0) if mood == "screaming" else (0.055, -0.02 if mood == "depressed" else lift)
    pen.ellipse(x, y + fall, pupil, pupil, BLACK)
    if mood is None:
        pen.ellipse(x + 0.022, y + fall + 0.022, 0.022, 0.022, WHITE)
    if mood == "depressed":  # a brow that falls outwards, and a tear
        pen.line([(x - side * 0.06, y + 0.12), (x + side * 0.1, y + 0.06)], BLACK, 0.045)
        pen.ellipse(x + side * 0.05, y - 0.13, 0.04, 0.055, (90, 180, 255))


def draw_mouth(pen: Pen, s: Subject, x: float, y: float, mood: str | None) -> None:
    if mood == "joyous":
        pen.polygon(oval(x, y + 0.02, 0.14, 0.12, 180, 360), (120, 20, 40))
        pen.ellipse(x, y - 0.06, 0.065, 0.035, PINK)
    elif mood == "screaming":
        pen.ellipse(x, y - 0.04, 0.105, 0.13, (120, 20, 40))
        pen.ellipse(x, y - 0.11, 0.06, 0.045, PINK)
    elif mood == "depressed":
        pen.line(oval(x, y - 0.06, 0.075, 0.06, 20, 160), BLACK, 0.04)
    elif mood == "sleepy":
        pen.ellipse(x, y - 0.03, 0.045, 0.045, (120, 20, 40))
    elif s.kind == "rabbit":
        pen.box(x - 0.05, y - 0.07, x + 0.05, y + 0.03, WHITE)
    else:
        pen.line([(x, y + 0.04), (x, y - 0.03)], BLACK)
        pen.line(oval(x, y - 0.01, 0.07, 0.045, 200, 340), BLACK)


def draw_from_the_side(pen: Pen, s: Subject) -> None:
    """Standing, looking right."""
    head = Ellipse(0.3, 0.66, 0.23, 0.21 + 0.02 * s.detail2)
    low = 0.34 - 0.05 * s.width
    if s.kind == "rabbit" or s.kind == "bear":
        part(pen, WHITE if s.kind == "rabbit" else s.main, oval(-0.44, 0.44, 0.09, 0.09))
    else:
        reach = (-0.2, 0.3) if s.kind == "dog" else (-0.22, 0.42)
        tube(pen, shade(s.main, 0.85), [(-0.32, 0.45), (-0.45, 0.5), (-0.35 + reach[0], 0.45 + reach[1])], 0.085)
    for x in (-0.28, 0.2):
        tube(pen, shade(s.main, 0.75), [(x + 0.1, 0.3), (x + 0.1, 0.07)], 0.1)
    for x in (-0.3, 0.18):
        tube(pen, s.main, [(x, 0.3), (x, 0.05)], 0.11)
    coat(pen, s, oval(-0.06, 0.16 + low / 2 + 0.06, 0.36, low / 2 + 0.05))
    tube(pen, s.accent, [(0.12, 0.53), (0.32, 0.4)], 0.07)
    behind = s.kind != "dog" or s.variant == 2
    if behind:
        draw_ears(pen, s, head, sides=(-0.3,))
    muzzle = 0.13 if s.kind == "dog" else 0.09
    coat(pen, s, oval(*head))
    part(pen, shade(s.second, 1.12), oval(head.x + 0.2, head.y - 0.08, muzzle, 0.085))
    pen.ellipse(head.x + 0.19 + muzzle, head.y - 0.05, 0.05, 0.045, PINK if s.kind in ("cat", "rabbit") else BLACK)
    if not behind:
        draw_ears(pen, s, head, sides=(-0.45,))
    draw_eye(pen, head.x + 0.09, head.y + 0.06, 1, None, 0)


def draw_cube_animal(pen: Pen, s: Subject) -> None:
    """The animal as one cube: a face on the front, ears on top, the collar around the bottom."""
    part(pen, shade(s.main, 1.35), [(-0.42, 0.8), (-0.26, 0.94), (0.58, 0.94), (0.42, 0.8)])
    part(pen, shade(s.main, 0.6), [(0.42, 0), (0.58, 0.14), (0.58, 0.94), (0.42, 0.8)])
    coat(pen, s, slab(-0.42, 0, 0.42, 0.8, 0.02))
    pen.box(-0.42, 0, 0.42, 0.11, s.accent)
    draw_ears(pen, s, Ellipse(0, 0.5, 0.42, 0.36), sides=(-0.8, 0.8))
    draw_face(pen, s, Ellipse(0, 0.45, 0.36, 0.32), None, 0, None)
    part(pen, GOLD, star(0, 0.06, 0.07))
