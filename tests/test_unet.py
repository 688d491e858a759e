"""The U-Net against diffusers' UNet2DConditionModel: same files, same numbers."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from model.files.errors import CheckpointError
from model.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
SMALL = {
    "block_out_channels": (16, 32, 48, 48),
    "down_block_types": (DOWN[0],) * 3 + (DOWN[1],),
    "up_block_types": (UP[0],) + (UP[1],) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
KINDS = {
    "sd1": {"attention_head_dim": 4},
    "sd2": {"attention_head_dim": (1, 2, 3, 6), "use_linear_projection": True, "upcast_attention": True},
    "toy": {  # the embedded base: other levels attend, one layer a block
        "block_out_channels": (16, 32, 48),
        "down_block_types": (DOWN[1], DOWN[0], DOWN[0]),
        "up_block_types": (UP[1], UP[1], UP[0]),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2, 6),
    },
}


def reference(folder, kind, scale=1.0):
    """A small random UNet2DConditionModel, saved in `folder`: norms off their defaults, other weights times `scale`."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(**SMALL | KINDS[kind]).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn_like(parameter)
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter *= 4  # else attention is nearly uniform, and the number of heads hardly shows
        elif "norm" not in name:
            parameter *= scale
    network.save_pretrained(folder)
    return network


def inputs(height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, height, width, generator=generator), torch.randn(2, 7, 24, generator=generator)


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# Both sides do the same float32 arithmetic, here bit for bit and elsewhere perhaps in another order (1e-6). Deliberate
# mistakes show at 1e-4 and more; a GroupNorm's wrong eps shows at 1e-3 on the quiet set, where every norm sees a tiny
# variance. A LayerNorm's is too faint even there: test_full_size.py compares every eps.
@pytest.mark.parametrize("scale", [1.0, 0.04], ids=["ordinary", "quiet"])
@pytest.mark.parametrize("size", [(16, 16), (20, 12), (13, 9)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(tmp_path, kind, size, scale):
    theirs = reference(tmp_path, kind, scale)
    ours = UNet.from_pretrained(tmp_path)
    latents, context = inputs(*size)
    t = torch.tensor([3, 981])
    with torch.no_grad():
        out, expected = ours(latents, t, context), theirs(latents, t, context).sample
    assert out.shape == expected.shape == latents.shape
    assert relative(out, expected) <= 1e-5
    if scale == 1.0:
        assert 0.1 < expected.abs().max() < 30
        assert (out - expected).abs().max() <= 1e-4


def test_timestep_may_be_a_number_or_a_tensor(tmp_path):
    reference(tmp_path, "sd1")
    ours = UNet.from_pretrained(tmp_path)
    latents, context = inputs(8, 8)
    out = ours(latents, 500, context)
    for t in (torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500]), torch.tensor(500.0)):
        assert torch.equal(ours(latents, t, context), out)
    assert not torch.allclose(ours(latents, 499, context), out, atol=1e-6)
    mixed = ours(latents, torch.tensor([500, 3]), context)
    assert torch.allclose(mixed[0], out[0], atol=1e-5) and not torch.allclose(mixed[1], out[1], atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_trains(kind, autocast):
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**{k: v for k, v in (SMALL | KINDS[kind]).items() if k != "upcast_attention"}))
    unet = unet.to(memory_format=torch.channels_last).train()
    latents, context = inputs(12, 8)
    latents = latents.contiguous(memory_format=torch.channels_last)
    before = latents.clone(), context.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = unet(latents, torch.tensor([7, 700]), context)
    (out.float() - latents).square().mean().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    dead = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not dead
    assert torch.equal(latents, before[0]) and torch.equal(context, before[1])


def test_bf16_autocast_stays_close(tmp_path):
    reference(tmp_path, "sd1")
    ours = UNet.from_pretrained(tmp_path)
    latents, context = inputs()
    with torch.no_grad():
        exact = ours(latents, 981, context)
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(latents, 981, context)
    assert relative(out.float(), exact) < 0.05  # bf16 keeps 8 bits: 0.4 % a rounding, over some forty layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tells_neighbouring_timesteps_apart(tmp_path, dtype):
    """Sines and cosines are taken in float32 even then: in bf16 the numbers next to 998 are 996 and 1000."""
    reference(tmp_path, "sd1")
    t = torch.tensor([995, 998, 999])
    exact = UNet.from_pretrained(tmp_path).time_embedding(t)
    half = UNet.from_pretrained(tmp_path, dtype).time_embedding(t)
    assert half.dtype == dtype
    assert relative(half.float(), exact) < 0.02  # 8 bits through two layers; a rounded timestep is off by 0.5


@pytest.mark.parametrize(
    "field, value",
    [
        ("act_fn", "gelu"),
        ("addition_embed_type", "text_time"),
        ("class_embed_type", "timestep"),
        ("dual_cross_attention", True),
        ("num_attention_heads", 4),
        ("only_cross_attention", [True, False, False, False]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("time_cond_proj_dim", 256),
        ("transformer_layers_per_block", [1, 2, 10, 10]),
        ("attention_head_dim", [1, 2]),
        ("attention_head_dim", 5),
        ("norm_num_groups", 5),
        ("layers_per_block", [1, 2, 2, 2]),
        ("cross_attention_dim", [24, 24, 24, 24]),
        ("down_block_types", ["DownBlock2D"]),
        ("up_block_types", ["UpBlock2D"] * 3 + ["AttnUpBlock2D"]),
    ],
)
def test_another_kind_of_unet_is_refused(tmp_path, field, value):
    reference(tmp_path, "sd1")
    config = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=field) as error:
        UNet.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_an_old_config_with_few_keys_is_understood(tmp_path):
    theirs = reference(tmp_path, "sd1")
    config = json.loads((tmp_path / "config.json").read_text())
    old = {name: config[name] for name in ("attention_head_dim", *SMALL)} | {"class_embed_type": None}
    (tmp_path / "config.json").write_text(json.dumps(old | {"use_linear_projection": None}))
    latents, context = inputs(8, 8)
    ours = UNet.from_pretrained(tmp_path)(latents, 1, context)
    assert relative(ours, theirs(latents, 1, context).sample) <= 1e-5
