"""Speed on this machine, compared with diffusers, and of a whole run by phase.

    python -m benchmarks.run                           # all tables, at toy size and SD 1.5 size: long on a CPU
    python -m benchmarks.run --quick                   # the same tables in minutes, with few repetitions
    python -m benchmarks.run --device cuda --size sd15 # SD 1.5's size, with random weights
    python -m benchmarks.run --write                   # also put the tables into benchmarks/RESULTS.md

1. Compared with diffusers' networks, with the same weights and settings: the U-Net forward, forward and backward,
   generating, and RPO's training step. Calls of both alternate. Their outputs are compared before anything is timed.
2. The whole of train.py by phase, with the share of the machine's peak FLOP/s that it used, and its peak memory.

At SD 1.5's size on a CPU the training step uses LoRA, because two full fine-tunings do not fit into the memory, and the
whole run is left out, because it would take days. ALIGN is the embedded base's at both sizes. On a GPU everything is
measured in train.py's default precision.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from benchmarks.common import AsOurs, Pair, Report, alternate, check_same, row
from benchmarks.full_size import write_sd15
from benchmarks.phases import DOG, matmul_peak, step, whole, whole_rows
from model.align import ALIGN
from model.stable_diffusion import StableDiffusion, recommended
from model.tokenizer import BertTokenizer
from reward import Reward
from subject import load_subject
from support import flags, start
from support.settings import resolve
from train import RPO

SHORT = ("--steps", "8", "--validate-every", "4", "--images-per-prompt", "1", "--solver-steps", "5")  # of a --quick run
PARTS = ("unet", "drawing", "training", "whole")

# --------------------------------------------------------------------------------- 1. compared with diffusers


def unet_rows(pair: Pair, batch: int, side: int, repeats: int, backward: bool = True) -> list[str]:
    """The U-Net on latents (batch, 4, side, side): forward, and forward and backward."""
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
        unet.zero_grad(set_to_none=True)  # the memory may not hold the gradients of both networks
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
    """Generating pictures of `size` pixels, DPM-Solver++ with guidance. Ours has already encoded the prompts."""
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
    apart = (pixels[0] - pixels[1]).abs().mean((1, 2, 3))  # in grey levels; single pixels may be rounded differently
    check_same(apart, torch.zeros(pictures), 1 if pair.device.type == "cpu" else 8, "the pictures")
    rows = []
    for name, layout in pair.layouts.items():
        pair.set_layout(layout)
        title = f"generating {pictures} at {size} px, {steps} steps, guidance {guidance:g}, {name}"
        rows.append(row(title, *alternate(ours, theirs, repeats, pair.device)))
    return rows


def run_of(sd: StableDiffusion, base: Path, folder: Path, argv: list[str]) -> RPO:
    """A run of train.py, ready for its first step. Its latents are random and its negatives are not generated."""
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
    """RPO's whole training step; for theirs, with diffusers' U-Nets in the place of ours."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in pair.layouts.items():
            pair.set_layout(layout)
            mine, other = copy.copy(pair.ours), copy.copy(pair.ours)
            # LoRA changes the modules of the network, so each run gets its own, with the same weights.
            mine.unet, other.unet = shared_copy(pair.ours.unet), AsOurs(shared_copy(pair.theirs.unet))
            ours, theirs = (run_of(sd, base, Path(folder), argv) for sd in (mine, other))
            losses = [step(run) for run in (ours, theirs)]
            check_same(*losses, 1e-3 if pair.device.type == "cpu" else 5e-2, "the first step's loss")
            rank, pairs, side = ours.machine.lora_rank, ours.settings.batch, ours.photo_latents[0].shape[-1]
            kind = f"LoRA {rank}" if rank else "the whole U-Net"
            seconds = alternate(lambda a=ours: step(a), lambda b=theirs: step(b), repeats, pair.device)
            rows.append(row(f"training step, {kind}, pairs: {pairs} x {side}x{side}, {name}", *seconds))
            del ours, theirs, mine, other  # only one layout's networks should be in memory
    return rows


def shared_copy(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules that shares the weights."""
    weights = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in weights})


# --------------------------------------------------------------------------------------------------------- the command


def compared(report: Report, size: str, base: Path, device: torch.device, quick: bool, parts: Sequence[str]) -> None:
    """The table of one size, compared with diffusers; each line is printed when it is known."""
    toy, slow = size == "toy", size == "sd15" and device.type == "cpu"
    title = "weights/toy" if toy else "SD 1.5 size, random weights"
    report(f"\n### {title}, compared with diffusers (min / median / max)\n")
    report(common.HEAD)
    pair = Pair(base, device)
    side, batch, pictures = (16, 8, 8) if toy else (64, 1, 1)
    repeats, steps = (3, 2) if slow else (5, 5) if quick else (20, 20)
    if quick and slow:  # a quarter of the picture, and no gradients
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
    """The table of the whole run of one size."""
    report(f"\n### The whole run, {'weights/toy' if size == 'toy' else 'SD 1.5 size with random weights'}\n")
    argv = [*argv, *(SHORT if quick else ())]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the run is in another process
    result = common.in_new_process(whole, base, str(device), argv, torch.get_num_threads())
    name, peak = matmul_peak(device, quick)
    for line in whole_rows(result, peak):
        report(line)
    shown = ("lr", "batch", "guidance", "images_per_prompt", "solver_steps")
    settings = ", ".join(f"{name} {result['settings'][name]:g}" for name in shown)
    short = " A short run, as a test: its shares are not those of the real run." if quick else ""
    report(f"\n`train.py --subject data/dog {' '.join(argv)}`; {settings}.{short} The start of Python is not included.")
    report(f"The machine's peak is measured with a {name}: {peak / 1e12:.3g} TFLOP/s.")
    report(f"Peak memory, {result['peak_of']}: {result['peak'] / 1e6:.0f} MB.")


def measured(args: argparse.Namespace) -> Report:
    """The tables that the flags select."""
    device = common.find_device(args.device)
    title = "benchmarks.run" + (f" --size {args.size}" if args.size != "both" else "")
    report = Report(title + (" --quick" if args.quick else ""), device)
    for size in ("toy", "sd15") if args.size == "both" else (args.size,):
        parts = set(args.only)
        if size == "sd15" and device.type == "cpu" and "whole" in parts:
            report("\nThe whole run at SD 1.5's size is left out: on a CPU it would take days.")
            parts.remove("whole")
        if not parts:
            continue
        with tempfile.TemporaryDirectory(prefix="benchmark_", dir=args.folder) as folder:
            base = args.base if size == "toy" else write_sd15(Path(folder))
            if parts - {"whole"}:
                compared(report, size, base, device, args.quick, [part for part in PARTS if part in parts])
            if "whole" in parts:
                by_phase(report, size, base, device, args.quick, shlex.split(args.train))
    return report


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    common.add_flags(parser)
    add("--size", choices=("toy", "sd15", "both"), default="both", help="(default: %(default)s)")
    add("--only", choices=PARTS, nargs="+", default=PARTS, help="some of the tables (default: all)")
    add("--quick", action="store_true", help="few repetitions and a short run, as a test")
    add("--folder", type=flags.path, help="for temporary weights of SD 1.5's size, 2 GB (default: the system's)")
    add("--train", default="", metavar="FLAGS", help='flags of the whole run, such as --train="--lora-rank 16"')
    args = parser.parse_args()
    return common.finish(measured, args)


if __name__ == "__main__":
    sys.exit(main())
