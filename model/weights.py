"""Read a public checkpoint, strictly: config.json into a dataclass, safetensors into a module.

Modules are named after the public files' keys, so loading is a copy. A key that is missing, left over or of another
shape is an error that names it: a network with a hole in it draws mush and tells nobody.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import types
import typing
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)

# diffusers' name, transformers' name, and the form in which align-base and dino-vits16 are published.
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: which file, what is wrong, what was expected."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a library's words, or a garbled name, may bring more


@contextmanager
def _told(what: str):
    """Whatever the libraries raise over a broken file or an impossible number becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if it is absent, unreadable or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is {Path(path).parent} a complete checkpoint folder?") from None
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def config_from(cls: type[Config], values: dict) -> Config:
    """A configuration dataclass from a config.json's object: unknown keys are passed over, null means the default.

    Raises CheckpointError for a value of another type than its field's.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    known = {name: value for name, value in values.items() if name in fields and value is not None}
    for name, value in known.items():
        if not _fits(value, hints[name]):
            raise CheckpointError(f"{cls.__name__}: {name} is {value!r} and should be {fields[name].type}")
    with _told(f"{cls.__name__} has values that do not go together"):
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def _fits(value: object, hint: object) -> bool:
    """Is a JSON value of a dataclass field's type? Whole numbers are floats too; true and false are no numbers."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if isinstance(value, bool) and hint is not bool:
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def refuse(values: dict, fixed: dict, path: Path) -> None:
    """Raise CheckpointError if a config.json sets what our network has `fixed` to another value.

    Keys that are absent or null are fine; of a list, every entry must be the fixed value.
    """
    for name, only in fixed.items():
        value = values.get(name)
        each = value if isinstance(value, list) else [value]
        if any(entry is not None and entry != only for entry in each):
            raise CheckpointError(f"{path}: {name} = {value!r} is not supported, only {only!r}")


def find_weights(folder: Path) -> Path:
    """The weight file of a network's folder. Raises CheckpointError if there is none."""
    for name in WEIGHT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise CheckpointError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU, or of a .bin file, whose pickle may hold tensors and no code.

    Raises CheckpointError for a broken file.
    """
    if Path(path).suffix == ".bin":
        with _told(f"{path} is not a whole file of tensors"):
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
            except (EOFError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{path} is not a whole file of tensors: {error}") from None
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise CheckpointError(f"{path} should hold named tensors and nothing else")
        return tensors
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata (str to str) of a safetensors file. Raises CheckpointError for a broken file."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path):
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is missing, or is no file")
    with _told(f"{path} is not a whole safetensors file"), safe_open(path, framework="pt") as file:
        yield file


def load_tensors(network: nn.Module, tensors: dict[str, Tensor], source: Path | str, dtype=torch.float32) -> None:
    """Put `tensors` into `network`, which may live on the meta device; floating-point tensors are cast to `dtype`.

    Raises CheckpointError, naming the first few keys, if any key is missing, extra, misshapen or of another kind, such
    as whole numbers for a weight. The `position_ids` that old files carry are a constant, not a weight, and are passed
    over.
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
    kinds = [
        f"{name} is {tensors[name].dtype} and should be like {expected[name].dtype}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].is_floating_point() != expected[name].is_floating_point()
    ]
    if kinds:
        problems.append(f"has other kinds of numbers: {_some(kinds)}")
    if problems:
        raise CheckpointError(f"{source} does not fit {type(network).__name__}: it {'; it '.join(problems)}")
    with _told(f"{source} does not fit {type(network).__name__}"):  # such as a type that cannot be cast
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        network.load_state_dict(cast, strict=True, assign=True)


def load(
    network_class: Callable[[object], Network],
    config: object,
    folder: Path,
    dtype=torch.float32,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Network:
    """Build `network_class(config)` and fill it from the folder's weight file; frozen and in eval mode, on the CPU.

    `rename` gives the tensors of a file in another spelling the network's own names.
    Raises CheckpointError, as `find_weights`, `read_tensors` and `load_tensors` do, or if no network has that config.
    """
    path = find_weights(folder)
    tensors = read_tensors(path)
    # On the meta device: no random initialisation, no second copy in memory.
    with _told(f"{Path(folder) / 'config.json'} describes no possible network"), torch.device("meta"):
        network = network_class(config)
    load_tensors(network, rename(tensors) if rename else tensors, path, dtype)
    return network.eval().requires_grad_(False)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside `path` and rename it, so that a kill at any moment leaves the old file whole.

    The same tensors and metadata give the same bytes.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as any new file's; safetensors would shut out everybody but the owner
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)
        beside.chmod(mode)
        _sort_metadata(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order, which safetensors leaves to chance: the same tensors give the same bytes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise RuntimeError(f"{path}: the header's length changed in sorting")
        file.seek(8)
        file.write(text)


def _some(names: list[str], most: int = 3) -> str:
    """The first few names of a long list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
