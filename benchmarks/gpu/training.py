"""The parts about training: every network's parity with the CPU, a whole run of train.py, its step in each mode."""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import train
from benchmarks.gpu import job as tools
from benchmarks.gpu.job import LAYOUTS, SIZES, Job, peak_memory, product_rate, timed, utilisation
from model.align import ALIGN
from model.clip import CLIP
from model.dino import DINO
from model.stable_diffusion import StableDiffusion
from model.tokenizer import BertTokenizer
from subject import load_photos, load_subject
from support import memory
from support.flags import EMBEDDED_BASE
from train import RPO

PROMPT = "a photo of a dog"
STEPS, VALIDATIONS = 400, 11  # of train.py's default run
MODES = {
    "the whole U-Net": (),
    "the whole U-Net, checkpointed": ("--checkpoint-gradients",),
    "LoRA 16": ("--lora-rank", "16"),
    "LoRA 16, checkpointed": ("--lora-rank", "16", "--checkpoint-gradients"),
    "the whole U-Net, 4 pairs": ("--batch", "4"),
}
PRECISIONS = {"fp32": None, "fp32, TF32 convolutions": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# -------------------------------------------------------------------------------------------------------------- parity


def parity(job: Job) -> None:
    """Every network on the device next to the same on the CPU in fp32."""
    for size, folder in (("weights/toy", EMBEDDED_BASE), (job.size, job.base)):
        for name, *case in cases(folder):
            job.measure(f"parity of {size}, {name}", differences, size, name, *case)


def cases(folder: Path) -> list[tuple[str, nn.Module, str, tuple[Tensor, ...]]]:
    """Name, network, method and its inputs, for every network in a base's folder."""
    sd, align = StableDiffusion.from_pretrained(folder), ALIGN.from_pretrained(folder / "reward")
    words = BertTokenizer.from_pretrained(folder / "reward")
    draws = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draws)

    side, config = sd.image_size // sd.vae.downscale, sd.unet.config
    latents, context = normal(config.in_channels, side, side), normal(77, config.cross_attention_dim)
    photo = load_photos(load_subject(tools.DOG), sd.image_size)[:1]
    found = [
        ("U-Net", sd.unet, "forward", (latents, torch.tensor([601]), context)),
        ("VAE decoder", sd.vae, "decode", (latents,)),
        ("VAE encoder", sd.vae, "encode", (normal(3, sd.image_size, sd.image_size),)),
        ("text encoder", sd.text_encoder, "forward", (sd.tokenizer([PROMPT]),)),
        ("ALIGN, pictures", align, "image_features", (align.preprocess(photo),)),
        ("ALIGN, texts", align, "text_features", words([PROMPT])),
    ]
    metrics = folder / "metrics"
    if metrics.is_dir():
        clip, dino = CLIP.from_pretrained(metrics / "clip"), DINO.from_pretrained(metrics / "dino")
        found.append(("CLIP, pictures", clip, "image_features", (clip.preprocess(photo),)))
        found.append(("DINO", dino, "forward", (dino.preprocess(photo),)))
    return found


@torch.no_grad()
def differences(job: Job, size: str, name: str, network: nn.Module, method: str, inputs: tuple[Tensor, ...]) -> None:
    """The largest, mean and relative difference in each precision and layout."""

    def output(device: torch.device) -> Tensor:
        result = getattr(network, method)(*(each.to(device) for each in inputs))
        return (result[0] if isinstance(result, tuple) else result).float().cpu()

    reference = output(next(network.parameters()).device)
    modes = PRECISIONS if job.device.type == "cuda" else {"fp32": None, "bf16": torch.bfloat16}
    for layout, memory_format in LAYOUTS.items():
        network.to(job.device, memory_format=memory_format)
        for mode, dtype in modes.items():
            torch.backends.cudnn.allow_tf32 = mode != "fp32"  # torch's default is True
            with torch.autocast(job.device.type, dtype, cache_enabled=False) if dtype else nullcontext():
                apart = output(job.device) - reference
            cells = {"max": apart.abs().max().item(), "mean": apart.abs().mean().item()}
            cells["relative"] = (apart.norm() / reference.norm()).item()
            job.add("Parity with fp32 on the CPU", size=size, network=name, precision=mode, layout=layout, **cells)
    network.to("cpu", memory_format=torch.contiguous_format)  # other methods of it may follow


# --------------------------------------------------------------------------------------------------------- a whole run


def whole(job: Job) -> None:
    """train.py from its files to its checkpoint in few steps, and what the default run would take."""
    for title, flags in (("the whole U-Net", ()), ("LoRA 16", ("--lora-rank", "16"))):
        job.measure(f"a whole run of {title}", whole_run, title, flags)


def whole_run(job: Job, title: str, flags: tuple[str, ...]) -> None:
    """A row for each phase: seconds here, how many the default run has, seconds there."""
    watch, runs, begin = tools.Watch(job.device), [], time.perf_counter()

    class Watched(RPO):
        def __init__(self, *parts):
            super().__init__(*parts)
            runs.append((self, time.perf_counter()))
            for owner, method in ((self, "prepare"), (self, "draw"), (self.reward, "alignments")):
                watch.on(owner, method)
            watch.on(self.record, "validation")

    train.fine_tune(tools.arguments(job, *flags), Watched)
    total, (run, built) = time.perf_counter() - begin, runs[0]
    prepare, draw, score, save = (watch.seconds[name] for name in ("prepare", "draw", "alignments", "validation"))
    steps = [row["seconds"] for row in run.record.history if "total" in row]
    step = statistics.median(steps)
    phases = {
        "load": (built - begin, 1),
        "draw the negatives": (draw[0], 1),
        "score and encode them": (prepare[0] - draw[0], 1),
        "first step, above the median": (max(0.0, steps[0] - save[0] - step), 1),  # its row begins before the saving
        "step (median)": (step, STEPS),
        "draw a validation": (draw[-1], VALIDATIONS),
        "score a validation": (score[-1], VALIDATIONS),
        "save at the start": (save[0], 1),
        "save, if each validation is the best": (save[-1], VALIDATIONS - 1),
    }
    table = f"A whole run of {title}"
    for phase, (seconds, times) in phases.items():
        job.add(table, phase=phase, s=seconds, times=times, **{"default run, s": seconds * times})
    default = sum(seconds * times for seconds, times in phases.values())
    job.add(table, phase=f"all; here {len(steps)} steps", s=total, **{"default run, s": default})


# ------------------------------------------------------------------------------------------------------ training steps


def step(job: Job) -> None:
    """A training step in each mode: seconds, utilisation, memory next to the estimate; and on diffusers' U-Net."""
    peak, work = product_rate(job.device), {}
    for mode in MODES:
        job.measure(f"a step of {mode}", training, mode, peak, work)
    job.measure("a step on diffusers' U-Net", training_of_diffusers, peak, work)


def training(job: Job, mode: str, peak: float, work: dict[str, int]) -> None:
    """work: FLOP of a step by mode, which this fills; what gradient checkpointing computes again does not count."""
    peak_memory(job.device)
    with tools.prepared(job, *MODES[mode]) as (args, method):
        loading = peak_memory(job.device)
        method.train()
        gigabytes = {"GB": peak_memory(job.device), "GB before": loading}
        gigabytes["GB, estimated"] = sum(memory.estimate_of(args).values()) / 1e9
        ms = 1e3 * statistics.median(row["seconds"] for row in method.record.history)
        plain = mode.removesuffix(", checkpointed")
        if plain not in work:
            work[plain] = tools.flop(lambda: once(method))
        watch = tools.Watch(job.device)
        watch.on(method, "batch")
        watch.on(method.machine, "place")
        watch.on(method, "loss")
        watch.on(method.optimizer, "minimize")
        timed(lambda: once(method), job.device, SIZES[job.size].repeats)
        parts = {f"{name}, ms": 1e3 * statistics.median(seconds) for name, seconds in watch.seconds.items()}
        job.add("A training step", mode=mode, ms=ms, **utilisation(work[plain], ms, peak), **gigabytes, **parts)


def once(method: RPO) -> None:
    """One training step, which the record does not see."""
    batch = method.machine.place(method.batch(1))
    method.optimizer.minimize(method.loss(batch).total)


def training_of_diffusers(job: Job, peak: float, work: dict[str, int]) -> None:
    """RPO's step with diffusers' U-Net as θ and θ₀, in each layout; AdamW as ours has it."""
    with tools.prepared(job) as (_, method):
        frozen = tools.of_diffusers(job, method.sd.unet)
        for layout, memory_format in LAYOUTS.items() if frozen else ():
            frozen.to(memory_format=memory_format)
            trained = copy.deepcopy(frozen).float().requires_grad_(True)
            weights = [*trained.parameters()]
            adamw = torch.optim.AdamW(weights, lr=1e-6, fused=True)
            method.theta, method.theta_0 = denoiser(method.sd, trained), torch.no_grad()(denoiser(method.sd, frozen))

            def theirs(weights=weights, adamw=adamw):
                method.loss(method.machine.place(method.batch(1))).total.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                adamw.step()
                adamw.zero_grad(set_to_none=True)

            cells = timed(theirs, job.device, SIZES[job.size].repeats)
            cells |= utilisation(work.get("the whole U-Net", 0), cells["ms"], peak)
            job.add("A training step", mode=f"the whole U-Net, diffusers', {layout}", **cells)


def denoiser(sd: StableDiffusion, network: nn.Module):
    """The network as `machine.theta` calls it."""

    def predict(*inputs: Tensor) -> Tensor:
        with sd.autocast():
            return network(*inputs)

    return predict
