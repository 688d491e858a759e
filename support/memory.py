"""An estimate of the memory of a training step, before anything heavy is loaded:

- weights: 2 bytes each where they are frozen and precision is half, 4 where they are trained
- AdamW: 8 bytes a trained weight: its two averages, in fp32
- other networks: VAE, text encoder and ALIGN, in fp32; away from the GPU between validations if memory is short
- a step: what backward() needs of the forward pass, then the gradients
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from model.files.config import config_from, read_json
from model.files.errors import error_context
from model.files.single_file import read_single_file
from model.files.tensors import find_weights, read_tensors
from model.lora import PROJECTION
from model.stable_diffusion import PRECISIONS
from model.unet import ResNet, Transformer, UNet, UNetConfig
from support import ranks

# Bytes that backward() needs for each number of a layer's input and output, in fp32 and in half precision: counted in
# ResNet and Transformer, where autocast keeps the norms, and so their inputs and the SiLU's, in fp32.
OF_RESNET, OF_TRANSFORMER = {True: 10, False: 12}, {True: 78, False: 132}
COPIES = 4  # of the largest convolution's weights, which the libraries need to compute it: measured on a CPU


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
    with error_context(f"the configuration of {source} describes no possible network"):
        side = math.ceil(args.resolution / 8) if args.resolution else config.sample_size  # 8: of every public VAE
        return estimate(config, others, side, own_pairs(args.batch), *modes)


def own_pairs(batch: int) -> int:
    """How many of a step's pairs a process has at most."""
    return math.ceil(batch / ranks.world())


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
    argv = [] if args.precision != "fp32" else ["--precision bf16"]
    argv += [] if args.lora_rank else ["--lora-rank 16"]  # the whole U-Net's weights take more than its activations
    argv += [] if args.checkpoint_gradients else ["--checkpoint-gradients"]
    alone = args.batch is not None and own_pairs(args.batch) == 1
    argv += [] if alone else ["a smaller --batch"]
    last = "a larger machine (--batch is a pair a process already)" if alone else "a larger machine"
    return f"try {', then '.join([*argv, last])}"


@contextmanager
def visiting(networks: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the networks are on `device`; afterwards on the CPU."""
    for network in networks:
        network.to(device)
    yield
    for network in networks:
        network.cpu()
