"""Read a public checkpoint, strictly: config.json into a dataclass, safetensors into a module.

Modules are named after the public files' keys, so loading is a copy. A key that is missing, left over or of another
shape is an error that names it: a network with a hole in it draws mush and tells nobody.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers' name, transformers' name


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: which file, what is wrong, what was expected."""


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if it is absent, unreadable or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is {Path(path).parent} a complete checkpoint folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def config_from(cls: type[Config], values: dict) -> Config:
    """A configuration dataclass from a config.json's object: unknown keys are passed over, null means the default."""
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    known = {name: value for name, value in values.items() if name in fields and value is not None}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def find_weights(folder: Path) -> Path:
    """The weight file of a network's folder. Raises CheckpointError if there is none."""
    for name in WEIGHT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise CheckpointError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU. Raises CheckpointError for a broken file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata (str to str) of a safetensors file. Raises CheckpointError for a broken file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def load_tensors(network: nn.Module, tensors: dict[str, Tensor], source: Path | str, dtype=torch.float32) -> None:
    """Put `tensors` into `network`, which may live on the meta device; floating-point tensors are cast to `dtype`.

    Raises CheckpointError, naming the first few keys, if any key is missing, extra or misshapen. The `position_ids` that
    old files carry are a constant, not a weight, and are passed over.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    expected = network.state_dict()
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"lacks {_some(missing)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        problems.append(f"has unexpected {_some(extra)}")
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} and should be {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"has other shapes: {_some(shapes)}")
    if problems:
        raise CheckpointError(f"{source} does not fit {type(network).__name__}: it {'; it '.join(problems)}")
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    network.load_state_dict(cast, strict=True, assign=True)


def load(network_class: type[Network], config: object, folder: Path, dtype=torch.float32) -> Network:
    """Build `network_class(config)` and fill it from the folder's weight file; frozen and in eval mode, on the CPU."""
    path = find_weights(folder)
    tensors = read_tensors(path)
    with torch.device("meta"):  # no random initialisation, no second copy in memory
        network = network_class(config)
    load_tensors(network, tensors, path, dtype)
    return network.eval().requires_grad_(False)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside `path` and rename it, so that a kill at any moment leaves the old file whole."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _some(names: list[str], most: int = 3) -> str:
    """The first few names of a long list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
