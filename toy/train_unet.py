"""The training of the U-Net: a command of toy/pretrain.py."""

from __future__ import annotations

import random
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.clip import CLIPTextEncoder
from model.files.config import config_from
from model.scheduler import Scheduler
from model.tokenizer import CLIPTokenizer
from model.unet import UNet, UNetConfig
from model.vae import VAE
from toy.data import Data, encoded
from toy.fast_norm import speed_up
from toy.loop import Job, fit, initialized
from toy.networks import UNET_CONFIG, write_part, write_scheduler


def train_unet(job: Job) -> None:
    """ε-prediction in the latents (DDPM, arXiv 2006.11239, eq. 14); one caption in ten is empty, for guidance.

    Half of a batch is drawn evenly from the kinds: in the stream dogs are four times as frequent as boots.
    """
    data = Data(job.cache, job.device)
    vae = VAE.from_pretrained(job.weights / "vae").to(job.device, memory_format=torch.channels_last)
    means, stds = encoded(data, vae)
    kinds = data.by_kind(len(means))
    tokenizer = CLIPTokenizer.from_pretrained(job.weights / "tokenizer")
    text_encoder = CLIPTextEncoder.from_pretrained(job.weights / "text_encoder").to(job.device)
    write_scheduler(job.weights)
    scheduler = Scheduler.from_pretrained(job.weights / "scheduler")
    unet = initialized(job, UNet(config_from(UNetConfig, UNET_CONFIG)), "unet").to(memory_format=torch.channels_last)
    if job.device == "cpu":
        speed_up(unet)
    weight = min_snr_weights(scheduler.alphas_cumprod.to(job.device))

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        chosen = [rng.choice(rng.choice(kinds)) if i % 2 else rng.randrange(len(means)) for i in range(job.batch)]
        texts = ["" if rng.random() < 0.1 else rng.choice(data.captions[i]) for i in chosen]
        with torch.no_grad():
            context = text_encoder(tokenizer(texts).to(job.device))
        mean, std = means[chosen].float(), stds[chosen].float()
        x_0 = mean + std * torch.randn_like(mean)
        t = spread_timesteps(job.batch, job.device)
        eps = torch.randn_like(x_0)
        x_t = scheduler.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
        with sdpa_kernel(SDPBackend.MATH) if job.device == "cpu" else nullcontext():  # faster on such small maps
            error = (unet(x_t, t, context).float() - eps).square().mean((1, 2, 3))
        loss = (weight[t] * error).mean()
        return loss, {"loss": loss.item(), "mse": error.mean().item()}

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(job.weights / "unet", UNET_CONFIG, tensors, "diffusion_pytorch_model.safetensors")

    fit(job, "unet", unet, loss_of, save, lr=4e-4 if job.go_on else 6e-4)


def min_snr_weights(alphas_cumprod: Tensor) -> Tensor:
    """(1000,) weights of the loss by timestep, min(SNR, 5) / SNR (Min-SNR, arXiv 2303.09556).

    They give a small budget to the noise levels that decide what is drawn.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=5) / snr


def spread_timesteps(count: int, device: str) -> Tensor:
    """(count,) random timesteps, one in each of `count` equal parts of 0 .. 999 (as in arXiv 2107.00630).

    The gradient is less noisy than with independent timesteps.
    """
    t = (torch.arange(count, device=device) + torch.rand(count, device=device)) * 1000 / count
    return t.long().clamp(max=999)  # 31 + 0.99999999 is 32
