"""How fast is it on this machine, beside diffusers and by itself? Run by hand; needs no download.

    python -m benchmarks.run                           # all tables, at toy size and SD 1.5 size: long on a CPU
    python -m benchmarks.run --quick                   # the same tables in minutes, with few repetitions
    python -m benchmarks.run --device cuda --size sd15 # the whole run at SD 1.5's size, with random weights
    python -m benchmarks.run --write                   # and put them into benchmarks/RESULTS.md

1. U-Net forward, and forward with backward, drawing, and RPO's training step, each against diffusers' networks with the
   same weights and settings. The two take turns; their outputs are compared before a clock starts.
2. The whole of train.py by phase, with the share of the machine's arithmetic that it used (model-FLOP utilisation) and
   its peak memory.

At SD 1.5's size on a CPU the training step is LoRA's, since two full fine-tunings do not fit, and the whole run is left
out, since it would take days. ALIGN is weights/toy's at either size. On a GPU all is in the precision of train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from benchmarks.common import AsOurs, Pair, Report, alternate, check_same, row
from benchmarks.full_size import write_sd15
from benchmarks.phases import DOG, matmul_peak, step, whole, whole_rows
from model.align import ALIGN
from model.stable_diffusion import recommended
from model.tokenizer import BertTokenizer
from reward import Reward
from subject import load_subject
from support import flags, start
from support.settings import count, resolve
from train import RPO

SHORT = ("--steps", "8", "--validate-every", "4", "--images-per-prompt", "1", "--solver-steps", "5")  # for --quick
PARTS = ("unet", "drawing", "training", "whole")

# --------------------------------------------------------------------------------------------- 1. beside diffusers


def unet_rows(pair: Pair, batch: int, side: int, repeats: int, backward: bool = True) -> list[str]:
    """The U-Net alone on latents (batch, 4, side, side): forward, and forward with backward."""
    ours, theirs = pair.ours.unet, AsOurs(pair.theirs.unet)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(batch, ours.config.in_channels, side, side, generator=draws).to(pair.device)
    context = torch.randn(batch, 77, ours.config.cross_attention_dim, generator=draws).to(pair.device)
    t = torch.full((batch,), 500, device=pair.device)

    def forward(unet):
        with torch.no_grad(), pair.ours.autocast():
            return unet(x, t, context)

    def both(unet):
        with pair.ours.autocast():
            loss = unet(x, t, context).float().square().mean()
        loss.backward()
        unet.zero_grad(set_to_none=True)  # there is not always room for both sides' gradients
        return loss

    check_same(forward(ours), forward(theirs), common.MOST_DIFFERENCE[pair.device.type], "the U-Net")
    rows, what = [], f"{batch} x {side}x{side} latents"
    for name, layout in pair.layouts.items():
        pair.set_layout(layout)
        seconds = alternate(lambda: forward(ours), lambda: forward(theirs), repeats, pair.device)
        rows.append(row(f"U-Net forward, {what}, {name}", *seconds))
    for name, layout in pair.layouts.items() if backward else ():
        pair.set_layout(layout)
        for unet in (ours, theirs):
            unet.requires_grad_(True)
        check_same(both(ours).detach(), both(theirs).detach(), 1e-2, "the U-Net's loss")
        seconds = alternate(lambda: both(ours), lambda: both(theirs), repeats, pair.device)
        rows.append(row(f"U-Net forward + backward, {what}, {name}", *seconds))
        for unet in (ours, theirs):
            unet.requires_grad_(False)
    return rows


def drawing_rows(pair: Pair, pictures: int, steps: int, size: int, repeats: int) -> list[str]:
    """From prompts to pictures of `size` pixels, DPM-Solver++ with guidance. Ours has kept the prompts' encodings."""
    prompts = load_subject(DOG).training_prompts
    prompts = [prompts[i % len(prompts)] for i in range(pictures)]
    shape = (pictures, pair.ours.unet.config.in_channels, size // pair.ours.vae.downscale)
    latents = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(0)).to(pair.device)
    guidance = recommended(pair.base)[0].get("guidance", RPO.Settings.guidance)

    def ours():
        seeds = list(range(pictures))
        return pair.ours.generate(prompts, seeds, steps, guidance, size=size, batch_size=pictures, latents=latents)

    def theirs():
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
        with pair.ours.autocast():
            return pair.theirs(prompts, latents=latents, **options).images

    pixels = [torch.from_numpy(np.stack(draw())).float() for draw in (ours, theirs)]
    apart = (pixels[0] - pixels[1]).abs().mean((1, 2, 3))  # in grey levels; single pixels may round the other way
    check_same(apart, torch.zeros(pictures), 1 if pair.device.type == "cpu" else 8, "the pictures")
    rows = []
    for name, layout in pair.layouts.items():
        pair.set_layout(layout)
        title = f"drawing {pictures} at {size} px, {steps} steps, guidance {guidance:g}, {name}"
        rows.append(row(title, *alternate(ours, theirs, repeats, pair.device)))
    return rows


def run_of(sd, base: Path, folder: Path, argv: list[str]) -> RPO:
    """train.py's own run, ready for its first step on random latents: neither pictures nor posteriors are made."""
    arguments = ["--subject", DOG, "--base", base, "--align", base / "reward", "--ckpt", folder / "run.safetensors"]
    args = start.parse(RPO, "", [str(argument) for argument in (*arguments, *argv)])
    sd = copy.copy(sd)
    side, draws = sd.image_size // sd.vae.downscale, torch.Generator().manual_seed(0)
    picture = Image.new("RGB", (sd.image_size, sd.image_size), "teal")

    def posterior(images):
        mean = torch.randn(len(images), sd.vae.config.latent_channels, side, side, generator=draws)
        return mean, 0.1 * torch.ones_like(mean)

    sd.encode_images = posterior
    with contextlib.redirect_stdout(io.StringIO()):
        args.settings = resolve(RPO.Settings, args, *recommended(base))
    align, bert = ALIGN.from_pretrained(args.align).to(sd.device), BertTokenizer.from_pretrained(args.align)
    parts = start.assemble(args, RPO, load_subject(DOG), sd, align, bert)
    run = RPO(parts, Reward(align, bert, parts.photos))
    run.draw = lambda prompts, *_: [picture] * len(prompts)
    run.prepare()
    return run


def training_rows(pair: Pair, base: Path, argv: list[str], repeats: int) -> list[str]:
    """RPO's whole step: θ forward and backward on pairs, θ₀ forward, loss, AdamW. Theirs: diffusers' U-Net in it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in pair.layouts.items():
            pair.set_layout(layout)
            mine, other = copy.copy(pair.ours), copy.copy(pair.ours)
            # Adapters are added to the network itself, so it gets a copy (that shares the weights).
            mine.unet, other.unet = shared_copy(pair.ours.unet), AsOurs(shared_copy(pair.theirs.unet))
            ours, theirs = (run_of(sd, base, Path(folder), argv) for sd in (mine, other))
            losses = [step(run) for run in (ours, theirs)]
            check_same(*losses, 1e-3 if pair.device.type == "cpu" else 5e-2, "the first step's loss")
            rank, pairs, side = ours.machine.lora_rank, ours.settings.batch, ours.ref[0].shape[-1]
            kind = f"LoRA {rank}" if rank else "the whole U-Net"
            seconds = alternate(lambda a=ours: step(a), lambda b=theirs: step(b), repeats, pair.device)
            rows.append(row(f"training step, {kind}, pairs: {pairs} x {side}x{side}, {name}", *seconds))
            del ours, theirs, mine, other  # so that only one layout's networks are in memory
    return rows


def shared_copy(network: torch.nn.Module) -> torch.nn.Module:
    """Modules of its own, the same weights."""
    weights = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in weights})


# --------------------------------------------------------------------------------------------------------- the command


def beside(report: Report, size: str, base: Path, device: torch.device, quick: bool, parts: list[str]) -> None:
    """The tables of one size against diffusers, a line as soon as it is known."""
    toy, slow = size == "toy", size == "sd15" and device.type == "cpu"
    report(f"\n### {'weights/toy' if toy else 'SD 1.5 size, random weights'}, beside diffusers (min / median / max)\n")
    report(common.HEAD)
    pair = Pair(base, device)
    side, batch, pictures = (16, 8, 8) if toy else (64, 1, 1)
    repeats, steps = (3, 2) if slow else (5, 5) if quick else (20, 20)
    if quick and slow:  # a quarter of the picture, and nothing that takes a gradient
        side, parts = 32, [part for part in parts if part != "training"]
    argv = ["--device", str(device), *(["--lora-rank", "16"] if slow else [])]
    jobs = {
        "unet": lambda: unet_rows(pair, batch, side, repeats, backward=not (quick and slow)),
        "drawing": lambda: drawing_rows(pair, pictures, steps, side * 8, 1 if quick and slow else 3),
        "training": lambda: training_rows(pair, base, argv, 2 if slow else repeats),
    }
    for part, job in jobs.items():
        for line in job() if part in parts else ():
            report(line)


def by_phase(report: Report, size: str, base: Path, device: torch.device, quick: bool, argv: list[str]) -> None:
    """The whole run of one size."""
    report(f"\n### The whole run, {'weights/toy' if size == 'toy' else 'SD 1.5 size with random weights'}\n")
    if size == "sd15" and device.type == "cpu":
        report("Left out on a CPU, where it would take days.")
        return
    argv = [*argv, *(SHORT if quick else ())]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the run is another process's
    result = common.alone(whole, base, str(device), argv, torch.get_num_threads())
    name, peak = matmul_peak(device, quick)
    for line in whole_rows(result, peak):
        report(line)
    shown = ("lr", "batch", "guidance", "images_per_prompt", "solver_steps")
    settings = ", ".join(f"{name} {result['settings'][name]:g}" for name in shown)
    short = " A short run, to see that it works: its shares are not the real run's." if quick else ""
    report(f"\n`train.py --subject data/dog {' '.join(argv)}`; {settings}.{short} Python's own start is not counted.")
    report(f"The peak is what a {name} reaches: {peak / 1e12:.3g} TFLOP/s.")
    report(f"Peak memory, {result['peak_of']}: {result['peak'] / 1e6:.0f} MB.")


def measured(args: argparse.Namespace) -> Report:
    """All tables that are asked for."""
    device = common.device(args.device)
    title = "benchmarks.run" + (f" --size {args.size}" if args.size != "both" else "")
    report = Report(title + (" --quick" if args.quick else ""), device)
    for size in ("toy", "sd15") if args.size == "both" else (args.size,):
        with tempfile.TemporaryDirectory(prefix="benchmark_", dir=args.folder) as folder:
            base = flags.EMBEDDED_BASE if size == "toy" else write_sd15(Path(folder))
            if set(args.only) - {"whole"}:
                beside(report, size, base, device, args.quick, args.only)
            if "whole" in args.only:
                by_phase(report, size, base, device, args.quick, shlex.split(args.train))
    return report


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("--device", help="cpu or cuda (default: the best there is)")
    add("--size", choices=("toy", "sd15", "both"), default="both", help="(default: %(default)s)")
    add("--only", choices=PARTS, nargs="+", default=PARTS, help="some of the tables (default: all)")
    add("--threads", type=count, help="of a CPU (default: as many as torch takes)")
    add("--quick", action="store_true", help="few repetitions and a short run, to see that all works")
    add("--write", action="store_true", help=f"put the tables into {common.RESULTS.name}, in this machine's section")
    add("--folder", type=Path, help="for the temporary weights of SD 1.5's size, 2 GB (default: the system's place)")
    add("--train", default="", metavar="FLAGS", help='for the whole run, such as --train="--lora-rank 16"')
    args = parser.parse_args()
    return common.finish(measured, args)


if __name__ == "__main__":
    sys.exit(main())
