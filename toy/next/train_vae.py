"""Train the autoencoder of the next toy world. Each command can be stopped and given again: it resumes.

    python -m toy.next.train_vae --draw 24000                          # draw the training pictures (minutes)
    python -m toy.next.train_vae --steps 20000                         # train
    python -m toy.next.train_vae --steps 60000 --device cuda --batch 64 --crop 128
    python -m toy.next.train_vae --measure 512                         # PSNR of fresh drawings

Training writes toy/next/weights/vae, the running average in half precision in the public layout, and next to the
drawings in toy/next/cache what it needs to resume. Without that it starts from toy/next/weights/vae if it is there,
and else from weights/toy/vae, grown (toy/next/grow.py). A larger --steps continues a run that has ended.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.files.config import config_from
from model.vae import VAE, VAEConfig
from toy.data import autocast
from toy.loop import EMA
from toy.networks import VAE_CONFIG, write_part
from toy.networks import WEIGHTS as TODAY
from toy.next import world
from toy.next.fast_norm import speed_up
from toy.next.grow import grow

HERE = Path(__file__).parent
CACHE, WEIGHTS = HERE / "cache", HERE / "weights" / "vae"
CONFIG = VAE_CONFIG | {"latent_channels": 8, "block_out_channels": [32, 64, 96, 96]}
SUBJECT = 2.0  # a pixel of the subject counts 1 + SUBJECT times as much as one of the background
KL, LATENTS = 1e-6, 8 * 16 * 16  # of each number of a picture's latents
FRESH = 10_000_000  # indices from here on are never trained on


def make_data(count: int) -> None:
    """Draw the first `count` pictures of the training stream, and the masks of their subjects, into toy/next/cache."""
    CACHE.mkdir(exist_ok=True)
    shape = (count, world.SIZE, world.SIZE)
    files = {CACHE / "drawings.npy": (*shape, 3), CACHE / "masks.npy": shape}
    arrays = [np.lib.format.open_memmap(f.with_suffix(".partial"), "w+", np.uint8, s) for f, s in files.items()]
    for index in range(count):
        for array, part in zip(arrays, world.draw_with_mask(*world.sample(index)), strict=True):
            array[index] = np.asarray(part)
        if index % 1000 == 0:
            print(f"drawn {index} of {count}", flush=True)
    for file in files:
        os.replace(file.with_suffix(".partial"), file)


class Drawings:
    """The cached drawings and masks."""

    def __init__(self):
        self.images, self.masks = (np.load(CACHE / name, mmap_mode="r") for name in ("drawings.npy", "masks.npy"))

    def crops(self, count: int, side: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Random squares: pixels (n, 3, side, side) in [-1, 1] and masks (n, 1, side, side) in [0, 1]."""
        room = world.SIZE - side + 1
        places = [(rng.randrange(len(self.images)), rng.randrange(room), rng.randrange(room)) for _ in range(count)]
        pixels, masks = (
            torch.from_numpy(np.stack([array[i, y : y + side, x : x + side] for i, y, x in places]))
            for array in (self.images, self.masks)
        )
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, masks[:, None].float() / 255


def vae_loss(vae: VAE, pixels: Tensor, masks: Tensor) -> tuple[Tensor, float]:
    """log MSE (that is, PSNR) + L1 of each picture, the subject weighted, + a little KL; and the PSNR in dB."""
    with autocast(pixels.device.type):
        mean, logvar = (part.float() for part in vae.encode(pixels))
        decoded = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).float()
    error, weight = decoded - pixels, 1 + SUBJECT * masks
    weight = weight / weight.mean((1, 2, 3), keepdim=True)
    mse, l1 = (weight * error.square()).mean((1, 2, 3)), (weight * error.abs()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean() * LATENTS
    psnr = 10 * np.log10(4) - 10 * error.square().mean((1, 2, 3)).log10().mean().item()
    return 1.25 * torch.log10(mse + 1e-4).mean() + l1 + KL * kl, psnr


@torch.no_grad()
def measure(vae: VAE, count: int, device: str) -> tuple[float, float, float]:
    """Mean PSNR in dB of fresh drawings: over the picture and over the subject's mask; and the latents' deviation."""
    overall, subject, deviation, batch = [], [], [], 16
    for first in range(0, count, batch):
        drawn = [world.draw_with_mask(*world.sample(FRESH + 4 * i)) for i in range(first, first + batch)]
        pixels, masks = (torch.from_numpy(np.stack([np.asarray(p) for p in part])) for part in zip(*drawn, strict=True))
        pixels, masks = pixels.permute(0, 3, 1, 2).to(device).float() / 255, masks[:, None].to(device).float() / 255
        mean, _ = vae.encode(2 * pixels - 1)
        again = ((vae.decode(mean) / 2 + 0.5).clamp(0, 1) * 255).round() / 255
        error = (again - pixels).square().mean(1, keepdim=True)
        overall.append(-10 * error.mean((1, 2, 3)).log10())
        subject.append(-10 * ((error * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))).log10())
        deviation.append(mean.std())
    return torch.cat(overall).mean().item(), torch.cat(subject).mean().item(), torch.stack(deviation).mean().item()


def first_vae() -> VAE:
    """What training starts from when there is nothing to resume."""
    vae = VAE(config_from(VAEConfig, CONFIG))
    if (WEIGHTS / "config.json").exists():
        vae.load_state_dict(VAE.from_pretrained(WEIGHTS).state_dict())
    else:
        grow(vae, VAE.from_pretrained(TODAY / "vae"))
    return vae


def save_weights(tensors: dict[str, Tensor], data: Drawings, device: str) -> None:
    """toy/next/weights/vae, with the scale that gives the latents of 256 drawings a deviation of 1."""
    vae = VAE(config_from(VAEConfig, CONFIG)).to(device)
    vae.load_state_dict(tensors)
    with torch.no_grad(), autocast(device):
        pixels, _ = data.crops(256, world.SIZE, random.Random(0))
        std = torch.cat([vae.encode(part.to(device))[0].float() for part in pixels.split(32)]).std().item()
    write_part(WEIGHTS, CONFIG | {"scaling_factor": round(1 / std, 5)}, tensors, "diffusion_pytorch_model.safetensors")


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up over 200 steps, constant, then linearly to 0 over the last fifth of --steps."""
    return args.lr * min(1, (step + 1) / 200, max(0.02, 5 * (1 - step / args.steps)))


def train(args: argparse.Namespace) -> None:
    """AdamW and a running average; the state goes to toy/next/cache every five minutes."""
    data, vae, path, first = Drawings(), first_vae().to(args.device), CACHE / "vae.pt", 0
    vae.to(memory_format=torch.channels_last).train().requires_grad_(True)
    if args.device == "cpu":
        speed_up(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    ema = EMA(vae)
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        vae.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        ema.average = {key: tensor.to(args.device) for key, tensor in state["ema"].items()}
        ema.count, first = state["count"], state["step"]

    def checkpoint(step: int) -> None:
        state = {"network": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.average}
        torch.save(state | {"count": ema.count, "step": step}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        save_weights(ema.average, data, args.device)

    saved, smooth = time.time(), None
    for step in range(first, args.steps):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        pixels, masks = data.crops(args.batch, args.crop, random.Random(step))
        loss, psnr = vae_loss(vae, pixels.to(args.device), masks.to(args.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update(vae)
        smooth = psnr if smooth is None else 0.98 * smooth + 0.02 * psnr
        if step % 50 == 0:
            print(f"{time.strftime('%H:%M:%S')} step {step} psnr {smooth:.2f}", flush=True)
        if time.time() - saved > 300:
            checkpoint(step + 1)
            saved = time.time()
    checkpoint(args.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--draw", type=int, help="draw so many pictures, and end")
    add("--measure", type=int, help="measure toy/next/weights/vae on so many fresh drawings, and end")
    add("--steps", type=int, default=20_000, help="the step to train to (default: 20000)")
    add("--batch", type=int, default=8, help="crops a step (default: 8)")
    add("--crop", type=int, default=64, help="their side in pixels, at most 128 (default: 64)")
    add("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    if args.draw:
        make_data(args.draw)
    elif args.measure:
        vae = VAE.from_pretrained(WEIGHTS).to(args.device)
        overall, subject, std = measure(vae, args.measure, args.device)
        print(f"{args.measure} fresh drawings: PSNR {overall:.2f} dB, at the subject {subject:.2f} dB, std {std:.3f}")
    else:
        train(args)


if __name__ == "__main__":
    main()
