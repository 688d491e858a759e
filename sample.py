"""Draw pictures with a checkpoint of train.py, or with a base model alone.

    python sample.py --ckpt best.safetensors
    python sample.py --ckpt best.safetensors --prompt "a [V] dog wearing a santa hat in the snow" --n 8 --seed 7
    python sample.py --ckpt best.safetensors --skill expressions          # the prompts of a figure of the paper
    python sample.py --prompt "a cat on the Moon"                         # the embedded base itself

Writes a PNG for each picture, with its settings in the text "parameters" that image tools read, and a grid of all; with
--skill a page a skill, each picture with its prompt under it. A different picture of the same name stays: the new one
gets a number.
"""

from __future__ import annotations

from support import flags, machine  # first: Ctrl-C during the other imports is one line

# isort: split
import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from model.files.tensors import read_metadata
from model.stable_diffusion import PRECISIONS, StableDiffusion, check_layout
from subject import SKILLS, fill
from support.export import check_export, export_single_file
from support.header import add_drawing_flags, drawing_options, resolve_base
from support.pictures import check_folder, drawn_with, grid, labelled, picture_name, save_png
from support.results import warn_if_unfinished
from support.settings import checked, count, seed_number

DEFAULT_PROMPTS = [
    "a photo of a {V} {noun}",
    "a {V} {noun} in the snow",
    "a {V} {noun} on the beach",
    "a {V} {noun} on the Moon",
]


def run(args: argparse.Namespace) -> None:
    header = read_metadata(args.ckpt) if args.ckpt else {}
    warn_if_unfinished(args.ckpt)
    base = resolve_base(args, args.ckpt, header)
    check_layout(base[0])
    if args.export_single:
        check_export(args.export_single, base[0])
        export_single_file(load(args, base, torch.device("cpu")), args.export_single, header)
        print(f"{args.export_single}: U-Net, VAE and text encoder in one file, in half precision")
        return
    check_folder(args.out)
    options = drawing_options(args, args.ckpt, header, base[0])
    draw(args, load(args, base, flags.device(args.device)), options, base[0], header)


def load(args: argparse.Namespace, base: tuple[Path, str | None, str | None], device: torch.device) -> StableDiffusion:
    """The base with the checkpoint in its U-Net's place, or next to its weights if that is a LoRA."""
    path, variant, prediction_type = base
    sd = StableDiffusion.from_pretrained(path, device, variant, prediction_type)
    sd.precision = PRECISIONS[machine.precision(args.precision, device)]
    if args.ckpt:
        sd.load_checkpoint(args.ckpt)
    return sd


def draw(args: argparse.Namespace, sd: StableDiffusion, options: dict, base: Path, header: dict[str, str]) -> None:
    """Draw --n pictures of each prompt. A batch is saved as soon as it is drawn, so that Ctrl-C keeps it."""
    machine.cast_frozen_weights(sd.unet, sd.precision)
    pages = pages_of(args, header)
    flags.warn_of_truncation(sd.tokenizer, [prompt for prompts in pages.values() for prompt in prompts])
    size = args.size or checked(count, {"resolution": sd.image_size} | header, "resolution", args.ckpt)
    settings = drawn_with(sd.unet, **options, size=size, ckpt=args.ckpt, base=base, header=header)

    n = args.n or (1 if args.skill else 4)
    wanted = [(prompt, args.seed + i) for prompts in pages.values() for prompt in prompts for i in range(n)]
    batch = args.batch or sd.drawing_batch(size)
    pictures = []
    try:
        with tqdm(total=len(wanted), desc="drawing", unit="image", delay=0.1) as bar:
            for start in range(0, len(wanted), batch):
                texts, seeds = zip(*wanted[start : start + batch], strict=True)
                drawn = sd.generate(list(texts), list(seeds), **options, size=size, batch_size=batch)
                for picture, text, seed in zip(drawn, texts, seeds, strict=True):
                    save_png(picture, args.out / picture_name(text, seed), text, settings, seed)
                pictures += drawn
                bar.update(len(drawn))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: {len(pictures)} of {len(wanted)} pictures are in {args.out}") from None
    print(f"{len(pictures)} pictures in {args.out}")
    for name, prompts in pages.items():
        shown, pictures = pictures[: len(prompts) * n], pictures[len(prompts) * n :]
        page = labelled(shown, prompts, n) if args.skill else grid(shown, n)
        print("all on one page:", save_png(page, args.out / name, "\n".join(prompts), settings, args.seed))


def pages_of(args: argparse.Namespace, header: dict[str, str]) -> dict[str, list[str]]:
    """The file names of the pages, and each one's prompts. Without a checkpoint's noun they are of a dog."""
    known = (header.get("token", "[V]"), header["noun"]) if "noun" in header else ("", "dog")
    if not args.skill:
        own = [prompt.replace("{V}", known[0]).replace("{noun}", known[1]) for prompt in args.prompt or ()]
        return {"grid.png": list(dict.fromkeys(own or fill(DEFAULT_PROMPTS, *known)))}
    names = SKILLS if args.skill == "all" else [args.skill]
    return {f"grid-{name}.png": fill(SKILLS[name], *known) for name in names}


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add, what = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--ckpt", type=flags.path, help="a checkpoint of train.py (default: none, the base itself)")
    prompt = "what to draw, perhaps with {V} and {noun}; may be given again (default: four prompts)"
    what.add_argument("--prompt", type=flags.text, action="append", help=prompt)
    what.add_argument("--skill", choices=(*SKILLS, "all"), help="draw what the paper's figure of this skill asks for")
    add("--n", type=count, help="pictures a prompt, of seeds --seed, --seed + 1, ... (default: 4; 1 with --skill)")
    add("--seed", type=seed_number, default=0, help="the first picture's seed (default: 0)")
    add_drawing_flags(parser)
    add("--size", type=count, help="the side in pixels (default: as in training, or the base's)")
    add("--batch", type=count, help="pictures at a time; changes no picture (default: what fits, 8 on a CPU)")
    flags.add_base_flags(parser, None, "the checkpoint's own, or the embedded one")
    export = "draw nothing; write all networks into one file for other tools"
    add("--export-single", type=flags.path, metavar="FILE", help=export)
    add("--out", type=flags.path, default=Path("outputs"), help="the folder for the pictures (default: outputs)")
    flags.add_machine_flags(parser)
    args = parser.parse_args()
    if args.export_single and args.export_single.suffix != ".safetensors":
        parser.error(f"--export-single {args.export_single} should end in .safetensors")
    return flags.guarded(lambda: run(args), lambda: "use a smaller --batch or --size, or another --device")


if __name__ == "__main__":
    sys.exit(main())
