"""The U-Net against diffusers' UNet2DConditionModel: same files, same numbers."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from parity import UNETS, disturb, relative, untrained

from model.files.config import config_from
from model.files.errors import CheckpointError
from model.unet import UNet, UNetConfig


def reference(folder, kind="sd1", scale=1.0):
    """A small random UNet2DConditionModel, saved in `folder`."""
    torch.manual_seed(0)
    network = disturb(UNet2DConditionModel(**UNETS[kind]), scale)
    network.save_pretrained(folder)
    return network


def inputs(height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, height, width, generator=generator), torch.randn(2, 7, 24, generator=generator)


# Both sides do the same float32 arithmetic, here bit for bit and elsewhere perhaps in another order (1e-6). Deliberate
# mistakes show at 1e-4 and more; a GroupNorm's wrong eps shows at 1e-3 on the quiet set, where every norm sees a tiny
# variance. A LayerNorm's is too faint even there: test_full_size.py compares every eps.
@pytest.mark.parametrize("scale", [1.0, 0.04], ids=["ordinary", "quiet"])
@pytest.mark.parametrize("size", [(16, 16), (20, 12), (13, 9)], ids=str)
@pytest.mark.parametrize("kind", UNETS)
@torch.no_grad()
def test_parity(tmp_path, kind, size, scale):
    theirs = reference(tmp_path, kind, scale)
    latents, context = inputs(*size)
    t = torch.tensor([3, 981])
    out, expected = UNet.from_pretrained(tmp_path)(latents, t, context), theirs(latents, t, context).sample
    assert out.shape == expected.shape == latents.shape
    assert relative(out, expected) <= 1e-5
    assert scale != 1.0 or 0.1 < expected.abs().max() < 30


def test_timestep_may_be_a_number_or_a_tensor(tmp_path):
    reference(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    latents, context = inputs(8, 8)
    out = ours(latents, 500, context)
    for t in (torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500]), torch.tensor(500.0)):
        assert torch.equal(ours(latents, t, context), out)
    mixed = ours(latents, torch.tensor([500, 3]), context)
    assert torch.allclose(mixed[0], out[0], atol=1e-5) and not torch.allclose(mixed[1], out[1], atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", UNETS)
def test_trains(kind, autocast):
    """Gradients for every parameter, the same with checkpointing; channels_last stays; no input is changed."""
    torch.manual_seed(0)
    unet = UNet(config_from(UNetConfig, UNETS[kind])).to(memory_format=torch.channels_last)
    latents, context = inputs(12, 8)
    latents = latents.contiguous(memory_format=torch.channels_last)
    before, grads = (latents.clone(), context.clone()), []
    for _ in range(2):
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = unet(latents, torch.tensor([7, 700]), context)
        (out.float() - latents).square().mean().backward()
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert not untrained(unet)
        grads.append([parameter.grad for parameter in unet.parameters()])
        unet.checkpoint_gradients()
    assert all(map(torch.equal, *grads))
    assert torch.equal(latents, before[0]) and torch.equal(context, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_distinguishes_neighbouring_timesteps(tmp_path, dtype):
    """Sines and cosines are taken in float32 even then: in bf16 the numbers next to 998 are 996 and 1000."""
    reference(tmp_path)
    t = torch.tensor([995, 998, 999])
    exact = UNet.from_pretrained(tmp_path).time_embedding(t)
    half = UNet.from_pretrained(tmp_path, dtype).time_embedding(t)
    assert half.dtype == dtype
    assert relative(half.float(), exact) < 0.02  # 8 bits through two layers; a rounded timestep is off by 0.5


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("up_block_types", ["UpBlock2D"] * 3 + ["AttnUpBlock2D"], "no possible network: 'AttnUpBlock2D'"),
        ("down_block_types", ["DownBlock2D"], "config"),
        ("attention_head_dim", [1, 2], "config"),
        ("layers_per_block", [1, 2, 2, 2], "layers_per_block"),
    ],
)
def test_another_kind_of_unet_is_refused(tmp_path, field, value, message):
    reference(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        UNet.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
