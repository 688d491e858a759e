"""A whole Stable Diffusion 1.x or 2.x in one file, as model sites share it: `v1-5-pruned-emaonly.safetensors`.

Such a file has the names of the code that SD was trained with (CompVis/stable-diffusion, arXiv 2112.10752). `NAMES`
holds the tables from our names to theirs. CompVis numbers the blocks of the U-Net across its levels:

    input_blocks    0 conv_in | level 0: resnets 1 2, downsampler 3 | level 1: 4 5, 6 | ...
    output_blocks   level 0: resnets 0 1 2, upsampler inside 2 | level 1: 3 4 5 | ...
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from model.files.errors import CheckpointError
from model.files.tensors import WHOLE, Tensors, identify, read_metadata, read_tensors
from model.files.write import save_tensors

Parts = dict[str, tuple[dict, Tensors] | dict]

CONFIG_KEY = "rpo.config"  # in the header of files written here: the parts' config values, as JSON
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
OPENAI, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."  # SD 1.x, SD 2.x
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}

# What the config.json files of the public folders say, without the defaults of our configurations. A single file of a
# model site has none.
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
SD_1 = {
    "unet": {"layers_per_block": 2, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
    "text_encoder": dict(zip(TEXT, (768, 3072, 12, 12, "quick_gelu"), strict=True)),
    "scheduler": {},
}
UNET_2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SD_2 = SD_1 | {
    "unet": SD_1["unet"] | UNET_2,
    "text_encoder": dict(zip(TEXT, (1024, 4096, 23, 16, "gelu"), strict=True)),
}

# Modules inside our modules, and their names there. What a table does not hold has one name.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn"}
TEXT_LAYER |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}

# Not needed for a picture: constants, leftovers of training, OpenCLIP's last layer and its projection.
IGNORED = re.compile(
    r"first_stage_model\.(loss|model_ema)\."
    r"|cond_stage_model\.(.*\.)?(position_ids|attn_mask|logit_scale|text_projection|text_projection\.weight)$"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\."
)


def read_single_file(path: Path | str, prediction_type: str | None = None) -> Parts:
    """Read a CompVis-layout file as the parts of a base model's folder.

    Returns {"unet", "vae", "text_encoder": (values of its config.json, tensors under its file's names), "scheduler":
    values of its config}. Tensors are views into the mapped file; they are checked when a network loads them.
    prediction_type: as for `describe`. Raises CheckpointError if the file is broken or no whole SD 1.x or 2.x.
    """
    tensors = read_tensors(path)
    _refuse_others(tensors, path)
    values = describe(tensors, read_metadata(path), prediction_type, path)
    parts = {part: (values[part], from_compvis(part, values[part], tensors)) for part in PREFIXES}
    return parts | {"scheduler": values["scheduler"]}


def write_single_file(path: Path | str, parts: Parts, metadata: Mapping[str, str] | None = None) -> None:
    """Write `parts`, as `read_single_file` returns them, to a CompVis-layout safetensors file, in half precision.

    The header holds `metadata`, the config values, and `modelspec.prediction_type`, which other tools read. Raises
    ValueError as `save_tensors` does.
    """
    halves, config = {}, {"scheduler": parts["scheduler"]}
    for part in PREFIXES:
        config[part], tensors = parts[part]
        halves |= {name: tensor.half() for name, tensor in to_compvis(part, config[part], tensors).items()}
    predicts = "v" if config["scheduler"].get("prediction_type") == "v_prediction" else "epsilon"
    header = {CONFIG_KEY: json.dumps(config), "modelspec.prediction_type": predicts}
    save_tensors(halves, path, dict(metadata or {}) | header)


def describe(tensors: Tensors, header: Mapping[str, str], prediction_type: str | None, source: Path) -> dict:
    """The config values of all four parts: from the header if it was written here, else those of SD 1.x or 2.x.

    The first of these gives the prediction type: `prediction_type`, our header, `modelspec.prediction_type` (kohya),
    `modelspec.predict_key` and an empty tensor `v_pred` (both ComfyUI).
    """
    is_2 = any(name.startswith(OPENCLIP) for name in tensors)
    values = json.loads(header[CONFIG_KEY]) if CONFIG_KEY in header else SD_2 if is_2 else SD_1
    said = prediction_type or values["scheduler"].get("prediction_type")
    said = said or header.get("modelspec.prediction_type") or header.get("modelspec.predict_key")
    predicts = PREDICTION_TYPES.get(said) or ("v_prediction" if "v_pred" in tensors else None)
    if predicts is None and is_2:
        choices = "--prediction-type epsilon (2.1-base, 512 px) or --prediction-type v_prediction (2.1, 768 px)"
        raise CheckpointError(f"{source} does not say what it predicts: add {choices}")
    if values is SD_2 and predicts == "v_prediction":
        values = SD_2 | {"unet": SD_2["unet"] | {"sample_size": 96}}
    return values | {"scheduler": values["scheduler"] | {"prediction_type": predicts or "epsilon"}}


def from_compvis(part: str, values: dict, tensors: Tensors) -> Tensors:
    """The tensors of one part in a CompVis-layout file under our names; unknown names stay, so that loading fails."""
    ours = {theirs: ours for ours, theirs in NAMES[part](values).items()}
    if part == "text_encoder":  # some tools leave out text_model
        ours |= {name: f"text_model.{name}" for name in ("embeddings", "encoder", "final_layer_norm")}
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIXES[part]) or IGNORED.match(name):
            continue
        name = name.removeprefix(_prefix(part, values))
        if ".attn_1." in name and tensor.ndim == 4:  # the VAE's attention, which has 1x1 convolutions there
            tensor = tensor[:, :, 0, 0]
        if ".attn.in_proj_" in name:  # OpenCLIP has q, k and v in one tensor
            for x, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[_rename(name.replace("in_proj_", f"{x}_proj."), ours)] = third
        else:
            renamed[_rename(name, ours)] = tensor
    return renamed


def to_compvis(part: str, values: dict, tensors: Tensors) -> Tensors:
    """The reverse of `from_compvis`, with the constants that clients look for in the text encoder of SD 2.x."""
    theirs, renamed = NAMES[part](values), {}
    for ours, tensor in tensors.items():
        name = _rename(ours, theirs)
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        if ".attn.k_proj." in name or ".attn.v_proj." in name:  # written with q
            continue
        if ".attn.q_proj." in name:
            name = name.replace("q_proj.", "in_proj_")
            tensor = torch.cat([tensors[ours.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        renamed[name] = tensor
    if _prefix(part, values) == OPENCLIP:  # what diffusers 0.32 and ComfyUI look for; a layer of zeros changes nothing
        last = {name: tensor for name, tensor in renamed.items() if name.startswith("transformer.resblocks.22.")}
        renamed |= {name.replace(".22.", ".23."): torch.zeros_like(tensor) for name, tensor in last.items()}
        renamed |= {"text_projection": torch.eye(values["hidden_size"]), "logit_scale": torch.zeros(())}
    return {_prefix(part, values) + name: tensor for name, tensor in renamed.items()}


def _unet_names(values: dict) -> dict[str, str]:
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    names["mid_block.attentions.0"] = "middle_block.1"
    names |= _resnet("mid_block.resnets.0", "middle_block.0") | _resnet("mid_block.resnets.1", "middle_block.2")
    stride = values["layers_per_block"] + 1  # a level's numbers: its layers and its downsampler, or one layer more
    for i, kind in enumerate(values["up_block_types"]):
        for j in range(stride):
            n = i * stride + j
            names |= _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n + 1}.0")
            names |= _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n + 1}.1"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
        place = 2 if kind.startswith("CrossAttn") else 1  # after the attention, if there is one
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n + 1}.0.op"
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n}.{place}.conv"
    return names


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESNET.items()}


def _vae_names(values: dict) -> dict[str, str]:
    names, levels = {}, len(values["block_out_channels"])
    for side, way in (("encoder", "down"), ("decoder", "up")):
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        names |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in range(2)}
        middle = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        names |= {f"{middle[0]}.{a}": f"{middle[1]}.{b}" for a, b in VAE_ATTENTION.items()}
        for i in range(levels):
            level = i if way == "down" else levels - 1 - i  # theirs are numbered by size on both sides
            ours, theirs = f"{side}.{way}_blocks.{i}", f"{side}.{way}.{level}"
            names[f"{ours}.{way}samplers.0"] = f"{theirs}.{way}sample"
            for j in range(values["layers_per_block"] + 1):
                names[f"{ours}.resnets.{j}"] = f"{theirs}.block.{j}"
                names[f"{ours}.resnets.{j}.conv_shortcut"] = f"{theirs}.block.{j}.nin_shortcut"
    return names


def _text_names(values: dict) -> dict[str, str]:
    if _prefix("text_encoder", values) == OPENAI:
        return {}
    names = {"text_model.embeddings.position_embedding.weight": "positional_embedding"}
    names |= {"text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final"}
    for i in range(values["num_hidden_layers"]):
        for a, b in TEXT_LAYER.items():
            names[f"text_model.encoder.layers.{i}.{a}"] = f"transformer.resblocks.{i}.{b}"
    return names


# The names that differ, with these config values: our module or tensor -> theirs, without the prefix.
NAMES = {"unet": _unet_names, "vae": _vae_names, "text_encoder": _text_names}


def _rename(name: str, table: dict[str, str]) -> str:
    """Replace the longest start of a dotted name that the table has."""
    words = name.split(".")
    for n in range(len(words), 0, -1):
        if (start := ".".join(words[:n])) in table:
            return ".".join([table[start], *words[n:]])
    return name


def _prefix(part: str, values: dict) -> str:
    if part != "text_encoder":
        return PREFIXES[part]
    return OPENCLIP if values["hidden_act"] == "gelu" else OPENAI  # OpenAI's CLIP has quick_gelu


def check_channels(takes: int, gives: int, latents: int, source: Path | str) -> None:
    """Raise CheckpointError if a U-Net with these input and output channels cannot denoise the VAE's latents."""
    if (takes, gives) != (latents, latents):
        raise CheckpointError(
            f"{source}: its U-Net takes {takes} channels and gives {gives}, but its VAE's latents have {latents}: "
            "inpainting (9), editing (8), depth (5) and the like are not supported"
        )


def _refuse_others(tensors: Tensors, path: Path) -> None:
    """Raise CheckpointError, saying what it is, if the file is not a whole Stable Diffusion in the CompVis layout."""
    if (kind := identify(tensors)) not in (None, WHOLE):
        wanted = "--base takes a whole Stable Diffusion 1.x or 2.x, --ckpt what train.py wrote"
        raise CheckpointError(f"{path} is {kind}: {wanted}")
    present = {part for part, prefix in PREFIXES.items() for key in tensors if key.startswith(prefix)}
    if lacking := [f"{part} ({prefix}*)" for part, prefix in PREFIXES.items() if part not in present]:
        raise CheckpointError(f"{path} is not a whole Stable Diffusion in one file: it lacks {', '.join(lacking)}")
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    latents = tensors.get("first_stage_model.post_quant_conv.weight")
    if first is not None and latents is not None:
        check_channels(first.shape[1], len(latents), len(latents), path)
