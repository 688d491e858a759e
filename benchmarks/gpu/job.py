"""What the parts share: a Job with its tables, the sizes, a base model of random weights, clocks, train.py's run."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import statistics
import time
import traceback
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import AsOurs, synchronize
from benchmarks.full_size import MODELS, VAE
from model import align, clip, unet, vae
from model.files.config import config_from, read_json
from model.files.write import save_tensors
from model.stable_diffusion import PRECISIONS, StableDiffusion
from reward import Reward
from support import start
from support.flags import EMBEDDED_BASE
from toy.networks import write_part
from train import RPO

DOG = Path(__file__).parents[2] / "data" / "dog"
FAILED = "What failed or was left out"
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

# ----------------------------------------------------------------------------------------------------------- the sizes


class Size(NamedTuple):
    """How large and how long the measurements are."""

    configs: dict[str, dict]  # of the networks, as config.json has them; {}: the defaults, which are public sizes
    passes: tuple[int, ...]  # batches of a U-Net pass
    pictures: tuple[int, ...]  # batches of drawing
    solver_steps: int
    release_steps: int  # of the release's solver
    repeats: int
    flags: tuple[str, ...]  # of a short run of train.py


TINY = {
    "unet": {
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 8,
    },
    "vae": {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
    },
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "reward": read_json(EMBEDDED_BASE / "reward" / "config.json"),
}
FEW = ("--steps", "4", "--validate-every", "4", "--images-per-prompt", "1", "--solver-steps", "2")
SIZES = {
    "tiny": Size(TINY, (2,), (1, 2), 2, 2, 2, FEW),
    "sd15": Size(
        MODELS["1.5"] | {"vae": VAE, "reward": {}},
        (2, 8, 32),
        (1, 4, 16),
        20,
        50,
        12,
        ("--steps", "20", "--validate-every", "20"),
    ),
}

# ------------------------------------------------------------------------------------------------------------- the job


class Job(NamedTuple):
    """What a part is given."""

    base: Path  # folder of the base model
    size: str
    device: torch.device
    until: float  # time.time() at which the part is stopped
    rows: Path  # a file with a line of JSON for each row of a table

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.until - time.time()

    def add(self, table: str, **cells: str | float) -> None:
        """Add a row to a table, and print it."""
        with open(self.rows, "a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, **cells}) + "\n")
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in cells.items()
        )
        print(f"[{table}] {', '.join(shown)}", flush=True)

    def measure(self, name: str, call: Callable[..., None], *arguments) -> None:
        """call(self, *arguments). If it fails, keep the traceback; with less than 5 seconds left, leave it out."""
        if self.left() < 5:
            self.add(FAILED, what=name, traceback="no time was left")
            return
        try:
            call(self, *arguments)
        except Exception:
            self.add(FAILED, what=name, traceback=traceback.format_exc())
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------- the base of random weights

NETWORKS = {
    "unet": (unet.UNet, unet.UNetConfig, "diffusion_pytorch_model.safetensors"),
    "vae": (vae.VAE, vae.VAEConfig, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (clip.CLIPTextEncoder, clip.CLIPTextConfig, "model.safetensors"),
    "reward": (align.ALIGN, align.ALIGNConfig, "model.safetensors"),
}


@torch.no_grad()
def random_network(name: str, config: dict, device: torch.device) -> nn.Module:
    """A network with random weights, made on the device: norms near 1, matrices that keep the size of their input."""
    network_class, config_class, _ = NETWORKS[name]
    with torch.device("meta"):
        network = network_class(config_from(config_class, config))
    network.to_empty(device=device)
    draws = torch.Generator(device).manual_seed(0)
    for key, tensor in network.state_dict().items():
        if not tensor.is_floating_point() or key.endswith("running_var"):
            tensor.fill_(1)
        elif tensor.ndim > 1:
            tensor.normal_(0, 1 if "embedding.weight" in key else tensor[0].numel() ** -0.5, generator=draws)
        else:
            tensor.normal_(float(key.endswith("weight")), 0.1, generator=draws)
    return network


def base(job: Job) -> None:
    """Write a base model of the job's size, and measure what the machine could reach at best."""
    configs = SIZES[job.size].configs
    for part in ("tokenizer", "scheduler", "reward"):
        shutil.copytree(EMBEDDED_BASE / part, job.base / part)
    if not configs["reward"]:
        (job.base / "reward" / "preprocessor_config.json").unlink()  # ALIGN's defaults are the public ones
    for name, (*_, file) in NETWORKS.items():
        begin = time.perf_counter()
        network = random_network(name, configs[name], job.device)
        synchronize(job.device)
        made = time.perf_counter()
        write_part(job.base / name, configs[name], network.state_dict(), file)
        million = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        seconds = {"made in s": made - begin, "written in s": time.perf_counter() - made}
        job.add("The base of random weights", network=name, million=million, **seconds)
    job.measure("the machine", machine)


def machine(job: Job) -> None:
    """What any program could reach at best on this machine."""
    device, cuda = job.device, job.device.type == "cuda"

    def add(what: str, value: float, unit: str) -> None:
        job.add("The machine", what=what, value=value, unit=unit)

    for name, dtype in PRECISIONS.items() if cuda else [("fp32", torch.float32)]:
        add(f"matrix product, {name}", product_rate(device, dtype) / 1e12, "TFLOP/s")
    there = torch.randn(2**28 if cuda else 2**16, device=device)
    other, here = torch.empty_like(there), torch.empty(len(there), pin_memory=cuda)
    size, file = there.nbytes / 1e6, job.base / "speed.safetensors"  # MB a ms is GB/s
    add("copy on the device, read and written", 2 * size / timed(lambda: other.copy_(there), device, 5)["ms"], "GB/s")
    add("device to host, pageable", size / timed(there.cpu, device, 3)["ms"], "GB/s")
    add("device to host, pinned", size / timed(lambda: here.copy_(there, non_blocking=True), device, 3)["ms"], "GB/s")
    add("device to file", size / timed(lambda: save_tensors({"x": there}, file), device, 1, 1)["ms"], "GB/s")
    file.unlink()
    x = torch.zeros(8, device=device)
    add("start of a kernel", timed(lambda: [x.add_(1) for _ in range(1000)], device, 5)["host ms"], "us")


# -------------------------------------------------------------------------------------------------------------- clocks


def timed(call: Callable[[], object], device: torch.device, repeats: int, warm: int = 2) -> dict[str, float]:
    """Median milliseconds of a call, and of the time until the host has started its last kernel.

    warm: calls before those that count.
    """
    totals, hosts = [], []
    for _ in range(warm + repeats):
        synchronize(device)
        begin = time.perf_counter()
        call()
        started = time.perf_counter()
        synchronize(device)
        totals.append(time.perf_counter() - begin)
        hosts.append(started - begin)
    return {"ms": 1e3 * statistics.median(totals[warm:]), "host ms": 1e3 * statistics.median(hosts[warm:])}


class Watch:
    """Seconds of every call of some methods, by name. It waits for the device before and after each call."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(list)

    def on(self, owner: object, method: str) -> None:
        """Watch the object's method from now on."""
        inner = getattr(owner, method)

        def call(*arguments, **options):
            synchronize(self.device)
            begin = time.perf_counter()
            result = inner(*arguments, **options)
            synchronize(self.device)
            self.seconds[method].append(time.perf_counter() - begin)
            return result

        setattr(owner, method, call)


def flop(call: Callable[[], object]) -> int:
    """Floating-point operations of a call as torch counts them, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def product_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a large matrix product, which utilisation is relative to."""
    side = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / (timed(lambda: a @ b, device, 10)["ms"] / 1e3)


def utilisation(work: float, milliseconds: float, peak: float) -> dict[str, float]:
    """The TFLOP of a call, and the share of the peak rate that it reached."""
    return {"TFLOP": work / 1e12, "of peak": work / (milliseconds / 1e3) / peak}


def peak_memory(device: torch.device) -> float:
    """GB (10^9 bytes) that were allocated at most since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


# ------------------------------------------------------------------------------------------------- networks and the run


def arguments(job: Job, *flags: str) -> Namespace:
    """A command line of train.py."""
    files = ("--subject", DOG, "--base", job.base, "--ckpt", job.base / "run.safetensors", "--device", job.device)
    return start.parse(RPO, "", [*map(str, files), *SIZES[job.size].flags, *flags])


@contextmanager
def prepared(job: Job, *flags: str) -> Iterator[tuple[Namespace, RPO]]:
    """train.py's flags, and its run before the first step. Grey pictures are the negatives; it never validates."""
    args = arguments(job, *flags)
    with start.prepared(args, RPO) as run:
        method = RPO(run, Reward(run.align, run.bert, run.photos, run.subject.token))
        grey = Image.new("RGB", (run.sd.image_size, run.sd.image_size), "grey")
        method.draw = lambda prompts, *_: [grey] * len(prompts)
        method.validate = lambda step: None
        method.prepare()
        yield args, method


def inputs_of(job: Job, sd: StableDiffusion, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, t and context of a U-Net pass, on the device."""
    side, width = sd.image_size // sd.vae.downscale, sd.unet.config.cross_attention_dim
    latents, context = (torch.randn(batch, *shape, device=job.device) for shape in ((4, side, side), (77, width)))
    return latents, torch.full((batch,), 601, device=job.device), context


def of_diffusers(job: Job, ours: nn.Module) -> nn.Module | None:
    """diffusers' U-Net with the weights of ours, called as ours is; None where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        job.add(FAILED, what="diffusers", traceback="not installed here: its rows are left out")
        return None
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(SIZES[job.size].configs["unet"])
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return AsOurs(theirs.eval().requires_grad_(False))
