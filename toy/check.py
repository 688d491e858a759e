"""Measure weights/toy against its bars, on drawings that no training has seen and on pictures that the base draws.

    python -m toy.check                        # everything, minutes on a CPU, most of them for the base
    python -m toy.check --only vae clip        # some of vae, clip, align, dino, base (which needs clip's weights too)

Zero-shot: CLIP picks the nearest text, for the kind among "a photo of a {kind}", for the phrase among the 33 prompts
that subject.py holds for that kind. Retrieval: the nearest of 51 drawings to a drawing of a subject should be the other
one of the same subject. Looks that hide who it is (red, purple, green, cube shaped, Van Gogh) take no part in it.
The exit status is 0 if every bar holds, 1 if one does not, 2 if weights are missing, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from model.align import ALIGN
from model.clip import CLIP
from model.dino import DINO
from model.stable_diffusion import StableDiffusion, recommended, to_pixels
from model.tokenizer import CLIPTokenizer
from model.vae import VAE
from subject import DREAMBENCH_PROMPTS, TRAINING_PROMPTS
from support import flags
from support.settings import count, seed_number
from toy import world
from toy.networks import WEIGHTS

PARTS = ("vae", "clip", "align", "dino", "base")
QUERIES, OTHERS, HIDING = 500, 50, ("red", "purple", "green", "cube shaped")
Row = tuple[str, float, float | None, str]  # what, measured, bar (None: only reported), unit


def prompts_of(kind: str) -> dict[str, world.Picture]:
    """Every prompt of subject.py for a kind, without the unique token, and what the world draws for it."""
    living = "live" if world.is_live(kind) else "thing"
    templates = DREAMBENCH_PROMPTS[living] + TRAINING_PROMPTS[living]
    return {template.replace("{V} ", "").format(noun=kind): picture_of(template) for template in templates}


def picture_of(template: str) -> world.Picture:
    """What the world draws for a prompt of subject.py. Raises KeyError if it has no drawing for the phrase."""
    before, after = template.split("{V} {noun}")
    phrase = after.strip() or before.removeprefix("a ").strip()
    if phrase == world.VAN_GOGH:
        return world.Picture(van_gogh=True)
    for name, known in (("scene", world.SCENES), ("outfit", world.OUTFITS), ("look", world.LOOKS)):
        if phrase in known:
            return world.Picture(**{name: phrase})
    raise KeyError(phrase)


def random_prompts(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Pairs of a kind and one of its prompts."""
    return [(kind, rng.choice(list(prompts_of(kind)))) for kind in rng.choices(world.KINDS, k=count)]


def check_vae(vae: VAE) -> Iterator[Row]:
    count, batch, psnr = 512, 16, 0.0  # one drawing differs from the next by 2 dB: of 64 the mean is only good to 0.3
    for i in tqdm(range(0, count, batch), "VAE", leave=False):
        indices = [10_000_000 + 4 * (i + j) for j in range(batch)]  # far beyond what is trained on
        pixels = to_pixels([world.draw(*world.sample(index)) for index in indices])
        again = ((vae.decode(vae.encode(pixels)[0]) / 2 + 0.5).clamp(0, 1) * 255).round() / 255
        psnr += -10 * torch.log10((again - (pixels / 2 + 0.5)).square().mean((1, 2, 3))).sum().item() / count
    yield f"VAE: PSNR of {count} drawings", psnr, 28, "dB"


def embedded(embed: Callable[[list], Tensor], items: Sequence, name: str, batch: int = 32) -> Tensor:
    """(n, width) of length 1."""
    starts = tqdm(range(0, len(items), batch), desc=name, leave=False)
    return F.normalize(torch.cat([embed(items[start : start + batch]) for start in starts]), dim=1)


def seen_by_clip(clip: CLIP, images: list[Image.Image], kinds: Sequence[str]) -> list[tuple[str, str]]:
    """The kind that CLIP sees in each picture and, given the true kind, the prompt."""
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "metrics" / "clip")
    pictures = embedded(lambda part: clip.image_features(clip.preprocess(part)), images, "CLIP")
    photos = {f"a photo of a {kind}": kind for kind in world.KINDS}
    prompts = {kind: list(prompts_of(kind)) for kind in world.KINDS}
    texts = [*photos, *(prompt for of_kind in prompts.values() for prompt in of_kind)]
    rows = embedded(lambda part: clip.text_features(tokenizer(part)), texts, "CLIP")
    feature = dict(zip(texts, rows, strict=True))

    def nearest(picture: Tensor, candidates: Iterable[str]) -> str:
        return max(candidates, key=lambda text: float(picture @ feature[text]))

    return [(photos[nearest(p, photos)], nearest(p, prompts[kind])) for p, kind in zip(pictures, kinds, strict=True)]


def zero_shot(name: str, asked: list[tuple[str, str]], seen: list[tuple[str, str]], bars: tuple) -> Iterator[Row]:
    """Two rows, each after a line about what was most often taken for something else."""
    for i, what in enumerate(("kind", "phrase")):
        wrong = Counter(f"{a[i]} (seen: {s[i]})" for a, s in zip(asked, seen, strict=True) if a[i] != s[i])
        if wrong:
            print(f"  {name}, wrong {what}: {', '.join(f'{n} x {text}' for text, n in wrong.most_common(3))}")
        yield f"{name}: {what} of {len(asked)}", 100 * (len(asked) - wrong.total()) / len(asked), bars[i], "%"


def check_clip(clip: CLIP, seed: int) -> Iterator[Row]:
    asked = random_prompts(1500, rng := random.Random(f"check clip {seed}"))
    images = [world.draw(world.random_subject(kind, rng), prompts_of(kind)[prompt], rng) for kind, prompt in asked]
    yield from zero_shot("CLIP", asked, seen_by_clip(clip, images, [kind for kind, _ in asked]), (95, 95))


def check_base(base: StableDiffusion, clip: CLIP, seed: int, count: int, path: Path) -> Iterator[Row]:
    asked = random_prompts(count, random.Random(f"check base {seed}"))
    kinds, prompts = zip(*asked, strict=True)
    settings, seeds = recommended(WEIGHTS)[0], range(1000 * seed, 1000 * seed + count)
    steps, guidance = settings["solver_steps"], settings["guidance"]
    with tqdm(total=count, desc="base", leave=False) as bar:
        images = base.generate(prompts, seeds, steps=steps, guidance=guidance, on_batch=bar.update)
    seen = seen_by_clip(clip, images, kinds)
    right = [a == s for a, s in zip(asked, seen, strict=True)]
    world.sheet(list(map(tile, images, prompts, right)), columns=min(12, count)).save(path)
    yield from zero_shot("base", asked, seen, (85, 80))


def tile(image: Image.Image, prompt: str, right: bool) -> Image.Image:
    """A picture with its prompt below, in red if CLIP sees something else in it."""
    page, color = Image.new("RGB", (image.width + 4, image.height + 50), "white"), "black" if right else "red"
    page.paste(image, (2, 0))
    ImageDraw.Draw(page).text((3, image.height), textwrap.fill(prompt, 22), fill=color, spacing=0)
    return page


def draw_new(kind: str, rng: random.Random, count: int = 1) -> list[Image.Image]:
    """`count` different pictures of one new subject in which it can be told from others."""
    named, pictures = world.random_subject(kind, rng), []
    while len(pictures) < count:
        picture = world.random_picture(kind, rng)
        if not (picture in pictures or picture.van_gogh or picture.look in HIDING):
            pictures.append(picture)
    return [world.draw(named, picture, rng) for picture in pictures]


def check_retrieval(name: str, embed: Callable[[list], Tensor], seed: int) -> Iterator[Row]:
    """How often a query is nearer to its partner than to all others: of any kind, and of its own."""
    kinds = (rng := random.Random(f"check retrieval {seed}")).choices(world.KINDS, k=QUERIES)
    queries, partners = zip(*(draw_new(kind, rng, 2) for kind in kinds), strict=True)
    others = [draw_new(kind, rng)[0] for kind in tqdm(world.KINDS, "drawing", leave=False) for _ in range(OTHERS)]
    queries, partners, others = (embedded(embed, part, name) for part in (queries, partners, others))
    own, others = (queries * partners).sum(1), queries @ others.T  # cosines; the others stand in blocks of one kind
    some = [rng.sample(range(others.shape[1]), OTHERS) for _ in kinds]
    same = [range(OTHERS * i, OTHERS * (i + 1)) for i in map(world.KINDS.index, kinds)]
    for what, columns, bar in (("others", some, 90), ("others of its kind", same, None)):
        right = own > others.gather(1, torch.tensor([list(c) for c in columns])).max(1).values
        yield f"{name}: the subject among {OTHERS} {what}", 100 * right.sum().item() / QUERIES, bar, "%"


def checks(only: Sequence[str], seed: int, prompts: int, sheet: Path) -> Iterator[Row]:
    """Loads everything first, so that what is missing is known at once; the generators then measure, one by one."""
    clip, rows = CLIP.from_pretrained(WEIGHTS / "metrics" / "clip") if {"clip", "base"} & set(only) else None, []
    if "vae" in only:
        rows.append(check_vae(VAE.from_pretrained(WEIGHTS / "vae")))
    if "clip" in only:
        rows.append(check_clip(clip, seed))
    if "align" in only:
        align = ALIGN.from_pretrained(WEIGHTS / "reward")
        rows.append(check_retrieval("ALIGN", lambda part: align.image_features(align.preprocess(part)), seed))
    if "dino" in only:
        dino = DINO.from_pretrained(WEIGHTS / "metrics" / "dino")
        rows.append(check_retrieval("DINO", lambda part: dino(dino.preprocess(part)), seed))
    if "base" in only:
        rows.append(check_base(StableDiffusion.from_pretrained(WEIGHTS), clip, seed, prompts, sheet))
    return chain(*rows)


def run(args: argparse.Namespace) -> int:
    status = 0
    for what, value, bar, unit in checks(args.only, args.seed, args.prompts, args.sheet):
        verdict = "" if bar is None else f"bar {bar} {unit}  {'pass' if value >= bar else 'FAIL'}"
        print(f"{what:46}{value:6.2f} {unit:2}   {verdict}".rstrip(), flush=True)
        status |= "FAIL" in verdict
    return status


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("--prompts", type=count, default=120, help="pictures the base draws (default: 120)")
    add("--seed", type=seed_number, default=0, help="of subjects, prompts and noise (default: 0)")
    add("--sheet", type=flags.path, default=Path("check.png"), help="the base's pictures (default: check.png)")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    args = parser.parse_args()
    if Image.registered_extensions().get(args.sheet.suffix.lower()) not in Image.SAVE:
        parser.error(f"--sheet {args.sheet} should end as pictures do, such as .png")
    if not args.sheet.parent.is_dir():
        parser.error(f"the folder of --sheet {args.sheet} does not exist")
    return flags.guarded(lambda: run(args), lambda: "end other programs", interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
