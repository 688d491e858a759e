"""What the machine can do: half precision, torch.compile, and its memory, which is told before it is needed:

- weights: 2 bytes each where they are frozen and precision is half, 4 where they are trained
- AdamW: 8 bytes a trained weight: its two averages, in fp32
- other networks: VAE, text encoder and ALIGN, in fp32; away from the GPU between validations if memory is short
- a step: what backward() needs of the forward pass, then the gradients
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import parallel
from model.lora import PROJECTION
from model.single_file import read_single_file
from model.stable_diffusion import PRECISIONS, StableDiffusion
from model.unet import ResNet, Transformer, UNet, UNetConfig
from model.weights import blaming, config_from, find_weights, read_json, read_tensors

# Bytes that backward() needs for each number of a layer's input and output, in fp32 and in half precision: counted in
# ResNet and Transformer, where autocast keeps the norms, and so their inputs and the SiLU's, in fp32.
OF_RESNET, OF_TRANSFORMER = {True: 10, False: 12}, {True: 78, False: 132}
COPIES = 4  # of the largest convolution's weights, which the libraries need to compute it: measured on a CPU


# ---------------------------------------------------------------------------------------------- precision


def precision(name: str | None, device: torch.device) -> str:
    """The precision called `name`, or the device's own: bf16 on an NVIDIA GPU, fp16 on one too old for it, else fp32.

    Some CPUs are fast in bf16 too, but a result should not depend on which.
    """
    if name is None and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return name or "fp32"


def round_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen weights as autocast would round them at every use: the same numbers, in half of the memory.

    So are the weights of linear layers and convolutions; the norms' are used in fp32.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            for name, parameter in [*layer.named_parameters(recurse=False)]:
                if not parameter.requires_grad:  # a new one: another network may share the old
                    setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def prepare_networks(args: argparse.Namespace, sd: StableDiffusion, unet: UNet, base_unet: UNet) -> None:
    """What train.py's flags ask of θ and θ₀, which are one network if it has adapters."""
    round_frozen(base_unet, sd.precision)
    if args.checkpoint_gradients:
        unet.checkpoint_gradients()
    if args.compile:
        compile_networks({unet, base_unet}, sd.device)


def own_averages(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's averages, just loaded, its own: they may be of another device, and parts of a mapped file.

    `fused` and the memory layout came with them, and on this one might fail, or be slow.
    """
    fused = optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        group["fused"] = fused
    for weight, averages in optimizer.state.items():
        averages["step"] = averages["step"].to(weight.device if fused else "cpu", copy=True)
        for name in ("exp_avg", "exp_avg_sq"):
            averages[name] = torch.empty_like(weight).copy_(averages[name])  # in the weight's layout


def numbers(row: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each tensor, in one transfer: asking a GPU for each would make it wait as many times."""
    values = torch.stack([value.float().mean() for value in row.values()]).tolist()
    return dict(zip(row, values, strict=True))


def check_numbers(row: dict[str, float], step: int, scaled: bool = False) -> dict[str, float | None]:
    """A step's "total" loss, its terms and the "gradient_norm", if all is well.

    scaled: with a GradScaler, which has passed over a step whose gradients overflowed; the norm is None then.
    Raises FloatingPointError, naming the term, if the loss or, unscaled, the gradient is not finite.
    """
    wrong = [name for name, value in row.items() if not math.isfinite(value)]
    if scaled and wrong == ["gradient_norm"]:
        return row | {"gradient_norm": None}
    if "total" in wrong or "gradient_norm" in wrong:
        term = next((name for name in wrong if name != "total"), "total")
        what = f"the loss is {row['total']} at step {step} ({term} is {row[term]})"
        raise FloatingPointError(f"{what}: try a smaller --lr{', or --precision fp32' if scaled else ''}")
    return row


# ---------------------------------------------------------------------------------------------- memory


def estimate(
    config: UNetConfig,
    others: int,
    side: int,
    batch: int,
    precision: str = "fp32",
    lora_rank: int | None = None,
    checkpointed: bool = False,
) -> dict[str, int]:
    """Bytes at the peak of a step of RPO, by what takes them: the list above. They are allocated at the same time.

    others: weights of the other networks. side: of the latents. batch: pairs. checkpointed: with checkpoint_gradients.
    Not counted are the libraries themselves and what the allocator loses between tensors.
    """
    with torch.device("meta"):  # shapes without numbers
        unet = UNet(config)
    half, last = PRECISIONS[precision] != torch.float32, len(config.block_out_channels) - 1
    weights = sum(parameter.numel() for parameter in unet.parameters())
    levels = [*enumerate(unet.down_blocks), (last, unet.mid_block)]
    levels += [(last - i, block) for i, block in enumerate(unet.up_blocks)]

    learned, kept, widest = [], [], 0  # of each block, in the order of the forward pass
    for level, block in levels:
        learned.append(sum(parameter.numel() for parameter in block.parameters()))
        if lora_rank:
            layers = [layer for name, layer in block.named_modules() if PROJECTION.fullmatch(f"block.{name}")]
            learned[-1] = sum(lora_rank * (layer.in_features + layer.out_features) for layer in layers)
        kept.append(2 * learned[-1] if half and not checkpointed else 0)  # the weights, as they were rounded
        positions = 2 * batch * math.ceil(side / 2**level) ** 2
        for layer in block.modules():
            if isinstance(layer, (ResNet, Transformer)):
                channels = [norm.num_channels for norm in layer.modules() if isinstance(norm, nn.GroupNorm)]
                inside = positions * sum(channels) * (OF_RESNET if isinstance(layer, ResNet) else OF_TRANSFORMER)[half]
                kept[-1] += positions * channels[0] * (2 if half else 4) if checkpointed else inside
                widest = max(widest, inside)
    # When backward() is at block i: what those before it have kept, and the gradients of those from it on.
    peak = max(sum(kept[:i]) + 4 * sum(learned[i:]) for i in range(len(kept) + 1))
    trained = sum(learned) if lora_rank else weights
    largest = max(parameter.numel() for parameter in unet.parameters()) * (2 if half else 4)
    parts = {
        "weights": weights * (2 if half else 4) + 4 * trained,  # θ₀, which LoRA shares, and θ
        "AdamW": 8 * trained,
        "other networks": 4 * others,
    }
    # All is loaded in fp32, and θ copied, before θ₀ is rounded: that may take more than a small step.
    loading = weights * (4 if lora_rank else 8) + 4 * others
    step = peak + (widest if checkpointed else 0) + COPIES * largest
    return parts | {"a step": max(step, loading - sum(parts.values()))}


def estimate_of(args: argparse.Namespace) -> dict[str, int]:
    """`estimate` for train.py's flags. Files are mapped, not read. Raises CheckpointError as loading does."""
    if args.base.is_file():
        parts = read_single_file(args.base, args.prediction_type)
        values, others = parts["unet"][0], [parts[name][1] for name in ("vae", "text_encoder")]
    else:
        values = read_json(args.base / "unet" / "config.json")
        others = [read_tensors(find_weights(args.base / name, args.variant)) for name in ("vae", "text_encoder")]
    others.append(read_tensors(find_weights(args.align)))
    source = args.base if args.base.is_file() else args.base / "unet" / "config.json"
    config, others = config_from(UNetConfig, values, source), sum(e.numel() for part in others for e in part.values())
    modes = args.precision, args.lora_rank, args.checkpoint_gradients
    with blaming(f"the configuration of {source} describes no possible network"):
        side = math.ceil(args.resolution / 8) if args.resolution else config.sample_size  # 8: of every public VAE
        return estimate(config, others, side, own_pairs(args.batch), *modes)


def own_pairs(batch: int) -> int:
    """How many of a step's pairs a process has at most."""
    return math.ceil(batch / parallel.world())


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; infinite elsewhere, where the system can swap."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def tell_memory(args: argparse.Namespace, device: torch.device) -> bool:
    """Print the estimate, and a warning if the GPU has less free; has it? Raises CheckpointError as loading does."""
    parts, free = estimate_of(args), free_memory(device)
    each = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    print(f"memory, estimated: {(total := sum(parts.values())) / 1e9:.1f} GB ({each})")
    if total > free:
        print(f"warning: this GPU has {free / 1e9:.1f} GB free: {remedy(args)}")
    return total > free


def remedy(args: argparse.Namespace) -> str:
    """What to try when the memory does not suffice for train.py, in this order."""
    flags = [] if args.precision != "fp32" else ["--precision bf16"]
    flags += [] if args.lora_rank else ["--lora-rank 16"]  # the whole U-Net's weights take more than its activations
    flags += [] if args.checkpoint_gradients else ["--checkpoint-gradients"]
    alone = args.batch is not None and own_pairs(args.batch) == 1
    flags += [] if alone else ["a smaller --batch"]
    last = "a larger machine (--batch is a pair a process already)" if alone else "a larger machine"
    return f"try {', then '.join([*flags, last])}"


@contextmanager
def visiting(networks: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the networks are on `device`; afterwards on the CPU."""
    for network in networks:
        network.to(device)
    yield
    for network in networks:
        network.cpu()


# ---------------------------------------------------------------------------------------------- torch.compile


def compile_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """torch.compile each in place: the names of its weights stay. Raises ValueError if there is no compiler."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds
        needs = "Triton" if device.type == "cuda" else "a C++ compiler"
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"--compile needs {needs}, which failed: {why}") from None
    for network in networks:
        network.compile()
