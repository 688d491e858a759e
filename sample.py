"""Draw pictures with a checkpoint of train.py, or with a base model alone.

    python sample.py --ckpt best.safetensors
    python sample.py --ckpt best.safetensors --prompt "a [V] dog wearing a santa hat in the snow" --n 8 --seed 7
    python sample.py --prompt "a cat on the Moon"                         # the embedded base itself

Writes a PNG a picture, which carries its settings as the "parameters" text that image tools read, and a grid of all.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import cli
from model.scheduler import SAMPLERS
from model.stable_diffusion import StableDiffusion, check_layout
from model.weights import CheckpointError, read_metadata
from pictures import grid

DEFAULT_PROMPTS = ["a photo of {subject}", "{subject} in the snow", "{subject} on the beach", "{subject} on the Moon"]


def base_of(header: dict[str, str], ckpt: Path) -> Path:
    """The base model that a checkpoint's header names. Raises CheckpointError if it names none or it is not there."""
    name = header.get("base")
    if not name:
        raise CheckpointError(f"{ckpt} does not say which base model it belongs to: name it with --base")
    base = cli.base_folder(name)
    if not base.is_dir():
        raise CheckpointError(f"{ckpt} belongs to the base model {name}, which is not there: name it with --base")
    return base


def save_png(picture: Image.Image, path: Path, parameters: str) -> None:
    """A PNG with its settings in the text chunk "parameters"."""
    info = PngInfo()
    info.add_text("parameters", parameters)
    cli.write_whole(path, lambda beside: picture.save(beside, "PNG", pnginfo=info))


def file_names(prompts: list[str]) -> dict[str, str]:
    """A valid file name for each prompt, no two alike: "a [V] dog in the snow" -> "a-V-dog-in-the-snow"."""
    names, taken = {}, set()
    for prompt in prompts:
        name = stem = re.sub(r"[^A-Za-z0-9]+", "-", prompt).strip("-")[:80] or "empty"
        number = 1
        while name.lower() in taken:  # lower: some file systems do not tell a from A
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names[prompt] = name
    return names


def run(args) -> int:
    header = read_metadata(args.ckpt) if args.ckpt else {}
    base = args.base or (base_of(header, args.ckpt) if args.ckpt else cli.EMBEDDED_BASE)
    check_layout(base)
    cli.check_writable(args.out / "grid.png")
    sd = StableDiffusion.from_pretrained(base, cli.device(args.device))
    if args.ckpt:
        sd.load_unet(args.ckpt)
    steps = args.steps or cli.recommended(sd.recommended, "solver_steps", 20, f"{base / 'rpo.json'}")
    guidance = cli.recommended(sd.recommended, "guidance", 7.5, f"{base / 'rpo.json'}")
    guidance = args.guidance or cli.recommended(header, "guidance", guidance, str(args.ckpt))
    subject = f"a {header.get('token', '[V]')} {header['noun']}" if "noun" in header else "a dog"
    prompts = list(dict.fromkeys(args.prompt or [text.format(subject=subject) for text in DEFAULT_PROMPTS]))
    for prompt in prompts:
        if rest := sd.tokenizer.overflow(prompt):
            print(f"warning: a prompt fills its {sd.tokenizer.length} tokens; not read: {rest!r}", file=sys.stderr)

    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.n)]
    with tqdm(total=len(jobs), desc="drawing", unit="image", delay=0.1) as bar:
        options = {"steps": steps, "guidance": guidance, "sampler": args.scheduler, "size": args.size}
        texts, seeds = [prompt for prompt, _ in jobs], [seed for _, seed in jobs]
        pictures = sd.generate(texts, seeds, **options, batch_size=args.batch, on_batch=bar.update)

    names, size = file_names(prompts), f"{pictures[0].width}x{pictures[0].height}"
    model = f"{args.ckpt.name}, Base: {base.name}, Step: {header.get('step', 'unknown')}" if args.ckpt else base.name
    settings = (
        f"Steps: {steps}, Sampler: {args.scheduler}, CFG scale: {guidance:g}, Size: {size}, Model: {model}, Seed:"
    )
    for (prompt, seed), picture in zip(jobs, pictures, strict=True):
        save_png(picture, args.out / f"{names[prompt]}-{seed}.png", f"{prompt}\n{settings} {seed}")
    save_png(grid(pictures, args.n), args.out / "grid.png", "\n".join([*prompts, f"{settings} {args.seed}"]))
    print(f"{len(pictures)} pictures in {args.out}, all on one page in {args.out / 'grid.png'}")
    return 0


def main() -> int:
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, help="a checkpoint of train.py (default: none, the base itself)")
    add("--prompt", action="append", help="what to draw; may be given several times (default: four prompts)")
    add("--n", type=cli.count, default=4, help="pictures a prompt, with seeds --seed, --seed + 1, ... (default: 4)")
    add("--seed", type=cli.seed, default=0, help="the first picture's seed (default: 0)")
    add("--steps", type=cli.count, help="sampler steps (default: 20, or what the base recommends)")
    add("--guidance", type=cli.positive, help="classifier-free guidance (default: as in training, or the base's)")
    add("--scheduler", choices=SAMPLERS, default="dpm++", help="the sampler (default: dpm++)")
    add("--size", type=cli.count, help="the side in pixels (default: the base's)")
    add("--batch", type=cli.count, default=8, help="pictures at a time; changes no picture (default: 8)")
    add("--base", type=Path, help="the base model's folder (default: the checkpoint's own, or the embedded one)")
    add("--out", type=Path, default=Path("outputs"), help="the folder for the pictures (default: outputs)")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    try:
        return run(args)
    except torch.OutOfMemoryError:
        return cli.fail("the GPU's memory is full: use a smaller --batch or --size")
    except (ValueError, OSError) as error:
        return cli.fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
