"""A whole Stable Diffusion in one CompVis-layout file: written as diffusers' own converters read it, read as written,
and whatever else is shared as one file refused in one line.

The converters copy and cut tensors and compute nothing, so all comparisons are exact.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file

from model import clip, unet, vae
from model.files.config import config_from
from model.files.errors import CheckpointError
from model.files.single_file import describe, from_compvis, read_single_file, to_compvis, write_single_file
from model.files.tensors import build, read_metadata

U, V, T = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
NETWORKS = {
    "unet": (unet.UNet, unet.UNetConfig),
    "vae": (vae.VAE, vae.VAEConfig),
    "text_encoder": (clip.CLIPTextEncoder, clip.CLIPTextConfig),
}
CROSS, PLAIN = "CrossAttn", ""
ODD = [PLAIN, CROSS, PLAIN, CROSS]


def base(widths, layers, downs, vae, text, act="quick_gelu", scale=0.18215, ups=None):
    """The parts' configurations; text: width, layers, heads, hidden width."""
    blocks = {"norm_num_groups": 4}
    unet = {"block_out_channels": widths, "layers_per_block": layers, "cross_attention_dim": 32, "sample_size": 8}
    unet |= {"down_block_types": [f"{kind}DownBlock2D" for kind in downs], "attention_head_dim": 2}
    unet |= {"up_block_types": [f"{kind}UpBlock2D" for kind in ups or reversed(downs)]}
    unet["use_linear_projection"] = act == "gelu"
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {
        "unet": blocks | unet,
        "vae": blocks | {"block_out_channels": vae, "layers_per_block": layers, "scaling_factor": scale},
        "text_encoder": dict(zip(names, text, strict=True)) | {"vocab_size": 50, "hidden_act": act},
    }


SMALL = {
    "SD 2": base([8, 16, 32, 32], 2, [CROSS] * 3 + [PLAIN], [8, 16, 32, 32], (8, 23, 1, 12), "gelu"),
    "toy": base([8, 16, 24], 1, [CROSS, CROSS, PLAIN], [8, 12, 16, 16], (32, 3, 4, 128), scale=0.5999),
    # More layers, a width that stays, attention at the smallest level only on the way down.
    "odd": base([8, 8, 16, 16, 24], 3, [*ODD, CROSS], [8, 16], (16, 1, 1, 16), "gelu", ups=[*ODD, PLAIN]),
}


def network(part, values, device="meta"):
    cls, config = NETWORKS[part]
    with torch.device(device):
        return cls(config_from(config, values))


def small(name, predicts="epsilon"):
    """The parts of a small random base in half precision: no two tensors alike."""
    torch.manual_seed(0)
    parts = {}
    for part, values in SMALL[name].items():
        tensors = network(part, values).state_dict()
        parts[part] = values, {key: torch.randn(tensor.shape).half() for key, tensor in tensors.items()}
    return parts | {"scheduler": {"prediction_type": predicts}}


def refused(call, *parts):
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value), caught.value


def equal(ours, others):
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)


def converted(part, values, tensors):
    """A part of a CompVis-layout file by diffusers' converters."""
    if part == "unet":
        return theirs.convert_ldm_unet_checkpoint(tensors, values)
    if part == "vae":
        levels = values["block_out_channels"]
        return theirs.convert_ldm_vae_checkpoint(tensors, {"down_block_types": levels, "up_block_types": levels})
    if values["hidden_act"] == "gelu":
        # Without a size in the configuration, as diffusers 0.32: only text_projection says where q, k and v end.
        converted = theirs.convert_open_clip_checkpoint(SimpleNamespace(config=SimpleNamespace()), tensors)
        return {key: tensor for key, tensor in converted.items() if ".layers.23." not in key and "text_model." in key}
    return theirs.convert_ldm_clip_checkpoint(tensors)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_written_converts_with_diffusers(name, tmp_path):
    parts = small(name)
    write_single_file(tmp_path / "x.safetensors", parts)
    tensors = load_file(tmp_path / "x.safetensors")
    for part in NETWORKS:
        equal(parts[part][1], converted(part, parts[part][0], tensors))
    if name != "odd":  # diffusers knows the families by one key
        assert (theirs.is_open_clip_model if name == "SD 2" else theirs.is_clip_model)(tensors)


@pytest.mark.parametrize("name", SMALL)
def test_round_trip(name, tmp_path):
    parts = small(name, "v_prediction" if name == "SD 2" else "epsilon")
    write_single_file(tmp_path / "x.safetensors", parts, {"noun": "dog"})
    again = read_single_file(tmp_path / "x.safetensors")
    assert again["scheduler"] == parts["scheduler"]
    for part in NETWORKS:
        assert again[part][0] == parts[part][0]
        equal(parts[part][1], again[part][1])
    header = read_metadata(tmp_path / "x.safetensors")
    assert header["noun"] == "dog"
    assert header["modelspec.prediction_type"] == ("v" if name == "SD 2" else "epsilon")
    write_single_file(tmp_path / "again.safetensors", again, {"noun": "dog"})  # views of a mapped file are written too
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_reads_without_copies():
    values, tensors = small("SD 2")["text_encoder"]
    file = to_compvis("text_encoder", values, tensors)
    places = {tensor.untyped_storage().data_ptr() for tensor in file.values()}
    ours = from_compvis("text_encoder", values, file).values()
    assert len(ours) == len(tensors)
    assert {tensor.untyped_storage().data_ptr() for tensor in ours} <= places


@pytest.mark.parametrize("is_2", [False, True])
def test_every_key_at_full_size(is_2):
    """test_full_size.py compares the configurations with the published ones, and counts keys and weights."""
    marker = f"{T}model.ln_final.bias" if is_2 else f"{T}transformer.text_model.final_layer_norm.bias"
    values, file, shapes = describe({marker: None}, {}, "v_prediction" if is_2 else None, "x"), {}, {}
    for part in NETWORKS:
        tensors = network(part, values[part]).state_dict()
        shapes[part] = {key: tensor.shape for key, tensor in tensors.items()}
        file |= to_compvis(part, values[part], tensors)
    for part in NETWORKS:
        for again in (converted(part, values[part], file), from_compvis(part, values[part], file)):
            assert {key: tensor.shape for key, tensor in again.items()} == shapes[part]
    assert len(file) == 686 + 248 + (6 + 24 * 12 if is_2 else 196)
    # What the published files have, where diffusers' converters take other names and shapes too.
    projection = (320, 320) if is_2 else (320, 320, 1, 1)
    for key, shape in {
        f"{U}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{U}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),  # after no attention
        f"{U}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{U}output_blocks.11.1.proj_out.weight": projection,
        f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024 if is_2 else 768),
        f"{V}encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        f"{V}decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        f"{V}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    }.items():
        assert file[key].shape == shape
    assert theirs.infer_diffusers_model_type(file) == ("v2" if is_2 else "v1")


def test_unused_tensors_of_sd_2():
    """Clients look for them in the file. A layer of zeros would give its input back."""
    values, tensors = small("SD 2")["text_encoder"]
    file = to_compvis("text_encoder", values, tensors)
    assert torch.equal(file[f"{T}model.text_projection"], torch.eye(8)) and file[f"{T}model.logit_scale"] == 0
    layer = [tensor for key, tensor in file.items() if key.startswith(f"{T}model.transformer.resblocks.23.")]
    assert len(layer) == 12 and not any(tensor.any() for tensor in layer)


def test_prediction_type():
    def predicts(key, asked=None, header=None):
        return describe(dict.fromkeys(key.split()), header or {}, asked, "x")["scheduler"]["prediction_type"]

    sd_1, sd_2 = f"{T}transformer.x", f"{T}model.x"
    assert predicts(sd_1) == "epsilon"
    for name in ("modelspec.prediction_type", "modelspec.predict_key"):  # kohya's and ComfyUI's
        assert predicts(sd_1, header={name: "v"}) == predicts(sd_2, header={name: "v"}) == "v_prediction"
        assert predicts(sd_2, header={name: "epsilon"}) == "epsilon"
        assert predicts(sd_2, "epsilon", {name: "v"}) == "epsilon"  # the user decides
    assert predicts(f"{sd_2} v_pred") == "v_prediction"
    ours = '{"scheduler": {"prediction_type": "v_prediction"}}'
    assert predicts(sd_2, header={"rpo.config": ours, "modelspec.predict_key": "epsilon"}) == "v_prediction"
    assert "sample_size" not in describe({sd_2: None}, {}, "epsilon", "x")["unet"]  # 64 by default
    asks = ("--prediction-type epsilon (2.1-base, 512 px)", "--prediction-type v_prediction (2.1, 768 px)")
    refused(lambda: predicts(sd_2), *asks)
    refused(lambda: predicts(sd_2, header={"modelspec.prediction_type": "sample"}), *asks)


def changed(folder, name="toy", without=(), extra=None):
    """A small file without the keys that start so, and with others."""
    path = folder / "x.safetensors"
    write_single_file(path, small(name))
    metadata = read_metadata(path)
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.startswith(tuple(without))}
    save_file(tensors | (extra or {}), path, metadata)
    return path


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize("name", ["toy", "SD 2"])
def test_what_is_ignored_and_other_spellings(name, tmp_path):
    """Text towers without "text_model.", and VAE attention that is a matrix already."""
    extra = {
        "model_ema.diffusion_modelout2bias": zeros(4),
        "model_ema.decay": zeros(),
        "betas": zeros(1000),
        f"{V}loss.discriminator.main.0.weight": zeros(1),
        f"{T}transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{T}transformer.text_projection.weight": zeros(8, 8),  # ComfyUI
        f"{T}logit_scale": zeros(),
        f"{T}model.attn_mask": zeros(77, 77),
    }
    extra |= {f"{T}model.transformer.resblocks.23.ln_1.weight": torch.ones(32)} if name == "SD 2" else {}
    path = changed(tmp_path, name, extra=extra)
    tensors = {key.replace(".text_model.", "."): tensor for key, tensor in load_file(path).items()}
    for key, tensor in tensors.items():
        tensors[key] = (tensor[:, :, 0, 0] if "attn_1" in key and tensor.ndim == 4 else tensor).contiguous()
    save_file(tensors, path, read_metadata(path))
    for part in NETWORKS:
        equal(small(name)[part][1], read_single_file(path)[part][1])


MISFITS = {
    f"{U}input_blocks.0.0.weight": "conv_in.weight",
    f"{U}output_blocks.1.1.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
    f"{U}input_blocks.99.0.weight": "input_blocks.99.0.weight",
    f"{V}decoder.up.0.block.0.nin_shortcut.weight": "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
    f"{V}encoder.extra.bias": "encoder.extra.bias",
    f"{T}transformer.text_model.embeddings.token_embedding.weight": "embeddings.token_embedding.weight",
    f"{T}extra": f"{T}extra",
}


@pytest.mark.parametrize("key", MISFITS)
def test_a_missing_or_unexpected_key_is_named_when_loaded(key, tmp_path):
    path = changed(tmp_path)
    present = key in load_file(path)
    path = changed(tmp_path, without=[key] if present else [], extra=None if present else {key: zeros(3)})

    def load():
        for part, (cls, config) in NETWORKS.items():
            values, tensors = read_single_file(path)[part]
            build(cls, config_from(config, values), tensors, path)

    refused(load, path, f"{'lacks' if present else 'has unexpected'} ", MISFITS[key])


OTHERS = {  # test_tensors.py has more kinds of files
    "a LoRA": {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": zeros(4, 8)},
    "SDXL": {"conditioner.embedders.1.model.ln_final.weight": zeros(1280), f"{U}out.2.bias": zeros(4)},
    "zero terminal SNR": {"ztsnr": zeros(0), f"{U}out.2.bias": zeros(4)},
    f"lacks vae ({V}*), text_encoder ({T}*)": {f"{U}out.2.bias": zeros(4)},
    f"lacks unet ({U}*), vae": {"emb_params": zeros(1, 768)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_refused(what, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(OTHERS[what], path)
    refused(lambda: read_single_file(path), what, path)


def test_an_inpainting_model_is_refused(tmp_path):
    path = changed(tmp_path, extra={f"{U}input_blocks.0.0.weight": zeros(8, 9, 3, 3)})
    refused(lambda: read_single_file(path), path, "takes 9 channels and gives 4", "inpainting (9)")
