"""Measure weights/toy on drawings that training has not seen and on pictures that the base generates.

    python -m toy.check                        # everything: minutes on a CPU, most of them for the base
    python -m toy.check --only vae clip        # some of vae, clip, align, dino, base; base needs CLIP's weights too

Most values have a bar, the least acceptable value. The exit status is 0 if all bars hold, 1 if one does not, 2 if
weights are missing, 130 after Ctrl-C.

- Zero-shot: CLIP selects the nearest text. For the kind the texts are "a photo of a {kind}"; for the phrase, the 33
  prompts of subject.py for that kind.
- Retrieval: of 51 drawings, the nearest to a drawing of a subject should be the other one of the same subject. Looks
  that hide the subject's colours or shape (red, purple, green, cube shaped, Van Gogh) are left out.
"""

from __future__ import annotations

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
from support.header import GUIDANCE, SOLVER_STEPS
from support.settings import count, seed_number
from toy import world
from toy.networks import WEIGHTS

PARTS = ("vae", "clip", "align", "dino", "base")
QUERIES, OTHERS, HIDING = 500, 50, ("red", "purple", "green", "cube shaped")
Row = tuple[str, float, float | None, str]  # what, value, bar (None: only reported), unit


def prompts_of(kind: str) -> dict[str, world.Picture]:
    """Each prompt of subject.py for a kind, without the token, and the picture that it asks for."""
    living = "live" if world.is_live(kind) else "thing"
    templates = DREAMBENCH_PROMPTS[living] + TRAINING_PROMPTS[living]
    return {template.replace("{V} ", "").format(noun=kind): picture_of(template) for template in templates}


def picture_of(template: str) -> world.Picture:
    """The picture that a prompt of subject.py asks for. Raises KeyError if the world cannot draw its phrase."""
    before, after = template.split("{V} {noun}")
    phrase = after.strip() or before.removeprefix("a ").strip()
    if phrase == world.VAN_GOGH:
        return world.Picture(van_gogh=True)
    for name, known in (("scene", world.SCENES), ("outfit", world.OUTFITS), ("look", world.LOOKS)):
        if phrase in known:
            return world.Picture(**{name: phrase})
    raise KeyError(phrase)


def random_prompts(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """`count` random pairs of a kind and one of its prompts."""
    return [(kind, rng.choice(list(prompts_of(kind)))) for kind in rng.choices(world.KINDS, k=count)]


def check_vae(vae: VAE, count: int = 512) -> Iterator[Row]:
    """PSNR of reconstructed drawings. They differ by 2 dB, so the mean of 512 has an error of 0.1."""
    batch, psnr = 16, 0.0
    for i in tqdm(range(0, count, batch), "VAE", leave=False):
        indices = [10_000_000 + 4 * (i + j) for j in range(batch)]  # far beyond the training drawings
        pixels = to_pixels([world.draw(*world.sample(index)) for index in indices])
        again = ((vae.decode(vae.encode(pixels)[0]) / 2 + 0.5).clamp(0, 1) * 255).round() / 255
        psnr += -10 * torch.log10((again - (pixels / 2 + 0.5)).square().mean((1, 2, 3))).sum().item() / count
    yield f"VAE: PSNR of {count} drawings", psnr, 28, "dB"


def embedded(embed: Callable[[list], Tensor], items: Sequence, name: str, batch: int = 32) -> Tensor:
    """The features of all items, (n, width), of length 1."""
    starts = tqdm(range(0, len(items), batch), desc=name, leave=False)
    return F.normalize(torch.cat([embed(items[start : start + batch]) for start in starts]), dim=1)


def seen_by_clip(
    clip: CLIP, tokenizer: CLIPTokenizer, images: list[Image.Image], kinds: Sequence[str]
) -> list[tuple[str, str]]:
    """What CLIP sees in each picture: the kind, and the prompt among those of the true kind."""
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
    """The rows for kind and phrase; before each, print the most frequent mistakes."""
    for i, what in enumerate(("kind", "phrase")):
        wrong = Counter(f"{a[i]} (seen: {s[i]})" for a, s in zip(asked, seen, strict=True) if a[i] != s[i])
        if wrong:
            print(f"  {name}, wrong {what}: {', '.join(f'{n} x {text}' for text, n in wrong.most_common(3))}")
        yield f"{name}: {what} of {len(asked)}", 100 * (len(asked) - wrong.total()) / len(asked), bars[i], "%"


def check_clip(clip: CLIP, tokenizer: CLIPTokenizer, seed: int, count: int = 1500) -> Iterator[Row]:
    """Zero-shot on true drawings."""
    asked = random_prompts(count, rng := random.Random(f"check clip {seed}"))
    images = [world.draw(world.random_subject(kind, rng), prompts_of(kind)[prompt], rng) for kind, prompt in asked]
    seen = seen_by_clip(clip, tokenizer, images, [kind for kind, _ in asked])
    yield from zero_shot("CLIP", asked, seen, (95, 95))


def check_base(
    base: StableDiffusion, clip: CLIP, tokenizer: CLIPTokenizer, settings: dict, seed: int, count: int, path: Path
) -> Iterator[Row]:
    """Zero-shot on pictures that the base generates; they are written to `path`, each with its prompt."""
    asked = random_prompts(count, random.Random(f"check base {seed}"))
    kinds, prompts = zip(*asked, strict=True)
    seeds = range(1000 * seed, 1000 * seed + count)
    steps, guidance = settings["solver_steps"], settings["guidance"]
    with tqdm(total=count, desc="base", leave=False) as bar:
        images = base.generate(prompts, seeds, steps=steps, guidance=guidance, on_batch=bar.update)
    seen = seen_by_clip(clip, tokenizer, images, kinds)
    right = [a == s for a, s in zip(asked, seen, strict=True)]
    world.sheet(list(map(tile, images, prompts, right)), columns=min(12, count)).save(path)
    yield from zero_shot("base", asked, seen, (85, 80))


def tile(image: Image.Image, prompt: str, right: bool) -> Image.Image:
    """A picture with its prompt below it, in red if CLIP sees something else."""
    page, color = Image.new("RGB", (image.width + 4, image.height + 50), "white"), "black" if right else "red"
    page.paste(image, (2, 0))
    ImageDraw.Draw(page).text((3, image.height), textwrap.fill(prompt, 22), fill=color, spacing=0)
    return page


def draw_new(kind: str, rng: random.Random, count: int = 1) -> list[Image.Image]:
    """`count` different drawings of one new subject, in looks that show its colours and shape."""
    named, pictures = world.random_subject(kind, rng), []
    while len(pictures) < count:
        picture = world.random_picture(kind, rng)
        if not (picture in pictures or picture.van_gogh or picture.look in HIDING):
            pictures.append(picture)
    return [world.draw(named, picture, rng) for picture in pictures]


def check_retrieval(
    name: str, embed: Callable[[list], Tensor], seed: int, count: int = QUERIES, rivals: int = OTHERS
) -> Iterator[Row]:
    """How often a drawing is nearer to its partner than to `rivals` others: of any kind, and of its own kind."""
    kinds = (rng := random.Random(f"check retrieval {seed}")).choices(world.KINDS, k=count)
    queries, partners = zip(*(draw_new(kind, rng, 2) for kind in kinds), strict=True)
    others = [draw_new(kind, rng)[0] for kind in tqdm(world.KINDS, "drawing", leave=False) for _ in range(rivals)]
    queries, partners, others = (embedded(embed, part, name) for part in (queries, partners, others))
    own, others = (queries * partners).sum(1), queries @ others.T  # cosines; the others are in blocks of one kind
    some = [rng.sample(range(others.shape[1]), rivals) for _ in kinds]
    same = [range(rivals * i, rivals * (i + 1)) for i in map(world.KINDS.index, kinds)]
    for what, columns, bar in (("others", some, 90), ("others of its kind", same, None)):
        right = own > others.gather(1, torch.tensor([list(c) for c in columns])).max(1).values
        yield f"{name}: the subject among {rivals} {what}", 100 * right.sum().item() / count, bar, "%"


def checks(weights: Path, only: Sequence[str], seed: int, prompts: int, sheet: Path) -> Iterator[Row]:
    """Measure the parts `only`. All networks are loaded first: missing weights are reported before any work.

    prompts: how many pictures the base generates. sheet: the file for them.
    """
    rows = []
    if {"clip", "base"} & set(only):
        clip = CLIP.from_pretrained(weights / "metrics" / "clip")
        tokenizer = CLIPTokenizer.from_pretrained(weights / "metrics" / "clip")
    if "vae" in only:
        rows.append(check_vae(VAE.from_pretrained(weights / "vae")))
    if "clip" in only:
        rows.append(check_clip(clip, tokenizer, seed))
    if "align" in only:
        align = ALIGN.from_pretrained(weights / "reward")
        rows.append(check_retrieval("ALIGN", lambda part: align.image_features(align.preprocess(part)), seed))
    if "dino" in only:
        dino = DINO.from_pretrained(weights / "metrics" / "dino")
        rows.append(check_retrieval("DINO", lambda part: dino(dino.preprocess(part)), seed))
    if "base" in only:
        base, settings = StableDiffusion.from_pretrained(weights), recommended(weights)[0]
        settings = {"solver_steps": SOLVER_STEPS, "guidance": GUIDANCE} | settings
        rows.append(check_base(base, clip, tokenizer, settings, seed, prompts, sheet))
    return chain(*rows)


def report(rows: Iterable[Row]) -> int:
    """Print each row and whether its bar holds; return the exit status."""
    status = 0
    for what, value, bar, unit in rows:
        verdict = "" if bar is None else f"bar {bar} {unit}  {'pass' if value >= bar else 'FAIL'}"
        print(f"{what:46}{value:6.2f} {unit:2}   {verdict}".rstrip(), flush=True)
        status |= bar is not None and value < bar
    return int(status)


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--prompts", type=count, default=120, help="pictures that the base generates (default: 120)")
    add("--seed", type=seed_number, default=0, help="of subjects, prompts and noise (default: 0)")
    add("--sheet", type=flags.path, default=Path("check.png"), help="file for the base's pictures (default: check.png)")
    add("--weights", type=flags.path, default=WEIGHTS, help="the folder to measure (default: weights/toy)")
    args = parser.parse_args()
    if Image.registered_extensions().get(args.sheet.suffix.lower()) not in Image.SAVE:
        parser.error(f"--sheet {args.sheet} should end as pictures do, such as .png")
    if not args.sheet.parent.is_dir():
        parser.error(f"the folder of --sheet {args.sheet} does not exist")

    def work() -> int:
        return report(checks(args.weights, args.only, args.seed, args.prompts, args.sheet))

    return flags.guarded(work, lambda: "close other programs")


if __name__ == "__main__":
    sys.exit(main())
