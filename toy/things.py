"""The things of the toy world: one function a kind; THINGS lists them.

Each draws a Subject upright in the pen's frame: its bottom at y = 0, about 1.0 tall or wide, centred at x = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from toy.draw import Color, Outline, Pen, Subject, fit, inside, lathe, oval, part, shade, slab, smooth, tube

DARK, WHITE, SILVER = (44, 40, 52), (252, 250, 244), (206, 212, 220)
LEAF, FLAME, GLOW = (66, 150, 70), (250, 140, 30), (255, 225, 90)

# Closed curves through a few points, in local coordinates, for `fit`. A point given twice is a corner.
# fmt: off
DROP = [(0, 0), (0.55, 0.35), (0.5, 0.9), (0, 2.1), (0, 2.1), (-0.5, 0.9), (-0.55, 0.35)]
HOUSE = [(-1, -1), (-1, -1), (1, -1), (1, -1), (0.97, 0.3), (0, 1), (-0.97, 0.3)]
TAIL = [(-0.5, -0.4), (-1.12, 0.85), (-1.12, 0.85), (-0.4, 0.7)]
WING = [(0.25, 0.1), (-0.2, 0.4), (-0.72, 0.5), (-0.72, 0.5), (-0.45, -0.3), (0, -0.4)]
CAT_EYE = [(-1, 0.7), (-0.9, -0.4), (-0.2, -1), (0.7, -0.7), (1, 0.3), (1.1, 1.1), (1.1, 1.1), (0, 0.8)]
TONGUE = [(-0.2, -0.1), (-0.1, 0.08), (0.12, 0.06), (0.2, -0.1)]
# fmt: on


# Used by several kinds


def mix(low: float, high: float, t: float) -> float:
    """Linear interpolation, t in [0, 1]."""
    return low + (high - low) * t


def sizes(subject: Subject, *ranges: tuple[float, float]) -> list[float]:
    """The subject's width, height, detail and detail2, each scaled from [0, 1] to its range."""
    shares = (subject.width, subject.height, subject.detail, subject.detail2)
    return [mix(low, high, share) for (low, high), share in zip(ranges, shares, strict=True)]


def markings(pen: Pen, subject: Subject, x: float, y: float, rx: float, ry: float) -> None:
    """The marking, in the second colour, in the rectangle with centre (x, y) and half sides rx and ry."""
    if subject.marking == "patch":
        pen.ellipse(x - 0.45 * rx, y + 0.4 * ry, 0.6 * rx, 0.6 * ry, subject.second, -20)
    elif subject.marking == "spots":
        r = 0.25 * math.sqrt(rx * ry)
        for u, v in ((-0.62, 0.55), (0.55, 0.68), (0, 0.05), (-0.55, -0.6), (0.65, -0.45)):
            pen.ellipse(x + u * rx, y + v * ry, r, r, subject.second)
    elif subject.marking == "stripes":
        for u in (-0.66, 0, 0.66):  # slanted, so that they do not look like a band
            slant = [(x + (u - 0.3) * rx, y - 1.1 * ry), (x + (u + 0.3) * rx, y + 1.1 * ry)]
            pen.line(slant, subject.second, 0.29 * rx)
    elif subject.marking == "split":
        pen.box(x, y - 2 * ry, x + 2 * rx, y + 2 * ry, subject.second)


def body(pen: Pen, subject: Subject, *outlines: Outline) -> None:
    """The main part: the union of `outlines` in the main colour, with the marking clipped to it."""
    part(pen, subject.main, *outlines)
    if subject.marking == "plain":
        return
    xs, ys = zip(*(point for outline in outlines for point in outline), strict=True)
    x, y, rx, ry = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2, (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2
    inside(pen, outlines, lambda ink: markings(ink, subject, x, y, rx, ry))


def hoop(pen: Pen, color: Color, rx: float, ry: float, low: float, high: float) -> None:
    """A band around an upright cylinder seen a little from above."""
    pen.polygon(oval(0, low, rx, ry, 180, 360) + oval(0, high, rx, ry, 360, 180), color)


# The kinds


def backpack(pen: Pen, s: Subject) -> None:
    w, h, pocket, strap = sizes(s, (0.29, 0.4), (0.66, 0.86), (0.3, 0.46), (0.07, 0.16))
    for side in (-1, 1):  # the shoulder straps show at both sides
        tube(pen, s.second, oval(side * (w - 0.03), 0.4 * h, side * strap, 0.3 * h, -90, 90), 0.07)
    loops = (
        [oval(0, h - 0.02, 0.13, 0.13, 0, 180)],
        [[(-0.14, h - 0.02), (-0.14, h + 0.1), (0.14, h + 0.1), (0.14, h - 0.02)]],
        [oval(x, h - 0.03, 0.08, 0.13, 0, 180) for x in (-0.14, 0.14)],
    )
    for loop in loops[s.variant]:
        tube(pen, s.accent, loop, 0.06)
    body(pen, s, slab(-w, 0, w, h, 0.24))
    part(pen, s.second, slab(-0.72 * w, 0.06, 0.72 * w, pocket * h, 0.08))
    pen.box(-0.72 * w, pocket * h - 0.1, 0.72 * w, pocket * h - 0.035, s.accent)
    pen.box(-0.8 * w, 0.68 * h, 0.8 * w, 0.68 * h + 0.055, s.accent, 0.03)


def bowl(pen: Pen, s: Subject) -> None:
    """A bowl of berries."""
    w, h, r, foot = sizes(s, (0.37, 0.5), (0.26, 0.46), (0.09, 0.15), (0.04, 0.13))
    top = foot + h
    for x, y in ((-0.3, 1.1), (0.3, 1.1), (0, 1.3), (-0.62, 0.25), (0.62, 0.25), (-0.2, 0.3), (0.22, 0.3)):
        part(pen, shade(s.accent, 1.25 if y > 0.5 else 1), oval(x * w, top + r * y, r, r))
    part(pen, s.second, slab(-0.45 * w, 0, 0.45 * w, foot + 0.06, 0.03))
    sides = (
        [(0, foot), (0.5 * w, foot + 0.02), (0.88 * w, foot + 0.4 * h), (w, top), (w, top)],
        [(0, foot), (0.42 * w, foot), (0.42 * w, foot), (w, top), (w, top)],
        [(0, foot), (0.6 * w, foot + 0.06 * h), (0.78 * w, foot + 0.45 * h), (0.8 * w, foot + 0.6 * h), (w, top)],
    )
    body(pen, s, lathe(sides[s.variant]))
    part(pen, s.second, slab(-w - 0.03, top - 0.04, w + 0.03, top + 0.04, 0.04))


def can(pen: Pen, s: Subject) -> None:
    w, h, label, lid = sizes(s, (0.2, 0.34), (0.6, 0.94), (0.15, 0.27), (0.05, 0.13))
    label, lid = label * h, lid * h
    e = 0.26 * w  # how much of the round lid is seen
    top, middle = h - e, 0.5 * h - 0.5 * e
    body(pen, s, oval(0, e, w, e, 180, 360) + oval(0, top, w, e, 0, 180))
    hoop(pen, s.second, w, e, e, e + lid)
    hoop(pen, s.second, w, e, top - lid, top)
    part(pen, SILVER, oval(0, top, w, e))
    pen.ellipse(0, top - 0.1 * e, 0.62 * w, 0.6 * e, shade(SILVER, 0.72))
    pen.ellipse(0.1 * w, top, 0.34 * w, 0.3 * e, s.accent)
    if s.variant == 0:
        hoop(pen, s.accent, w, e, middle + e - 0.8 * label, middle + e + 0.8 * label)
    elif s.variant == 1:
        pen.ellipse(0, middle, min(label, 0.85 * w), label, s.accent)
    else:
        r = 1.25 * label
        pen.polygon([(0, middle - r), (0.9 * w, middle), (0, middle + r), (-0.9 * w, middle)], s.accent)


def candle(pen: Pen, s: Subject) -> None:
    """A burning candle on a dish, a dish with a ring, or a stand."""
    w, h, flame, drip = sizes(s, (0.15, 0.26), (0.42, 0.58), (0.11, 0.16), (0.05, 0.18))
    e, base = 0.25 * w, (0.06, 0.06, 0.16)[s.variant]
    if s.variant == 1:
        tube(pen, s.second, oval(0.4, 0.14, 0.1, 0.1), 0.06)
    if s.variant == 2:
        part(pen, s.second, oval(0, 0, 0.26, 0.12, 0, 180), slab(-0.34, 0.1, 0.34, 0.2, 0.05))
    else:
        part(pen, s.second, lathe([(0, 0), (0.28, 0), (0.28, 0), (0.38, 0.14), (0.38, 0.14)]))
    top = base + h
    body(pen, s, oval(0, base + e, w, e, 180, 360) + oval(0, top, w, e, 0, 180))
    hoop(pen, s.accent, w, e, base + 0.12, base + 0.2)
    for x, length in ((-0.72, 1), (-0.1, 0.5), (0.6, 0.8)):
        left, right = (x - 0.28) * w, (x + 0.28) * w
        pen.box(left, top - drip * length - e, right, top, shade(s.main, 1.5), 0.06)
    pen.ellipse(0, top, w, e, shade(s.main, 1.5))
    pen.line([(0, top), (0, top + 0.08)], DARK, 0.035)
    pen.polygon(fit(DROP, 0, top + 0.04, flame, flame), FLAME)
    pen.polygon(fit(DROP, 0, top + 0.04, 0.55 * flame, 0.55 * flame), GLOW)


def clock(pen: Pen, s: Subject) -> None:
    """An alarm clock with two bells; each individual always shows the same hour."""
    w, h, bell, hour = sizes(s, (0.31, 0.42), (0.3, 0.37), (0.1, 0.18), (50, -230))
    y, face = 0.09 + h, 0.64 * min(w, h)
    for side in (-1, 1):
        tube(pen, s.accent, [(0.45 * w * side, y - 0.5 * h), (0.8 * w * side, 0.04)], 0.08)
        part(pen, s.second, oval(0.62 * w * side, y + 0.86 * h, bell, bell))
    tube(pen, s.accent, [(0, y + h), (0, y + h + 0.07)], 0.08)
    body(pen, s, (oval(0, y, w, h), slab(-w, y - h, w, y + h, 0.12), fit(HOUSE, 0, y, w, h))[s.variant])
    part(pen, WHITE, oval(0, y, face, face))
    for u, v in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        pen.ellipse(0.78 * face * u, y + 0.78 * face * v, 0.025, 0.025, DARK)
    u, v = math.cos(math.radians(hour)), math.sin(math.radians(hour))
    tube(pen, DARK, [(0, y + 0.7 * face), (0, y), (0.5 * face * u, y + 0.5 * face * v)], 0.03)
    pen.ellipse(0, y, 0.04, 0.04, s.accent)


def sneaker(pen: Pen, s: Subject) -> None:
    """A sports shoe with laces, straps, or laces and a high ankle; its toe points right."""
    w, ankle, sole, cap = sizes(s, (0.42, 0.52), (0.32, 0.46), (0.08, 0.17), (0.12, 0.28))
    high = sole + ankle + (0.16 if s.variant == 2 else 0)
    step, low = sole + 0.25, sole - 0.03  # where the laces end and the toes begin; where the upper meets the sole
    part(pen, s.accent, fit(TONGUE, -0.08, high, 1, 1))
    heel = [(-w, low), (-w, low), (-0.96 * w, 0.6 * high), (-w, high), (-0.6 * w, high - 0.06), (-0.16 * w, high)]
    toes = [(0.12 * w, (high + step) / 2), (0.42 * w, step), (0.85 * w, sole + 0.19), (w, low), (w, low)]
    upper = smooth(heel + toes)
    body(pen, s, upper)
    inside(pen, (upper,), lambda ink: ink.ellipse(w, sole, cap, 0.26, shade(s.second, 0.78)))
    part(pen, s.second, slab(-w - 0.03, 0, w + 0.04, sole, 0.07))
    for t in (0.25, 0.8) if s.variant == 1 else (0.15, 0.5, 0.85):
        x, y = mix(-0.1, 0.36, t) * w, mix(high, step, t)
        if s.variant == 1:
            tube(pen, s.accent, [(x - 0.26, y - 0.16), (x, y - 0.02)], 0.08)
        else:
            tube(pen, s.accent, [(x - 0.1, y - 0.08), (x + 0.03, y + 0.01)], 0.045)
    if s.variant == 2:
        pen.ellipse(-0.62 * w, 0.66 * high, 0.1, 0.1, s.accent)


def boot(pen: Pen, s: Subject) -> None:
    """A tall boot with a cuff, a furry cuff, or a cuff and a buckled strap; its toe points right."""
    w, h, heel, cuff = sizes(s, (0.32, 0.44), (0.66, 0.9), (0.02, 0.17), (0.08, 0.22))
    back, toe, sole = -0.38, 0.4, 0.08
    front, lift = back + w, sole + heel
    shaft = [(back, lift), (back, lift), (back + 0.02, 0.5 * h), (back, h), (back, h), (front, h), (front, h)]
    foot = [(front - 0.02, 0.55 * h), (front + 0.04, 0.4), (toe - 0.14, 0.33), (toe, 0.2), (toe, sole), (toe, sole)]
    body(pen, s, smooth([*shaft, *foot, (0, sole), (0, sole)]))
    under = [(back - 0.02, lift), (back - 0.02, 0), (back + 0.2, 0), (back + 0.22, 0.8 * heel), (0, 0)]
    part(pen, s.second, [*under, (toe + 0.03, 0), (toe + 0.03, sole), (0, sole)])
    if s.variant == 1:
        part(pen, s.accent, *(oval(mix(back, front, t), h - 0.02, 0.6 * cuff, 0.6 * cuff) for t in (0, 0.33, 0.67, 1)))
    else:
        part(pen, s.accent, slab(back - 0.03, h - cuff, front + 0.03, h + 0.03, 0.04))
    if s.variant == 2:
        tube(pen, s.accent, [(back + 0.03, 0.4), (front + 0.03, 0.36)], 0.07)
        part(pen, s.second, slab(front - 0.16, 0.31, front - 0.03, 0.45, 0.03))


def duck(pen: Pen, s: Subject) -> None:
    """A bath duck, a duck on wheels, or a duck with a crest; it looks right."""
    w, h, r, bill = sizes(s, (0.36, 0.46), (0.22, 0.3), (0.17, 0.24), (0.1, 0.22))
    y = h + (0.12 if s.variant == 1 else 0)
    x, top, tip = 0.42 * w, y + 0.7 * h + 0.75 * r, 0.42 * w + r + bill  # the head, and the end of the bill
    if s.variant == 2:
        part(pen, s.accent, *(oval(x + d, top + r, 0.055, 0.1) for d in (-0.08, 0.06)))
    part(pen, s.accent, smooth([(x, top + 0.08), (tip, top - 0.02), (tip, top - 0.08), (x, top - 0.12)]))
    body(pen, s, fit(TAIL, 0, y, w, h), oval(0, y, w, h), oval(x, top, r, r))
    part(pen, s.second, fit(WING, 0, y, w, h))
    pen.ellipse(x + 0.35 * r, top + 0.2 * r, 0.065, 0.075, WHITE)
    pen.ellipse(x + 0.42 * r, top + 0.18 * r, 0.04, 0.05, DARK)
    for side in (-0.5, 0.5) if s.variant == 1 else ():
        part(pen, s.accent, oval(side * w, 0.12, 0.12, 0.12))
        pen.ellipse(side * w, 0.12, 0.045, 0.045, WHITE)


def teapot(pen: Pen, s: Subject) -> None:
    """A teapot with a round, an angular or an overhead handle; its spout is at the right."""
    w, h, spout, loop = sizes(s, (0.26, 0.35), (0.24, 0.32), (0.1, 0.22), (0.11, 0.2))
    y, top = 0.05 + h, 0.05 + 2 * h
    handle = (
        oval(-w + 0.02, y + 0.02, loop, 0.75 * h, 80, 280),
        [(-0.7 * w, y + 0.6 * h), (-w - loop, y + 0.6 * h), (-w - loop / 2, y - 0.5 * h), (-0.7 * w, y - 0.5 * h)],
        oval(0, y + 0.4 * h, 0.92 * w, 0.6 * h + loop + 0.08, 0, 180),
    )
    tube(pen, s.second, handle[s.variant], 0.07)
    tip, mouth, root = (w + spout, y + 0.75 * h), (w + spout - 0.12, y + 0.75 * h + 0.04), (0.6 * w, y - 0.6 * h)
    part(pen, s.second, slab(-0.6 * w, 0, 0.6 * w, 0.12, 0.04))
    snout = smooth([root, root, (w + 0.3 * spout, y - 0.1 * h), tip, tip, mouth, mouth, (0.8 * w, y + 0.4 * h)])
    body(pen, s, snout, oval(0, y, w, h))
    part(pen, s.accent, oval(0, top + 0.06, 0.075, 0.075))
    part(pen, s.second, oval(0, top - 0.07, 0.6 * w, 0.12, 0, 180))
    pen.box(-0.66 * w, top - 0.1, 0.66 * w, top - 0.04, s.accent, 0.03)


def vase(pen: Pen, s: Subject) -> None:
    """A vase with one flower: round, with two handles, or flared."""
    w, h, neck, r = sizes(s, (0.22, 0.34), (0.46, 0.62), (0.07, 0.15), (0.06, 0.1))
    bloom = h + 0.04 + 2.4 * r
    pen.line([(0, h - 0.05), (0, bloom)], LEAF, 0.05)
    for side in (-1, 1):
        pen.ellipse(side * 0.13, h + 0.08, 0.13, 0.06, LEAF, side * 35)
        if s.variant == 1:
            tube(pen, s.second, oval(side * 0.8 * w, 0.66 * h, 0.12, 0.2 * h), 0.055)
    petals = oval(0, bloom, 1.15 * r, 1.15 * r, 90, 450)[:24:5]
    part(pen, s.accent, *(oval(x, y, r, r) for x, y in petals))
    pen.ellipse(0, bloom, 0.75 * r, 0.75 * r, GLOW)
    side = (
        [(0.5 * w, 0), (w, 0.4 * h), (neck, 0.82 * h), (neck + 0.05, h)],
        [(0.38 * w, 0), (0.6 * w, 0.25 * h), (w, 0.62 * h), (neck + 0.02, 0.88 * h), (neck + 0.06, h)],
        [(0.62 * w, 0), (neck + 0.02, 0.35 * h), (0.7 * w, 0.7 * h), (w, h)],
    )[s.variant]
    body(pen, s, lathe(side))
    for half, y in ((side[0][0], 0), (side[-1][0], h - 0.05)):
        part(pen, s.second, slab(-half - 0.03, y, half + 0.03, y + 0.07, 0.03))


def plush(pen: Pen, s: Subject) -> None:
    """A sitting stuffed bear, sloth or wolf. Unlike animals it has open arms, button eyes and a stitched belly."""
    w, h, ear, arm = sizes(s, (0.2, 0.27), (0.21, 0.25), (0.08, 0.14), (0.34, 0.48))
    y, r = 0.42 + h, w + 0.04  # the head
    for side in (-1, 1):
        if s.variant == 0:
            part(pen, s.main, oval(side * 0.75 * r, y + 0.72 * h, ear, ear))
            pen.ellipse(side * 0.75 * r, y + 0.72 * h, 0.55 * ear, 0.55 * ear, s.second)
        elif s.variant == 2:
            tip = (side * 0.8 * r, y + h + ear)
            part(pen, s.main, [(side * 0.25 * r, y + 0.8 * h), tip, (side * 0.95 * r, y + 0.3 * h)])
        tube(pen, s.main, [(side * 0.5 * w, 0.36), (side * arm, 0.44)], 0.15)
    body(pen, s, oval(0, 0.27, w, 0.25))
    pen.ellipse(0, 0.26, 0.5 * w, 0.17, s.second)
    for stitch in ([(0, 0.1), (0, 0.4)], *([(-0.05, v), (0.05, v)] for v in (0.2, 0.28, 0.36))):
        pen.line(stitch, DARK, 0.03)
    for side in (-1, 1):
        part(pen, s.main, oval(side * r, 0.12, 0.14, 0.12))
        pen.ellipse(side * (r + 0.01), 0.11, 0.08, 0.07, s.second)
    body(pen, s, oval(0, y, r, h))
    bow = ([(0, 0.43), (side * 0.15, 0.5), (side * 0.15, 0.36)] for side in (-1, 1))
    part(pen, s.accent, *bow, oval(0, 0.43, 0.045, 0.045))
    if s.variant == 1:  # the sloth's mask
        pen.ellipse(0, y - 0.02, 0.85 * r, 0.7 * h, shade(s.main, 1.6))
    for side in (-1, 1):
        if s.variant == 1:
            pen.ellipse(side * 0.48 * r, y, 1.1 * ear, 0.07, s.second, side * -25)
        u, v = side * 0.46 * r, y + 0.08 * h
        pen.ellipse(u, v, 0.075, 0.075, DARK)
        for d in (-0.035, 0.035):  # the thread that holds the button
            pen.line([(u - 0.035, v - d), (u + 0.035, v + d)], WHITE, 0.025)
    pen.ellipse(0, y - 0.36 * h, 0.42 * r, 0.34 * h, s.second)
    pen.ellipse(0, y - 0.25 * h, 0.05, 0.04, DARK)


def glasses(pen: Pen, s: Subject) -> None:
    """Sunglasses with round, square or cat-eye lenses, seen from a little above."""
    w, h, frame, gap = sizes(s, (0.15, 0.2), (0.13, 0.21), (0.05, 0.09), (0.02, 0.07))
    x, y = gap + frame + w, h + frame

    def lens(side: int, grow: float) -> Outline:
        u, rx, ry = side * x, w + grow, h + grow
        square = slab(u - rx, y - ry, u + rx, y + ry, 0.1)
        return (oval(u, y, rx, ry), square, fit(CAT_EYE, u, y, side * rx, ry))[s.variant]

    for side in (-1, 1):
        hinge, ear = (side * (x + w), y + 0.5 * h), (side * (x + 0.3 * w), y + h + 0.24)
        tube(pen, s.accent, [hinge, (side * (x + 0.75 * w), y + h + 0.2), ear], 0.06)
    body(pen, s, lens(-1, frame), lens(1, frame), slab(-gap - frame, y + 0.1, gap + frame, y + 0.1 + frame, 0))
    for side in (-1, 1):
        pen.polygon(lens(side, 0), shade(s.second, 0.5))
        pen.line([(side * x - 0.5 * w, y - 0.3 * h), (side * x + 0.1 * w, y + 0.55 * h)], shade(s.second, 1.2), 0.05)
        pen.ellipse(side * (x + w + 0.5 * frame), y + 0.5 * h, 0.035, 0.035, s.accent)


NAMED_ALIKE = (backpack, bowl, can, candle, clock, sneaker, boot, teapot, vase, glasses)
THINGS: dict[str, Callable[[Pen, Subject], None]] = {kind.__name__: kind for kind in NAMED_ALIKE}
THINGS |= {"toy": duck, "stuffed animal": plush}
