"""What the benchmarks share: the machine, a base loaded by ours and by diffusers, timing, the report."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from model.files.write import write_atomic
from model.stable_diffusion import StableDiffusion
from support import flags, memory
from support.settings import count

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "# Results of the benchmarks\n\nWritten by the commands named, with --write; a section a command and machine.\n"
HEAD = "| | ours, s | diffusers, s | diffusers / ours |\n|---|---|---|---|"
MOST_DIFFERENCE = {"cpu": 1e-3, "cuda": 2e-2}  # of outputs of order 1: fp32, and bf16, which has three digits


# ------------------------------------------------------------------------------------------------------- the command


def add_flags(parser: argparse.ArgumentParser, base: bool = True) -> None:
    """--device and --write, which all benchmarks have; with `base` also --base and --threads."""
    add = parser.add_argument
    if base:
        add(
            "--base",
            type=flags.path,
            default=flags.EMBEDDED_BASE,
            help="a base with reward/ and metrics/ in its folder",
        )
        add("--threads", type=count, help="on a CPU (default: torch's own)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    help = "put the tables into this file, in the section of this command and machine (default: benchmarks/RESULTS.md)"
    add("--write", nargs="?", const=RESULTS, type=flags.path, metavar="FILE", help=help)


def finish(measure: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> int:
    """Call `measure`, and write its report if --write is given; return the exit status."""
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)

    def work() -> None:
        report = measure(args)
        if args.write:
            report.write(args.write)

    return flags.guarded(work, lambda: "close other programs, or measure a smaller part")


# ------------------------------------------------------------------------------------------------------- the machine


def describe(device: torch.device) -> str:
    """The processor, the threads and torch's version."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        threads = torch.get_num_threads()
        name = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
        name += f", {threads} thread{'s' * (threads > 1)}"
    return f"{name}, torch {torch.__version__}"


def find_device(name: str | None) -> torch.device:
    """The device called `name`, or the default. Raises ValueError if nothing can be measured on it."""
    device = flags.device(name)
    if device.type not in MOST_DIFFERENCE or not Path("/proc/self/status").exists():
        raise ValueError("the benchmarks need --device cpu or cuda, and Linux")
    return device


def resident() -> int:
    """Bytes of memory that this process uses now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most bytes of memory that this process has used. (getrusage's value includes the parent's before exec.)"""
    return _kilobytes("/proc/self/status", "VmHWM") * 1024


def peak_memory(device: torch.device) -> tuple[str, int]:
    """What is measured and its peak in bytes: resident memory on a CPU, allocated memory on a GPU."""
    if device.type == "cuda":
        return "allocated on the GPU", torch.cuda.max_memory_allocated(device)
    return "resident", peak()


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` measure from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # see proc(5)


def free_memory(device: torch.device) -> int:
    """Free bytes; on a CPU what programs can get before the system swaps."""
    if device.type == "cuda":
        return memory.free_memory(device)
    return _kilobytes("/proc/meminfo", "MemAvailable") * 1024


def _kilobytes(file: str, name: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def in_new_process(function: Callable, *arguments):
    """Call the function in a new process, and return its result. Raises MemoryError if the process was killed."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:  # on Linux almost always the out-of-memory killer
        raise MemoryError(f"the process of {function.__name__} was killed") from None


def autocast(device: torch.device):
    """train.py's default precision: bf16 on a GPU, fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------- the same base


class AsOurs(torch.nn.Module):
    """diffusers' U-Net with the call signature of ours."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet, self.config = unet, unet.config

    @property
    def conv_in(self):
        return self.unet.conv_in

    def forward(self, latents, timestep, context):
        return self.unet(latents, timestep, context).sample


def libraries():
    """diffusers and transformers. All that `pipeline` needs is imported here, so that no measured time includes it."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("AutoencoderKL", "UNet2DConditionModel", "StableDiffusionPipeline"):
        getattr(diffusers, name)
    for name in ("AlignModel", "BertTokenizer", "CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)
    return diffusers, transformers


def pipeline(base: Path, device: torch.device, scheduler: str = "DPMSolverMultistepScheduler"):
    """diffusers' StableDiffusionPipeline of a base folder, frozen and in fp32, as ours is loaded."""
    diffusers, transformers = libraries()
    parts = {
        "vae": diffusers.AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32),
    }
    for network in parts.values():
        network.requires_grad_(False).eval()
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(base / "tokenizer"),
        scheduler=getattr(diffusers, scheduler).from_pretrained(base / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class Pair:
    """One base, loaded by us and by diffusers.

    Convolutions are stored contiguous, diffusers' default, or channels_last, ours on a CPU. `layouts` are diffusers'
    layouts to measure, by title: first the same as ours, then diffusers' default, if that is another.
    """

    def __init__(self, base: Path, device: torch.device):
        self.base, self.device = base, device
        self.ours, self.theirs = StableDiffusion.from_pretrained(base, device), pipeline(base, device)
        last = not self.ours.unet.conv_in.weight.is_contiguous()
        self.layouts = {"both channels_last": torch.channels_last} if last else {}
        self.layouts["ours channels_last, theirs contiguous" if last else "both contiguous"] = torch.contiguous_format

    def set_layout(self, layout: torch.memory_format) -> None:
        """Change the layout of diffusers' networks."""
        self.theirs.unet.to(memory_format=layout)
        self.theirs.vae.to(memory_format=layout)


# ------------------------------------------------------------------------------------------------------------ timing


def alternate(ours: Callable, theirs: Callable, repeats: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of each call, ours, theirs, ours, theirs, ... after a first call of each that is not counted.

    Alternating distributes the load of other programs over both.
    """
    seconds = ([], [])
    for i in range(repeats + 1):
        for side, call in enumerate((ours, theirs)):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if i:
                seconds[side].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    """diffusers' median over ours: above 1 ours is faster."""
    return statistics.median(theirs) / statistics.median(ours)


def row(title: str, ours: list[float], theirs: list[float]) -> str:
    """A line of the table with HEAD: min / median / max of each, and the ratio."""
    cells = (" / ".join(f"{f(side):.3g}" for f in (min, statistics.median, max)) for side in (ours, theirs))
    return f"| {title} | {' | '.join(cells)} | {ratio(ours, theirs):.2f} |"


def check_same(ours: torch.Tensor, theirs: torch.Tensor, most: float, what: str) -> None:
    """Raise ValueError if the two differ by more than `most`: then their times cannot be compared.

    On a CPU the largest difference counts. On a GPU the mean: of ten thousand bf16 numbers one may differ by more.
    """
    kind = torch.mean if ours.is_cuda else torch.max
    if ours.shape != theirs.shape or not (difference := kind((ours.float() - theirs.float()).abs()).item()) <= most:
        found = f"by {difference:.1e}" if ours.shape == theirs.shape else f"in shape, {ours.shape} and {theirs.shape}"
        raise ValueError(f"{what}: ours and diffusers' differ {found}, so their times cannot be compared")


# ------------------------------------------------------------------------------------------------------------ report


class Report:
    """Prints lines of Markdown and keeps them as a section of RESULTS.md."""

    def __init__(self, command: str, device: torch.device):
        self.heading, self.lines = f"{command}: {describe(device)}", []
        self(f"## {self.heading}")
        self(f"\nMeasured {time.strftime('%Y-%m-%d')}, {os.getloadavg()[0]:.1f} processes busy at the start.")

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def write(self, path: Path) -> None:
        """Replace the section with this heading in the file, or append it."""
        text = path.read_text(encoding="utf-8") if path.exists() else TITLE
        first, *sections = text.split("\n## ")
        kept = [section for section in sections if section.splitlines()[0] != self.heading]
        own = "\n".join(self.lines).removeprefix("## ")
        text = "\n## ".join(part.strip() + "\n" for part in (first, *kept, own))
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
