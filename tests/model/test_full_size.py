"""Every public checkpoint at its full size: keys, shapes and number of parameters, through a file.

The reference network is built on the meta device from the published config.json. Its keys and shapes are written as a
file with a correct header and no stored numbers, which ours must load strictly. What shapes do not show (a norm's eps,
the number of heads, the activation) is compared module by module.
"""

import dataclasses
import json
import struct
from collections import Counter
from math import prod

import diffusers
import pytest
import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from model.align import ALIGN, ALIGNConfig
from model.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPTextEncoder
from model.dino import DINO, DINOConfig
from model.files.config import config_from
from model.files.single_file import describe
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig

# Key for key as published, null values and stale ones (the text encoders' bos, eos and pad) included.
# fmt: off
UNET = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_2 = UNET | {
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
    "use_linear_projection": True,
}
AUTOENCODER = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408,
}
TEXT_2 = TEXT | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512, "torch_dtype": "float16",
}
LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
LARGE_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768,
}
LARGE = {"projection_dim": 768, "text_config": LARGE_TEXT, "vision_config": LARGE_VISION}
VIT = {
    "hidden_act": "gelu", "hidden_size": 384, "image_size": 224, "intermediate_size": 1536, "layer_norm_eps": 1e-12,
    "num_attention_heads": 6, "num_hidden_layers": 12, "patch_size": 16,
}
# fmt: on
EFFICIENTNET = {"image_size": 289, "hidden_dim": 640, "num_hidden_layers": 64}

# name: (our class, theirs, config.json, parameters, tensors in the file)
PUBLISHED = {
    "SD 1.5 U-Net": (UNet, diffusers.UNet2DConditionModel, UNET, 859_520_964, 686),
    "SD 2.1 U-Net": (UNet, diffusers.UNet2DConditionModel, UNET_2, 865_910_724, 686),
    "SD VAE": (VAE, diffusers.AutoencoderKL, AUTOENCODER, 83_653_863, 248),
    "SD 1.5 text encoder": (CLIPTextEncoder, transformers.CLIPTextModel, TEXT, 123_060_480, 196),
    "SD 2.1 text encoder": (CLIPTextEncoder, transformers.CLIPTextModel, TEXT_2, 340_387_840, 372),
    "CLIP B/32": (CLIP, transformers.CLIPModel, {"projection_dim": 512}, 151_277_313, 398),
    "CLIP B/16": (CLIP, transformers.CLIPModel, {"vision_config": {"patch_size": 16}}, 149_620_737, 398),
    "CLIP L/14": (CLIP, transformers.CLIPModel, LARGE, 427_616_513, 590),
    "ALIGN": (ALIGN, transformers.AlignModel, {"vision_config": EFFICIENTNET}, 172_117_841, 1394),
    "DINO S/16": (DINO, transformers.ViTModel, VIT, 21_665_664, 198),
    "DINO S/8": (DINO, transformers.ViTModel, VIT | {"patch_size": 8}, 21_670_272, 198),
}


def reference(library_class, values):
    """The reference network on the meta device."""
    with torch.device("meta"):
        if issubclass(library_class, diffusers.ModelMixin):
            return library_class.from_config(values)
        more = {"add_pooling_layer": False} if library_class is transformers.ViTModel else {}
        return library_class(library_class.config_class(**values), **more)


def file_tensors(network):
    """The network's tensors under the names that public files have."""
    if isinstance(network, diffusers.ModelMixin):
        return network.state_dict()
    tensors = revert_weight_conversion(network, network.state_dict())
    if isinstance(network, transformers.CLIPTextModel):  # transformers 5 alone writes it without the prefix
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77, device="meta")[None]  # in files of 2022
    return tensors


def write_hollow(tensors, path):
    """Write a sparse safetensors file in half precision: all numbers are zero, and none takes disk space."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        kind, size = ("F16", 2) if tensor.is_floating_point() else ("I64", 8)
        begin, end = end, end + size * prod(tensor.shape)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def norms(network):
    """The number of norms of each kind, width and eps."""
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
    return Counter((type(m).__name__, tuple(m.weight.shape), m.eps) for m in network.modules() if isinstance(m, kinds))


def heads(network):
    """The number of attentions with each number of heads."""
    names = ["heads"] if isinstance(network, diffusers.ModelMixin) else ["heads", "num_heads", "num_attention_heads"]
    found = [getattr(m, name, None) for m in network.modules() for name in names]
    return Counter(each for each in found if isinstance(each, int))


def shared(ours, theirs):
    """The fields that both configurations have: {name: (our value, their value)}."""
    found = {}
    for field in dataclasses.fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name, None)
        if dataclasses.is_dataclass(mine) and other is not None:
            found |= {f"{field.name}.{name}": pair for name, pair in shared(mine, other).items()}
        elif other is not None:
            found[field.name] = mine, tuple(other) if isinstance(other, list) else other
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size(tmp_path, name):
    our_class, library_class, values, parameters, count = PUBLISHED[name]
    theirs = reference(library_class, values)
    tensors = file_tensors(theirs)
    (tmp_path / "config.json").write_text(json.dumps(values))
    write_hollow(tensors, tmp_path / "model.safetensors")
    ours = our_class.from_pretrained(tmp_path, dtype=torch.float16)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == parameters
    expected = {key: tensor.shape for key, tensor in tensors.items() if not key.endswith("position_ids")}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected and len(expected) == count
    assert {p.dtype for p in ours.parameters()} == {torch.float16}
    settings = shared(ours.config, theirs.config)
    assert len(settings) >= 7 and {field: pair for field, pair in settings.items() if pair[0] != pair[1]} == {}
    assert norms(ours) == norms(theirs)
    if our_class is not VAE:
        assert heads(ours) == heads(theirs) != {}
    if our_class in (CLIP, CLIPTextEncoder):
        x = torch.linspace(-3, 3, 50)
        mine = [m.activation(x) for m in ours.modules() if hasattr(m, "activation")]
        public = [m.activation_fn(x) for m in theirs.modules() if hasattr(m, "activation_fn")]
        assert torch.allclose(torch.stack(mine), torch.stack(public), atol=1e-6)


@pytest.mark.parametrize(
    ("key", "predicts", "unet_values", "text_values"),
    [("transformer.x", None, UNET, TEXT), ("model.x", "v_prediction", UNET_2, TEXT_2)],
    ids=["SD 1.5", "SD 2.1"],
)
def test_a_single_file_without_configurations_has_the_published_ones(key, predicts, unet_values, text_values):
    values = describe({f"cond_stage_model.{key}": None}, {}, predicts, "x")
    assert config_from(UNetConfig, values["unet"]) == config_from(UNetConfig, unet_values)
    assert config_from(VAEConfig, values["vae"]) == VAEConfig()
    ours, published = (config_from(CLIPTextConfig, each) for each in (values["text_encoder"], text_values))
    assert ours == dataclasses.replace(published, eos_token_id=ours.eos_token_id)


def test_the_defaults_are_the_published_ones():
    assert UNetConfig() == config_from(UNetConfig, UNET)
    assert VAEConfig() == config_from(VAEConfig, AUTOENCODER)
    assert DINOConfig() == config_from(DINOConfig, VIT)
    assert CLIPConfig() == config_from(CLIPConfig, {"projection_dim": 512, "vision_config": {"patch_size": 32}})
    assert ALIGNConfig() == config_from(ALIGNConfig, {"vision_config": EFFICIENTNET, "projection_dim": 640})
