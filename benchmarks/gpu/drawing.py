"""The parts about drawing: U-Net passes, pictures, where the time goes, CUDA graphs and torch.compile, the release."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import job as tools
from benchmarks.gpu.job import LAYOUTS, SIZES, Job, peak_memory, product_rate, timed, utilisation
from benchmarks.gpu.training import PROMPT, STEPS, once
from model.align import ALIGN
from model.files.write import save_tensors
from model.stable_diffusion import StableDiffusion
from reward import Reward
from support.machine import cast_frozen_weights

GUIDANCE = 7.5
KINDS = {  # of a GPU's kernels, by their names; the first pattern that is found decides
    "attention": r"flash|fmha|attention",
    "AdamW, clipping": r"multi_tensor|adam",
    "norms": r"norm|welford|rowwise",
    "copies, casts, layouts": r"copy|memcpy|memset|nchwto|nhwcto",
    "products, convolutions": r"gemm|cutlass|xmma|nvjet|conv|winograd|cudnn|sm\d\d_|::mm|linear",
    "element by element": r"",
}
RELEASED = {"negatives": 128, "validation pictures": 320, "validations": 10}  # the authors' release at 400 steps

# -------------------------------------------------------------------------------------------------------- U-Net passes


def passes(job: Job) -> None:
    """A U-Net pass without gradient, in each layout, with fp32 weights (θ) and rounded ones (θ₀); and diffusers'."""
    sd, peak = StableDiffusion.from_pretrained(job.base, job.device), product_rate(job.device)
    rounded = copy.deepcopy(sd.unet)
    cast_frozen_weights(rounded, sd.precision)
    networks = {"ours": sd.unet, "ours, rounded": rounded, "diffusers'": tools.of_diffusers(job, sd.unet)}
    for batch in SIZES[job.size].passes:
        for name, network in networks.items():
            if network:
                job.measure(f"a pass of {name} at batch {batch}", one_pass, sd, name, network, batch, peak)


@torch.no_grad()
def one_pass(job: Job, sd: StableDiffusion, name: str, network: nn.Module, batch: int, peak: float) -> None:
    """Rows for each layout, and for cuDNN's search for the fastest convolutions."""
    inputs = tools.inputs_of(job, sd, batch)

    def call() -> Tensor:
        with sd.autocast():
            return network(*inputs)

    for layout, memory_format in LAYOUTS.items():
        network.to(memory_format=memory_format)
        for search in (False, True) if name == "ours, rounded" else (False,):
            peak_memory(job.device)
            torch.backends.cudnn.benchmark = search
            cells = timed(call, job.device, SIZES[job.size].repeats) | {"GB": peak_memory(job.device)}
            cells |= utilisation(tools.flop(call), cells["ms"], peak)
            torch.backends.cudnn.benchmark = False
            layout += ", cudnn.benchmark" if search else ""
            job.add("A U-Net pass", network=name, batch=batch, layout=layout, **cells)


# ------------------------------------------------------------------------------------------------------------- drawing


def drawing(job: Job) -> None:
    """Seconds a picture at each batch, split, and the kernels of one U-Net pass and of one training step."""
    sd = StableDiffusion.from_pretrained(job.base, job.device)
    cast_frozen_weights(sd.unet, sd.precision)
    for batch in SIZES[job.size].pictures:
        job.measure(f"drawing {batch}", draw, sd, batch)
    for batch in SIZES[job.size].passes:
        inputs = tools.inputs_of(job, sd, batch)
        job.measure(f"kernels of a pass at batch {batch}", kernels, f"a pass at batch {batch}", sd.denoise, *inputs)
    job.measure("kernels of a step", kernels_of_a_step)


def draw(job: Job, sd: StableDiffusion, batch: int) -> None:
    """One batch of pictures: in one go, then with U-Net and VAE watched."""
    steps = SIZES[job.size].solver_steps

    def call() -> None:
        sd.generate([PROMPT] * batch, list(range(batch)), steps, GUIDANCE, batch_size=batch)

    whole = timed(call, job.device, 2)["ms"] / 1e3 / batch
    watch, watched = tools.Watch(job.device), copy.copy(sd)
    watched.vae = copy.copy(sd.vae)
    watch.on(watched, "denoise")
    watch.on(watched.vae, "decode")
    begin = time.perf_counter()
    watched.generate([PROMPT] * batch, list(range(batch)), steps, GUIDANCE, batch_size=batch)
    total = (time.perf_counter() - begin) / batch
    unet, vae = (sum(watch.seconds[name]) / batch for name in ("denoise", "decode"))
    cells = {"s a picture": whole, "U-Net, s": unet, "VAE, s": vae, "rest, s": total - unet - vae}
    job.add(f"Drawing, {steps} steps", batch=batch, **cells)


def kernels(job: Job, name: str, call: Callable, *arguments) -> None:
    """How long the device is busy in a call, and with which kernels; the rest of the time it waits for the host."""

    @torch.no_grad()
    def without_gradient() -> None:
        call(*arguments)

    run = without_gradient if arguments else call
    ms, cuda = timed(run, job.device, 5)["ms"], job.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        run()
        tools.synchronize(job.device)
    found = [event for event in profiled.events() if event.device_type.name == job.device.type.upper()]
    found = [event for event in found if not getattr(event, "is_user_annotation", False)]  # these contain others
    kinds, names = Counter(), Counter()
    for event in found:
        spent = event.time_range.elapsed_us() / 1e3
        names[event.name[:100]] += spent
        kinds[kind_of(event.name)] += spent
    job.add("Kernels", what=name, kernels=len(found), ms=ms, **{"busy, ms": kinds.total()}, **kinds)
    for kernel, spent in names.most_common(8):
        job.add("The longest kernels", what=name, kernel=kernel, ms=spent)


def kind_of(kernel: str) -> str:
    """Which of KINDS a kernel is, by its name."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.lower()))


def kernels_of_a_step(job: Job) -> None:
    """Of a training step of the whole U-Net."""
    with tools.prepared(job) as (_, method):
        kernels(job, "a training step", lambda: once(method))


# ---------------------------------------------------------------------------------------------- graphs and compilation


def graphs(job: Job) -> None:
    """What CUDA graphs would save in a U-Net pass and in a training step; then torch.compile."""
    sd = StableDiffusion.from_pretrained(job.base, job.device)
    cast_frozen_weights(sd.unet, sd.precision)
    for batch in SIZES[job.size].passes:
        job.measure(f"a CUDA graph of a pass at batch {batch}", graph_of_a_pass, sd, batch)
    for mode, flags in (("the whole U-Net", ()), ("LoRA 16", ("--lora-rank", "16"))):
        job.measure(f"a CUDA graph of a step of {mode}", graph_of_a_step, mode, flags)
    for batch in reversed(SIZES[job.size].passes):
        job.measure(f"torch.compile at batch {batch}", compiled, sd, batch)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph, replayed on the same tensors. A CPU has none: the call itself."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.no_grad()
def graph_of_a_pass(job: Job, sd: StableDiffusion, batch: int) -> None:
    inputs = tools.inputs_of(job, sd, batch)
    eager = timed(lambda: sd.denoise(*inputs), job.device, SIZES[job.size].repeats)["ms"]
    graph = timed(captured(lambda: sd.denoise(*inputs), job.device), job.device, SIZES[job.size].repeats)["ms"]
    cells = {"ms": graph, "eager, ms": eager}
    job.add("Graphs and compilation", what=f"a pass at batch {batch}", how="CUDA graph", **cells)


def graph_of_a_step(job: Job, mode: str, flags: tuple[str, ...]) -> None:
    """Loss, backward, clipping and AdamW as one graph, on one batch."""
    with tools.prepared(job, *flags) as (_, method):
        scheduler = method.sd.scheduler
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(job.device)  # a graph may not copy from the host
        for group in method.optimizer.adamw.param_groups:
            group["capturable"] = job.device.type == "cuda"
        batch = method.machine.place(method.batch(1))

        def call() -> None:
            method.optimizer.minimize(method.loss(batch).total)

        eager = timed(call, job.device, SIZES[job.size].repeats)["ms"]
        graph = timed(captured(call, job.device), job.device, SIZES[job.size].repeats)["ms"]
        job.add("Graphs and compilation", what=f"a step of {mode}", how="CUDA graph", ms=graph, **{"eager, ms": eager})


@torch.no_grad()
def compiled(job: Job, sd: StableDiffusion, batch: int) -> None:
    """torch.compile of the U-Net. It takes a minute or more, so only if there is time."""
    if job.left() < 60 and job.device.type == "cuda":
        job.add(tools.FAILED, what=f"torch.compile at batch {batch}", traceback="no time was left")
        return
    inputs = tools.inputs_of(job, sd, batch)
    network = torch.compile(sd.unet, dynamic=False, disable=job.device.type == "cpu")

    def call() -> Tensor:
        with sd.autocast():
            return network(*inputs)

    eager = timed(lambda: sd.denoise(*inputs), job.device, SIZES[job.size].repeats)["ms"]
    begin = time.perf_counter()
    call()
    tools.synchronize(job.device)
    compiling = time.perf_counter() - begin
    cells = timed(call, job.device, SIZES[job.size].repeats)
    cells |= {"eager, ms": eager, "compiling, s": compiling}
    job.add("Graphs and compilation", what=f"a pass at batch {batch}", how="torch.compile", **cells)


# ------------------------------------------------------------------------------------------------- the release's shape


def release(job: Job) -> None:
    """The authors' release in its shape, on our networks: pictures one by one with 50 steps of DDIM, nothing cached."""
    with tools.prepared(job) as (args, method):
        sd, device = method.sd, job.device

        def seconds(call: Callable[[], object], repeats: int = 3, warm: int = 1) -> float:
            return timed(call, device, repeats, warm)["ms"] / 1e3

        steps, photo, prompt = SIZES[job.size].release_steps, method.photos[0], method.prompts[0]
        draw = seconds(lambda: sd.generate([prompt], [0], steps, GUIDANCE, sampler="ddim", batch_size=1), 2)
        score = seconds(lambda: method.reward.alignments([photo], [prompt]))

        def encode() -> None:
            sd.encode_images([photo, photo])
            with torch.no_grad():
                sd.text_encoder(sd.tokenizer([prompt, prompt]).to(device))

        def load_align() -> None:
            Reward(ALIGN.from_pretrained(args.align).to(device), method.reward.tokenizer, method.photos)

        def save() -> None:
            save_tensors(method.machine.weights(), job.base / "released.safetensors")

        pieces = {
            "a negative: drawn and scored": (draw + score, RELEASED["negatives"]),
            "a step, its pictures and prompts encoded": (seconds(lambda: once(method)) + seconds(encode), STEPS),
            "a validation picture": (draw + score, RELEASED["validation pictures"]),
            "ALIGN loaded, photos embedded": (seconds(load_align, 1, 0), 1 + RELEASED["validations"]),
            "the U-Net saved": (seconds(save, 1, 0), RELEASED["validations"]),
        }
        for piece, (spent, times) in pieces.items():
            job.add("The release's shape", piece=piece, s=spent, times=times, **{"whole job, s": spent * times})
        total = sum(spent * times for spent, times in pieces.values())
        job.add("The release's shape", piece="all", **{"whole job, s": total})
