"""The lifeless subjects: one function a kind, listed in THINGS.

Each draws one Subject upright in the pen's frame: its bottom at y = 0, about 1 tall or wide, centred on x = 0.
"""

from __future__ import annotations

from collections.abc import Callable

from toy.draw import (
    BLACK,
    GOLD,
    WHITE,
    Color,
    Outline,
    Pen,
    Subject,
    coat,
    inside,
    lathe,
    oval,
    part,
    polar,
    shade,
    slab,
    smooth,
    tube,
)

SILVER, LEAF, FLAME, GLOW = (206, 212, 220), (66, 150, 70), (250, 140, 30), (255, 228, 100)


def mix(low: float, high: float, t: float) -> float:
    return low + (high - low) * t


def sizes(s: Subject, *ranges: tuple[float, float]) -> list[float]:
    """Where width, height, detail and detail2 stand between the given smallest and largest values."""
    shares = (s.width, s.height, s.detail, s.detail2)
    return [mix(low, high, share) for (low, high), share in zip(ranges, shares, strict=False)]


def barrel(w: float, low: float, high: float, e: float) -> Outline:
    """An upright cylinder of half width `w`, seen a little from above; `e`: half the height of its round ends."""
    return oval(0, low, w, e, 180, 360) + oval(0, high, w, e, 0, 180)


def hoop(pen: Pen, color: Color, w: float, low: float, high: float, e: float) -> None:
    """A band around that cylinder."""
    pen.polygon(oval(0, low, w, e, 180, 360) + oval(0, high, w, e, 360, 180), color)


def backpack(pen: Pen, s: Subject) -> None:
    w, h, pocket, strap = sizes(s, (0.3, 0.42), (0.72, 0.9), (0.34, 0.5), (0.08, 0.16))
    for side in (-1, 1):
        tube(pen, s.second, oval(side * (w - 0.03), 0.4 * h, side * strap, 0.3 * h, -90, 90), 0.085)
    loops = (oval(0, h, 0.14, 0.13, 0, 180), [(-0.16, h), (-0.16, h + 0.12), (0.16, h + 0.12), (0.16, h)])
    tube(pen, s.accent, loops[s.variant % 2], 0.075)
    coat(pen, s, slab(-w, 0, w, h, (0.24, 0.24, 0.06)[s.variant]))
    part(pen, s.second, slab(-0.75 * w, 0.07, 0.75 * w, pocket * h, 0.08))
    pen.box(-0.75 * w, pocket * h - 0.12, 0.75 * w, pocket * h - 0.02, s.accent, 0.03)
    pen.box(-0.85 * w, 0.7 * h, 0.85 * w, 0.7 * h + 0.08, s.accent, 0.04)


def bowl(pen: Pen, s: Subject) -> None:
    """A bowl of berries: round, angular, or bell-shaped."""
    w, h, r, foot = sizes(s, (0.42, 0.52), (0.3, 0.48), (0.11, 0.16), (0.05, 0.13))
    top = foot + h
    for x, y in ((-0.3, 1.0), (0.3, 1.0), (0, 1.3), (-0.65, 0.2), (0.65, 0.2), (0, 0.25)):
        part(pen, shade(s.accent, 1.25 if y > 0.5 else 1), oval(x * w, top + r * y, r, r))
    part(pen, s.second, slab(-0.45 * w, 0, 0.45 * w, foot + 0.06, 0.03))
    sides = (
        [(0, foot), (0.5 * w, foot + 0.02), (0.88 * w, foot + 0.4 * h), (w, top), (w, top)],
        [(0, foot), (0.42 * w, foot), (0.42 * w, foot), (w, top), (w, top)],
        [(0, foot), (0.6 * w, foot + 0.06 * h), (0.78 * w, foot + 0.45 * h), (0.8 * w, foot + 0.6 * h), (w, top)],
    )
    coat(pen, s, lathe(sides[s.variant]))
    part(pen, s.second, slab(-w - 0.02, top - 0.05, w + 0.02, top + 0.05, 0.05))


def can(pen: Pen, s: Subject) -> None:
    """A can whose label is a band, a disc or a diamond."""
    w, h, label, lid = sizes(s, (0.26, 0.38), (0.74, 1.0), (0.16, 0.26), (0.09, 0.13))
    e = 0.26 * w
    top, middle, r = h - e, 0.46 * h, label * h
    coat(pen, s, barrel(w, e, top, e))
    hoop(pen, s.second, w, e, e + lid, e)
    hoop(pen, s.second, w, top - lid, top, e)
    part(pen, SILVER, oval(0, top, w, e))
    pen.ellipse(0, top, 0.55 * w, 0.5 * e, shade(SILVER, 0.7))
    if s.variant == 0:
        hoop(pen, s.accent, w, middle - 0.6 * r + e, middle + 0.6 * r + e, e)
    else:
        diamond = [(0, middle - r), (0.85 * w, middle), (0, middle + r), (-0.85 * w, middle)]
        part(pen, s.accent, oval(0, middle, min(r, 0.75 * w), min(r, 0.75 * w)) if s.variant == 1 else diamond)


def candle(pen: Pen, s: Subject) -> None:
    """A burning candle on a dish, a dish with a ring, or a stand."""
    w, h, flame, band = sizes(s, (0.2, 0.3), (0.42, 0.56), (0.12, 0.17), (0.15, 0.6))
    e, base = 0.25 * w, (0.08, 0.08, 0.18)[s.variant]
    if s.variant == 1:
        tube(pen, s.second, oval(0.45, 0.16, 0.11, 0.11), 0.075)
    if s.variant == 2:
        part(pen, s.second, oval(0, 0, 0.26, 0.14, 0, 180), slab(-0.36, 0.12, 0.36, 0.22, 0.05))
    else:
        part(pen, s.second, lathe([(0, 0), (0.3, 0), (0.3, 0), (0.42, 0.15), (0.42, 0.15)]))
    top = base + h
    coat(pen, s, barrel(w, base + e, top, e))
    hoop(pen, s.accent, w, base + e + band * (h - 0.2), base + e + band * (h - 0.2) + 0.11, e)
    wax = shade(s.main, 1.5)
    for x, length in ((-0.65, 0.16), (0.6, 0.1)):
        pen.box((x - 0.3) * w, top - length - e, (x + 0.3) * w, top, wax, 0.07)
    part(pen, wax, oval(0, top, w, e))
    pen.line([(0, top), (0, top + 0.08)], BLACK, 0.045)
    drop = [(0, 0), (0.6, 0.4), (0.5, 1.0), (0, 2.2), (0, 2.2), (-0.5, 1.0), (-0.6, 0.4)]
    part(pen, FLAME, smooth([(x * flame, top + 0.06 + y * flame) for x, y in drop]))
    pen.polygon(smooth([(0.5 * x * flame, top + 0.08 + 0.5 * y * flame) for x, y in drop]), GLOW)


def clock(pen: Pen, s: Subject) -> None:
    """An alarm clock with two bells, round, square or house-shaped; each shows its own hour."""
    w, h, bell, hour = sizes(s, (0.35, 0.42), (0.33, 0.38), (0.12, 0.18), (50, -230))
    y, face = 0.1 + h, 0.68 * min(w, h)
    for side in (-1, 1):
        tube(pen, s.accent, [(0.5 * w * side, y - 0.6 * h), (0.8 * w * side, 0.05)], 0.1)
        part(pen, s.second, oval(0.66 * w * side, y + 0.9 * h, bell, bell))
    tube(pen, s.accent, [(0, y + h), (0, y + h + 0.09)], 0.1)
    house = [(-w, y - h), (w, y - h), (w, y + 0.35 * h), (0, y + 1.05 * h), (-w, y + 0.35 * h)]
    coat(pen, s, (oval(0, y, w, h), slab(-w, y - h, w, y + h, 0.1), house)[s.variant])
    part(pen, WHITE, oval(0, y, face, face))
    u, v = polar(0.55 * face, hour)
    pen.line([(0, y + 0.75 * face), (0, y), (u, y + v)], BLACK, 0.055)
    pen.ellipse(0, y, 0.06, 0.06, s.accent)


def sneaker(pen: Pen, s: Subject) -> None:
    """A sports shoe with laces, straps, or laces and a high ankle; its toe points right."""
    ankle, sole, cap, stripe = sizes(s, (0.34, 0.44), (0.1, 0.17), (0.16, 0.3), (-0.2, 0.06))
    high = sole + ankle + (0.18 if s.variant == 2 else 0)
    low, left, right = sole - 0.03, -0.5, 0.52
    heel = [(left + 0.02, low), (left + 0.02, low), (left, 0.55 * high), (left - 0.01, high), (left - 0.01, high)]
    collar_dip, tongue = [(-0.3, high - 0.08), (-0.12, high + 0.01)], [(-0.02, high + 0.05), (-0.02, high + 0.05)]
    toes = [(0.16, sole + 0.27), (0.32, sole + 0.2), (0.48, sole + 0.13), (right, low), (right, low)]
    upper = smooth(heel + collar_dip + tongue + toes)
    coat(pen, s, upper)
    inside(pen, (upper,), lambda ink: ink.ellipse(right, sole, cap, 0.26, shade(s.second, 0.85)))
    inside(pen, (upper,), lambda ink: ink.line([(stripe, low), (stripe - 0.12, high - 0.14)], s.accent, 0.1))
    part(pen, s.second, slab(left - 0.04, 0, right + 0.04, sole, 0.07))
    for t in (0.2, 0.75) if s.variant == 1 else (0.1, 0.45, 0.8):
        x, y = mix(0.02, 0.2, t), mix(high, sole + 0.27, t)
        wide, reach = (0.1, 0.2) if s.variant == 1 else (0.06, 0.12)
        tube(pen, s.accent, [(x - reach, y - 0.6 * reach), (x, y)], wide)


def boot(pen: Pen, s: Subject) -> None:
    """A tall boot with a cuff, a furry cuff, or a cuff and a buckled strap; its toe points right."""
    w, h, heel, cuff = sizes(s, (0.36, 0.46), (0.76, 0.98), (0.03, 0.16), (0.12, 0.22))
    back, toe, sole = -0.4, 0.44, 0.1
    front, lift = back + w, sole + heel
    shaft = [(back, lift), (back, lift), (back + 0.02, 0.5 * h), (back, h), (back, h), (front, h), (front, h)]
    foot = [(front, 0.55 * h), (front + 0.05, 0.42), (toe - 0.14, 0.36), (toe, 0.22), (toe, sole), (toe, sole)]
    coat(pen, s, smooth([*shaft, *foot, (0, sole), (0, sole)]))
    under = [(back - 0.02, lift), (back - 0.02, 0), (back + 0.22, 0), (back + 0.24, 0.8 * heel), (0, 0)]
    part(pen, s.second, [*under, (toe + 0.03, 0), (toe + 0.03, sole), (0, sole)])
    if s.variant == 1:
        part(pen, s.accent, *(oval(mix(back, front, t), h, 0.6 * cuff, 0.6 * cuff) for t in (0, 0.33, 0.67, 1)))
    else:
        part(pen, s.accent, slab(back - 0.03, h - cuff, front + 0.03, h + 0.02, 0.04))
    if s.variant == 2:
        tube(pen, s.accent, [(back + 0.03, 0.45), (front + 0.03, 0.4)], 0.1)
        part(pen, GOLD, slab(front - 0.2, 0.36, front - 0.06, 0.5, 0.03))


def duck(pen: Pen, s: Subject) -> None:
    """A bath duck, a duck on wheels, or a duck with a crest; it looks right."""
    w, h, r, bill = sizes(s, (0.38, 0.46), (0.24, 0.3), (0.2, 0.26), (0.12, 0.2))
    y = h + (0.13 if s.variant == 1 else 0)
    x, top = 0.4 * w, y + 0.7 * h + 0.75 * r
    if s.variant == 2:
        part(pen, s.accent, *(oval(x + d, top + r, 0.065, 0.12) for d in (-0.1, 0.06)))
    part(pen, s.accent, oval(x + r + 0.3 * bill, top - 0.05, bill, 0.075))
    tail = smooth(
        [(-0.5 * w, y - 0.3 * h), (-1.12 * w, y + 0.85 * h), (-1.12 * w, y + 0.85 * h), (-0.3 * w, y + 0.8 * h)]
    )
    coat(pen, s, tail, oval(0, y, w, h), oval(x, top, r, r))
    wing = [(0.3, 0.15), (-0.2, 0.45), (-0.75, 0.5), (-0.75, 0.5), (-0.45, -0.35), (0, -0.4)]
    part(pen, s.second, smooth([(u * w, y + v * h) for u, v in wing]))
    pen.ellipse(x + 0.4 * r, top + 0.25 * r, 0.085, 0.085, WHITE)
    pen.ellipse(x + 0.5 * r, top + 0.22 * r, 0.055, 0.06, BLACK)
    for side in (-0.55, 0.55) if s.variant == 1 else ():
        part(pen, s.accent, oval(side * w, 0.14, 0.14, 0.14))
        pen.ellipse(side * w, 0.14, 0.055, 0.055, WHITE)


def teapot(pen: Pen, s: Subject) -> None:
    """A teapot with a round, an angular or an overhead handle; it pours to the right."""
    w, h, spout, loop = sizes(s, (0.29, 0.36), (0.26, 0.34), (0.14, 0.22), (0.14, 0.2))
    y, top = 0.05 + h, 0.05 + 2 * h
    handle = (
        oval(-w + 0.02, y + 0.02, loop, 0.7 * h, 80, 280),
        [(-0.7 * w, y + 0.6 * h), (-w - loop, y + 0.6 * h), (-w - loop, y - 0.4 * h), (-0.7 * w, y - 0.4 * h)],
        oval(0, y + 0.4 * h, 0.92 * w, 0.6 * h + loop + 0.1, 0, 180),
    )
    tube(pen, s.second, handle[s.variant], 0.09)
    tip, root = (w + spout, y + 0.75 * h), (0.6 * w, y - 0.6 * h)
    mouth = (w + spout - 0.15, y + 0.75 * h + 0.05)
    snout = smooth([root, root, (w + 0.35 * spout, y - 0.1 * h), tip, tip, mouth, mouth, (0.8 * w, y + 0.4 * h)])
    part(pen, s.second, slab(-0.6 * w, 0, 0.6 * w, 0.14, 0.04), snout)
    coat(pen, s, oval(0, y, w, h))
    part(pen, s.accent, oval(0, top + 0.07, 0.09, 0.09))
    part(pen, s.second, oval(0, top - 0.08, 0.62 * w, 0.13, 0, 180))
    pen.box(-0.66 * w, top - 0.13, 0.66 * w, top - 0.04, s.accent, 0.04)


def vase(pen: Pen, s: Subject) -> None:
    """A vase with one flower: round, with two handles, or flared."""
    w, h, neck, r = sizes(s, (0.25, 0.36), (0.5, 0.62), (0.1, 0.16), (0.08, 0.11))
    bloom = h + 0.06 + 2.2 * r
    pen.line([(0, h - 0.05), (0, bloom)], LEAF, 0.06)
    for side in (-1, 1):
        part(pen, LEAF, oval(side * 0.15, h + 0.1, 0.13, 0.06, turn=side * 35))
        if s.variant == 1:
            tube(pen, s.second, oval(side * 0.8 * w, 0.66 * h, 0.13, 0.2 * h), 0.07)
    petals = [polar(1.2 * r, 90 + 72 * i) for i in range(5)]
    part(pen, s.accent, *(oval(x, bloom + y, r, r) for x, y in petals))
    pen.ellipse(0, bloom, 0.8 * r, 0.8 * r, GLOW)
    side = (
        [(0.5 * w, 0), (w, 0.4 * h), (neck, 0.82 * h), (neck + 0.05, h)],
        [(0.38 * w, 0), (0.6 * w, 0.25 * h), (w, 0.62 * h), (neck + 0.02, 0.88 * h), (neck + 0.06, h)],
        [(0.7 * w, 0), (neck + 0.03, 0.35 * h), (0.7 * w, 0.7 * h), (w, h)],
    )[s.variant]
    coat(pen, s, lathe(side))
    for half, y in ((side[0][0], 0), (side[-1][0], h - 0.06)):
        part(pen, s.second, slab(-half - 0.03, y, half + 0.03, y + 0.09, 0.03))


def plush(pen: Pen, s: Subject) -> None:
    """A sitting stuffed bear, sloth or wolf; open arms, button eyes and a stitched belly tell it from a live animal."""
    w, h, ear, arm = sizes(s, (0.22, 0.28), (0.23, 0.26), (0.1, 0.15), (0.42, 0.5))
    y, r = 0.44 + h, w + 0.06
    for side in (-1, 1):
        if s.variant == 0:
            part(pen, s.main, oval(side * 0.78 * r, y + 0.74 * h, ear, ear))
            pen.ellipse(side * 0.78 * r, y + 0.74 * h, 0.55 * ear, 0.55 * ear, s.second)
        elif s.variant == 2:
            part(pen, s.main, [(side * 0.2 * r, y + 0.85 * h), (side * 0.85 * r, y + h + ear), (side * r, y + 0.2 * h)])
        tube(pen, s.main, [(side * 0.5 * w, 0.38), (side * arm, 0.5)], 0.17)
    coat(pen, s, oval(0, 0.27, w, 0.25))
    pen.ellipse(0, 0.24, 0.6 * w, 0.17, s.second)
    pen.line([(0, 0.12), (0, 0.36)], BLACK, 0.04)
    pen.line([(-0.07, 0.24), (0.07, 0.24)], BLACK, 0.04)
    for side in (-1, 1):
        part(pen, s.main, oval(side * r, 0.13, 0.15, 0.13))
        pen.ellipse(side * r, 0.13, 0.085, 0.075, s.second)
    coat(pen, s, oval(0, y, r, h))
    if s.variant == 1:  # the sloth's mask
        pen.ellipse(0, y, 0.85 * r, 0.6 * h, shade(s.main, 1.6))
    for side in (-1, 1):
        pen.ellipse(side * 0.46 * r, y + 0.12 * h, 0.085, 0.085, BLACK)
        pen.ellipse(side * 0.46 * r, y + 0.12 * h, 0.03, 0.03, WHITE)
    pen.ellipse(0, y - 0.42 * h, 0.5 * r, 0.38 * h, shade(s.second, 1.2))
    pen.ellipse(0, y - 0.28 * h, 0.065, 0.05, BLACK)
    bow = ([(0, 0.45), (side * 0.19, 0.54), (side * 0.19, 0.36)] for side in (-1, 1))
    part(pen, s.accent, *bow, oval(0, 0.45, 0.06, 0.06))


def glasses(pen: Pen, s: Subject) -> None:
    """Sunglasses with round, square or cat-eye lenses, seen from a little above."""
    w, h, frame, gap = sizes(s, (0.16, 0.19), (0.14, 0.2), (0.07, 0.1), (0.03, 0.06))
    x, y = gap + frame + w, h + frame

    def lens(side: int, grow: float) -> Outline:
        u, rx, ry = side * x, w + grow, h + grow
        tilted = [(-1, 0.75), (-0.9, -0.5), (0, -1), (0.75, -0.6), (1, 0.3), (1.15, 1.15), (1.15, 1.15), (0, 0.85)]
        cat_eye = smooth([(u + side * rx * a, y + ry * b) for a, b in tilted])
        return (oval(u, y, rx, ry), slab(u - rx, y - ry, u + rx, y + ry, 0.06), cat_eye)[s.variant]

    for side in (-1, 1):
        tube(pen, s.accent, [(side * (x + w), y + 0.5 * h), (side * (x + 0.5 * w), y + h + 0.26)], 0.085)
    coat(pen, s, lens(-1, frame), lens(1, frame), slab(-gap - frame, y + 0.04, gap + frame, y + 0.16, 0))
    for side in (-1, 1):
        pen.polygon(lens(side, 0), shade(s.second, 0.5))
        pen.line([(side * x - 0.4 * w, y - 0.2 * h), (side * x + 0.1 * w, y + 0.45 * h)], shade(s.second, 1.3), 0.07)


NAMED_ALIKE = (backpack, bowl, can, candle, clock, sneaker, boot, teapot, vase, glasses)
THINGS: dict[str, Callable[[Pen, Subject], None]] = {kind.__name__: kind for kind in NAMED_ALIKE}
THINGS |= {"toy": duck, "stuffed animal": plush}
