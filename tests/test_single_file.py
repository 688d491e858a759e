"""A whole Stable Diffusion in one CompVis-layout file: written as diffusers' own converters read it, read as written,
the architecture inferred from shapes alone, and whatever else is shared as one file refused in one line.

The converters copy and cut tensors and compute nothing, so all comparisons are exact.
"""

import functools
import random
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import clip, unet, vae
from model.files import single_file
from model.files.config import config_from
from model.files.errors import CheckpointError
from model.files.single_file import compvis_names, describe, read_single_file, write_single_file

U, V, T = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CROSS, PLAIN = "CrossAttn", ""
NETWORKS = {
    "unet": (unet.UNet, unet.UNetConfig),
    "vae": (vae.VAE, vae.VAEConfig),
    "text_encoder": (clip.CLIPTextEncoder, clip.CLIPTextConfig),
}


def unet_values(widths, layers, downs, ups, **more):
    return {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in downs],
        "up_block_types": [f"{kind}UpBlock2D" for kind in ups],
        "layers_per_block": layers,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "use_linear_projection": False,
    } | more


def vae_values(widths, layers, **more):
    values = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "scaling_factor": 0.18215}
    return values | {"block_out_channels": widths, "layers_per_block": layers} | more


def text_values(width, layers, heads, hidden, act="quick_gelu", vocab=49408):
    values = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act}
    return values | {"vocab_size": vocab, "intermediate_size": hidden, "max_position_embeddings": 77}


SD_LEVELS = [CROSS] * 3 + [PLAIN], [PLAIN] + [CROSS] * 3
SD1_UNET = unet_values([320, 640, 1280, 1280], 2, *SD_LEVELS)
SD2_HEADS = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
FULL = {
    "SD 1.5": {
        "unet": SD1_UNET,
        "vae": vae_values([128, 256, 512, 512], 2),
        "text_encoder": text_values(768, 12, 12, 3072),
        "scheduler": single_file.SCHEDULER | {"prediction_type": "epsilon"},
    },
    "SD 2.1": {
        "unet": SD1_UNET | SD2_HEADS | {"sample_size": 96},
        "vae": vae_values([128, 256, 512, 512], 2),
        "text_encoder": text_values(1024, 23, 16, 4096, "gelu"),
        "scheduler": single_file.SCHEDULER | {"prediction_type": "v_prediction"},
    },
}
KEYS = {"SD 1.5": (686, 248, 196), "SD 2.1": (686, 248, 372)}  # of the published folders

TINY = {"norm_num_groups": 4, "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2}
SMALL = {
    "SD 1": {
        "unet": unet_values([8, 16, 32, 32], 2, *SD_LEVELS, **TINY),
        "vae": vae_values([8, 16, 32, 32], 2, norm_num_groups=4),
        "text_encoder": text_values(32, 3, 2, 64, vocab=50),
    },
    "SD 2": {
        "unet": unet_values([8, 16, 32, 32], 2, *SD_LEVELS, **TINY | {"use_linear_projection": True}),
        "vae": vae_values([8, 16, 32, 32], 2, norm_num_groups=4),
        "text_encoder": text_values(32, 12, 4, 48, "gelu", vocab=50),  # 12: layer 1 is not layer 10 or 11
    },
    "toy": {
        "unet": unet_values([8, 16, 24], 1, [CROSS, CROSS, PLAIN], [PLAIN, CROSS, CROSS], **TINY),
        "vae": vae_values([8, 12, 16, 16], 1, norm_num_groups=4, scaling_factor=0.5999),
        "text_encoder": text_values(32, 3, 4, 128, vocab=50),
    },
    "odd": {  # more layers, a width that stays, attention at the smallest level only on the way down
        "unet": unet_values([8, 8, 16, 16, 24], 3, [PLAIN, CROSS] * 2 + [CROSS], [PLAIN, CROSS] * 2 + [PLAIN], **TINY),
        "vae": vae_values([8, 16], 3, norm_num_groups=4, latent_channels=4),
        "text_encoder": text_values(16, 1, 1, 16, "gelu", vocab=20),
    },
}


def network(part, values, device="meta"):
    cls, config = NETWORKS[part]
    with torch.device(device):
        return cls(config_from(config, values))


def small(name, predicts="epsilon"):
    """The parts of a small random base: no two tensors alike."""
    torch.manual_seed(0)
    parts = {}
    for part, values in SMALL[name].items():
        tensors = network(part, values, "cpu").state_dict()
        parts[part] = values, {key: torch.randn_like(tensor) for key, tensor in tensors.items()}
    return parts | {"scheduler": single_file.SCHEDULER | {"prediction_type": predicts}}


def with_their_names(values, tensors):
    """The tensors of `write_single_file`, on whatever device, without a file."""
    written = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "save_tensors", lambda tensors, path, header: written.update(tensors))
        write_single_file("x", {part: (values[part], tensors[part]) for part in NETWORKS} | {"scheduler": {}})
    return written


def refused(call, *parts):
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), caught.value


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
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=values["hidden_size"]))
        return theirs.convert_open_clip_checkpoint(model, tensors)
    return theirs.convert_ldm_clip_checkpoint(tensors)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_written_converts_with_diffusers(name, tmp_path):
    parts = small(name)
    write_single_file(tmp_path / "x.safetensors", parts, dtype=torch.float32)
    tensors = load_file(tmp_path / "x.safetensors")
    for part in NETWORKS:
        equal(parts[part][1], converted(part, parts[part][0], tensors))
    if name != "odd":  # diffusers' families are told by these keys
        assert (theirs.is_open_clip_model if name == "SD 2" else theirs.is_clip_model)(tensors)


@pytest.mark.parametrize("name", SMALL)
def test_round_trip(name, tmp_path):
    parts = small(name, "v_prediction" if name == "SD 2" else "epsilon")
    write_single_file(tmp_path / "x.safetensors", parts, {"noun": "dog"}, torch.float32)
    again = read_single_file(tmp_path / "x.safetensors")
    assert again["scheduler"] == parts["scheduler"]
    for part in NETWORKS:
        assert again[part][0] == parts[part][0]
        equal(parts[part][1], again[part][1])
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        header = file.metadata()
    assert header["noun"] == "dog"
    assert header["modelspec.prediction_type"] == ("v" if name == "SD 2" else "epsilon")

    write_single_file(tmp_path / "half.safetensors", again)
    halves = read_single_file(tmp_path / "half.safetensors")
    for part in NETWORKS:
        equal({key: tensor.half() for key, tensor in parts[part][1].items()}, halves[part][1])
    write_single_file(tmp_path / "again.safetensors", halves)  # views of a mapped file are written too
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "half.safetensors").read_bytes()


def test_reads_without_copies(tmp_path, monkeypatch):
    write_single_file(tmp_path / "x.safetensors", small("SD 2"))
    tensors = load_file(tmp_path / "x.safetensors")
    monkeypatch.setattr(single_file, "read_tensors", lambda path: tensors)
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    parts = read_single_file(tmp_path / "x.safetensors")
    ours = [tensor for part in NETWORKS for tensor in parts[part][1].values()]
    assert len(ours) > len(tensors)  # q, k and v
    assert {tensor.untyped_storage().data_ptr() for tensor in ours} <= places


@pytest.mark.parametrize("part, cls, name", [("unet", UNet2DConditionModel, "toy"), ("vae", AutoencoderKL, "SD 1")])
def test_from_single_file(part, cls, name, tmp_path):
    """diffusers opens the file by itself, given its configuration, and computes what ours computes."""
    parts = small(name)
    parts[part] = parts[part][0], network(part, parts[part][0], "cpu").state_dict()
    write_single_file(tmp_path / "x.safetensors", parts, dtype=torch.float32)
    values = parts[part][0]
    if part == "vae":
        levels = len(values["block_out_channels"])
        values = values | {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    cls(**values).save_config(tmp_path / part)
    reference = cls.from_single_file(
        str(tmp_path / "x.safetensors"), config=str(tmp_path), subfolder=part, local_files_only=True
    )
    ours = network(part, parts[part][0])
    ours.load_state_dict(read_single_file(tmp_path / "x.safetensors")[part][1], assign=True)
    equal(dict(reference.state_dict()), dict(ours.state_dict()))
    with torch.no_grad():
        x = torch.randn(1, 4, 8, 8)
        if part == "vae":
            a, b = ours.decode(x), reference.decode(x).sample
        else:
            context = torch.randn(1, 5, 32)
            a, b = ours(x, 500, context), reference(x, 500, context).sample
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FULL)
def test_every_key_at_full_size(name):
    values = FULL[name]
    tensors = {part: network(part, values[part]).state_dict() for part in NETWORKS}
    for part, count in zip(NETWORKS, KEYS[name], strict=True):
        names = compvis_names(part, values[part])
        assert names.keys() == tensors[part].keys() and len(names) == count
    file = with_their_names(values, tensors)
    for part in NETWORKS:
        again = converted(part, values[part], file)
        shapes = {key: tensor.shape for key, tensor in tensors[part].items()}
        assert {key: tensor.shape for key, tensor in again.items()} == shapes
    assert len(file) == {"SD 1.5": 686 + 248 + 196, "SD 2.1": 686 + 248 + 4 + 23 * 12}[name]
    # What the published files have, where diffusers' converters take other names and shapes too.
    context = FULL[name]["unet"]["cross_attention_dim"]
    projection = (320, 320) if name == "SD 2.1" else (320, 320, 1, 1)
    for key, shape in {
        f"{U}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{U}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),  # behind no attention
        f"{U}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{U}output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        f"{U}output_blocks.11.1.proj_out.weight": projection,
        f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, context),
        f"{V}encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        f"{V}decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        f"{V}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        f"{V}quant_conv.weight": (8, 8, 1, 1),
    }.items():
        assert file[key].shape == shape
    assert theirs.infer_diffusers_model_type(file) == {"SD 1.5": "v1", "SD 2.1": "v2"}[name]


@functools.cache
def public_shapes(name):
    """Names and shapes as in the published file, with all that a picture does not need."""
    tensors = {part: network(part, FULL[name][part]).state_dict() for part in NETWORKS}
    shapes = {key: tuple(tensor.shape) for key, tensor in with_their_names(FULL[name], tensors).items()}
    if name == "SD 2.1":
        at = f"{T}model.transformer.resblocks."
        shapes |= {key.replace("s.22.", "s.23."): shape for key, shape in shapes.items() if key.startswith(f"{at}22.")}
        shapes |= {f"{T}model.text_projection": (1024, 1024), f"{T}model.logit_scale": ()}
    else:
        shapes |= {f"{T}transformer.text_model.embeddings.position_ids": (1, 77)}
        shapes |= {f"model_ema.{k[6:].replace('.', '')}": shape for k, shape in shapes.items() if k.startswith(U)}
    return shapes | dict.fromkeys(("betas", "alphas_cumprod", "sqrt_recip_alphas_cumprod", "lvlb_weights"), (1000,))


@pytest.mark.parametrize("name", FULL)
def test_architecture_is_told_by_shapes(name):
    shapes, predicts = public_shapes(name), FULL[name]["scheduler"]["prediction_type"]
    assert describe(shapes, {}, predicts, "x") == FULL[name]
    for part, (_, config) in NETWORKS.items():
        config_from(config, describe(shapes, {}, predicts, "x")[part])
    base = describe(shapes, {}, "epsilon", "x")
    assert base["unet"]["sample_size"] == 64 and base["scheduler"]["prediction_type"] == "epsilon"


def test_prediction_type():
    def predicts(name, asked=None, **header):
        header = {key.replace("__", "."): value for key, value in header.items()}
        return describe(public_shapes(name), header, asked, "x")["scheduler"]["prediction_type"]

    assert predicts("SD 1.5") == "epsilon"
    assert predicts("SD 1.5", modelspec__prediction_type="v") == "v_prediction"
    assert predicts("SD 2.1", modelspec__prediction_type="v") == "v_prediction"
    assert predicts("SD 2.1", modelspec__prediction_type="epsilon") == "epsilon"
    assert predicts("SD 2.1", "epsilon", modelspec__prediction_type="v") == "epsilon"  # the user knows best
    assert describe(public_shapes("SD 2.1") | {"v_pred": (0,)}, {}, None, "x")["unet"]["sample_size"] == 96
    ours = '{"scheduler": {"prediction_type": "v_prediction"}}'
    assert predicts("SD 2.1", rpo__config=ours) == "v_prediction"
    asks = ("--prediction-type epsilon (2.1-base, 512 px)", "--prediction-type v_prediction (2.1, 768 px)")
    refused(lambda: predicts("SD 2.1"), *asks)
    refused(lambda: predicts("SD 2.1", modelspec__prediction_type="sample"), *asks)


def changed(folder, name="toy", without=(), extra=None, header=True):
    """A small file with keys taken out that match, or put in."""
    path = folder / "x.safetensors"
    write_single_file(path, small(name))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.startswith(tuple(without))}
    save_file(tensors | (extra or {}), path, metadata if header else None)
    return path


def one(*shape):
    return torch.zeros(shape)


def test_passed_over(tmp_path):
    extra = {
        "model_ema.diffusion_modelout2bias": one(4),
        "model_ema.decay": one(),
        "betas": one(1000),
        f"{V}loss.discriminator.main.0.weight": one(1),
        f"{T}transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{T}logit_scale": one(),
    }
    parts = read_single_file(changed(tmp_path, extra=extra))
    for part in NETWORKS:
        assert parts[part][1].keys() == compvis_names(part, SMALL["toy"][part]).keys()
    extra = {f"{T}model.transformer.resblocks.23.ln_1.weight": one(32), f"{T}model.text_projection": one(32, 32)}
    values, tensors = read_single_file(changed(tmp_path, "SD 2", extra=extra))["text_encoder"]
    assert values["num_hidden_layers"] == 12
    assert tensors.keys() == compvis_names("text_encoder", values).keys()


def test_the_24th_layer_is_dropped(tmp_path):
    values = text_values(8, 23, 1, 8, "gelu", vocab=5)
    parts = small("toy") | {"text_encoder": (values, network("text_encoder", values, "cpu").state_dict())}
    path = tmp_path / "x.safetensors"
    write_single_file(path, parts, dtype=torch.float32)
    tensors = load_file(path)
    at = f"{T}model.transformer.resblocks."
    tensors |= {key.replace("s.22.", "s.23."): one() for key in tensors if key.startswith(f"{at}22.")}
    save_file(tensors, path)
    again = read_single_file(path, "epsilon")["text_encoder"]
    assert again[0]["num_hidden_layers"] == 23
    equal(parts["text_encoder"][1], again[1])

    values = values | {"num_hidden_layers": 24}
    parts["text_encoder"] = values, network("text_encoder", values, "cpu").state_dict()
    refused(lambda: write_single_file(path, parts), "OpenCLIP layer")


def test_other_spellings(tmp_path):
    """Text towers without "text_model.", and VAE attention that is a matrix already."""
    path = changed(tmp_path)
    expected, tensors = read_single_file(path), load_file(path)
    short = {key.replace(".text_model.", "."): tensor for key, tensor in tensors.items()}
    short = {
        key: tensor[:, :, 0, 0] if "attn_1" in key and tensor.ndim == 4 else tensor for key, tensor in short.items()
    }
    assert short.keys() != tensors.keys()
    save_file({key: tensor.contiguous() for key, tensor in short.items()}, path)
    again = read_single_file(path, "epsilon")
    for part in NETWORKS:
        equal(expected[part][1], again[part][1])


MISFITS = [
    f"{U}out.2.bias",
    f"{U}input_blocks.1.0.in_layers.2.weight",
    f"{U}input_blocks.1.1.norm.weight",
    f"{U}middle_block.1.proj_in.weight",
    f"{U}output_blocks.3.2.conv.bias",
    f"{V}decoder.up.0.block.0.nin_shortcut.weight",
    f"{V}encoder.mid.attn_1.q.weight",
    f"{V}post_quant_conv.weight",
    f"{T}transformer.text_model.encoder.layers.1.self_attn.q_proj.bias",
    f"{T}transformer.text_model.embeddings.token_embedding.weight",
]


@pytest.mark.parametrize("key", MISFITS)
def test_missing_key_is_named(key, tmp_path):
    path = changed(tmp_path, without=[key])
    refused(lambda: read_single_file(path), str(path), key)


@pytest.mark.parametrize(
    "key", [f"{U}input_blocks.1.1.alpha", f"{V}encoder.extra.bias", f"{T}transformer.text_model.embeddings.lora"]
)
def test_unexpected_key_is_named(key, tmp_path):
    path = changed(tmp_path, extra={key: one(3)})
    refused(lambda: read_single_file(path), "unexpected", key)


OTHERS = {
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": one(4, 8)},
    "LoRA": {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": one(4, 8)},
    "Stable Diffusion XL": {"conditioner.embedders.1.model.ln_final.weight": one(1280), f"{U}out.2.bias": one(4)},
    "Stable Diffusion 3": {f"{U}joint_blocks.0.x_block.attn.qkv.weight": one(2, 2)},
    "Flux": {"double_blocks.0.img_attn.norm.key_norm.scale": one(2)},
    "upscaler": {f"{U}label_emb.0.0.weight": one(2, 2), f"{V}quant_conv.bias": one(8)},
    "zero terminal SNR": {"ztsnr": one(0), f"{U}out.2.bias": one(4)},
    "U-Net alone": {"down_blocks.0.resnets.0.norm1.weight": one(8), "conv_in.weight": one(8, 4, 3, 3)},
    "VAE alone": {"encoder.conv_in.weight": one(8, 3, 3, 3), "quant_conv.bias": one(8)},
    "a VAE": {"decoder.up.0.block.0.norm1.weight": one(8)},
    "text encoder alone": {"text_model.final_layer_norm.bias": one(8)},
    f"lacks vae ({V}*), text_encoder ({T}*)": {f"{U}out.2.bias": one(4)},
    f"lacks unet ({U}*), vae": {"emb_params": one(1, 768)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_told(what, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(OTHERS[what], path)
    refused(lambda: read_single_file(path), what, str(path))


def test_other_refusals(tmp_path):
    for name in ("v1-5.ckpt", "v1-5.CKPT", "x.pt", "x.bin"):
        refused(lambda name=name: read_single_file(tmp_path / name), name, "pickle", ".safetensors")
    refused(lambda: read_single_file(tmp_path / "none.safetensors"), "none.safetensors")
    inpainting = {f"{U}input_blocks.0.0.weight": one(8, 9, 3, 3)}
    refused(lambda: read_single_file(changed(tmp_path, extra=inpainting)), "takes 9 channels", "inpainting (9)")
    variance = {f"{U}out.2.weight": one(8, 8, 3, 3)}
    refused(lambda: read_single_file(changed(tmp_path, extra=variance)), "gives 8", "latents have 4")
    refused(lambda: read_single_file(changed(tmp_path, without=[V])), "lacks vae (first_stage_model.*)")
    refused(lambda: read_single_file(changed(tmp_path, header=False)), "--prediction-type")
    lost = changed(tmp_path, without=[f"{U}input_blocks.5."])
    refused(lambda: read_single_file(lost), "5 model.diffusion_model.input_blocks", "3 levels")
    cut = changed(tmp_path, "SD 2", extra={f"{T}model.transformer.resblocks.0.attn.in_proj_bias": one(4)})
    refused(lambda: read_single_file(cut), "in_proj_bias is (4,)", "q, k and v")
    scalar = changed(tmp_path, extra={f"{T}transformer.text_model.embeddings.token_embedding.weight": one()})
    refused(lambda: read_single_file(scalar), "token_embedding.weight is ()")
    for broken in ("{", "[]", '{"unet": 3}', '{"vae": null}', '{"unet": [[[], 1]]}', "[" * 100_000):
        refused(
            lambda broken=broken: describe(public_shapes("SD 1.5"), {"rpo.config": broken}, None, "x"), "rpo.config"
        )


def test_writing_is_strict(tmp_path):
    parts = small("toy")
    values, tensors = parts["unet"]
    lacking = {name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}
    refused(lambda: write_single_file(tmp_path / "x", parts | {"unet": (values, lacking)}), "lacks conv_in.bias")
    more = tensors | {"more.weight": one(1)}
    refused(lambda: write_single_file(tmp_path / "x", parts | {"unet": (values, more)}), "unexpected more.weight")
    assert list(tmp_path.iterdir()) == []


def test_no_broken_file_gives_another_error(tmp_path):
    """Byte flips and truncations of a small file: read, or refused in one line. Most flips hit the header."""
    path = tmp_path / "x.safetensors"
    write_single_file(path, small("odd"))
    whole, draws, refusals = path.read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(150):
        data = bytearray(whole if i % 5 else whole[: draws.randrange(len(whole))])
        for _ in range(draws.randint(1, 4)):
            if data:
                data[draws.randrange(min(header, len(data)))] = draws.randrange(256)
        path.write_bytes(data)
        try:
            read_single_file(path)
        except CheckpointError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 50
