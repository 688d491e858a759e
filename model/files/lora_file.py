"""LoRA files: the names that kohya's tools, diffusers and peft give to the tensors, and what the headers say.

Our files have kohya's names, which A1111, ComfyUI and diffusers read too: the adapter of mid_block.attentions.0.proj_in
is lora_unet_mid_block_attentions_0_proj_in, with the tensors .lora_down.weight, .lora_up.weight and .alpha.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from model.files.config import read_json
from model.files.errors import CheckpointError
from model.files.tensors import identify, read_metadata

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"

# The same layer's `down` in other files: to_q.lora_A.weight (peft, diffusers now), and from older versions of diffusers
# to_q.lora.down.weight, to_q.lora_linear_layer.down.weight and processor.to_q_lora.down.weight.
DIFFUSERS = re.compile(r"(.+)[._]lora(?:_linear_layer)?[._](A|B|down|up)\.weight")

# Parts of names in files that change something else, or in another way: text encoders, LoHa, LoKr, OFT, DoRA.
OTHERS = re.compile(r"lora_te|text_encoder|hada_w|lokr_w|oft_|dora_scale|magnitude_vector|lora_mid")


def is_lora(keys: Iterable[str]) -> bool:
    """Return True if these are names of tensors of a LoRA, or of a variant of LoRA, and not of a whole network."""
    return any("lora" in key or "lycoris" in key for key in keys)


def adapter_name(layer: str) -> str:
    """kohya's name for the adapter of a U-Net's layer."""
    return "lora_unet_" + layer.replace(".", "_")


def read_adapters(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`down` and `up` of a LoRA file under kohya's names, and the alpha of each adapter: if none is given, its rank.

    Raises CheckpointError if it is no LoRA, or of a kind not supported.
    """
    if other := next(filter(OTHERS.search, sorted(tensors)), None):
        raise CheckpointError(f"{path} holds {other}: LoRAs of text encoders, LyCORIS and DoRA are not supported")
    if not is_lora(tensors):
        raise CheckpointError(f"{path} is no LoRA but {identify(tensors) or 'something unknown'}")
    alpha = _common_alpha(path, tensors)
    tensors = {_kohya_key(key): tensor for key, tensor in tensors.items()}
    ranks = {key.removesuffix(DOWN): len(tensor) for key, tensor in tensors.items() if key.endswith(DOWN)}
    return tensors, {name: float(tensors.pop(name + ALPHA, alpha or rank)) for name, rank in ranks.items()}


def _kohya_key(key: str) -> str:
    """A name in any of the spellings under kohya's; a name of no known kind as it is."""
    name = key.removeprefix("base_model.model.").removeprefix("unet.").replace(".processor.", ".")
    match = DIFFUSERS.fullmatch(name.replace(".to_out_lora.", ".to_out.0_lora."))
    if key.startswith("lora_unet_") or not match:
        return key
    return adapter_name(match[1]) + (DOWN if match[2] in ("A", "down") else UP)


def _common_alpha(path: Path, keys: Iterable[str]) -> float | None:
    """The alpha of all adapters: diffusers writes it into the header, peft into adapter_config.json."""
    if any(key.startswith("base_model.model.") for key in keys):
        settings = read_json(path.with_name("adapter_config.json"))
    else:
        noted = json.loads(_header(path).get("lora_adapter_metadata", "{}"))
        settings = {key.removeprefix("unet."): value for key, value in noted.items()}
    if other := next((key for key in ("use_rslora", "use_dora", "alpha_pattern") if settings.get(key)), None):
        raise CheckpointError(f"{path} was trained with {other}, which is not supported")
    return settings.get("lora_alpha")


def base_in_header(path: Path) -> str | None:
    """The base model that a LoRA was made for, if its header says so."""
    return _header(path).get("base") or _header(path).get("ss_base_model_version")


def _header(path: Path) -> dict[str, str]:
    return read_metadata(path) if path.suffix == ".safetensors" else {}
