"""An estimate of the memory of a training step, before anything large is loaded. Its parts:

- weights: 2 bytes each where they are frozen and precision is half, 4 where they are trained
- AdamW: 8 bytes a trained weight: its two averages, in fp32
- other networks: VAE, text encoder and ALIGN, in fp32; off the GPU between validations if memory is short
- a step: what backward() needs of the forward pass, then the gradients
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import nn

from model.files.config import config_from, read_json
from model.files.errors import error_context
from model.files.single_file import read_single_file
from model.files.tensors import find_weights, read_tensors
from model.lora import add_lora
from model.stable_diffusion import PRECISIONS
from model.unet import ResNet, Transformer, UNet, UNetConfig
from support import ranks

# Bytes that backward() needs for each number of a layer's input and output, by "precision is half": counted in ResNet
# and Transformer, where autocast keeps the norms, and so their inputs and the SiLU's, in fp32.
OF_RESNET, OF_TRANSFORMER = {True: 10, False: 12}, {True: 78, False: 132}
COPIES = 4  # of the largest convolution's weights, which the libraries need to compute it: measured on a CPU


def estimate(
    config: UNetConfig,
    others: int,
    side: int,
    pictures: int,
    precision: str = "fp32",
    lora_rank: int | None = None,
    checkpointed: bool = False,
    also: int = 0,
) -> dict[str, int]:
    """Bytes at the peak of a training step, by the parts listed above, which are allocated at the same time.

    others: weights of the other networks. side: of the latents. pictures: in a pass of θ, on one device (three a pair
    for RPO). checkpointed: with --checkpoint-gradients. also: how many of `others` are trained too. Not counted: the
    libraries themselves, and what the allocator loses between tensors.
    """
    half = PRECISIONS[precision] != torch.float32
    size = 2 if half else 4
    with torch.device("meta"):  # shapes without numbers
        unet = UNet(config)
    sizes = [parameter.numel() for parameter in unet.parameters()]
    if lora_rank:
        add_lora(unet, lora_rank, generator=torch.Generator())
    kept, gradients, widest = [], [], 0  # of each block, in the order of the forward pass
    for level, block in _blocks(unet):
        positions = pictures * math.ceil(side / 2**level) ** 2
        layers = [_activations(layer, positions, half) for layer in block.modules()]
        widest = max(widest, *(activations for activations, _ in layers))
        trained = _trained(block)
        gradients.append(4 * trained)
        of_backward = sum(activations for activations, _ in layers) + (2 * trained if half else 0)
        kept.append(sum(inputs for _, inputs in layers) if checkpointed else of_backward)
    # When backward() is at block i: what the blocks before it have kept, and the gradients of those from it on.
    peak = max(sum(kept[:i]) + sum(gradients[i:]) for i in range(len(kept) + 1))
    step = peak + (widest if checkpointed else 0) + COPIES * max(sizes) * size + 4 * also
    trained = _trained(unet)
    parts = {"weights": size * sum(sizes) + 4 * trained, "AdamW": 8 * (trained + also), "other networks": 4 * others}
    # Everything is loaded in fp32, and θ copied, before θ₀ is rounded: that may take more than a small step.
    loading = sum(sizes) * (4 if lora_rank else 8) + 4 * (others + also)
    return parts | {"a step": max(step, loading - sum(parts.values()))}


def _blocks(unet: UNet) -> list[tuple[int, nn.Module]]:
    """The blocks in the order of the forward pass, each with its level: its maps are 2^level times smaller."""
    last = len(unet.down_blocks) - 1
    ups = [(last - i, block) for i, block in enumerate(unet.up_blocks)]
    return [*enumerate(unet.down_blocks), (last, unet.mid_block), *ups]


def _trained(network: nn.Module) -> int:
    """How many weights of a network are trained."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _activations(layer: nn.Module, positions: int, half: bool) -> tuple[int, int]:
    """Bytes that backward() needs of a ResNet or Transformer, and of its input alone; 0 of another layer."""
    if not isinstance(layer, (ResNet, Transformer)):
        return 0, 0
    channels = [norm.num_channels for norm in layer.modules() if isinstance(norm, nn.GroupNorm)]
    each = (OF_RESNET if isinstance(layer, ResNet) else OF_TRANSFORMER)[half]
    return positions * sum(channels) * each, positions * channels[0] * (2 if half else 4)


def estimate_of(args: argparse.Namespace) -> dict[str, int]:
    """`estimate` for train.py's flags. Files are mapped, not read. Raises CheckpointError as loading does."""
    if args.base.is_file():
        parts, source = read_single_file(args.base, args.prediction_type), args.base
        values, others = parts["unet"][0], {name: parts[name][1] for name in ("vae", "text_encoder")}
    else:
        source = args.base / "unet" / "config.json"
        values = read_json(source)
        folders = {name: args.base / name for name in ("vae", "text_encoder")}
        others = {name: read_tensors(find_weights(folder, args.variant)) for name, folder in folders.items()}
    others["align"] = read_tensors(find_weights(args.align))
    numbers = {name: sum(tensor.numel() for tensor in part.values()) for name, part in others.items()}
    also = sum(numbers[name] for name in args.settings.also_trained)
    config, resolution = config_from(UNetConfig, values, source), args.settings.resolution
    side = math.ceil(resolution / 8) if resolution else config.sample_size  # 8: of every public VAE
    with error_context(f"the configuration of {source} describes no possible network"):
        modes = args.precision, args.lora_rank, args.checkpoint_gradients
        pictures = own_pairs(args) * args.settings.pictures_a_pair
        return estimate(config, sum(numbers.values()), side, pictures, *modes, also)


def own_pairs(args: argparse.Namespace) -> int:
    """How many of a step's pairs one process has at most."""
    return math.ceil(args.settings.batch / ranks.world_size())


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; infinite elsewhere, where the system can swap."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def print_estimate(args: argparse.Namespace, device: torch.device) -> bool:
    """Print the estimate; return True if the GPU has less free, after a warning. Raises CheckpointError as loading."""
    parts, free = estimate_of(args), free_memory(device)
    total = sum(parts.values())
    each = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    print(f"memory, estimated: {total / 1e9:.1f} GB ({each})")
    if total > free:
        print(f"warning: this GPU has {free / 1e9:.1f} GB free: {remedy(args)}")
    return total > free


def remedy(args: argparse.Namespace) -> str:
    """What to try when the memory does not suffice for train.py, in this order."""
    advice = {
        "--precision bf16": args.precision == "fp32",
        "--lora-rank 16": not args.lora_rank,  # the whole U-Net's weights take more than its activations
        "--checkpoint-gradients": not args.checkpoint_gradients,
        "a smaller --batch": "settings" not in args or own_pairs(args) > 1,
        "a larger machine": True,
    }
    return "try " + ", then ".join(name for name, helps in advice.items() if helps)
