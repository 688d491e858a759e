"""How much memory does a training step of Stable Diffusion 1.5 take, in each mode? Run by hand; needs no download.

    python -m benchmarks.memory --device cuda           # 4 modes, some minutes
    python -m benchmarks.memory --modes lora full       # some of them; on a CPU in fp32
    python -m benchmarks.memory --write                 # and put the table into benchmarks/RESULTS.md

A mode is measured in a process of its own: train.py's run with random weights of the public sizes, ALIGN's too, and
one pair takes one step, with AdamW's averages in place, as every step but the first finds them. On a GPU the peak of
loading counts too, and one picture is drawn as well (a validation draws as many at a time as fit). A mode that is
estimated to need more memory than is free is left out. The targets are for 512 px in bf16, train.py's precision on a
GPU; a GB is 10^9 bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.full_size import write_sd15
from benchmarks.phases import DOG, step
from benchmarks.run import run_of
from model.align import ALIGN, ALIGNConfig
from model.files.config import read_json
from model.files.errors import is_out_of_memory
from model.stable_diffusion import PRECISIONS, StableDiffusion, recommended
from support import flags, machine, memory, start
from support.results import write_json
from support.settings import count, resolve
from toy.networks import write_part
from train import RPO

MODES = {  # train.py's flags, and the most GB that it should take
    "lora-checkpointed": (["--lora-rank", "16", "--checkpoint-gradients"], 6),
    "lora": (["--lora-rank", "16"], 10),
    "full-checkpointed": (["--checkpoint-gradients"], None),
    "full": ([], 18),
}
HEAD = "| mode | trained weights | estimated GB | measured peak GB | target |\n|---|---|---|---|---|"
COUNTED = {
    "cuda": "bytes allocated on the GPU, as torch counts them; the estimate is of the same.",
    "cpu": "the process's peak resident memory, less what it held before loading. The estimate is of allocated bytes: "
    "the allocator and the libraries' work space add some on a CPU.",
}


def write_base(folder: Path, side: int) -> Path:
    """`write_sd15` for pictures of `side` pixels, with ALIGN of its public size."""
    base = write_sd15(folder)
    config = read_json(base / "unet" / "config.json")
    write_json(base / "unet" / "config.json", config | {"sample_size": side // 8})
    write_part(base / "reward", {}, ALIGN(ALIGNConfig()).state_dict(), "model.safetensors")  # the rest of it stays
    return base


def measure(argv: list[str], base: Path, device: torch.device, precision: str, threads: int) -> tuple[int, int, int]:
    """Trained weights, and bytes at the peak of a step (on a GPU of loading, too) and, on a GPU, of drawing a picture.

    For a fresh process.
    """
    torch.set_num_threads(threads)
    before = common.resident() if device.type == "cpu" else 0
    sd = StableDiffusion.from_pretrained(base, device)
    sd.precision = PRECISIONS[precision]
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(sd, base, Path(folder), argv)
        for parameter in run.machine.parameters:  # a step without a gradient makes AdamW's averages
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.adamw.step()
        run.optimizer.adamw.zero_grad(set_to_none=True)
        loading = common.peak_memory(device)[1] if device.type == "cuda" else 0
        common.forget_peak(device)
        step(run)
        peak, drawing = max(loading, common.peak_memory(device)[1]), 0
        trained = sum(parameter.numel() for parameter in run.machine.parameters)
        if device.type == "cuda":
            common.forget_peak(device)
            run.sd.generate(["a dog"], [0], 2, run.settings.guidance, batch_size=1)
            drawing = common.peak_memory(device)[1]
    return trained, peak - before, drawing


def row(mode: str, base: Path, device: torch.device, precision: str) -> str:
    """A line of the table under HEAD; of a mode for which the memory does not suffice it says so."""
    special, most = MODES[mode]
    argv = [*special, "--precision", precision, "--batch", "1", "--images-per-prompt", "1"]
    args = start.parse(RPO, "", [*argv, "--subject", str(DOG), "--base", str(base), "--align", f"{base}/reward"])
    with contextlib.redirect_stdout(io.StringIO()):
        args.settings = resolve(RPO.Settings, args, *recommended(base))
    need, room = sum(memory.estimate_of(args).values()), common.free_memory(device)
    title, target = f"{mode}: `{' '.join(special)}`" if special else mode, f"at most {most}" if most else ""
    if need > room:
        return f"| {title} | | {need / 1e9:.1f} | left out: {room / 1e9:.1f} GB are free | {target} |"
    try:
        trained, step, drawing = common.alone(measure, argv, base, device, precision, torch.get_num_threads())
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, BrokenProcessPool) or is_out_of_memory(error)):
            raise
        return f"| {title} | | {need / 1e9:.1f} | the memory did not suffice | {target} |"
    also = f" (drawing a picture: {drawing / 1e9:.1f})" if drawing else ""
    return f"| {title} | {trained / 1e6:.1f} M | {need / 1e9:.1f} | {step / 1e9:.1f}{also} | {target} |"


def measured(args: argparse.Namespace) -> common.Report:
    """A row a mode."""
    device = common.device(args.device)
    if args.side % 64:
        raise ValueError(f"--side must be a multiple of 64, not {args.side}")
    precision = machine.precision(args.precision, device)
    report = common.Report(f"benchmarks.memory --side {args.side} --precision {precision}", device)
    report(f"One pair of {args.side} px in {precision}. Measured are {COUNTED[device.type]}\n\n{HEAD}")
    with tempfile.TemporaryDirectory(prefix="memory_", dir=args.folder) as folder:
        base = common.alone(write_base, Path(folder), args.side)  # what it took is given back
        for mode in args.modes:
            report(row(mode, base, device, precision))
    return report


def main() -> int:
    parser = flags.Parser(description=__doc__)
    flags.add_machine_flags(parser)
    add = parser.add_argument
    add("--side", type=count, default=512, help="of the pictures, in pixels (default: %(default)s)")
    add("--modes", choices=list(MODES), default=list(MODES), nargs="+", help="(default: all)")
    add("--folder", type=Path, help="for the temporary weights, 3 GB (default: the system's place)")
    add("--write", action="store_true", help=f"put the table into {common.RESULTS.name}, in this machine's section")
    args = parser.parse_args()
    return common.finish(measured, args)


if __name__ == "__main__":
    sys.exit(main())
