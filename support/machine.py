"""Precision, and what AdamW's averages need after loading."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model.stable_diffusion import StableDiffusion
from model.unet import UNet


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
