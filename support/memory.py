"""An estimate of the memory of a training step, before anything large is loaded. Its parts:

- weights: 2 bytes each where they are frozen and precision is half, 4 where they are trained
- AdamW: 8 bytes a trained weight: its two averages, in fp32
- other networks: VAE, text encoder and ALIGN, in fp32; off the GPU between validations if memory is short
- a step: what backward() needs of the forward pass, gradients, buffers of the libraries
"""

from __future__ import annotations

import argparse
import math

import torch

from model.files.config import config_from, read_json
from model.files.errors import error_context
from model.files.single_file import read_single_file
from model.files.tensors import find_weights, read_tensors
from model.lora import add_lora
from model.unet import UNet, UNetConfig
from support import ranks

# Bytes per channel and position, summed over the feature maps of all levels, in fp32 and in half precision. KEPT: what
# the forward pass keeps for backward(), counted by autograd in SD 1.5, and with --checkpoint-gradients. LAYER: what
# backward() needs in the widest layer, in addition.
KEPT = {"fp32": 715, "half": 345}
KEPT_CHECKPOINTED = {"fp32": 70, "half": 50}
LAYER = {"fp32": 150, "half": 90}
COPIES = 6  # of the largest layer's weights: buffers of the libraries, measured with SD 1.5 on a CPU


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
    """Bytes at the peak of a training step, by the parts listed above. Within about 10 % of what was measured.

    others: weights of the other networks. side: of the latents. pictures: in a pass of θ, on one device (three a pair
    for RPO). checkpointed: with --checkpoint-gradients. also: how many of `others` are trained too.
    """
    kind, size = ("fp32", 4) if precision == "fp32" else ("half", 2)
    with torch.device("meta"):  # shapes without numbers
        unet = UNet(config)
    sizes = [parameter.numel() for parameter in unet.parameters()]
    learned = add_lora(unet, lora_rank, generator=torch.Generator()) if lora_rank else unet
    trained = sum(parameter.numel() for parameter in learned.parameters())
    parts = {"weights": size * sum(sizes) + 4 * trained, "AdamW": 8 * (trained + also), "other networks": 4 * others}

    channels = pictures * side**2 * sum(width / 4**level for level, width in enumerate(config.block_out_channels))
    kept = (KEPT_CHECKPOINTED if checkpointed else KEPT)[kind] * channels
    if kind == "half" and not checkpointed:
        kept += 2 * trained  # autocast's copies of the weights
    # backward() frees what was kept while it makes the gradients.
    step = max(kept, 4 * trained) + 4 * also + LAYER[kind] * channels + COPIES * size * max(sizes)
    # Everything is loaded in fp32, and θ copied, before θ₀ is rounded: that may take more than a small step.
    loading = sum(sizes) * (4 if lora_rank else 8) + 4 * (others + also)
    return parts | {"a step": int(max(step, loading - sum(parts.values())))}


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
        pictures = pairs_of_a_process(args) * args.settings.pictures_a_pair
        modes = args.precision, args.lora_rank, args.checkpoint_gradients
        return estimate(config, sum(numbers.values()), side, pictures, *modes, also)


def pairs_of_a_process(args: argparse.Namespace) -> int:
    """The largest part of --batch that one process trains on."""
    return math.ceil(args.settings.batch / ranks.world_size())


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; infinite elsewhere, where the system can swap."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def print_estimate(args: argparse.Namespace, device: torch.device) -> bool:
    """Print the estimate; return True if the GPU has less free, after a warning. Raises CheckpointError as loading."""
    parts, free = estimate_of(args), free_memory(device)
    total, listed = sum(parts.values()), ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    pictures = f"{pairs_of_a_process(args)} x {args.settings.pictures_a_pair} pictures"
    print(f"memory, estimated: {total / 1e9:.1f} GB for {pictures} a step ({listed})")
    if total > free:
        print(f"warning: this GPU has {free / 1e9:.1f} GB free: {remedy(args)}")
    return total > free


def remedy(args: argparse.Namespace) -> str:
    """What to try when the memory does not suffice for train.py, in this order."""
    settings = getattr(args, "settings", None)
    only_whole = settings and settings.also_trained  # LoRA is refused then
    advice = {
        "--precision bf16": args.precision == "fp32",
        "--lora-rank 16": not (args.lora_rank or only_whole),  # a U-Net's weights take more than its activations
        "--checkpoint-gradients": not args.checkpoint_gradients,
        "a smaller --batch": not settings or settings.batch > ranks.world_size(),
        "a larger machine": True,
    }
    return "try " + ", then ".join(name for name, helps in advice.items() if helps)
