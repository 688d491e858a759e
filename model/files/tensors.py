"""Find and read the tensors of a public checkpoint, and load them into a network, strictly.

Modules are named after the public files' keys, so loading is a copy. A key that is missing, unexpected or of another
shape is an error that names it. Safetensors files are mapped into memory: weights in the file's own dtype are read when
they are used, and stay valid if the file is replaced or deleted.
"""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.files.errors import CheckpointError, check_file, error_context, is_out_of_memory

NetworkClass = Callable[[object], nn.Module]
Tensors = dict[str, Tensor]

# Names of diffusers and transformers, the preferred first. align-base and dino-vits16 have pytorch_model.bin only.
WEIGHT_FILES = ["diffusion_pytorch_model.safetensors", "model.safetensors"]
WEIGHT_FILES += ["diffusion_pytorch_model.bin", "pytorch_model.bin"]

WHOLE = "a whole base model in one file, to be given as --base FILE"
# Patterns in tensors' names that only one kind of file has. The first that is found decides.
KEY_PATTERNS = {
    r"lora_|[_.]lora\.|hada_w|lokr_w": "a LoRA, not a whole U-Net",
    r"^conditioner\.embedders\.|add_embedding\.|\.label_emb\.": "an SDXL or an upscaler, which is not supported",
    r"^(model\.diffusion_model\.)?(joint|double|double_stream)_blocks\.": "a Stable Diffusion 3, a Flux or the like",
    r"^ztsnr$": "a model with zero terminal SNR, which is not supported",
    r"^model\.diffusion_model\.": WHOLE,
    r"controlnet_": "a ControlNet",
    r"time_embedding\.linear_1\.|^(down_blocks|mid_block|up_blocks|input_blocks)\.": "a U-Net",
    r"^(encoder|decoder)\.(conv_in|down|up|mid)": "a VAE",
    r"^vision_model\.": "CLIP or ALIGN, with both towers",
    r"^(text_model|embeddings\.token_embedding)\.": "a CLIP text encoder",
}


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The weight file of a network's folder; safetensors before .bin.

    A variant is a word in the name, such as fp16 in model.fp16.safetensors. By default the plain file is taken, or else
    the only variant. Raises CheckpointError, with what the folder holds, if there is none, or a choice.
    """
    with error_context(f"{folder} is not a checkpoint folder"):
        names = sorted(os.listdir(folder))
    for file in WEIGHT_FILES:
        if variant is None and file in names:
            return folder / file
        pattern = file.replace(".", rf"\.{re.escape(variant)}\." if variant else r"\.\w+\.")
        found = [name for name in names if re.fullmatch(pattern, name)]
        if len(found) > 1:
            raise CheckpointError(f"{folder} holds {_some(found)}: choose one of these variants with --variant")
        if found:
            return folder / found[0]
    wanted = f"no weights of the variant {variant}" if variant else f"none of {', '.join(WEIGHT_FILES)}"
    raise CheckpointError(f"{folder} holds {wanted}, only {_some(names) or 'no file at all'}")


def read_tensors(path: Path) -> Tensors:
    """Every tensor, on the CPU, of a safetensors, .bin or .pth file. No code in a pickle is run.

    Raises CheckpointError for a file that is missing, broken or something else.
    """
    if Path(path).suffix not in (".bin", ".pth"):
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    check_file(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises anything, and torch's messages advise to run its code
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path} is broken, or holds more than tensors: code in it is not run") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} should hold named tensors and nothing else")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata (str to str) of a safetensors file. Raises CheckpointError for a broken file."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path):
    check_file(path)
    with error_context(f"{path} is not a whole safetensors file"), safe_open(path, framework="pt") as file:
        yield file


def identify(keys: Iterable[str]) -> str | None:
    """What a file with these tensors is, such as "a VAE"; None if it is no public kind."""
    keys = list(keys)
    return next((kind for pattern, kind in KEY_PATTERNS.items() if any(re.search(pattern, key) for key in keys)), None)


def load_tensors(network: nn.Module, tensors: Tensors, source: Path | str, dtype=torch.float32) -> None:
    """Put `tensors` into `network`, which may be on the meta device; floating-point tensors are cast to `dtype`.

    Raises CheckpointError, naming the first few keys, if any is missing, unexpected, misshapen or not floating-point.
    """
    expected, kind = network.state_dict(), identify(tensors)
    # position_ids is a constant in older files
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    shapes = {name: (tuple(tensors[name].shape), tuple(expected[name].shape)) for name in tensors if name in expected}
    integers = {name for name, tensor in tensors.items() if not tensor.is_floating_point()}
    found = {
        "lacks": sorted(expected.keys() - tensors.keys()),
        "has unexpected": sorted(tensors.keys() - expected.keys()),
        "has integers in": [name for name in shapes if name in integers and expected[name].is_floating_point()],
        "has other shapes:": [f"{name} is {a} and should be {b}" for name, (a, b) in shapes.items() if a != b],
    }
    if problems := [f"{what} {_some(names)}" for what, names in found.items() if names]:
        if kind and kind != identify(expected):
            problems.insert(0, f"is {kind}")
        raise CheckpointError(f"{source} does not fit {type(network).__name__}: it {'; it '.join(problems)}")
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    network.load_state_dict(cast, strict=True, assign=True)


def load(
    network_class: NetworkClass,
    config: object,
    folder: Path,
    dtype=torch.float32,
    rename: Callable[[Tensors], Tensors] = dict,  # no name changes
    variant: str | None = None,
) -> nn.Module:
    """`build` a network from the weights in a folder; `rename` turns older names into the network's."""
    path = find_weights(folder, variant)
    return build(network_class, config, rename(read_tensors(path)), path, dtype)


def build(
    network_class: NetworkClass, config: object, tensors: Tensors, source: Path | str, dtype=torch.float32
) -> nn.Module:
    """`network_class(config)` with `tensors` loaded by `load_tensors`; frozen, in eval mode, on the CPU.

    Raises CheckpointError as `load_tensors` does, or if no network can have that config.
    """
    context = error_context(f"the configuration of {source} describes no possible network")
    with context, torch.device("meta"), _NoInit():
        network = network_class(config)
    load_tensors(network, tensors, source, dtype)
    return network.eval().requires_grad_(False)


class _NoInit(TorchFunctionMode):
    """Skip torch.nn.init: on the meta device it sets nothing, but imports parts of torch for seconds and 70 MB."""

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*arguments, **(keywords or {}))


def _some(names: list[str]) -> str:
    """The first three names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
