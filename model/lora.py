"""LoRA (arXiv 2106.09685): the weights W stay fixed, and a low-rank adapter next to them is trained.

    y = W x + alpha / rank * up(down(x))        down: to `rank` numbers, random; up: back again, zero at the start

New adapters are given to the projections of the U-Net's attention: q, k, v and out. Without its adapters the U-Net is
the base, θ₀, so that no second U-Net is needed. Files are read and written as model/files/lora_file.py describes.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from model.files.errors import CheckpointError
from model.files.lora_file import ALPHA, DOWN, UP, adapter_name, base_in_header, read_adapters
from model.files.tensors import load_tensors

PROJECTION = re.compile(r".+\.attn[12]\.(?:to_[qkv]|to_out\.0)")


class Adapter(nn.Module):
    """Low-rank adapter of one layer, fp32, on the meta device until loaded."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        options = {"bias": False, "device": "meta"}
        if isinstance(layer, nn.Linear):
            self.lora_down = nn.Linear(layer.in_features, rank, **options)
            self.lora_up = nn.Linear(rank, layer.out_features, **options)
        else:  # only in files of other tools
            shape = layer.kernel_size, layer.stride, layer.padding
            self.lora_down = nn.Conv2d(layer.in_channels, rank, *shape, **options)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """alpha / rank * up(down(x)), of the shape of the layer's output."""
        return self.scale * self.lora_up(self.lora_down(x))


class AdaptedLayer(nn.Module):
    """A layer and its adapter, in the layer's place."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, lora: Adapter):
        super().__init__()
        self.layer, self.lora, self.on = layer, lora, True

    def forward(self, x: Tensor) -> Tensor:
        """The shapes are the layer's."""
        return self.layer(x) + self.lora(x) if self.on else self.layer(x)


class LoRA(nn.ModuleDict):
    """The adapters of a U-Net by their names in files. Training updates its parameters()."""


def add_lora(unet: nn.Module, rank: int, *, generator: torch.Generator) -> LoRA:
    """Freeze the U-Net and give it new adapters of alpha = rank, which change nothing yet; returns them, to be trained.

    generator: on the CPU, draws `down` uniformly, as torch initialises a Linear.
    """
    tensors, alphas = {}, {}
    for place, layer in unet.named_modules():
        if PROJECTION.fullmatch(place):
            name = adapter_name(place)
            uniform = 2 * torch.rand(rank, layer.in_features, generator=generator) - 1
            tensors[name + DOWN] = uniform / layer.in_features**0.5
            tensors[name + UP] = torch.zeros(layer.out_features, rank)
            alphas[name] = float(rank)
    unet.requires_grad_(False)
    return _attach(unet, tensors, alphas, "a new LoRA").requires_grad_(True)


def load_lora(unet: nn.Module, path: Path, tensors: dict[str, Tensor]) -> LoRA:
    """Give the U-Net, which has none yet, the adapters of a file, of any layers; frozen; returns them.

    tensors: the file's. Raises CheckpointError, and leaves the U-Net as it was, if it does not fit.
    """
    try:
        return _attach(unet, *read_adapters(path, tensors), path).requires_grad_(False)
    except CheckpointError as error:
        if base := base_in_header(path):
            raise CheckpointError(f"{error}; it was made for {base}") from error
        raise


def _attach(unet: nn.Module, tensors: dict[str, Tensor], alphas: dict[str, float], source: Path | str) -> LoRA:
    """Put adapters with these tensors, named as in a file, into the U-Net."""
    kinds, lora = (nn.Linear, nn.Conv2d), LoRA()
    layers = {adapter_name(at): (at, layer) for at, layer in unet.named_modules() if isinstance(layer, kinds)}
    if unknown := [key for key in sorted(tensors) if key.partition(".")[0] not in layers]:
        raise CheckpointError(f"{source} holds {unknown[0]}, which fits no layer of this U-Net")
    for name in layers:
        if name in alphas:
            lora[name] = Adapter(layers[name][1], len(tensors[name + DOWN]), alphas[name])
    load_tensors(lora, tensors, source)
    for name, adapter in lora.items():
        place, layer = layers[name]
        unet.set_submodule(place, AdaptedLayer(layer, adapter.to(layer.weight.device)))
    return lora


def lora_of(unet: nn.Module) -> LoRA:
    """The adapters a U-Net has, perhaps none."""
    return LoRA({adapter_name(place): adapted.lora for place, adapted in _adapted(unet)})


@contextmanager
def without_lora(unet: nn.Module):
    """Context manager: the adapters are off, so the U-Net is θ₀.

    Use under no_grad() only: checkpointed blocks run again in backward(), after its end.
    """
    before = [(layer, layer.on) for _, layer in _adapted(unet)]
    try:
        for layer, _ in before:
            layer.on = False
        yield
    finally:
        for layer, on in before:
            layer.on = on


@torch.no_grad()
def merge(unet: nn.Module) -> None:
    """Add the adapters to the weights, W + scale * up @ down, and remove them: a plain U-Net remains."""
    for _, adapted in _adapted(unet):
        layer, lora = adapted.layer, adapted.lora
        change = lora.scale * (lora.lora_up.weight.flatten(1) @ lora.lora_down.weight.flatten(1))
        merged = (layer.weight + change.view(layer.weight.shape)).to(layer.weight.dtype)
        layer.weight = nn.Parameter(merged, layer.weight.requires_grad)
    remove_lora(unet)


def remove_lora(unet: nn.Module) -> None:
    """Remove the adapters, if there are any: the plain base remains, to the last bit."""
    for place, adapted in _adapted(unet):
        unet.set_submodule(place, adapted.layer)


def lora_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """The U-Net's adapters as a file holds them: down, up and alpha."""
    lora = lora_of(unet)
    return lora.state_dict() | {name + ALPHA: torch.tensor(adapter.alpha) for name, adapter in lora.items()}


def _adapted(unet: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    return [(place, layer) for place, layer in unet.named_modules() if isinstance(layer, AdaptedLayer)]
