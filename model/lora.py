"""LoRA (arXiv 2106.09685): the weights W stay as they are, and a narrow detour beside them is trained.

    y = W x + alpha / rank * up(down(x))        down: to `rank` numbers, random; up: back again, zero at the start

Here for the projections of the U-Net's attention: q, k, v and out. The detours can be left out, so the base θ₀ needs no
second U-Net, and folded into W. Files carry kohya's names, which diffusers, A1111 and ComfyUI read too.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from model.files.errors import CheckpointError
from model.files.tensors import load_tensors, read_metadata, read_tensors, what_is

PROJECTION = re.compile(r".+\.attn[12]\.(?:to_[qkv]|to_out\.0)")
DIFFUSERS = re.compile(r"unet\.(.+)\.lora[._](A|B|down|up)\.weight")  # peft's A and B are down and up
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"

# Pieces of tensors' names in files that change something else, or in another way: LoHa, LoKr, OFT, DoRA, LoCon.
OTHERS = re.compile(r"lora_te|text_encoder|hada_w|lokr_w|oft_|dora_scale|magnitude_vector|lora_mid")


class Adapter(nn.Module):
    """The detour beside one projection, in fp32; without numbers until they are loaded."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False, device="meta")
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), not yet times `scale`."""
        return self.lora_up(self.lora_down(x))


class AdaptedLinear(nn.Linear):
    """A projection with its detour. It shares its weights with `layer`, whose place it takes."""

    def __init__(self, layer: nn.Linear, lora: Adapter):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.lora, self.on = lora, True
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = super().forward(x)
        return torch.add(y, self.lora(x), alpha=self.lora.scale) if self.on else y


class LoRA(nn.ModuleDict):
    """The adapters of a U-Net by their public names: its parameters() are to be trained."""


def add_lora(unet: nn.Module, rank: int, alpha: float | None = None, *, generator: torch.Generator) -> LoRA:
    """Freeze the U-Net and give it new adapters, which change nothing yet; returns them, to be trained.

    alpha: by default the rank. generator: a CPU one, for `down`, uniform with the variance 1 / (3 * width) that a
    Linear begins with. Raises ValueError for an impossible rank or alpha, or if there are adapters already.
    """
    alpha = float(rank if alpha is None else alpha)
    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"a LoRA's rank and alpha should be above 0, not {rank} and {alpha}")
    tensors, projections = {}, _projections(unet)
    for name, (_, layer) in projections.items():
        uniform = 2 * torch.rand(rank, layer.in_features, generator=generator) - 1
        tensors[name + DOWN] = uniform / layer.in_features**0.5
        tensors[name + UP] = torch.zeros(layer.out_features, rank)
    unet.requires_grad_(False)
    return _attach(unet, tensors, dict.fromkeys(projections, alpha), "a new LoRA").requires_grad_(True)


def load_lora(unet: nn.Module, path: Path, read: dict[str, Tensor] | None = None) -> LoRA:
    """Give the U-Net the adapters of a file, frozen; returns them.

    read: the file's tensors, where they have been read already.
    Its tensors are named as kohya or as diffusers does; it may adapt only some of the projections, each with a rank and
    an alpha of its own. Raises CheckpointError if it is no LoRA of this U-Net's attention alone, or has holes, and
    leaves the U-Net as it was; ValueError if there are adapters already.
    """
    path = Path(path)
    projections, read = _projections(unet), read_tensors(path) if read is None else read
    if other := next(filter(OTHERS.search, sorted(read)), None):
        kinds = "LyCORIS, DoRA and LoRAs of text encoders or convolutions are not supported"
        raise CheckpointError(f"{path} holds {other}: {kinds}")
    if not is_lora(read):
        raise CheckpointError(f"{path} is no LoRA but {what_is(read) or 'something unknown'}")
    tensors = {_public_key(key): tensor for key, tensor in read.items()}
    names = sorted({key.partition(".")[0] for key in tensors})
    if unknown := [name for name in names if name not in projections]:
        raise CheckpointError(f"{path} adapts {unknown[0]}, which is no attention projection of this U-Net")
    told, alphas = _alpha_of_diffusers(path), {}
    for name in names:
        if lacking := [name + half for half in (DOWN, UP) if name + half not in tensors]:
            raise CheckpointError(f"{path} lacks {lacking[0]}")
        default = [told] if told else tensors[name + DOWN].shape[:1]  # the rank
        alpha = tensors.pop(name + ALPHA, torch.tensor(default)).float()
        if alpha.numel() != 1 or not alpha.isfinite().all():
            raise CheckpointError(f"{path}: {name}{ALPHA} should be one number")
        alphas[name] = float(alpha)
    return _attach(unet, tensors, alphas, path).requires_grad_(False)


def _attach(unet: nn.Module, tensors: dict, alphas: dict, source: Path | str) -> LoRA:
    """Adapters with these tensors, named as in a file, in their places."""
    projections, lora = _projections(unet), LoRA()
    for name, (_, layer) in projections.items():
        if (down := tensors.get(name + DOWN)) is not None:
            lora[name] = Adapter(layer, max((1, *down.shape[:1])), alphas[name])
    try:
        load_tensors(lora, tensors, source)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (is it a LoRA of another base model?)") from error
    for name, adapter in lora.items():
        place, layer = projections[name]
        unet.set_submodule(place, AdaptedLinear(layer, adapter.to(layer.weight.device)))
    return lora


def lora_of(unet: nn.Module) -> LoRA:
    """The adapters a U-Net has, perhaps none; of a deepcopy the copy's own."""
    return LoRA({_public_name(place): layer.lora for place, layer in _adapted(unet)})


@contextmanager
def without_lora(unet: nn.Module):
    """Inside, the U-Net is the base, θ₀. Under no_grad() only: checkpointed blocks run again in backward(), outside."""
    layers = [layer for _, layer in _adapted(unet)]
    before = [layer.on for layer in layers]
    try:
        for layer in layers:
            layer.on = False
        yield
    finally:
        for layer, on in zip(layers, before, strict=True):
            layer.on = on


@torch.no_grad()
def merge(unet: nn.Module) -> None:
    """Fold the adapters into the weights, W + scale * up @ down, and take them off: a plain U-Net remains."""
    for _, layer in _adapted(unet):
        change = layer.lora.scale * (layer.lora.lora_up.weight @ layer.lora.lora_down.weight)
        layer.weight = nn.Parameter((layer.weight + change).to(layer.weight.dtype), layer.weight.requires_grad)
    remove_lora(unet)


def remove_lora(unet: nn.Module) -> None:
    """Take the adapters off, if there are any: the plain base remains, to the last bit."""
    for place, layer in _adapted(unet):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        unet.set_submodule(place, plain.train(layer.training))


def lora_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """The U-Net's adapters as a file holds them: down, up and alpha. Raises ValueError if it has none."""
    if not (lora := lora_of(unet)):
        raise ValueError("this U-Net has no adapters")
    return lora.state_dict() | {name + ALPHA: torch.tensor(adapter.alpha) for name, adapter in lora.items()}


def lora_header(unet: nn.Module) -> dict[str, str]:
    """What kohya's tools note in the header of a LoRA of `add_lora`: what it is and for which base."""
    first = next(iter(lora_of(unet).values()))  # of all adapters alike
    header = {"format": "pt", "ss_network_module": "networks.lora"}
    header |= {"ss_network_dim": str(first.rank), "ss_network_alpha": str(first.alpha)}
    if version := {768: "1", 1024: "2"}.get(unet.config.cross_attention_dim):  # A1111 knows SD 2 by ss_v2
        header |= {"ss_base_model_version": f"sd_v{version}", "ss_v2": str(version == "2")}
    return header


def is_lora(keys) -> bool:
    """Are these the names of the tensors of a LoRA, or of a relative of it, rather than of a whole network?"""
    return any("lora" in key or "lycoris" in key for key in keys)


def _projections(unet: nn.Module) -> dict[str, tuple[str, nn.Linear]]:
    """The name of each projection's module, and the module, by public name, in the network's order."""
    if _adapted(unet):
        raise ValueError("this U-Net has adapters already: merge them first")
    return {_public_name(place): (place, m) for place, m in unet.named_modules() if PROJECTION.fullmatch(place)}


def _adapted(unet: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    return [(place, layer) for place, layer in unet.named_modules() if isinstance(layer, AdaptedLinear)]


def _public_name(place: str) -> str:
    return "lora_unet_" + place.replace(".", "_")


def _public_key(key: str) -> str:
    """A tensor's name in diffusers' spelling to kohya's; every other name as it is."""
    match = DIFFUSERS.fullmatch(key)
    return _public_name(match[1]) + (DOWN if match[2] in ("A", "down") else UP) if match else key


def _alpha_of_diffusers(path: Path) -> float | None:
    """diffusers has no tensors for alpha; if it notes alpha at all, then in the header."""
    noted = read_metadata(path).get("lora_adapter_metadata", "") if path.suffix == ".safetensors" else ""
    if odd := re.search(r'"unet\.(?:(use_rslora|use_dora)": true|(alpha_pattern)": \{\s*")', noted):
        raise CheckpointError(f"{path} was trained with {odd[1] or odd[2]}, which is not supported")
    alpha = re.search(r'"unet\.lora_alpha": (\d+(?:\.\d+)?)', noted)
    return float(alpha[1]) if alpha else None
