"""Read a public checkpoint, strictly: config.json into a dataclass, safetensors into a module. Write files whole.

Modules are named after the public files' keys, so loading is a copy. A key that is missing, left over or of another
shape is an error that names it: a network with a hole in it draws mush and tells nobody.

Files are mapped, not copied: a network of the file's own precision takes the file's size in memory, and is not read
from the disk before it is used. On POSIX systems it outlives the file's deletion and its replacement by renaming, as
`write_atomic` does it; what is written into its tensors never reaches the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.files.config import read_json
from model.files.errors import CheckpointError, error_context, is_out_of_memory

Network = TypeVar("Network", bound=nn.Module)
Tensors = dict[str, Tensor]
Rename = Callable[[Tensors], Tensors]

# Of diffusers, of transformers, and theirs of old: align-base and dino-vits16 are published as .bin.
WEIGHT_FILES = ["diffusion_pytorch_model.safetensors", "model.safetensors"]
WEIGHT_FILES += ["pytorch_model.bin", "diffusion_pytorch_model.bin"]

# A variant, such as fp16 or non_ema, is a word in a file's name: X.fp16.safetensors. A file in shards is known by its
# index, X.safetensors.index.json, whose variants are spelt X.safetensors.index.fp16.json, of old
# X.safetensors.fp16.index.json. The shards, X.fp16-00001-of-00002.safetensors, do not match, for their hyphens.
WEIGHT_NAME = re.compile(r"(\w+)(?:\.(\w+))?\.(safetensors|bin)((?:\.(\w+))?\.index(?:\.(\w+))?\.json)?")

WHOLE = "a whole base model in one file, to be given as --base FILE"
# Patterns in tensors' names that only one kind of file has. The first that is found decides.
TELL_TALES = {
    r"lora_|[_.]lora\.|hada_w|lokr_w": "a LoRA, not a whole U-Net",
    r"^conditioner\.embedders\.": "a Stable Diffusion XL, which is not supported",
    r"^(model\.diffusion_model\.)?(joint|double|double_stream)_blocks\.": "a Stable Diffusion 3, a Flux or the like",
    r"^model\.diffusion_model\.label_emb\.": "an SDXL, an upscaler or another that reads more than a prompt",
    r"^ztsnr$": "a model with zero terminal SNR, which is not supported",
    r"^model\.diffusion_model\.": WHOLE,
    r"add_embedding\.": "an SDXL U-Net, which is not supported",
    r"controlnet_": "a ControlNet",
    r"time_embedding\.linear_1\.|^(down_blocks|mid_block|up_blocks|input_blocks)\.": "a U-Net",
    r"^(encoder|decoder)\.(conv_in|down|up|mid)": "a VAE",
    r"vision_model\.embeddings\.convolution\.": "ALIGN",
    r"vision_model\.pre_layrnorm\.": "CLIP, with both its towers",
    r"^(text_model|embeddings\.token_embedding)\.": "a CLIP text encoder",
    r"embeddings\.cls_token": "a vision transformer, such as DINO",
}


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The weight file of a network's folder, or the index of its shards; safetensors before .bin.

    With no `variant` the plain file, or, if there is none of that kind, the only variant. Raises CheckpointError if
    there is none, if there are several and none was asked for, or if the one asked for is not there: it says what is.
    """
    with error_context(f"{folder} is no checkpoint folder"):
        names = sorted(path.name for path in Path(folder).iterdir() if path.is_file())
    found: dict[str, dict[str | None, Path]] = {"safetensors": {}, "bin": {}}  # by kind and variant
    for index in (False, True):
        for match in filter(None, map(WEIGHT_NAME.fullmatch, names)):
            if f"{match[1]}.{match[3]}" in WEIGHT_FILES and bool(match[4]) == index:
                found[match[3]].setdefault(match[2] or match[5] or match[6], Path(folder) / match[0])
    for paths in found.values():
        if variant in paths:
            return paths[variant]
        if variant is None and len(paths) > 1:
            raise CheckpointError(f"{folder} holds {_some(sorted(paths))} weights: choose one of these with --variant")
        if variant is None and paths:
            return next(iter(paths.values()))
    wanted = "none of " + ", ".join(WEIGHT_FILES) if variant is None else f"no weights of the variant {variant}"
    raise CheckpointError(f"{folder} holds {wanted}, only {_some(names, most=6) or 'no file at all'}")


def read_tensors(path: Path) -> Tensors:
    """Every tensor, on the CPU, of a safetensors file, of a .bin file, or of all the shards that an index.json names.

    A .bin file's pickle may hold tensors and no code. Raises CheckpointError for a broken file.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _read_shards(path)
    if path.suffix == ".bin":
        return _read_bin(path)
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def _read_shards(index: Path) -> Tensors:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} should hold a weight_map that says in which file each tensor is")
    tensors: Tensors = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or "\\" in name or not name.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{index} names {name!r}, which is no weight file in its own folder")
        shard = index.with_name(name)
        with error_context(f"{index} names {name!r}"):  # such as a name too long to be one
            if not shard.is_file():
                raise CheckpointError(f"{index} names {name}, which is missing")
        read = read_tensors(shard)
        if lacking := sorted(key for key, place in places.items() if place == name and key not in read):
            raise CheckpointError(f"{shard} lacks {_some(lacking)}, which {index.name} says it holds")
        if twice := sorted(read.keys() & tensors.keys()):
            raise CheckpointError(f"{shard} holds {_some(twice)}, which another shard of {index.name} holds too")
        tensors |= read
    return tensors


def _read_bin(path: Path) -> Tensors:
    _require_file(path)
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # torch's format since 2020; the older one cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a garbled pickle fails in any way; an honest one in words that advise to run its code
        if is_out_of_memory(error):
            raise
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {code[1]}, and code is not run" if code else "its pickle is broken, or not torch's own"
        if isinstance(error, (OSError, RuntimeError)):
            why = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a whole file of tensors: {why}") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} should hold named tensors and nothing else")
    if odd := [name for name, each in tensors.items() if each.layout != torch.strided or each.device.type != "cpu"]:
        raise CheckpointError(f"{path} holds tensors that are sparse, or have no numbers: {_some(odd)}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata (str to str) of a safetensors file. Raises CheckpointError for a broken file."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path):
    _require_file(Path(path))
    with error_context(f"{path} is not a whole safetensors file"), safe_open(path, framework="pt") as file:
        yield file


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or is no file")
    with error_context(f"{path} cannot be read"), open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise CheckpointError(f"{path} is not a whole weight file but Git LFS's note of one: run `git lfs pull`")


def what_is(keys: Iterable[str]) -> str | None:
    """What a file with these tensors is, such as "a VAE", if it is one of the public kinds."""
    keys = list(keys)
    return next((kind for pattern, kind in TELL_TALES.items() if any(re.search(pattern, key) for key in keys)), None)


def load_tensors(
    network: nn.Module, tensors: Tensors, source: Path | str, dtype=torch.float32, rename: Rename | None = None
) -> None:
    """Put `tensors` into `network`, which may live on the meta device; floating-point tensors are cast to `dtype`.

    `rename` gives the tensors of a file in another spelling the network's own names.
    Raises CheckpointError, naming the first few keys, if any key is missing, extra, misshapen or of another kind, such
    as whole numbers for a weight. The `position_ids` that old files carry are a constant, not a weight, and are passed
    over.
    """
    expected, kind = network.state_dict(), what_is(tensors)
    tensors = rename(tensors) if rename else tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    both = [(name, tensors[name], expected[name]) for name in sorted(expected.keys() & tensors.keys())]
    shapes = [(name, tuple(a.shape), tuple(b.shape)) for name, a, b in both if a.shape != b.shape]
    kinds = [(name, a.dtype, b.dtype) for name, a, b in both if a.is_floating_point() != b.is_floating_point()]
    found = {
        "lacks": sorted(expected.keys() - tensors.keys()),
        "has unexpected": sorted(tensors.keys() - expected.keys()),
        "has other shapes:": [f"{name} is {given} and should be {ours}" for name, given, ours in shapes],
        "has other kinds of numbers:": [f"{name} is {given} and should be like {ours}" for name, given, ours in kinds],
    }
    if problems := [f"{what} {_some(names)}" for what, names in found.items() if names]:
        if kind and kind != what_is(expected):
            problems.insert(0, f"is {kind}")
        raise CheckpointError(f"{source} does not fit {type(network).__name__}: it {'; it '.join(problems)}")
    with error_context(f"{source} does not fit {type(network).__name__}"):  # such as a type that cannot be cast
        # Whole numbers are few: copied, they do not keep a file in memory whose every other tensor has been cast.
        cast = {name: each.to(dtype) if each.is_floating_point() else each.clone() for name, each in tensors.items()}
        network.load_state_dict(cast, strict=True, assign=True)


def load(
    network_class: Callable[[object], Network],
    config: object,
    folder: Path,
    dtype=torch.float32,
    rename: Rename | None = None,
    variant: str | None = None,
) -> Network:
    """`build` with the tensors of the folder's weight file: of its `variant`, as for `find_weights`.

    Raises CheckpointError, as `find_weights`, `read_tensors` and `build` do.
    """
    path = find_weights(folder, variant)
    return build(network_class, config, read_tensors(path), path, dtype, rename)


class _Unfilled(TorchFunctionMode):
    """No random initialisation: on the meta device it fills nothing, but an Embedding's imports 80 MB of torch."""

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **(keywords or {}))


def build(
    network_class: Callable[[object], Network],
    config: object,
    tensors: Tensors,
    source: Path | str,
    dtype=torch.float32,
    rename: Rename | None = None,
) -> Network:
    """`network_class(config)`, filled as by `load_tensors`; frozen and in eval mode, on the CPU.

    Raises CheckpointError as `load_tensors` does, or if no network has that config.
    """
    # On the meta device: no second copy in memory.
    with (
        error_context(f"the configuration of {source} describes no possible network"),
        torch.device("meta"),
        _Unfilled(),
    ):
        network = network_class(config)
    load_tensors(network, tensors, source, dtype, rename)
    return network.eval().requires_grad_(False)


def _some(names: list[str], most: int = 3) -> str:
    """The first few names of a long list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
