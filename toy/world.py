"""The toy world: 128 x 128 cartoons of subjects in scenes, with captions in the words of DreamBench's prompts.

    python -m toy.world sheet.png               # draw a page of examples
    python -m toy.world --photos data/cat       # draw five photos of a new subject; the folder's name is its kind

A `Subject` is one individual, a `Picture` says what is drawn of it, and `draw(subject, picture, rng)` draws it.
Training uses the subjects of `training_subject(index)`. It never uses those of `reserved_subject(kind, index)`: they
have other seeds, and training skips every subject with the same kind, colours and marking.
"""

from __future__ import annotations

import argparse
import colorsys
import dataclasses
import functools
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from toy.animals import ANIMALS, OUTFITS, draw_animal
from toy.draw import CANVAS, MARKINGS, Color, Pen, Subject, shade
from toy.scenes import PLAIN, SCENES, starry_night, van_gogh
from toy.things import THINGS

SIZE = 128
VAN_GOGH = "in Vincent Van Gogh rendition"
# The scenes of DreamBench's prompts (25 + 25) and the paper's training prompts (8 + 8), for living subjects and things.
SHARED_SCENES = list(SCENES)[:10]
LIVE_SCENES = [
    *SHARED_SCENES,
    "with a China Great Wall in the background",
    "is swimming in a pool",
    "on a subway platform",
    "with the Statue of Liberty in the background",
    "on the Moon",
]
THING_SCENES = [scene for scene in SCENES if scene != "is swimming in a pool"]
LOOKS = ("red", "purple", "green", "shiny", "wet", "cube shaped")
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
COATS = ("brown", "black", "white", "grey", "orange", "golden")
PAINTS = ("red", "blue", "green", "yellow", "pink", "purple", "teal", "orange", "white", "black", "grey", "brown")
COLLARS = ("red", "blue", "green", "yellow", "pink", "purple", "teal", "orange")
# Captions contain these meaningless words, so that the base ignores them and draws the noun.
NONCE_WORDS = ("[V]", "[V]", "[V]", "sks", "zwx", "ohwx", "qkv", "xjy")
KINDS = (*ANIMALS, *THINGS)
RESERVED_PER_KIND = 4
EXAMPLE = 1  # of each kind's reserved subjects; the dog is white and brown, with grey ears and a green collar


@dataclass(frozen=True)
class Picture:
    """What is drawn of a subject: phrases of captions, or None."""

    scene: str | None = None
    outfit: str | None = None
    look: str | None = None
    van_gogh: bool = False


@dataclass(frozen=True)
class Named:
    """A subject, and the names of its three colours in captions."""

    subject: Subject
    main: str
    second: str
    accent: str

    @property
    def signature(self) -> tuple[str, ...]:
        """Subjects with equal signatures have the same caption and look nearly the same."""
        return (self.subject.kind, self.main, self.second, self.accent, self.subject.marking)


def is_live(kind: str) -> bool:
    """Return True for an animal."""
    return kind in ANIMALS


def jitter(color: Color, rng: random.Random) -> Color:
    """A similar colour: hue, saturation and value change a little."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    h = (h + rng.uniform(-0.018, 0.018)) % 1
    s = min(1.0, max(0.0, s * rng.uniform(0.85, 1.15)))
    v = min(1.0, max(0.0, v * rng.uniform(0.88, 1.08)))
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h, s, v))


def random_subject(kind: str, rng: random.Random) -> Named:
    """One individual of a kind."""
    palette = COATS if is_live(kind) else PAINTS
    main, second = rng.sample(palette, 2)
    accent = rng.choice([c for c in COLLARS if c not in (main, second)])
    subject = Subject(
        kind,
        *(jitter(COLORS[name], rng) for name in (main, second, accent)),
        marking=rng.choice(MARKINGS),
        width=rng.random(),
        height=rng.random(),
        detail=rng.random(),
        detail2=rng.random(),
        variant=rng.randrange(3),
    )
    return Named(subject, main, second, accent)


def reserved_subject(kind: str, index: int) -> Named:
    """An individual that training never sees; index is in 0 .. RESERVED_PER_KIND - 1."""
    return random_subject(kind, random.Random(f"reserved {kind} {index}"))


@functools.cache
def reserved_signatures() -> frozenset:
    """The signatures that no training subject may have."""
    return frozenset(reserved_subject(k, i).signature for k in KINDS for i in range(RESERVED_PER_KIND))


def training_subject(index: int) -> Named:
    """Subject `index` of the endless training stream: half of them are animals, most often dogs."""
    rng = random.Random(f"training {index}")
    while True:
        kind = rng.choices(ANIMALS, weights=(4, 3, 2, 2))[0] if rng.random() < 0.5 else rng.choice(list(THINGS))
        named = random_subject(kind, rng)
        if named.signature not in reserved_signatures():
            return named


def random_picture(kind: str, rng: random.Random) -> Picture:
    """A random picture of a subject: any phrase of the prompts, alone or combined."""
    live = is_live(kind)
    scene = rng.choice(LIVE_SCENES if live else THING_SCENES)
    outfit, look = rng.choice(list(OUTFITS)) if live else None, rng.choice(LOOKS)
    roll = rng.random()
    if roll < 0.10:
        return Picture()
    if roll < 0.14:
        return Picture(van_gogh=True)
    if roll < (0.26 if live else 0.34):
        return Picture(look=look, scene=scene if rng.random() < 0.3 else None)
    if live and roll < 0.58:
        return Picture(outfit=outfit, scene=scene if rng.random() < 0.45 else None)
    return Picture(scene=scene)


def article(word: str) -> str:
    """ "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def caption(named: Named, picture: Picture, rng: random.Random) -> str:
    """A caption in the words of the prompts; half of them also describe the subject's colours and marking."""
    subject, words = named.subject, []
    detailed = rng.random() < 0.5
    if picture.look:
        words.append(picture.look)
    if rng.random() < 0.15:
        words.append(rng.choice(NONCE_WORDS))
    if detailed and picture.look not in ("red", "purple", "green"):
        words.append(named.main)
    words.append(subject.kind)
    if detailed:
        marking = {
            "plain": "",
            "patch": f"{article(named.second)} {named.second} patch",
            "spots": f"{named.second} spots",
            "stripes": f"{named.second} stripes",
            "split": f"{article(named.second)} {named.second} half",
        }[subject.marking]
        trim = f"{article(named.accent)} {named.accent} {'collar' if is_live(subject.kind) else 'trim'}"
        if picture.look in ("red", "purple", "green"):
            marking = ""
        words.append(f"with {marking} and {trim}" if marking else f"with {trim}")
    words += [phrase for phrase in (picture.outfit, picture.scene) if phrase]
    if picture.van_gogh:
        words.append(VAN_GOGH)
    text = " ".join([article(words[0]), *words])
    plain = len(words) <= 3 and not (picture.outfit or picture.scene or picture.van_gogh)
    return f"a photo of {text}" if (plain and rng.random() < 0.5) or rng.random() < 0.05 else text


def draw(named: Named, picture: Picture, rng: random.Random) -> Image.Image:
    """One RGB picture of SIZE x SIZE pixels; `rng` decides place, pose and background."""
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    if picture.van_gogh:
        scene = starry_night(canvas, rng)
    else:
        scene = (SCENES[picture.scene] if picture.scene else rng.choice(PLAIN))(canvas, rng)
    layer = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    subject = recolored(named.subject, picture.look, rng)
    reach = 14 if picture.scene else 28  # the subject must not hide a landmark
    height = rng.uniform(155, 195) * (0.84 if subject.kind == "rabbit" else 1.0) * (0.9 if picture.outfit else 1.0)
    pen = Pen(layer, scene.x + rng.uniform(-reach, reach), scene.ground, height, rng.uniform(-6, 6), rng.random() < 0.5)
    if picture.look == "cube shaped":
        draw_cube(pen, layer, subject)
    else:
        draw_subject(pen, subject, picture.outfit)
    if picture.look == "shiny":
        gloss(pen, layer)
    if picture.look == "wet":
        drip(pen, canvas, layer)
    canvas.paste(layer, mask=layer)
    if scene.front:
        scene.front(canvas)
    if picture.van_gogh:
        canvas = van_gogh(canvas, rng)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_subject(pen: Pen, subject: Subject, outfit: str | None = None) -> None:
    """Draw only the subject. outfit: a phrase of OUTFITS, for animals."""
    if is_live(subject.kind):
        draw_animal(pen, subject, outfit)
    else:
        THINGS[subject.kind](pen, subject)


def recolored(subject: Subject, look: str | None, rng: random.Random) -> Subject:
    """The subject in red, purple or green, if that is the look; else the subject."""
    if look not in ("red", "purple", "green"):
        return subject
    main = jitter(COLORS[look], rng)
    return dataclasses.replace(subject, main=main, second=shade(main, 0.62))


def draw_cube(pen: Pen, layer: Image.Image, subject: Subject) -> None:
    """A box in the subject's colours, with the subject on its front."""
    main, w, h, d = subject.main, 0.40, 0.78, 0.16
    pen.polygon([(-w, 0), (w, 0), (w, h), (-w, h)], main)
    pen.polygon([(-w, h), (-w + d, h + d), (w + d, h + d), (w, h)], shade(main, 1.35))
    pen.polygon([(w, 0), (w + d, d), (w + d, h + d), (w, h)], shade(main, 0.6))
    pen.box(-w + 0.05, 0.05, w - 0.05, h - 0.05, shade(subject.second, 1.15))
    x, y = pen.place(0, 0.09)
    inner = Pen(layer, x, y, pen.scale * (0.56 if subject.kind == "rabbit" else 0.64), 0, pen.flip)
    inner.cos, inner.sin = pen.cos, pen.sin
    draw_subject(inner, subject)


def gloss(pen: Pen, layer: Image.Image) -> None:
    """Highlights on the subject, and two sparkles that reach over its outline."""
    over = Image.new("RGBA", layer.size, (0, 0, 0, 0))
    light = Pen(over, pen.x, pen.y, pen.scale)
    light.cos, light.sin = pen.cos, pen.sin
    light.line([(-0.3, 0.1), (0.02, 0.95)], (255, 255, 255), 0.055)
    light.line([(0.16, 0.0), (0.36, 0.5)], (255, 255, 255), 0.055)
    layer.paste(over, mask=Image.composite(over.getchannel("A"), Image.new("L", over.size), layer.getchannel("A")))
    for x, y, size in ((-0.34, 0.82, 0.15), (0.36, 0.56, 0.12)):
        for u, v in ((size, size * 0.16), (size * 0.16, size)):
            pen.polygon([(x - u, y), (x, y + v), (x + u, y), (x, y - v)], (255, 252, 214))


def drip(pen: Pen, canvas: Image.Image, layer: Image.Image) -> None:
    """A puddle under the subject, and big drops on it and next to it."""
    blue, light = (70, 150, 235), (190, 226, 255)
    puddle = Pen(canvas, pen.x, pen.y, pen.scale)
    puddle.ellipse(0, 0.01, 0.52, 0.085, blue)
    puddle.ellipse(-0.12, 0.02, 0.2, 0.03, light)
    for x, y in ((-0.3, 0.86), (0.33, 0.8), (-0.16, 0.34), (0.2, 0.42), (-0.42, 0.5), (0.45, 0.3)):
        pen.ellipse(x, y, 0.045, 0.05, blue)
        pen.polygon([(x - 0.04, y + 0.02), (x, y + 0.12), (x + 0.04, y + 0.02)], blue)
        pen.ellipse(x - 0.012, y, 0.014, 0.018, light)


def sample(index: int) -> tuple[Named, Picture, random.Random]:
    """Drawing `index` of the training stream, for `draw`. Four drawings in a row show one subject."""
    named, rng = training_subject(index // 4), random.Random(f"picture {index}")
    return named, random_picture(named.subject.kind, rng), rng


def sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, in rows of `columns`."""
    w, h = pictures[0].size
    page = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h), "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * w, i // columns * h))
    return page


def photos_of(kind: str, index: int) -> list[Image.Image]:
    """Five drawings of a reserved subject, in scenes that none of the paper's training prompts has."""
    named = reserved_subject(kind, index)
    scenes = (None, "in the snow", "with a mountain in the background", "on top of a wooden floor", None)
    return [draw(named, Picture(scene=scene), random.Random(f"photo {i}")) for i, scene in enumerate(scenes)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw examples of the toy world, or five photos of a new subject.")
    parser.add_argument("sheet", nargs="?", default="world.png", help="the page of examples (default: world.png)")
    parser.add_argument("--photos", type=Path, help="draw into this new folder, whose name is a kind, such as data/cat")
    args = parser.parse_args()
    if folder := args.photos:
        if (kind := folder.name.replace("_", " ")) not in KINDS:
            parser.error(f"--photos {folder}: there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            parser.error(f"--photos {folder} cannot be created ({error.strerror}): give a new folder")
        for i, photo in enumerate(photos_of(kind, EXAMPLE)):
            photo.save(folder / f"{i:02d}.png")
        return
    drawings = []
    for i in range(0, 384, 4):
        named, picture, rng = sample(i)
        text = caption(named, picture, rng)
        drawings.append(draw(named, picture, rng))
        ImageDraw.Draw(drawings[-1]).text((2, 1), text[:40], fill="black")
    sheet(drawings, 12).save(args.sheet)


if __name__ == "__main__":
    main()
