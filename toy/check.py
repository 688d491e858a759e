"""Measure weights/toy on drawings that training has not seen and on pictures that the base generates.

    python -m toy.check                        # everything: minutes on a CPU, most of them for the base
    python -m toy.check --only vae clip        # some of vae, clip, align, dino, base; base needs CLIP's weights too

Most values have a bar, the least acceptable value. The exit status is 0 if all bars hold, 1 if one does not, 2 if
weights are missing, 130 after Ctrl-C.

- VAE: the PSNR of reconstructed drawings, over the whole picture and over the subject's own layer.
- Zero-shot: CLIP selects the nearest text. For the kind the texts are "a photo of a {kind}"; for the phrase, all
  prompts of world.templates for that kind, which are subject.py's and the skills'. Each skill has a row, and the worst
  kind.
- Retrieval: of 51 drawings, the nearest to a drawing of a subject should be the other one of the same subject. Looks
  that hide the subject's colours or shape (colours, cube shaped, painters) are left out.
"""

from __future__ import annotations

import random
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
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
from support import flags
from support.header import GUIDANCE, SOLVER_STEPS
from support.settings import count, seed_number
from toy import world
from toy.networks import WEIGHTS
from toy.picture import RECOLORS

PARTS = ("vae", "clip", "align", "dino", "base")
QUERIES, OTHERS, HIDING = 500, 50, (*RECOLORS, "cube shaped")
FRESH = 10_000_000  # drawings of the stream from here on are far beyond those of the trainings
Row = tuple[str, float, float | None, str]  # what, value, bar (None: only reported), unit


def prompts_of(kind: str) -> dict[str, world.Picture]:
    """Each prompt for a kind, without the token, and the picture that it asks for."""
    known = world.templates(world.is_live(kind))
    return {t.replace("{V} ", "").format(noun=kind): p for t, p in known.items() if p.cross != kind}


def balanced_prompts(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """`count` pairs of a kind and one of its prompts: all kinds and skills in turn, living kinds twice as often."""
    kinds = [kind for kind in world.KINDS for _ in range(2 if world.is_live(kind) else 1)]
    pairs = []
    for i in range(count):
        kind, by_skill = kinds[i % len(kinds)], defaultdict(list)
        for prompt, picture in prompts_of(kind).items():
            by_skill[picture.part].append(prompt)
        pairs.append((kind, rng.choice([*by_skill.values()][i // len(kinds) % len(by_skill)])))
    return pairs


def check_vae(vae: VAE, count: int = 512) -> Iterator[Row]:
    """PSNR of reconstructed drawings: all of them, and their subjects. They differ by 2 dB; the mean of 512 by 0.1."""
    batch, overall, subject = 16, [], []
    for i in tqdm(range(0, count, batch), "VAE", leave=False):
        drawn = [world.draw_with_mask(*world.sample(FRESH + 4 * (i + j))) for j in range(batch)]
        pictures, masks = zip(*drawn, strict=True)
        pixels, mask = to_pixels(pictures), torch.from_numpy(np.stack(masks))[:, None] / 255
        again = ((vae.decode(vae.encode(pixels)[0]) / 2 + 0.5).clamp(0, 1) * 255).round() / 255
        error = (again - (pixels / 2 + 0.5)).square().mean(1, keepdim=True)
        overall.append(-10 * error.mean((1, 2, 3)).log10())
        subject.append(-10 * ((error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).log10())
    yield f"VAE: PSNR of {count} drawings", torch.cat(overall).mean().item(), 30, "dB"
    yield f"VAE: PSNR at the subject of {count} drawings", torch.cat(subject).mean().item(), 28, "dB"


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


def agree(asked: list[tuple[str, str]], seen: list[tuple[str, str]]) -> tuple[list[bool], list[bool]]:
    """For each picture, True where the kind is the same, and where both prompts ask for the same drawing."""
    kinds, phrases = [], []
    for (kind, prompt), (other_kind, other_prompt) in zip(asked, seen, strict=True):
        pictures = prompts_of(kind)
        kinds.append(kind == other_kind)
        phrases.append(pictures[prompt] == pictures[other_prompt])
    return kinds, phrases


def shares(groups: list[str], right: list[bool]) -> dict[str, float]:
    """How many per cent are right in each group."""
    hits = defaultdict(list)
    for group, hit in zip(groups, right, strict=True):
        hits[group].append(100 * hit)
    return {group: statistics.mean(values) for group, values in hits.items()}


def zero_shot(name: str, asked: list[tuple[str, str]], seen: list[tuple[str, str]], bars: tuple) -> Iterator[Row]:
    """Rows for kind, phrase, the worst kind and each skill's phrase, with these four bars; print frequent mistakes."""
    verdicts = agree(asked, seen)
    for i, (what, right) in enumerate(zip(("kind", "phrase"), verdicts, strict=True)):
        wrong = Counter(f"{a[i]} (seen: {s[i]})" for a, s, hit in zip(asked, seen, right, strict=True) if not hit)
        if wrong:
            print(f"  {name}, wrong {what}: {', '.join(f'{n} x {text}' for text, n in wrong.most_common(3))}")
        yield f"{name}: {what} of {len(asked)}", 100 * statistics.mean(right), bars[i], "%"
    of_kinds = shares([kind for kind, _ in asked], verdicts[0])
    worst = min(of_kinds, key=of_kinds.get)
    yield f"{name}: the worst kind, {worst}", of_kinds[worst], bars[2], "%"
    skills = [prompts_of(kind)[prompt].part for kind, prompt in asked]
    for part, value in shares(skills, verdicts[1]).items():
        yield f"{name}: phrase, {part} of {skills.count(part)}", value, bars[3], "%"


def check_clip(clip: CLIP, tokenizer: CLIPTokenizer, seed: int, count: int = 1500) -> Iterator[Row]:
    """Zero-shot on true drawings."""
    asked = balanced_prompts(count, rng := random.Random(f"check clip {seed}"))
    images = [world.draw(world.random_subject(kind, rng), prompts_of(kind)[prompt], rng) for kind, prompt in asked]
    seen = seen_by_clip(clip, tokenizer, images, [kind for kind, _ in asked])
    yield from zero_shot("CLIP", asked, seen, (95, 95, None, None))


def check_base(
    base: StableDiffusion, clip: CLIP, tokenizer: CLIPTokenizer, settings: dict, seed: int, count: int, path: Path
) -> Iterator[Row]:
    """Zero-shot on pictures that the base generates; they are written to `path`, each with its prompt."""
    asked = balanced_prompts(count, random.Random(f"check base {seed}"))
    kinds, prompts = zip(*asked, strict=True)
    seeds = range(1000 * seed, 1000 * seed + count)
    steps, guidance = settings["solver_steps"], settings["guidance"]
    with tqdm(total=count, desc="base", leave=False) as bar:
        images = base.generate(prompts, seeds, steps=steps, guidance=guidance, on_batch=bar.update)
    seen = seen_by_clip(clip, tokenizer, images, kinds)
    right = map(all, zip(*agree(asked, seen), strict=True))
    world.sheet(list(map(tile, images, prompts, right)), columns=min(20, count)).save(path)
    yield from zero_shot("base", asked, seen, (95, 97, 85, 80))


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
        if not (picture in pictures or picture.painter or picture.look in HIDING):
            pictures.append(picture)
    return [world.draw(named, picture, rng) for picture in pictures]


def check_retrieval(
    name: str, embed: Callable[[list], Tensor], seed: int, bars: tuple, count: int = QUERIES, rivals: int = OTHERS
) -> Iterator[Row]:
    """How often a drawing is nearer to its partner than to `rivals` others: of any kind, and of its own; two bars."""
    kinds = (rng := random.Random(f"check retrieval {seed}")).choices(world.KINDS, k=count)
    queries, partners = zip(*(draw_new(kind, rng, 2) for kind in kinds), strict=True)
    others = [draw_new(kind, rng)[0] for kind in tqdm(world.KINDS, "drawing", leave=False) for _ in range(rivals)]
    queries, partners, others = (embedded(embed, part, name) for part in (queries, partners, others))
    own, others = (queries * partners).sum(1), queries @ others.T  # cosines; the others are in blocks of one kind
    some = [rng.sample(range(others.shape[1]), rivals) for _ in kinds]
    same = [range(rivals * i, rivals * (i + 1)) for i in map(world.KINDS.index, kinds)]
    for what, columns, bar in (("others", some, bars[0]), ("others of its kind", same, bars[1])):
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
        rows.append(check_retrieval("ALIGN", lambda part: align.image_features(align.preprocess(part)), seed, (90, 75)))
    if "dino" in only:
        dino = DINO.from_pretrained(weights / "metrics" / "dino")
        rows.append(check_retrieval("DINO", lambda part: dino(dino.preprocess(part)), seed, (90, None)))
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
    add("--prompts", type=count, default=480, help="pictures that the base generates (default: 480)")
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
