"""A whole Stable Diffusion 1.x or 2.x in one file, as model sites share it: `v1-5-pruned-emaonly.safetensors`.

Such a file keeps the names of the code it was trained with (CompVis/stable-diffusion, arXiv 2112.10752), which are not
those of the folders. `compvis_names` lists, for a network's configuration, every tensor of ours with its name there;
reading and writing are look-ups in that one list. The U-Net's blocks are numbered straight through there:

    input_blocks    0 conv_in | level 0: resnets 1 2, downsampler 3 | level 1: 4 5, 6 | ...
    output_blocks   level 0: resnets 0 1 2, upsampler inside 2 | level 1: 3 4 5 | ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.files.errors import CheckpointError
from model.files.tensors import WHOLE, read_metadata, read_tensors, what_is
from model.files.write import save_tensors

Parts = dict[str, tuple[dict, dict[str, Tensor]] | dict]

CONFIG_KEY = "rpo.config"  # in the header of files written here: the parts' config values, as JSON
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
OPENAI, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."  # SD 1.x, SD 2.x
OPENCLIP_LAYERS = 23  # of 24: SD 2.x reads the layer before the last

# What every public scheduler_config.json of SD 1.x and 2.x says.
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULER |= {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "trained_betas": None}
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}  # "v" is ModelSpec's

# Modules inside our modules, and what they are called there.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
TEXT_LAYER |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
EMBEDDINGS = {"embeddings.token_embedding.weight": "token_embedding.weight"}
EMBEDDINGS |= {"embeddings.position_embedding.weight": "positional_embedding"}
PROJECTIONS = [f"attn{n}.to_{x}" for n in (1, 2) for x in "qkv"]  # the only modules without a bias
BLOCK = ["norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", *PROJECTIONS]
TRANSFORMER = {name: name for name in ("norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{x}" for x in BLOCK))}

# Under the three prefixes, but no weights that a picture needs: constants, training leftovers, OpenCLIP's other half.
PASSED_OVER = re.compile(
    r"first_stage_model\.(loss|model_ema)\."
    r"|cond_stage_model\.(.*\.)?(position_ids|attn_mask|logit_scale|text_projection|text_projection\.weight)$"
    rf"|{re.escape(OPENCLIP)}transformer\.resblocks\.{OPENCLIP_LAYERS}\."
)


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for a .ckpt and its like, whatever it holds."""
    if Path(path).suffix.lower() in PICKLES:
        raise CheckpointError(f"{path} is a pickle, which may run code when opened: get this model as .safetensors")


def read_single_file(path: Path | str, prediction_type: str | None = None) -> Parts:
    """A CompVis-layout file as the parts of a base model's folder.

    Returns {"unet", "vae", "text_encoder": (values of its config.json, tensors in its file's names), "scheduler":
    values of its config}. Tensors are views into the mapped file. EMA copies (`model_ema.*`) are passed over.

    Shapes tell the architecture; see `describe` for what they do not tell. `prediction_type`: "epsilon" or
    "v_prediction"; None to take the header's word, or epsilon for SD 1.x.
    Raises CheckpointError, naming the file and its keys, if it is broken, something else or incomplete, if it has keys
    too many, or if nothing says what an SD 2.x predicts.
    """
    path = Path(path)
    refuse_pickle(path)
    bare = re.escape(OPENAI) + "(?=embeddings|encoder|final_layer_norm)"  # some tools leave out "text_model."
    tensors = {re.sub(f"^{bare}", f"{OPENAI}text_model.", name): tensor for name, tensor in read_tensors(path).items()}
    _refuse_others(tensors, path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    values = describe(shapes, read_metadata(path), prediction_type, path)
    parts = {part: (values[part], _to_ours(part, values[part], tensors, path)) for part in PREFIXES}
    return parts | {"scheduler": values["scheduler"]}


def write_single_file(
    path: Path | str, parts: Parts, metadata: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float16
) -> None:
    """Write `parts`, as `read_single_file` returns them, to a CompVis-layout safetensors file, in `dtype`.

    The header holds `metadata`, the config values, and for other tools `modelspec.prediction_type` (Stability AI's
    ModelSpec). Raises CheckpointError if a part's tensors are not those of its config, and as `save_tensors` does.
    """
    tensors = {}
    for part in PREFIXES:
        values, ours = parts[part]
        if part == "text_encoder" and _is_openclip(values) and values["num_hidden_layers"] > OPENCLIP_LAYERS:
            raise CheckpointError(f"{path}: readers drop every OpenCLIP layer after the first {OPENCLIP_LAYERS}")
        ours = {name: tensor for name, tensor in ours.items() if not name.endswith(".position_ids")}
        names = compvis_names(part, values)
        _same_keys(set(names), set(ours), f"the {part} for {path}")
        for theirs, group in _inverse(names).items():
            tensor = torch.cat([ours[name] for name in group]) if len(group) > 1 else ours[group[0]]
            if part == "vae" and tensor.ndim == 2:  # the attention's matrices are 1x1 convolutions there
                tensor = tensor[:, :, None, None]
            tensors[theirs] = tensor.to(dtype)
    config = {part: parts[part][0] for part in PREFIXES} | {"scheduler": parts["scheduler"]}
    predicts = "v" if config["scheduler"].get("prediction_type") == "v_prediction" else "epsilon"
    header = {CONFIG_KEY: json.dumps(config), "modelspec.prediction_type": predicts}
    save_tensors(tensors, Path(path), dict(metadata or {}) | header)


def compvis_names(part: str, values: dict) -> dict[str, str]:
    """Every tensor of "unet", "vae" or "text_encoder" with these config values: our name -> the CompVis file's.

    Three of ours share one of theirs where OpenCLIP keeps q, k and v, in this order, in one tensor.
    """
    names = {"unet": _unet_names, "vae": _vae_names, "text_encoder": _text_names}[part](values)
    prefix = PREFIXES[part] if part != "text_encoder" else OPENCLIP if _is_openclip(values) else OPENAI
    return {ours: prefix + theirs for ours, theirs in names.items()}


def _unet_names(values: dict) -> dict[str, str]:
    widths, layers = values["block_out_channels"], values["layers_per_block"]
    stride = layers + 1  # numbers a level takes: on the way down the downsampler's, on the way up one more layer's
    modules = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    modules |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    modules |= _inside("mid_block.attentions.0", "middle_block.1", TRANSFORMER)
    for j in range(2):
        modules |= _inside(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", RESNET, shortcut=False)
    for way, blocks, first, count in (("down", "input_blocks", 1, layers), ("up", "output_blocks", 0, stride)):
        for i, kind in enumerate(values[f"{way}_block_types"]):
            ours, attends = f"{way}_blocks.{i}", kind.startswith("CrossAttn")
            for j in range(count):
                theirs = f"{blocks}.{first + i * stride + j}"
                shortcut = way == "up" or (j == 0 and i > 0 and widths[i] != widths[i - 1])
                modules |= _inside(f"{ours}.resnets.{j}", f"{theirs}.0", RESNET, shortcut)
                modules |= _inside(f"{ours}.attentions.{j}", f"{theirs}.1", TRANSFORMER) if attends else {}
            if i < len(widths) - 1:
                down, up = f"{blocks}.{(i + 1) * stride}.0.op", f"{theirs}.{1 + attends}.conv"
                modules[f"{ours}.{way}samplers.0.conv"] = down if way == "down" else up
    return _weights_and_biases(modules)


def _vae_names(values: dict) -> dict[str, str]:
    layers, last = values["layers_per_block"], len(values["block_out_channels"]) - 1
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, way, count in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        modules |= _inside(side, side, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        modules |= _inside(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
        for j in range(2):
            modules |= _inside(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", VAE_RESNET, shortcut=False)
        widths = values["block_out_channels"][:: 1 if way == "down" else -1]
        for i in range(len(widths)):
            level = i if way == "down" else last - i  # numbered by size there, not in order
            ours, theirs = f"{side}.{way}_blocks.{i}", f"{side}.{way}.{level}"
            for j in range(count):
                changes = j == 0 and i > 0 and widths[i] != widths[i - 1]
                modules |= _inside(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", VAE_RESNET, changes)
            if i < last:
                modules[f"{ours}.{way}samplers.0.conv"] = f"{theirs}.{way}sample.conv"
    return _weights_and_biases(modules)


def _text_names(values: dict) -> dict[str, str]:
    modules = {"text_model.final_layer_norm": "ln_final"}
    names = {f"text_model.{ours}": theirs for ours, theirs in EMBEDDINGS.items()}
    for i in range(values["num_hidden_layers"]):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        modules |= _inside(ours, theirs, TEXT_LAYER)
        for kind in ("weight", "bias"):
            names |= {f"{ours}.self_attn.{x}_proj.{kind}": f"{theirs}.attn.in_proj_{kind}" for x in "qkv"}
    names |= _weights_and_biases(modules)
    return names if _is_openclip(values) else {name: name for name in names}


def _inside(ours: str, theirs: str, modules: dict[str, str], shortcut: bool = True) -> dict[str, str]:
    kept = {a: b for a, b in modules.items() if shortcut or a != "conv_shortcut"}
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in kept.items()}


def _weights_and_biases(modules: dict[str, str]) -> dict[str, str]:
    kinds = {ours: ["weight"] if ours.endswith(tuple(PROJECTIONS)) else ["weight", "bias"] for ours in modules}
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in kinds[ours]}


def _is_openclip(values: dict) -> bool:
    return values.get("hidden_act") == "gelu"  # OpenAI's CLIP has quick_gelu


def _inverse(names: dict[str, str]) -> dict[str, list[str]]:
    groups = {}
    for ours, theirs in names.items():
        groups.setdefault(theirs, []).append(ours)
    return groups


def _to_ours(part: str, values: dict, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    groups = _inverse(compvis_names(part, values))
    found = {name for name in tensors if name.startswith(PREFIXES[part]) and not PASSED_OVER.match(name)}
    _same_keys(set(groups), found, path)
    renamed = {}
    for theirs, ours in groups.items():
        tensor = tensors[theirs]
        if part == "vae" and ".attn_1." in theirs and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        pieces = tensor.chunk(len(ours)) if len(ours) > 1 and tensor.ndim else [tensor]
        if len(pieces) != len(ours):
            raise CheckpointError(f"{path}: {theirs} is {tuple(tensor.shape)} and should hold q, k and v")
        renamed |= zip(ours, pieces, strict=True)
    return renamed


def describe(shapes: dict[str, tuple], header: Mapping[str, str], prediction_type: str | None, source: Path) -> dict:
    """The config values of all four parts, from the shapes {CompVis name: shape} and the header's metadata.

    No shape tells the number of heads, the groups of the norms or the VAE's scale. Files of `write_single_file` say
    so in the header. Others have Stable Diffusion's: 8 heads with a context 768 wide (1.x), else heads of 64 channels;
    in the text encoder always heads of 64; 32 groups; 0.18215.
    """
    told, saved = _architecture(shapes, source), _saved_config(header, source)
    context, widths = told["unet"]["cross_attention_dim"], told["unet"]["block_out_channels"]
    said = saved["scheduler"].get("prediction_type") or PREDICTION_TYPES.get(header.get("modelspec.prediction_type"))
    said = said or ("v_prediction" if "v_pred" in shapes else None)  # an empty tensor that some trainers put there
    predicts = prediction_type or said or ("epsilon" if context == 768 else None)
    if predicts is None:
        raise CheckpointError(
            f"{source} does not say what it predicts: add --prediction-type epsilon (2.1-base, 512 px) or "
            "--prediction-type v_prediction (2.1, 768 px)"
        )
    heads = 8 if context == 768 else [max(width // 64, 1) for width in widths]
    side = 96 if context == 1024 and predicts == "v_prediction" else 64
    guessed = {
        "unet": {"attention_head_dim": heads, "sample_size": side},
        "vae": {"scaling_factor": 0.18215},
        "text_encoder": {"num_attention_heads": max(told["text_encoder"]["hidden_size"] // 64, 1)},
        "scheduler": SCHEDULER,
    }
    told["scheduler"] = {"prediction_type": predicts}
    return {part: guessed[part] | saved[part] | told[part] for part in told}


def _architecture(shapes: dict[str, tuple], source: Path) -> dict[str, dict]:
    """The config values of the three networks that follow from the names and shapes in the file."""
    names = [name for name in shapes if not PASSED_OVER.match(name)]

    def size(key: str, axis: int) -> int:
        if axis >= len(shapes.get(key, ())) or shapes[key][axis] < 1:
            raise CheckpointError(f"{source}: {key} is {shapes.get(key, 'missing')}")
        return shapes[key][axis]

    def count(pattern: str) -> int:
        """How many different texts the pattern's group stands for."""
        return len({match[1] for key in names if (match := re.match(pattern, key))})

    at = PREFIXES["unet"]
    levels, blocks = 1 + count(rf"{at}input_blocks\.(\d+)\.0\.op\."), count(rf"{at}input_blocks\.(\d+)\.")
    stride = blocks // levels  # the layers of a level and its downsampler; at the first level, conv_in
    if stride < 2 or blocks % levels:
        raise CheckpointError(f"{source} has {blocks} {at}input_blocks.* for {levels} levels: some are missing")
    downs = [count(rf"{at}input_blocks\.{1 + i * stride}\.(1)\.") for i in range(levels)]
    ups = [count(rf"{at}output_blocks\.{i * stride}\.(1)\.") for i in range(levels)]
    unet = {
        "in_channels": size(f"{at}input_blocks.0.0.weight", 1),
        "out_channels": size(f"{at}out.2.weight", 0),
        "block_out_channels": [
            size(f"{at}input_blocks.{1 + i * stride}.0.in_layers.2.weight", 0) for i in range(levels)
        ],
        "down_block_types": ["CrossAttn" * attends + "DownBlock2D" for attends in downs],
        "up_block_types": ["CrossAttn" * attends + "UpBlock2D" for attends in ups],
        "layers_per_block": stride - 1,
        "cross_attention_dim": size(f"{at}middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": len(shapes.get(f"{at}middle_block.1.proj_in.weight", ())) == 2,
    }
    at = PREFIXES["vae"]
    levels = count(rf"{at}encoder\.down\.(\d+)\.")
    vae = {
        "in_channels": size(f"{at}encoder.conv_in.weight", 1),
        "out_channels": size(f"{at}decoder.conv_out.weight", 0),
        "latent_channels": size(f"{at}post_quant_conv.weight", 0),
        "block_out_channels": [size(f"{at}encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)],
        "layers_per_block": count(rf"{at}encoder\.down\.0\.block\.(\d+)\."),
    }
    check_channels(unet["in_channels"], unet["out_channels"], vae["latent_channels"], source)
    openclip = any(key.startswith(OPENCLIP) for key in shapes)
    at = OPENCLIP if openclip else f"{OPENAI}text_model."
    layers = f"{at}transformer.resblocks" if openclip else f"{at}encoder.layers"
    tokens, places = EMBEDDINGS.values() if openclip else EMBEDDINGS
    text = {
        "vocab_size": size(at + tokens, 0),
        "hidden_size": size(at + tokens, 1),
        "intermediate_size": size(f"{layers}.0.mlp.{'c_fc' if openclip else 'fc1'}.weight", 0),
        "num_hidden_layers": count(rf"{layers}\.(\d+)\."),
        "max_position_embeddings": size(at + places, 0),
        "hidden_act": "gelu" if openclip else "quick_gelu",
    }
    return {"unet": unet, "vae": vae, "text_encoder": text}


def check_channels(takes: int, gives: int, latents: int, source: Path | str) -> None:
    """Raise CheckpointError if a U-Net that takes and gives so many channels does not denoise such latents."""
    if (takes, gives) != (latents, latents):
        raise CheckpointError(
            f"{source}: its U-Net takes {takes} channels and gives {gives}, but its VAE's latents have {latents}: "
            "inpainting (9), editing (8), depth (5) and the like are not supported"
        )


def _saved_config(header: Mapping[str, str], source: Path) -> dict[str, dict]:
    """What `write_single_file` put into the header, {} for a part of which it says nothing."""
    try:
        config = json.loads(header.get(CONFIG_KEY, "{}"))
        return {part: dict(config.get(part, {})) for part in (*PREFIXES, "scheduler")}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: the header's {CONFIG_KEY} cannot be read: {error}") from None


def _refuse_others(keys: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError, saying what it is, if the file is not a whole Stable Diffusion in the CompVis layout."""
    if (kind := what_is(keys)) not in (None, WHOLE):
        kind += "" if "," in kind else " alone"  # a kind with a comma explains itself
        wanted = "--base takes a whole Stable Diffusion 1.x or 2.x, --ckpt what train.py wrote"
        raise CheckpointError(f"{path} is {kind}: {wanted}")
    parts = {part: f"{part} ({prefix}*)" for part, prefix in PREFIXES.items()}
    lacking = [name for part, name in parts.items() if not any(key.startswith(PREFIXES[part]) for key in keys)]
    if lacking:
        raise CheckpointError(f"{path} is no whole Stable Diffusion in one file: it lacks {', '.join(lacking)}")


def _same_keys(expected: set[str], found: set[str], source: Path | str) -> None:
    problems = {"lacks": sorted(expected - found), "has unexpected": sorted(found - expected)}
    told = [f"{verb} {', '.join(keys[:3])}{' and more' * (len(keys) > 3)}" for verb, keys in problems.items() if keys]
    if told:
        raise CheckpointError(f"{source} {' and '.join(told)}")
