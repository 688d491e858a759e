"""Draw pictures with a checkpoint of train.py, or with a base model alone.

    python sample.py --ckpt best.safetensors
    python sample.py --ckpt best.safetensors --prompt "a [V] dog wearing a santa hat in the snow" --n 8 --seed 7
    python sample.py --prompt "a cat on the Moon"                         # the embedded base itself

Writes a PNG a picture, which carries its settings as the "parameters" text that image tools read, and a grid of all.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from model.files.errors import CheckpointError
from model.files.single_file import CONFIG_KEY
from model.files.tensors import read_metadata
from model.scheduler import SAMPLERS
from model.stable_diffusion import PRECISIONS, StableDiffusion, check_layout
from support import flags, machine
from support.export import export_single_file
from support.header import base_of, steps_and_guidance
from support.pictures import check_page, drawn_with, grid, picture_names, save_png
from support.results import check_writable, warn_if_unfinished
from support.settings import checked, count, positive, seed_number

DEFAULT_PROMPTS = ["a photo of {subject}", "{subject} in the snow", "{subject} on the beach", "{subject} on the Moon"]


def run(args: argparse.Namespace) -> int:
    header = read_metadata(args.ckpt) if args.ckpt else {}
    warn_if_unfinished(args.ckpt)
    base, variant, prediction_type = base_of(args, args.ckpt, header)
    check_layout(base)
    if whole := args.export_single:
        check_writable(whole)
        there = whole.resolve()  # "new/../old" is there before "new" is
        if there.exists() and not (is_export(there) and not there.samefile(base)):
            raise ValueError(f"--export-single {whole} would replace no earlier export: give another name")
    else:
        check_page(args.out)
        steps, guidance = steps_and_guidance(args, args.ckpt, header, base)
    device = torch.device("cpu") if whole else flags.device(args.device)  # to export is no arithmetic
    sd = StableDiffusion.from_pretrained(base, device, variant, prediction_type)
    sd.precision = PRECISIONS[machine.precision(args.precision, sd.device)]
    if args.ckpt:
        sd.load_unet(args.ckpt)
    if whole:
        export_single_file(
            sd, whole, {name: value for name, value in header.items() if not name.startswith("ss_")}
        )  # ss_: a LoRA's
        print(f"{whole}: U-Net, VAE and text encoder in one file, in half precision")
        return 0
    machine.round_frozen(sd.unet, sd.precision)
    subject = f"a {header.get('token', '[V]')} {header['noun']}" if "noun" in header else "a dog"
    prompts = list(dict.fromkeys(args.prompt or [text.format(subject=subject) for text in DEFAULT_PROMPTS]))
    flags.warn_of_truncation(sd.tokenizer, prompts)
    size = args.size or checked(count, {"resolution": sd.image_size} | header, "resolution", args.ckpt)

    texts = [prompt for prompt in prompts for _ in range(args.n)]
    seeds = [args.seed + i for _ in prompts for i in range(args.n)]
    names = picture_names(texts, seeds)
    at_once = args.batch or sd.drawing_batch(size)
    pictures = []
    options = {"steps": steps, "guidance": guidance, "sampler": args.scheduler}
    try:
        with tqdm(total=len(texts), desc="drawing", unit="image", delay=0.1) as bar:
            for start in range(0, len(texts), at_once):
                part = slice(start, start + at_once)
                drawn = sd.generate(texts[part], seeds[part], **options, size=size, batch_size=at_once)
                settings = drawn_with(**options, size=drawn[0].size, ckpt=args.ckpt, base=base, header=header)
                for name, picture, text, seed in zip(names[part], drawn, texts[part], seeds[part], strict=True):
                    save_png(picture, args.out / name, text, settings, seed)
                pictures += drawn
                bar.update(len(drawn))
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(pictures)} of {len(texts)} pictures are in {args.out}", file=sys.stderr)
        return 130
    save_png(grid(pictures, args.n), args.out / "grid.png", "\n".join(prompts), settings, args.seed)
    print(f"{len(pictures)} pictures in {args.out}, all on one page in {args.out / 'grid.png'}")
    return 0


def is_export(path: Path) -> bool:
    """Has --export-single written this file?"""
    with suppress(CheckpointError):
        return CONFIG_KEY in read_metadata(path)
    return False


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=flags.path, help="a checkpoint of train.py (default: none, the base itself)")
    add("--prompt", type=flags.text, action="append", help="what to draw; may be given again (default: four prompts)")
    add("--n", type=count, default=4, help="pictures a prompt, with seeds --seed, --seed + 1, ... (default: 4)")
    add("--seed", type=seed_number, default=0, help="the first picture's seed (default: 0)")
    add("--steps", type=count, help="sampler steps (default: 20, or what the base recommends)")
    add("--guidance", type=positive, help="classifier-free guidance (default: as in training, or the base's)")
    add("--scheduler", choices=SAMPLERS, default="dpm++", help="the sampler (default: dpm++)")
    add("--size", type=count, help="the side in pixels (default: as in training, or the base's)")
    add("--batch", type=count, help="pictures at a time; changes no picture (default: what fits, 8 on a CPU)")
    flags.add_base_flags(parser, None, "the checkpoint's own, or the embedded one")
    add(
        "--export-single",
        type=flags.path,
        metavar="FILE",
        help="draw nothing; write all networks into one file for other tools",
    )
    add("--out", type=flags.path, default=Path("outputs"), help="the folder for the pictures (default: outputs)")
    flags.add_machine_flags(parser)
    args = parser.parse_args()
    if args.export_single and args.export_single.suffix != ".safetensors":
        parser.error(f"--export-single {args.export_single} should end in .safetensors")
    return flags.guarded(
        lambda: run(args), lambda: "use a smaller --batch or --size, or another --device", interrupted="interrupted"
    )


if __name__ == "__main__":
    sys.exit(main())
