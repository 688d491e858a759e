"""What the benchmarks share: one base loaded by both libraries, timing side by side, peak memory, the report."""

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
from pathlib import Path

import torch

from model.files.write import write_atomic
from model.stable_diffusion import StableDiffusion
from support import flags, memory

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "# Results of the benchmarks\n\nWritten by the commands named, with --write; a section a command and machine.\n"
HEAD = "| | ours, s | diffusers, s | diffusers / ours |\n|---|---|---|---|"
MOST_DIFFERENCE = {"cpu": 1e-3, "cuda": 2e-2}  # of outputs of order 1: fp32, and bf16, which keeps three digits


# ------------------------------------------------------------------------------------------------------- the machine


def machine(device: torch.device) -> str:
    """What the numbers were measured on: the processor, the threads, torch."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        threads = torch.get_num_threads()
        name = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
        name += f", {threads} thread{'s' * (threads > 1)}"
    return f"{name}, torch {torch.__version__}"


def device(name: str | None) -> torch.device:
    """cli.device, of the kinds that can be measured here. Raises ValueError for another."""
    device = flags.device(name)
    if device.type not in MOST_DIFFERENCE or not Path("/proc/self/status").exists():
        raise ValueError("what can be measured is --device cpu or cuda, on Linux")
    return device


def resident() -> int:
    """Bytes that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most bytes that this program ever had in memory (getrusage would count the parent's before the exec too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_memory(device: torch.device) -> tuple[str, int]:
    """What is counted, and how many bytes: resident memory on a CPU, allocated memory on a GPU."""
    if device.type == "cuda":
        return "allocated on the GPU", torch.cuda.max_memory_allocated(device)
    return "resident", peak()


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # as proc(5) has it


def free_memory(device: torch.device) -> int:
    """Bytes that are free; on a CPU those that a program can have before the system swaps."""
    if device.type == "cuda":
        return memory.free_memory(device)
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def alone(function, *arguments):
    """What the function returns, called in a fresh process that ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def autocast(device: torch.device):
    """bf16 on a GPU, fp32 on a CPU: train.py's default."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------- the same base


class AsOurs(torch.nn.Module):
    """diffusers' U-Net, called as ours is."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet, self.config = unet, unet.config

    def forward(self, latents, timestep, context):
        return self.unet(latents, timestep, context).sample


def libraries():
    """diffusers and transformers, with all that `pipeline` needs imported: no clock should count that."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("AutoencoderKL", "UNet2DConditionModel", "StableDiffusionPipeline"):
        getattr(diffusers, name)
    for name in ("AlignModel", "BertTokenizer", "CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)
    return diffusers, transformers


def pipeline(base: Path, device: torch.device, scheduler: str = "DPMSolverMultistepScheduler"):
    """diffusers' StableDiffusionPipeline of a base folder, in fp32 and frozen, as ours is loaded."""
    diffusers, transformers = libraries()
    parts = {
        "vae": diffusers.AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32),
    }
    for network in parts.values():
        network.requires_grad_(False).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(base / "tokenizer")
    steps = getattr(diffusers, scheduler).from_pretrained(base / "scheduler")
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=steps,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class Pair:
    """One base, as ours and as diffusers'.

    Convolutions can read their maps channel by channel (contiguous, diffusers' default) or place by place
    (channels_last, ours on a CPU). `layouts` are those worth a row: both in ours, then each in its own default.
    """

    def __init__(self, base: Path, device: torch.device):
        self.base, self.device = base, device
        self.ours, self.theirs = StableDiffusion.from_pretrained(base, device), pipeline(base, device)
        last = not self.ours.unet.conv_in.weight.is_contiguous()
        self.layouts = {"both channels_last": torch.channels_last} if last else {}
        self.layouts["ours channels_last, theirs contiguous" if last else "both contiguous"] = torch.contiguous_format

    def set_layout(self, layout: torch.memory_format) -> None:
        """Of diffusers' networks; ours stay as they are."""
        self.theirs.unet.to(memory_format=layout)
        self.theirs.vae.to(memory_format=layout)


# ------------------------------------------------------------------------------------------------------------ timing


def alternate(ours: Callable, theirs: Callable, repeats: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of each call, ours, theirs, ours, theirs, ... after one call of each that is not counted.

    Taking turns spreads whatever else the machine does over both.
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
    """diffusers' median over ours: 1 or more means that we are not slower."""
    return statistics.median(theirs) / statistics.median(ours)


def row(title: str, ours: list[float], theirs: list[float]) -> str:
    """A line of the table under HEAD: min / median / max of each, and the ratio."""
    cells = (" / ".join(f"{f(side):.3g}" for f in (min, statistics.median, max)) for side in (ours, theirs))
    return f"| {title} | {' | '.join(cells)} | {ratio(ours, theirs):.2f} |"


def check_same(ours: torch.Tensor, theirs: torch.Tensor, most: float, what: str) -> None:
    """Raise ValueError if the two differ by more than `most`: then they do not do the same job, and no time counts.

    At most, or for a GPU's on average: of ten thousand bf16 numbers one differs by more than the rest.
    """
    kind = torch.mean if ours.is_cuda else torch.max
    if ours.shape != theirs.shape or not (difference := kind((ours.float() - theirs.float()).abs()).item()) <= most:
        found = f"by {difference:.1e}" if ours.shape == theirs.shape else f"in shape, {ours.shape} and {theirs.shape}"
        raise ValueError(f"{what}: ours and diffusers' differ {found}, so their times cannot be compared")


# ------------------------------------------------------------------------------------------------------------ report


class Report:
    """Prints Markdown and keeps it, so that it can take its place in RESULTS.md."""

    def __init__(self, command: str, device: torch.device):
        self.heading, self.lines = f"## {command}: {machine(device)}", []
        self(self.heading)
        load = f", {os.getloadavg()[0]:.1f} processes busy at the start" if hasattr(os, "getloadavg") else ""
        self(f"\nMeasured {time.strftime('%Y-%m-%d')}{load}.")

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def write(self) -> None:
        """Replace the section of this command and machine in RESULTS.md, or add it."""
        path = RESULTS
        text = path.read_text(encoding="utf-8") if path.exists() else TITLE
        first, *sections = text.split("\n## ")
        ours = "\n".join(self.lines).removeprefix("## ").strip() + "\n"
        heading = self.heading.removeprefix("## ")
        kept = [section for section in sections if section.splitlines()[0] != heading]
        parts = [first.rstrip() + "\n", *(section.strip() + "\n" for section in (*kept, ours))]
        write_atomic(path, lambda beside: beside.write_text("\n## ".join(parts), encoding="utf-8"))


def finish(measured: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> int:
    """Measure, and write the report if --write says so; the command's exit status."""
    try:
        if getattr(args, "threads", None):
            torch.set_num_threads(args.threads)
        report = measured(args)
        if args.write:
            report.write()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        return flags.fail(error)
    except KeyboardInterrupt:
        return 130
    return 0
