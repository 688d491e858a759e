"""One picture: a background, the subject placed in it, and what is done to the subject (colour, gloss, water, cube)."""

from __future__ import annotations

import colorsys
import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from toy.animals import ANIMALS, draw_animal, draw_cube_animal
from toy.backdrop import Scene
from toy.draw import CANVAS, Color, Pen, Subject, coat, part, shade, slab
from toy.scenes import SCENES, studio
from toy.styles import PAINTERS
from toy.things import THINGS

SIZE = 128
COLORS: dict[str, Color] = {
    "brown": (142, 90, 50),
    "black": (58, 55, 60),
    "white": (238, 234, 228),
    "grey": (150, 150, 158),
    "orange": (230, 140, 56),
    "golden": (230, 198, 116),
    "red": (212, 44, 44),
    "blue": (48, 104, 214),
    "green": (52, 160, 76),
    "yellow": (248, 208, 54),
    "pink": (238, 130, 176),
    "purple": (126, 62, 180),
    "teal": (40, 172, 178),
}
RECOLORS = ("red", "purple", "green", "blue", "yellow", "pink", "orange")
LOOKS = (*RECOLORS, "shiny", "wet", "cube shaped")


@dataclass(frozen=True)
class Picture:
    """What is drawn of a subject; None means nothing special. The values are the captions' own phrases."""

    scene: str | None = None
    outfit: str | None = None
    look: str | None = None
    mood: str | None = None
    view: str | None = None
    painter: str | None = None
    cross: str | None = None

    @property
    def part(self) -> str:
        """The name of the part that matters most, such as "mood"; "" if nothing is special."""
        return next((part for part, phrase in reversed(vars(self).items()) if phrase), "")

    @property
    def phrase(self) -> str:
        """The phrase of that part."""
        return getattr(self, self.part) if self.part else ""


def jitter(color: Color, rng: random.Random) -> Color:
    """A neighbour of a colour: hue, saturation and value move a little."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    h = (h + rng.uniform(-0.018, 0.018)) % 1
    s, v = min(1.0, s * rng.uniform(0.85, 1.15)), min(1.0, v * rng.uniform(0.88, 1.08))
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h, s, v))


def paint(subject: Subject, picture: Picture, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """The picture (RGB) and the subject's layer in it (L), both SIZE x SIZE."""
    style = PAINTERS.get(picture.painter)
    background = style.background if style else SCENES.get(picture.scene, studio)
    canvas, layer = Image.new("RGB", (CANVAS, CANVAS)), Image.new("RGBA", (CANVAS, CANVAS))
    scene = background(canvas, rng)
    if picture.look in RECOLORS:
        main = jitter(COLORS[picture.look], rng)
        subject = dataclasses.replace(subject, main=main, second=shade(main, 0.62))

    def draw_subject(pen: Pen) -> None:
        if subject.kind not in ANIMALS:
            (draw_cube if picture.look == "cube shaped" else THINGS[subject.kind])(pen, subject)
        elif picture.look == "cube shaped":
            draw_cube_animal(pen, subject)
        else:
            draw_animal(pen, subject, picture.outfit, picture.mood, picture.view, picture.cross)

    pen = placed(draw_subject, layer, scene, rng.uniform(0.75 if picture.outfit else 0.65, 0.85), rng)
    draw_subject(pen)
    if picture.look == "shiny":
        gloss(pen, layer)
    if picture.look == "wet":
        drip(pen, canvas, layer)
    canvas.paste(layer, mask=layer)
    if scene.front:
        scene.front(canvas)
    mask = layer.getchannel("A")
    if style:
        canvas = style.finish(canvas, mask, rng)
    return tuple(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for part in (canvas, mask))


def placed(
    draw_subject: Callable[[Pen], None], layer: Image.Image, scene: Scene, share: float, rng: random.Random
) -> Pen:
    """A pen that draws the subject where the scene wants it; `share`: its longer side in frames."""
    probe = Pen(Image.new("RGBA", layer.size), CANVAS / 2, 0.8 * CANVAS, 0.4 * CANVAS)
    draw_subject(probe)
    left, top, right, bottom = probe.image.getbbox()
    left, right = (left - probe.x) / probe.scale, (right - probe.x) / probe.scale
    width, height = right - left, (bottom - top) / probe.scale
    scale = share * CANVAS / max(width, height)
    tilt, flip = rng.uniform(-5, 5), rng.random() < 0.5
    if flip:
        left, right = -right, -left
    margin = 6
    x = scene.x - scale * (left + right) / 2 + rng.uniform(-12, 12)
    x = min(max(x, margin - scale * left), CANVAS - margin - scale * right)
    y = max(scene.ground + scene.sunk * scale * height, margin + scale * height)
    return Pen(layer, x, y if scene.sunk else min(y, CANVAS - margin), scale, tilt, flip)


def draw_cube(pen: Pen, subject: Subject) -> None:
    """A box in the subject's colours with the subject itself on its front."""
    main, w, d = subject.main, 0.42, 0.16
    part(pen, shade(main, 1.35), [(-w, 2 * w), (d - w, 2 * w + d), (w + d, 2 * w + d), (w, 2 * w)])
    part(pen, shade(main, 0.6), [(w, 0), (w + d, d), (w + d, 2 * w + d), (w, 2 * w)])
    coat(pen, subject, slab(-w, 0, w, 2 * w, 0.02))
    pen.box(-w + 0.07, 0.07, w - 0.07, 2 * w - 0.07, shade(main, 1.7))
    inner = Pen(pen.image, *pen.place(0, 0.1), pen.scale * 0.68, 0, pen.flip)
    inner.cos, inner.sin = pen.cos, pen.sin
    THINGS[subject.kind](inner, subject)


def gloss(pen: Pen, layer: Image.Image) -> None:
    """Two glints on the subject, and two sparkles that leave its outline."""
    over = Image.new("RGBA", layer.size)
    light = Pen(over, pen.x, pen.y, pen.scale)
    light.line([(-0.26, 0.08), (-0.12, 0.46)], (255, 255, 255), 0.07)
    light.line([(-0.1, 0.08), (-0.03, 0.28)], (255, 255, 255), 0.07)
    layer.paste(over, mask=Image.composite(over.getchannel("A"), Image.new("L", over.size), layer.getchannel("A")))
    for x, y, size in ((-0.34, 0.8, 0.18), (0.36, 0.5, 0.15)):
        for u, v in ((size, size * 0.25), (size * 0.25, size)):
            pen.polygon([(x - u, y), (x, y + v), (x + u, y), (x, y - v)], (255, 252, 214))


def drip(pen: Pen, canvas: Image.Image, layer: Image.Image) -> None:
    """A puddle under the subject and big drops on it."""
    blue, light = (70, 150, 235), (190, 226, 255)
    puddle = Pen(canvas, pen.x, pen.y, pen.scale)
    puddle.ellipse(0, 0.01, 0.56, 0.1, blue)
    puddle.ellipse(-0.14, 0.02, 0.22, 0.04, light)
    for x, y in ((-0.28, 0.8), (0.33, 0.72), (-0.14, 0.3), (0.22, 0.36), (-0.42, 0.44)):
        pen.ellipse(x, y, 0.06, 0.06, blue)
        pen.polygon([(x - 0.055, y + 0.02), (x, y + 0.16), (x + 0.055, y + 0.02)], blue)
        pen.ellipse(x - 0.015, y, 0.022, 0.026, light)
