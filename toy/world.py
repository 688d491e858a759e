"""The toy world: 128 x 128 cartoons of subjects in scenes, with captions in the words of DreamBench and the paper.

A `Subject` is one point of a continuous family, a `Picture` is what is drawn of it, and `draw(subject, picture, rng)`
draws it. Training subjects come from `training_subject(index)`. `reserved_subject(kind, index)` never takes part in
any training: its seeds are others, and training skips each subject that shares its colours, collar and marking.

    python -m toy.world sheet.png               # look at it
    python -m toy.world --photos data/cat       # draw a subject, of the kind the folder is named after
"""

from __future__ import annotations

import argparse
import functools
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from toy.animals import ANIMALS, CROSSES, MOODS, VIEWS
from toy.draw import MARKINGS, Color, Subject
from toy.outfits import OUTFITS
from toy.picture import COLORS, LOOKS, Picture, jitter, paint
from toy.picture import SIZE as SIZE
from toy.scenes import SCENES
from toy.styles import PAINTERS
from toy.things import THINGS

VAN_GOGH = "Vincent Van Gogh"
# What DreamBench (25 + 25) and the paper's training prompts (8 + 8) ask of living subjects and of things.
LIVE_SCENES = [
    *list(SCENES)[:10],
    "with a China Great Wall in the background",
    "is swimming in a pool",
    "on a subway platform",
    "with the Statue of Liberty in the background",
    "on the Moon",
]
THING_SCENES = [scene for scene in SCENES if scene != "is swimming in a pool"]
# How each part of a Picture is asked for, in the words of DreamBench and of the paper's figures.
TEMPLATES = {
    "scene": "a {{V}} {{noun}} {}",
    "outfit": "a {{V}} {{noun}} {}",
    "look": "{a} {} {{V}} {{noun}}",
    "mood": "{a} {} {{V}} {{noun}}",
    "cross": "a cross of a {{V}} {{noun}} and a {}",
    "painter": "{} styled painting of a {{V}} {{noun}}",
}
COATS = ("brown", "black", "white", "grey", "orange", "golden")
PAINTS = ("red", "blue", "green", "yellow", "pink", "purple", "teal", "orange", "white", "black", "grey", "brown")
COLLARS = ("red", "blue", "green", "yellow", "pink", "purple", "teal", "orange")
# Words without a meaning here: a base model has always met such words and has learned to draw the noun all the same.
NONCE_WORDS = ("[V]", "[V]", "[V]", "sks", "zwx", "ohwx", "qkv", "xjy")
KINDS = (*ANIMALS, *THINGS)
RESERVED_PER_KIND = 4
EXAMPLE = 1  # of each kind's reserved subjects; data/dog is this one


@dataclass(frozen=True)
class Named:
    """A subject and the names of its colours, which captions use."""

    subject: Subject
    main: str
    second: str
    accent: str

    @property
    def signature(self) -> tuple[str, ...]:
        return (self.subject.kind, self.main, self.second, self.accent, self.subject.marking)


def is_live(kind: str) -> bool:
    return kind in ANIMALS


def random_subject(kind: str, rng: random.Random) -> Named:
    """One individual of a kind."""
    main, second = rng.sample(COATS if is_live(kind) else PAINTS, 2)
    accent = rng.choice([c for c in COLLARS if c not in (main, second)])
    colors: list[Color] = [jitter(COLORS[name], rng) for name in (main, second, accent)]
    marking, shares, variant = rng.choice(MARKINGS), [rng.random() for _ in range(4)], rng.randrange(3)
    return Named(Subject(kind, *colors, marking, *shares, variant), main, second, accent)


def reserved_subject(kind: str, index: int) -> Named:
    """An individual that no training ever sees; index in 0..RESERVED_PER_KIND-1."""
    return random_subject(kind, random.Random(f"reserved {kind} {index}"))


@functools.cache
def reserved_signatures() -> frozenset:
    """What training subjects may not share with any of the reserved ones."""
    return frozenset(reserved_subject(k, i).signature for k in KINDS for i in range(RESERVED_PER_KIND))


def training_subject(index: int) -> Named:
    """The index-th individual of the endless training stream: half of them alive, most often a dog."""
    rng = random.Random(f"training {index}")
    while True:
        kind = rng.choices(ANIMALS, weights=(4, 3, 2, 2))[0] if rng.random() < 0.5 else rng.choice(list(THINGS))
        named = random_subject(kind, rng)
        if named.signature not in reserved_signatures():
            return named


def random_picture(kind: str, rng: random.Random) -> Picture:
    """What to draw of a subject: each phrase of the benchmark and each skill, some with a scene."""
    scene = rng.choice(LIVE_SCENES if is_live(kind) else THING_SCENES)
    if is_live(kind):
        shares = {"scene": 30, "outfit": 22, "look": 12, "mood": 10, "view": 8, "painter": 6, "cross": 5, "": 7}
    else:
        shares = {"scene": 62, "look": 20, "painter": 8, "": 10}
    part = rng.choices(list(shares), weights=shares.values())[0]
    choices = {"outfit": OUTFITS, "look": LOOKS, "mood": MOODS, "view": VIEWS, "painter": PAINTERS, "cross": CROSSES}
    if part in ("scene", ""):
        return Picture(scene=scene if part else None)
    picture = {part: rng.choice([phrase for phrase in choices[part] if phrase != kind])}
    if part != "painter" and rng.random() < 0.35:
        picture["scene"] = scene
    return Picture(**picture)


def sample(index: int) -> tuple[Named, Picture, random.Random]:
    """The index-th drawing of the training stream: four drawings in a row show one subject."""
    named, rng = training_subject(index // 4), random.Random(f"picture {index}")
    return named, random_picture(named.subject.kind, rng), rng


def draw(named: Named, picture: Picture, rng: random.Random) -> Image.Image:
    """One RGB picture, SIZE x SIZE; place, pose and background vary with `rng`."""
    return draw_with_mask(named, picture, rng)[0]


def draw_with_mask(named: Named, picture: Picture, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """The picture, and the subject's layer in it: 255 where the subject is, 0 elsewhere, SIZE x SIZE."""
    return paint(named.subject, picture, rng)


# Words


def templates(live: bool) -> dict[str, Picture]:
    """Each thing that can be asked of a living subject or of a thing, as a prompt with {V} and {noun}.

    Prompts that ask for the same drawing have the same Picture.
    """
    first = {outfit: phrase for phrase, outfit in reversed(OUTFITS.items())}  # two phrases may name one outfit
    known = {"scene": LIVE_SCENES if live else THING_SCENES, "look": LOOKS, "painter": PAINTERS}
    if live:
        known |= {"outfit": OUTFITS, "mood": MOODS, "cross": CROSSES}
    found = {}
    for part, phrases in known.items():
        for phrase in phrases:
            prompt = TEMPLATES[part].format(phrase, a=article(phrase))
            found[prompt] = Picture(**{part: first.get(OUTFITS.get(phrase), phrase)})
    found["a {V} {noun} in Vincent Van Gogh rendition"] = Picture(painter=VAN_GOGH)
    for view in VIEWS if live else ():
        at = view.startswith("looking")
        found[f"a {{V}} {{noun}} {view}" if at else f"a {view} of a {{V}} {{noun}}"] = Picture(view=view)
    return found


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def description(named: Named, colored: bool) -> str:
    """What tells this subject from others: its marking and its collar or trim."""
    trim = f"{article(named.accent)} {named.accent} {'collar' if is_live(named.subject.kind) else 'trim'}"
    a_second = f"{article(named.second)} {named.second}"
    marking = {
        "plain": "",
        "patch": f"{a_second} patch and ",
        "spots": f"{named.second} spots and ",
        "stripes": f"{named.second} stripes and ",
        "split": f"{a_second} half and ",
    }[named.subject.marking]
    return f"with {'' if colored else marking}{trim}"


def caption(named: Named, picture: Picture, rng: random.Random) -> str:
    """The picture in DreamBench's and the paper's words, half of the time with what tells this subject from others."""
    colored, detailed = picture.look in COLORS, rng.random() < 0.5
    words = [picture.look or picture.mood or ""]
    words += [rng.choice(NONCE_WORDS)] if rng.random() < 0.15 else []
    words += [named.main] if detailed and not colored else []
    words = [word for word in (*words, named.subject.kind) if word]
    text = " ".join([article(words[0]), *words])
    if picture.cross:
        text = f"a cross of {text} and a {picture.cross}"
    elif detailed:
        text += f" {description(named, colored)}"
    if picture.view:
        text = f"{text} {picture.view}" if picture.view.startswith("looking") else f"a {picture.view} of {text}"
    text = " ".join(part for part in (text, picture.outfit, picture.scene) if part)
    if picture.painter == VAN_GOGH and rng.random() < 0.5:
        return f"{text} in Vincent Van Gogh rendition"
    if picture.painter:
        return f"{picture.painter} styled painting of {text}"
    return f"a photo of {text}" if rng.random() < (0.5 if picture == Picture() else 0.05) else text


# To look at it


def sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows."""
    w, h = pictures[0].size
    page = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h), "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * w, i // columns * h))
    return page


def photos_of(kind: str, index: int) -> list[Image.Image]:
    """Five drawings of a reserved subject, in scenes that no training prompt of the paper asks for."""
    named = reserved_subject(kind, index)
    scenes = (None, "in the snow", "with a mountain in the background", "on top of a wooden floor", None)
    return [draw(named, Picture(scene=scene), random.Random(f"photo {i}")) for i, scene in enumerate(scenes)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Look at the toy world, or draw the five photos of a new subject.")
    parser.add_argument("sheet", nargs="?", default="world.png", help="where the sheet goes (default: world.png)")
    parser.add_argument("--photos", type=Path, help="a new folder named after a kind, such as data/cat: draw there")
    args = parser.parse_args()
    if folder := args.photos:
        if (kind := folder.name.replace("_", " ")) not in KINDS:
            parser.error(f"--photos {folder}: the world has no {kind!r}, but {', '.join(KINDS)}")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            parser.error(f"--photos {folder} cannot be made ({error.strerror}): name a new folder")
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
