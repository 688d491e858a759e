"""The four trainings of the VAE: crops, whole pictures, then PSNR, then sharp lines. Commands of toy/pretrain.py."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.files.config import config_from, read_json
from model.files.write import save_tensors
from model.vae import VAE, VAEConfig
from toy.adversary import Adversary, sharpened
from toy.data import Data, encoded
from toy.loop import Job, fit, initialized
from toy.networks import VAE_CONFIG, write_part

FILE = "diffusion_pytorch_model.safetensors"


def train_vae(job: Job) -> None:
    """L1 + MSE + a small KL, on random crops of 64 x 64 pixels, a quarter of the cost of whole pictures."""
    vae = initialized(job, VAE(config_from(VAEConfig, VAE_CONFIG)), "vae")
    _reconstruct(job, "vae", vae, VAE_CONFIG, crop=64, lr=2e-3)


def train_vae_full(job: Job) -> None:
    """The same loss on whole pictures, from the weights in weights/toy."""
    folder = job.weights / "vae"
    vae, config = VAE.from_pretrained(folder), read_json(folder / "config.json")
    _reconstruct(job, "vae-full", vae, config, crop=None, lr=1e-3)


def _reconstruct(job: Job, name: str, vae: VAE, config: dict, crop: int | None, lr: float) -> None:
    data = Data(job.cache, job.device)
    vae.to(memory_format=torch.channels_last)

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        pixels = data.pixels([rng.randrange(len(data)) for _ in range(job.batch)], crop, rng)
        mean, logvar = (part.float() for part in vae.encode(pixels))
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        error = vae.decode(z).float() - pixels
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / job.batch
        mse = error.square().mean()
        psnr = float(10 * torch.log10(4 / mse.detach()))
        return error.abs().mean() + mse + 1e-6 * kl, {"psnr": psnr, "kl": kl.item()}

    def save(tensors: dict[str, Tensor]) -> None:
        scale = _scaling_factor(vae.config, tensors, data)
        write_part(job.weights / "vae", config | {"scaling_factor": scale}, tensors, FILE)

    fit(job, name, vae, loss_of, save, lr)


@torch.no_grad()
def _scaling_factor(config: VAEConfig, tensors: dict[str, Tensor], data: Data) -> float:
    """One over the standard deviation of the latents of 512 drawings, so that scaled latents have variance 1."""
    vae = VAE(config)
    vae.load_state_dict(tensors)
    vae.eval().to(data.device)
    starts = range(0, min(512, len(data)), 64)
    latents = torch.cat([vae.encode(data.pixels(range(i, min(i + 64, len(data)))))[0] for i in starts])
    return round(1 / latents.std().item(), 5)


def refine_vae(job: Job) -> None:
    """Maximize the PSNR of each picture, so that a plain picture counts as much as a crowded one.

    In place of the KL an anchor: the encoder's output may change only a little, so that the U-Net stays valid.
    """
    data, folder = Data(job.cache, job.device), job.weights / "vae"
    vae, config = VAE.from_pretrained(folder), read_json(folder / "config.json")
    vae.to(memory_format=torch.channels_last)
    before = _anchor(job, vae).requires_grad_(False).to(job.device)

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        pixels = data.pixels([rng.randrange(len(data)) for _ in range(job.batch)])
        mean, logvar = (part.float() for part in vae.encode(pixels))
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        error = vae.decode(z).float() - pixels
        moved = torch.cat([mean, logvar], 1) - torch.cat(before.encode(pixels), 1).float()
        psnr, anchor = mean_psnr(error), moved.square().mean()
        return 10 * anchor - psnr / 4, {"psnr": psnr.item(), "moved": anchor.item() ** 0.5}

    fit(job, "vae-refine", vae, loss_of, _writer(job, config), lr=1e-3)


def _anchor(job: Job, vae: VAE) -> VAE:
    """The VAE that refine_vae started from: in the cache, because weights/toy gets new weights during the training."""
    path = job.cache / "vae-refine.anchor.safetensors"
    if not (job.cache / "vae-refine.pt").exists():  # there is no interrupted run
        save_tensors(vae.state_dict(), path, {})
    anchor = copy.deepcopy(vae)
    anchor.load_state_dict(load_file(path))
    return anchor


def sharpen_vae(job: Job) -> None:
    """Train only the decoder, on PSNR and against an adversary. The latents, which the U-Net knows, do not change.

    The latents of every other picture, whose variance is about 1, get noise: the U-Net's latents are not exact either.
    """
    data, folder = Data(job.cache, job.device), job.weights / "vae"
    vae = VAE.from_pretrained(folder).to(job.device, memory_format=torch.channels_last)
    means, stds = encoded(data, vae)
    pair = nn.ModuleDict({"vae": vae, "adversary": Adversary().to(memory_format=torch.channels_last)})

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

    save = _writer(job, read_json(folder / "config.json"), prefix="vae.")
    fit(job, "vae-sharpen", pair, loss_of, save, lr=8e-4, fixed=[vae.encoder, vae.quant_conv])


def mean_psnr(error: Tensor) -> Tensor:
    """The PSNR in dB, 0-d, averaged over pictures: error is (B, 3, H, W), of values in [-1, 1]."""
    return 10 * math.log10(4) - 10 * error.square().mean((1, 2, 3)).log10().mean()


def _writer(job: Job, config: dict, prefix: str = "") -> Callable[[dict[str, Tensor]], None]:
    """A function that writes the tensors under the prefix, without it, to weights/toy."""

    def save(tensors: dict[str, Tensor]) -> None:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        write_part(job.weights / "vae", config, own, FILE)

    return save
