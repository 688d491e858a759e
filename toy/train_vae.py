"""The trainings of the VAE: first for the least error, then for sharp lines. Commands of toy/pretrain.py."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn

from model.files.config import config_from, read_json
from model.vae import VAE, VAEConfig
from toy.adversary import Adversary, sharpened
from toy.data import Data, encoded
from toy.fast_norm import speed_up
from toy.loop import Job, fit, initialized
from toy.networks import VAE_CONFIG, write_part

FILE = "diffusion_pytorch_model.safetensors"
CROP = 64  # pixels; a crop of this side is a quarter of the cost of a whole picture
SUBJECT = 2.0  # a pixel of the subject counts 1 + SUBJECT times as much as one of the background
KL, LATENTS = 1e-6, 8 * 16 * 16  # the weight of each number of a picture's latents


def train_vae(job: Job) -> None:
    """Reconstruct random crops with little error, above all at the subject."""
    data = Data(job.cache, job.device)
    vae = initialized(job, VAE(config_from(VAEConfig, VAE_CONFIG)), "vae").to(memory_format=torch.channels_last)
    if job.device == "cpu":
        speed_up(vae)

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        loss, psnr = vae_loss(vae, *data.crops(job.batch, CROP, random.Random(number)))
        return loss, {"loss": loss.item(), "psnr": psnr.item()}

    def save(tensors: dict[str, Tensor]) -> None:
        scale = scaling_factor(vae.config, tensors, data)
        write_part(job.weights / "vae", VAE_CONFIG | {"scaling_factor": scale}, tensors, FILE)

    fit(job, "vae", vae, loss_of, save, lr=1e-3)


def vae_loss(vae: VAE, pixels: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """log MSE + L1 + a small KL, and the PSNR in dB, both 0-d.

    pixels (B, 3, H, W) in [-1, 1], masks (B, 1, H, W): 1 at the subject, which has a larger weight. The logarithm of
    each picture's MSE makes a plain picture count as much as a crowded one.
    """
    mean, logvar = (part.float() for part in vae.encode(pixels))
    error = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).float() - pixels
    weight = 1 + SUBJECT * masks
    weight = weight / weight.mean((1, 2, 3), keepdim=True)
    mse, l1 = (weight * error.square()).mean((1, 2, 3)), (weight * error.abs()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean() * LATENTS
    return 1.25 * torch.log10(mse + 1e-4).mean() + l1 + KL * kl, mean_psnr(error.detach())


@torch.no_grad()
def scaling_factor(config: VAEConfig, tensors: dict[str, Tensor], data: Data) -> float:
    """One over the standard deviation of the latents of 256 drawings, so that scaled latents have variance 1."""
    vae = VAE(config)
    vae.load_state_dict(tensors)
    vae.eval().to(data.device)
    starts = range(0, min(256, len(data)), 32)
    latents = torch.cat([vae.encode(data.pixels(range(i, min(i + 32, len(data)))))[0] for i in starts])
    return round(1 / latents.std().item(), 5)


def sharpen_vae(job: Job) -> None:
    """Train only the decoder, on PSNR and against an adversary. The latents, which the U-Net knows, do not change.

    The latents of every other picture, whose variance is about 1, get noise: the U-Net's latents are not exact either.
    """
    data, folder = Data(job.cache, job.device), job.weights / "vae"
    vae, config = VAE.from_pretrained(folder), read_json(folder / "config.json")
    vae.to(job.device, memory_format=torch.channels_last)
    means, stds = encoded(data, vae)
    pair = nn.ModuleDict({"vae": vae, "adversary": Adversary().to(memory_format=torch.channels_last)})
    if job.device == "cpu":
        speed_up(vae.decoder)

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        chosen = [rng.randrange(len(means)) for _ in range(job.batch)]
        drawings, mean, std = data.pixels(chosen), means[chosen].float(), stds[chosen].float()
        noise = 0.15 * torch.rand(job.batch, 1, 1, 1, device=job.device)
        noise[::2] = 0
        z = mean + std * torch.randn_like(mean) + noise * torch.randn_like(mean)
        decoded = vae.decode(z / vae.config.scaling_factor).float()
        psnr = mean_psnr(decoded - drawings)
        loss, hinge = sharpened(-psnr / 4, decoded, drawings, pair["adversary"])
        return loss + hinge, {"psnr": psnr.item(), "hinge": hinge.item()}

    def save(tensors: dict[str, Tensor]) -> None:
        own = {name.removeprefix("vae."): tensor for name, tensor in tensors.items() if name.startswith("vae.")}
        write_part(folder, config, own, FILE)

    fit(job, "vae-sharpen", pair, loss_of, save, lr=8e-4, fixed=[vae.encoder, vae.quant_conv])


def mean_psnr(error: Tensor) -> Tensor:
    """The PSNR in dB, 0-d, averaged over pictures: error is (B, 3, H, W), of values in [-1, 1]."""
    return 10 * math.log10(4) - 10 * error.square().mean((1, 2, 3)).log10().mean()
