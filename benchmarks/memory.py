"""Memory of a training step of Stable Diffusion 1.5, in four modes.

    python -m benchmarks.memory --device cuda           # all modes, some minutes
    python -m benchmarks.memory --modes lora full       # some of them; on a CPU in fp32
    python -m benchmarks.memory --write                 # also put the table into benchmarks/RESULTS.md

Each mode is measured in a new process: a run of train.py, with random weights of the public sizes, ALIGN's too, does
one step with one pair. AdamW's averages exist already, as in all steps but the first. On a GPU the peak of loading
counts too, and one picture is generated as well (a validation generates as many at a time as fit). A mode whose
estimate is above the free memory is left out. The targets are for 512 px in bf16; the estimate for the whole U-Net
misses its own by 0.7 GB. A GB is 10^9 bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.full_size import write_sd15
from benchmarks.phases import DOG, step
from benchmarks.run import run_of
from model.align import ALIGN, ALIGNConfig
from model.files.errors import is_out_of_memory
from model.stable_diffusion import PRECISIONS, StableDiffusion, recommended
from support import flags, machine, memory, start
from support.settings import count, resolve
from toy.networks import write_part
from train import RPO

MODES = {  # train.py's flags, and the target in GB
    "lora-checkpointed": (["--lora-rank", "16", "--checkpoint-gradients"], 6),
    "lora": (["--lora-rank", "16"], 10),
    "full-checkpointed": (["--checkpoint-gradients"], None),
    "full": ([], 18),
}
HEAD = "| mode | trained weights | estimated GB | measured peak GB | target |\n|---|---|---|---|---|"
COUNTED = {
    "cuda": "the bytes that torch has allocated on the GPU.",
    "cpu": "the growth of the process's resident memory since before loading, at its peak.",
}


def write_base(folder: Path) -> Path:
    """Write a base of SD 1.5's size with random weights, and an ALIGN of its public size."""
    base = write_sd15(folder)
    write_part(base / "reward", {}, ALIGN(ALIGNConfig()).state_dict(), "model.safetensors")
    return base


def measure(
    argv: list[str], base: Path, side: int, device: torch.device, precision: str, threads: int
) -> tuple[int, int, int]:
    """Trained weights, and the peak bytes of a step (on a GPU also of loading) and, on a GPU, of generating a picture.

    argv: train.py's flags. side: of the pictures, in pixels. Call it in a new process.
    """
    torch.set_num_threads(threads)
    before = common.resident() if device.type == "cpu" else 0
    sd = StableDiffusion.from_pretrained(base, device)
    sd.precision, sd.image_size = PRECISIONS[precision], side
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(sd, base, Path(folder), argv)
        for parameter in run.machine.parameters:  # a step without a gradient makes AdamW's averages
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.adamw.step()
        run.optimizer.adamw.zero_grad(set_to_none=True)
        loading = common.peak_memory(device)[1] if device.type == "cuda" else 0
        common.reset_peak(device)
        step(run)
        peak, drawing = max(loading, common.peak_memory(device)[1]), 0
        trained = sum(parameter.numel() for parameter in run.machine.parameters)
        if device.type == "cuda":
            common.reset_peak(device)
            run.sd.generate(["a dog"], [0], 2, run.settings.guidance, batch_size=1)
            drawing = common.peak_memory(device)[1]
    return trained, peak - before, drawing


def row(mode: str, base: Path, side: int, device: torch.device, precision: str, room: int) -> str:
    """A line of the table with HEAD; it says so if the mode does not fit into the memory. room: free bytes."""
    special, most = MODES[mode]
    argv = [*special, "--precision", precision, "--resolution", str(side), "--batch", "1", "--images-per-prompt", "1"]
    args = start.parse(RPO, "", [*argv, "--subject", str(DOG), "--base", str(base), "--align", f"{base}/reward"])
    with contextlib.redirect_stdout(io.StringIO()):
        args.settings = resolve(RPO.Settings, args, *recommended(base))
    need = sum(memory.estimate_of(args).values())
    title, target = f"{mode}: `{' '.join(special)}`" if special else mode, f"at most {most}" if most else ""
    if need > room:
        return f"| {title} | | {need / 1e9:.1f} | left out: {room / 1e9:.1f} GB are free | {target} |"
    try:
        arguments = argv, base, side, device, precision, torch.get_num_threads()
        trained, step, drawing = common.in_new_process(measure, *arguments)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return f"| {title} | | {need / 1e9:.1f} | out of memory | {target} |"
    also = f" (generating a picture: {drawing / 1e9:.1f})" if drawing else ""
    return f"| {title} | {trained / 1e6:.1f} M | {need / 1e9:.1f} | {step / 1e9:.1f}{also} | {target} |"


def measured(args: argparse.Namespace) -> common.Report:
    """The table, a row a mode."""
    device = common.find_device(args.device)
    if args.side % 8:
        raise ValueError(f"--side must be a multiple of 8, not {args.side}")
    precision = machine.precision(args.precision, device)
    report = common.Report(f"benchmarks.memory --side {args.side} --precision {precision}", device)
    report(f"One pair, {args.side} px, {precision}. Measured: {COUNTED[device.type]}\n\n{HEAD}")
    with tempfile.TemporaryDirectory(prefix="memory_", dir=args.folder) as folder:
        base = args.base or common.in_new_process(write_base, Path(folder))  # its memory is free afterwards
        for mode in args.modes:
            report(row(mode, base, args.side, device, precision, common.free_memory(device)))
    return report


def main() -> int:
    parser = flags.Parser(description=__doc__)
    common.add_flags(parser, base=False)
    add = parser.add_argument
    add("--base", type=flags.path, help="a base with reward/ in its folder (default: random weights of SD 1.5's size)")
    add("--precision", choices=PRECISIONS, help="(default: bf16 on cuda, or fp16 if it is old, else fp32)")
    add("--side", type=count, default=512, help="pixels of the pictures' sides (default: %(default)s)")
    add("--modes", choices=list(MODES), default=list(MODES), nargs="+", help="(default: all)")
    add("--folder", type=flags.path, help="for temporary weights, 3 GB (default: the system's)")
    args = parser.parse_args()
    return common.finish(measured, args)


if __name__ == "__main__":
    sys.exit(main())
