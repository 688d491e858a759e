"""The VAE against diffusers' AutoencoderKL: same files, same numbers."""

import pytest
import torch
from diffusers import AutoencoderKL
from parity import disturb, relative, untrained
from safetensors.torch import load_file, save_file

from model.vae import VAE, VAEConfig
from toy.networks import VAE_CONFIG

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def reference(folder, scale=1.0):
    """A small random AutoencoderKL, saved in `folder`."""
    torch.manual_seed(0)
    config = VAE_CONFIG | {"block_out_channels": (16, 32, 32, 48), "layers_per_block": 1, "norm_num_groups": 8}
    network = disturb(AutoencoderKL.from_config(config | {"latent_channels": 4}), scale)
    network.save_pretrained(folder)
    return network


# Both sides compute the same float32 sums in another order: 3e-6 apart, and 2e-5 on the quiet set, where every norm
# sees a tiny variance and magnifies rounding. A wrong eps, the mildest mistake, shows there at 1e-3 and more.
@pytest.mark.parametrize("scale", [1.0, 0.04], ids=["ordinary", "quiet"])
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (39, 28)], ids=str)
@torch.no_grad()
def test_parity(tmp_path, size, scale):
    theirs = reference(tmp_path, scale)
    ours = VAE.from_pretrained(tmp_path)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    mean, logvar = ours.encode(images)
    posterior = theirs.encode(images).latent_dist
    latents = torch.randn(2, 4, *mean.shape[2:], generator=torch.Generator().manual_seed(2))
    decoded, expected = ours.decode(latents), theirs.decode(latents).sample
    for a, b in ((mean, posterior.mean), (logvar, posterior.logvar), (decoded, expected)):
        assert a.shape == b.shape
        assert relative(a, b) <= 1e-4
        assert scale != 1.0 or 0.1 < b.abs().max() < 30
        assert scale != 1.0 or (a - b).abs().max() <= 1e-4
    assert decoded.shape[2:] == tuple(ours.downscale * n for n in latents.shape[2:])


def test_old_attention_names_load_as_the_present_ones(tmp_path):
    """In files of before 2023 the attention has other names and, in some, weights as 1x1 convolutions."""
    theirs = reference(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for present, before in OLD_NAMES.items():
                name = name.replace(f".{present}.", f".{before}.")
            tensor = tensor[:, :, None, None].contiguous() if tensor.ndim == 2 and "decoder" in name else tensor
        old[name] = tensor
    assert len(old.keys() - tensors.keys()) == 16
    save_file(old, tmp_path / WEIGHTS)
    ours = VAE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())


def test_logvar_is_clamped(tmp_path):
    reference(tmp_path)
    ours = VAE.from_pretrained(tmp_path)
    ours.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 0, 0])
    _, logvar = ours.encode(torch.zeros(1, 3, 16, 16))
    assert logvar[:, 0].max() == 20 and logvar[:, 1].min() == -30


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_trains(autocast):
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))
    vae = vae.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    before = images.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mean, logvar = vae.encode(images)
        out = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean))
    (out.float() ** 2).mean().backward()
    assert not untrained(vae)
    assert torch.equal(images, before)
